"""The recipe: every setting of a compress run, in one place, enough to repeat the run.

Each field states its type, bounds, default and meaning once: the command line makes its options
from them (`prune.epochs` becomes `--prune-epochs`), YAML files are checked against them, and the
resolved recipe is written beside the result. `read_recipe` opens the only file.
"""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from prune2onnx.errors import RecipeError, RenamedWarning
from prune2onnx.runs.defaults import FileOptions
from prune2onnx.runs.sections import Augment, Channels, Dense, Prune, Quantize, Section, Tune
from prune2onnx.shrinking.structure import BLOCK
from prune2onnx.tasks.quantity import absolute, amount

PHASES = ("dense", "channels", "prune", "tune", "quantize")
"""The phases of training, in their order; each is a section of the recipe."""

RENAMED = {
    "narrow.epochs": "channels.epochs",
    "narrow.spare": "channels.margin",
    "narrow.price": "channels.price",
    "narrow.batch": "channels.batch",
    "narrow.multiple": "channels.multiple",
    "share.epochs": "quantize.epochs",
    "share.lr": "quantize.lr",
    "share.scale_lr": "quantize.scale_lr",
    "share.levels": "quantize.levels",
    "share.step": "quantize.step",
    "share.small_levels": "quantize.small_levels",
    "share.slack": "quantize.slack",
}
"""Settings of version 0.1 -> their names now. The old names still work for one version."""

DENSITY = 0.07
"""Density of the pruned weights from which the smallest network is looked for."""

MACS = 0.5
"""Fraction of the multiply-adds where speed is the goal and no budget is given."""


_INT4 = 7  # the largest level that 4 bits have room for on both sides


class Recipe(Section):
    """Every setting of one `prune2onnx compress` run."""

    model: str = Field(
        description="function that makes the network: file.py:callable or package.module:callable; "
        "or timm:NAME, or hf:FOLDER with a transformers model"
    )
    data: str = Field(
        "digits",
        description="data set: digits, mnist[:DIR], idx:DIR, folder:DIR, npz:FILE, text:FILE or "
        "file.py:callable",
    )
    task: str = Field(
        "classification",
        description="what it is for: classification, multi-label, regression, "
        "regression-l1, segmentation, token-classification, language-modelling, reconstruction, "
        "distillation, or file.py:callable",
    )
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the model's function, as NAME=VALUE"
    )
    weights: str | None = Field(
        None,
        description="weights to start from: .safetensors, or .pt read with weights_only",
    )
    start: Literal["dense", "prune", "tune"] | None = Field(
        None,
        description="first phase: dense, prune (from trained weights) or tune (from pruned ones); "
        "default: prune if weights are given, else dense",
    )
    goal: Literal["size", "latency", "balanced"] = Field(
        "size",
        description="what to reduce: bytes, the time of an inference (by channel pruning and "
        "int8), or both",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="random seed of initial weights, order and validation split"
    )
    target_size: ByteSize | None = Field(
        None, gt=0, description="budget: bytes of the whole file, such as 12KB; never exceeded"
    )
    target_density: float | None = Field(
        None, gt=0, le=1, description="budget: surviving fraction of the pruned weights, 0-1"
    )
    target_macs: float | None = Field(
        None,
        gt=0,
        le=1,
        description="budget: fraction of the dense network's multiply-adds that may be left, 0-1",
    )
    max_drop: float | str | None = Field(
        None,
        description="budget: points of validation error that may be added (accuracy loss), or how "
        "much worse another task's metric may be, or 5%, relative; as the only budget, the "
        "smallest file, or the fewest multiply-adds, within it is searched for",
    )
    trials: int = Field(6, ge=1, description="most prunings in a search for max_drop")
    distill: float | None = Field(
        None,
        ge=0,
        le=1,
        description="distillation: weight of the dense network's outputs in the loss, against the "
        "labels, 0-1; default: its accuracy in classification, else 0",
    )
    temperature: float = Field(2.0, gt=0, description="temperature of the distillation")
    anonymize: bool = Field(
        False,
        description="rename weights to the shortest names, for a smaller file; inputs and outputs "
        "keep their names",
    )
    portable: bool = Field(
        False,
        description="write the decoder into the graph, so that OpenVINO opens the file, too; it is "
        "larger",
    )
    int8: bool | None = Field(
        None,
        description="compute in int8, in layers that lose little accuracy by it, and only if that "
        "is faster on this machine; default: with goal latency or balanced",
    )
    compute: Literal["float32", "int8", "int8-weights", "int4", "auto"] = Field(
        "float32",
        description="what matrices and tables are while a session runs, as for pack; auto: what is "
        "fastest here and within max_drop, or 0.1 points; convolutions then go by int8 alone",
    )
    teacher: str | None = Field(
        None,
        description="weights of the network to distill from; default: the network before pruning",
    )
    batch_size: int = Field(64, ge=1, description="examples per step, over all processes")
    validation: float = Field(
        0.1, gt=0, lt=1, description="fraction of the training set held out as validation split"
    )
    precision: Literal["no", "fp16", "bf16"] = Field("no", description="mixed precision")
    opset: int = Field(18, ge=18, description="ONNX operator set of the result")
    format: Literal["packed", "sparse-initializer", "dense"] = Field(
        "packed",
        description="what model.onnx holds: coded weights, ONNX's own sparse tensors, or plain "
        "ones; budgets of bytes are measured on it",
    )
    resize: tuple[int, ...] = Field(
        (), description="images of folder:DIR: pixels of the shorter side, or HEIGHT,WIDTH"
    )
    crop: tuple[int, ...] = Field(
        (), description="images of folder:DIR: pixels cut out of the middle, or HEIGHT,WIDTH"
    )
    mean: tuple[float, ...] = Field(
        (), description="normalise images: subtract these from the channels, which are from 0 to 1"
    )
    std: tuple[float, ...] = Field((), description="normalise images: divide the channels by these")
    tokenizer: str | None = Field(
        None, description="tokenizer.json of text:FILE; default: the one in the model's hf:FOLDER"
    )
    length: int | None = Field(
        None, ge=1, description="tokens of an example of text:FILE, at most; see docs/TASKS.md"
    )
    augment: Augment = Augment()
    dense: Dense = Dense()
    channels: Channels = Channels()
    prune: Prune = Prune()
    tune: Tune = Tune()
    quantize: Quantize = Quantize()

    @property
    def first_phase(self) -> str:
        """The phase in which training starts."""
        return self.start or ("prune" if self._is_trained else "dense")

    @property
    def _is_trained(self) -> bool:
        """Whether the network comes with weights."""
        return self.weights is not None or self.model.startswith("hf:")

    @property
    def wanted_density(self) -> float:
        """The target density of pruning where there is no target size."""
        return self.target_density or DENSITY

    @property
    def tries_int8(self) -> bool:
        """Whether the result may compute in int8."""
        return self.goal != "size" if self.int8 is None else self.int8

    @property
    def prunes_channels(self) -> bool:
        """Whether channels are pruned by default: where `channels.epochs` is not given."""
        return self.goal != "size" or self.target_macs is not None

    @property
    def file(self) -> FileOptions:
        """Options of the file that is written."""
        multiple = self.channels.multiple or (BLOCK if self.goal == "size" else 2 * BLOCK)
        return FileOptions(self.opset, self.anonymize, self.portable, multiple, self.format)

    def allowed_drop(self, dense: float) -> float | None:
        """How much worse than the dense network's a metric may be, in its unit."""
        return None if self.max_drop is None else absolute(self.max_drop, dense)

    @property
    def has_no_budget(self) -> bool:
        """Whether only accuracy limits how small a network gets."""
        budgets = (self.target_size, self.target_density, self.target_macs, self.max_drop)
        return self.goal == "size" and budgets == (None,) * 4

    @property
    def searches(self) -> bool:
        """Whether the allowed accuracy loss is the only budget, so that a search is needed."""
        targets = (self.target_size, self.target_density, self.target_macs)
        return self.max_drop is not None and not any(targets)

    def phase(self, name: str) -> Dense | Prune | Tune | Quantize:
        """The settings of a training phase; "channels" has those of "prune", with changes."""
        if name == "channels":
            changes = {
                "epochs": self.channels.epochs,
                "granularity": "channel",
                "weigh": "count",
                "start": 0.5,  # channels of a layer have similar norms: none is below
                "threshold_lr": self.prune.threshold_lr / 2,
            }
            return self.prune.model_copy(update=changes)
        phase: Dense | Prune | Tune | Quantize = getattr(self, name)
        return phase

    @field_validator("max_drop")
    @classmethod
    def _is_an_amount(cls, value: float | str | None) -> float | str | None:
        return None if value is None else amount(value, "max_drop")

    @field_validator("resize", "crop")
    @classmethod
    def _is_a_size(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) > 2 or any(number < 1 for number in value):
            raise ValueError(f"size {value}, expected pixels such as 224, or HEIGHT,WIDTH")
        return value

    @field_validator("std")
    @classmethod
    def _is_not_zero(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(number <= 0 for number in value):
            raise ValueError(f"std is {value}, expected numbers above 0")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.start in ("prune", "tune") and not self._is_trained:
            raise ValueError(f"start is {self.start!r}, which needs weights; give --weights")
        if self.compute == "int4" and (self.quantize.levels or 0) > _INT4:
            raise ValueError(
                f"compute int4 has levels -{_INT4} ... {_INT4}, and quantize.levels is "
                f"{self.quantize.levels}; give at most {_INT4}, or compute int8"
            )
        if self.portable and self.format != "packed":
            raise ValueError(
                f"portable writes out a decoder, and format {self.format} has none; give one"
            )
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
        overrides: dotted name -> value; they override `content`.
        source: the origin of `content`, for errors.

    Raises:
        RecipeError: an unknown key (the nearest known one is named) or a value that does not fit.
    """
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    old_sections = {old.partition(".")[0] for old in RENAMED}
    for section in old_sections & {k for k, v in merged.items() if isinstance(v, dict)}:
        for name, value in merged.pop(section).items():
            new = _new_name(f"{section}.{name}", source)
            if name in content.get(new.partition(".")[0], {}):
                raise RecipeError(
                    f"{source}: {section}.{name} and {new} are the same setting; give {new} alone"
                )
            _put(merged, new, value, source)
    for dotted, value in (overrides or {}).items():
        _put(merged, _new_name(dotted, source), value, source)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(f"{source}: " + "; ".join(map(_explain, error.errors()))) from error


def _new_name(dotted: str, source: str) -> str:
    """The present name of a setting; warns if an old name is given."""
    new = RENAMED.get(dotted, dotted)
    if new != dotted:
        text = f"{source}: {dotted} is now {new}; the next version will not accept {dotted}"
        warnings.warn(text, RenamedWarning, stacklevel=3)
    return new


def _put(content: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Sets one of nested settings."""
    *sections, name = dotted.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise RecipeError(f"{source}: {section} is {content!r}, expected a mapping of settings")
    content[name] = value


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
