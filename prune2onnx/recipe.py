"""The recipe: every setting of a compress run, in one place, enough to repeat it.

Each field states its type, bounds, default and meaning once; the command line makes its options
from them (`prune.epochs` becomes `--prune-epochs`), YAML files are checked against them, and the
resolved recipe is written beside the result. No file is opened here but the one that is read.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from prune2onnx.errors import RecipeError
from prune2onnx.structure import BLOCK

DENSITY = 0.07
"""Density of the pruned weights where no budget is given."""

MACS = 0.5
"""Part of the multiply-adds where speed is the goal and no budget is given."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Dense(_Section):
    """Phase 1: ordinary training. Skipped where trained weights are given."""

    epochs: int | None = Field(
        None, ge=1, description="epochs of dense training; default: 1,500 steps, at least 5 epochs"
    )
    lr: float = Field(2e-3, gt=0, description="peak learning rate (Adam)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW)")


class Narrow(_Section):
    """Before phase 2: whole channels and neurons go, so that all that is left is smaller."""

    epochs: int | None = Field(
        None,
        ge=0,
        description="epochs in which whole channels are pruned; default: none if only the size "
        "counts, else 2,000 steps, at least 6 epochs",
    )
    spare: float = Field(
        5.0,
        ge=1,
        description="weights left then, in multiples of the density to be reached, where only the "
        "size counts",
    )
    price: Literal["time", "macs"] = Field(
        "time",
        description="what a layer costs where speed counts: its time on this machine, or its "
        "multiply-adds",
    )
    batch: int = Field(1, ge=1, description="examples in an inference, when layers are timed")
    multiple: int | None = Field(
        None,
        ge=1,
        description="channels of a convolution that go together, the weakest with the weakest, "
        "since kernels compute several at a time; default: 8 where speed counts, else 4",
    )


class Prune(_Section):
    """Phase 2: weights and thresholds are trained together."""

    epochs: int | None = Field(
        None, ge=1, description="epochs of pruning; default: 4,000 steps, at least 10 epochs"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the weights (Adam)")
    threshold_lr: float = Field(1e-2, gt=0, description="peak learning rate of the thresholds")
    pressure: float = Field(
        2.0, ge=0, description="first lambda: loss added per unit of (weighted) density, 0-1"
    )
    ramp: float = Field(
        0.75, ge=0, le=1, description="part of the phase over which the density falls to its goal"
    )
    function: Literal["threshold-linear", "soft-threshold", "sigmoid-gate"] = Field(
        "threshold-linear", description="pruning function"
    )
    granularity: Literal["weight", "channel"] = Field(
        "weight", description="what lives or dies together"
    )
    thresholds: Literal["layer", "channel"] = Field("layer", description="one threshold per ...")
    beta: float = Field(10.0, gt=0, description="sharpness, in 1 / rms of the weight")
    start: float = Field(0.05, gt=0, description="first threshold, in rms of the weight")
    weigh: Literal["bytes", "count"] = Field(
        "bytes",
        description="what a survivor counts in the penalty: what it takes in the file, or 1",
    )
    balance: float = Field(
        0.0, ge=0, description="press a layer by (size / largest size) ** balance"
    )
    importance: dict[str, float] = Field(
        default_factory=dict, description="further factor on the pressure, by name pattern"
    )
    include: tuple[str, ...] = Field(("*",), description="patterns of the weights to prune")
    exclude: tuple[str, ...] = Field((), description="patterns of weights to leave alone")


class Tune(_Section):
    """Phase 3: the survivors are fine-tuned under fixed masks."""

    epochs: int | None = Field(
        None, ge=1, description="epochs of tuning; default: 1,500 steps, at least 3 epochs"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate (Adam)")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay (AdamW)")


class Share(_Section):
    """Phase 4: surviving values become few levels, and are trained on as such."""

    epochs: int | None = Field(
        None, ge=1, description="epochs on levels; default: 800 steps, at least 2 epochs"
    )
    lr: float = Field(5e-4, gt=0, description="peak learning rate (Adam)")
    scale_lr: float = Field(1e-4, gt=0, description="peak learning rate of the levels' scales")
    levels: int = Field(
        7, ge=1, le=127, description="largest level of a weight: it is -k ... k times one scale"
    )
    step: Literal["weight", "network"] = Field(
        "weight", description="one scale for each weight and bias, or one for all: fewer bytes"
    )
    small_levels: int = Field(15, ge=1, le=127, description="largest level of a bias")
    slack: float = Field(
        0.05, ge=0, description="validation error (points) that coarser biases may cost"
    )


class Augment(_Section):
    """What is done to training images, in every phase."""

    shift: int = Field(0, ge=0, description="pixels by which images are moved at random, at most")
    flip: bool = Field(False, description="mirror half of the images, left to right")


class Recipe(_Section):
    """Every setting of one `prune2onnx compress` run."""

    model: str = Field(
        description="file.py:callable or package.module:callable that makes the network"
    )
    data: str = Field(
        "digits",
        description="digits, mnist[:DIR], idx:DIR, folder:DIR, npz:FILE or file.py:callable",
    )
    weights: str | None = Field(
        None,
        description="weights to start from: .safetensors, or .pt read with weights_only",
    )
    start: Literal["dense", "prune", "tune"] | None = Field(
        None,
        description="first phase: dense, prune (the weights are trained) or tune (and pruned); "
        "default: prune with weights, else dense",
    )
    goal: Literal["size", "latency", "balanced"] = Field(
        "size",
        description="what is to become less: bytes, the time of an inference (whole channels go by "
        "their multiply-adds, and int8 is tried), or both",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initialisation, order and split")
    target_size: ByteSize | None = Field(
        None, gt=0, description="budget: bytes of the whole file, such as 12KB; never exceeded"
    )
    target_density: float | None = Field(
        None, gt=0, le=1, description="budget: surviving part of the pruned weights, 0-1"
    )
    target_macs: float | None = Field(
        None,
        gt=0,
        le=1,
        description="budget: part of the dense network's multiply-adds that may be left, 0-1",
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        description="budget: points of validation error that may be added; alone: the "
        "smallest file within it is searched for, or the fewest multiply-adds",
    )
    trials: int = Field(6, ge=1, description="prunings that a search for max_drop may take")
    distill: float = Field(
        0.0, ge=0, le=1, description="how much the dense network's answers count beside the labels"
    )
    temperature: float = Field(2.0, gt=0, description="of those answers, when they are compared")
    anonymize: bool = Field(
        False,
        description="shortest names for weights, less for readers of the file; inputs and outputs "
        "keep their names",
    )
    int8: bool | None = Field(
        None,
        description="compute in int8: layers for which that costs little accuracy, and none if the "
        "whole is no faster on this machine; default: unless only the size counts",
    )
    teacher: str | None = Field(
        None,
        description="weights of the network to learn from; default: the network before pruning",
    )
    batch_size: int = Field(64, ge=1, description="examples per step, over all processes")
    validation: float = Field(
        0.1, gt=0, lt=1, description="part of the training set held out for choices"
    )
    precision: Literal["no", "fp16", "bf16"] = Field("no", description="mixed precision")
    opset: int = Field(18, ge=18, description="ONNX operator set of the result")
    augment: Augment = Augment()
    dense: Dense = Dense()
    narrow: Narrow = Narrow()
    prune: Prune = Prune()
    tune: Tune = Tune()
    share: Share = Share()

    @property
    def first_phase(self) -> str:
        """Where training starts."""
        return self.start or ("prune" if self.weights else "dense")

    @property
    def wanted_density(self) -> float:
        """Density at which pruning aims where no size is asked for."""
        return self.target_density or DENSITY

    @property
    def tries_int8(self) -> bool:
        """Whether the result may compute in int8."""
        return self.goal != "size" if self.int8 is None else self.int8

    @property
    def narrows(self) -> bool:
        """Whether whole channels go where the recipe does not say for how many epochs."""
        return self.goal != "size" or self.target_macs is not None

    @property
    def multiple(self) -> int:
        """Of which convolutions keep their channels."""
        return self.narrow.multiple or (BLOCK if self.goal == "size" else 2 * BLOCK)

    @property
    def searches(self) -> bool:
        """Whether an allowed drop is all there is to aim at."""
        targets = (self.target_size, self.target_density, self.target_macs)
        return self.max_drop is not None and not any(targets)

    def phase(self, name: str) -> Dense | Prune | Tune | Share:
        """The settings of a phase of training; "narrow" has those of "prune", for channels."""
        if name == "narrow":
            changes = {
                "epochs": self.narrow.epochs,
                "granularity": "channel",
                "weigh": "count",
                "start": 0.5,  # channels of a layer are alike: no threshold is passed on the way
                "threshold_lr": self.prune.threshold_lr / 2,
            }
            return self.prune.model_copy(update=changes)
        phase: Dense | Prune | Tune | Share = getattr(self, name)
        return phase

    @model_validator(mode="after")
    def _starts_with_weights(self) -> Self:
        if self.start in ("prune", "tune") and self.weights is None:
            raise ValueError(f"start is {self.start!r}, which needs weights")
        return self

    def to_yaml(self) -> str:
        """The recipe as a YAML document, every setting included."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


def settings(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> field, for every setting, in order: {"model": ..., "prune.lr": ...}."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= settings(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Reads a YAML recipe, in part or whole, into nested settings that are not yet checked.

    Raises:
        RecipeError: no such file, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: cannot read the recipe: {reason}") from error
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise RecipeError(f"{path}: not valid YAML: {where}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of settings, this is a {type(content).__name__}"
        )
    return content


def resolve(
    content: dict[str, Any], overrides: dict[str, Any] | None = None, source: str = "recipe"
) -> Recipe:
    """Checks settings and fills in defaults.

    Args:
        content: nested settings, as `read_recipe` returns them.
        overrides: dotted name -> value; these win.
        source: where `content` came from, for errors.

    Raises:
        RecipeError: an unknown key (the nearest known one is named) or a value that does not fit.
    """
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    for dotted, value in (overrides or {}).items():
        *section, name = dotted.split(".")
        place = merged
        for part in section:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise RecipeError(f"{source}: {part} is {place!r}, expected a mapping of settings")
        place[name] = value
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(f"{source}: " + "; ".join(map(_explain, error.errors()))) from error


def _explain(error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        known = [*settings(), *Recipe.model_fields]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(settings())}"
        return f"unknown key {name!r}{hint}"
    return f"{name} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"
