"""A curve, not a point: `compress` for a list of budgets and seeds, shared by many workers.

One folder holds a sweep: sweep.yaml (every setting, written first), sweep.db (the study, unless it
lives elsewhere), dense-seedN/ (where all runs of a seed start), runs/NAME/ (one `compress` each),
locks/, front.json, front.svg and report.html.

The list of runs, and how workers share it, is `study`'s business.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from filelock import Timeout
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.files import write_whole
from prune2onnx.front import RUNS, Front, Point
from prune2onnx.page import write_page
from prune2onnx.pipeline import compress, prepared, train_dense
from prune2onnx.recipe import Recipe, read_recipe, resolve
from prune2onnx.report import Report
from prune2onnx.runfolder import FRONT
from prune2onnx.study import BUDGETS, Study, default_storage, lock_of, public_url
from prune2onnx.training import Epoch, Step

SETTINGS, PICTURE = "sweep.yaml", "front.svg"

_POLL = 2.0  # seconds between looks at what other workers do


def _listed(value: Any) -> Any:
    """What stands in a list as the command line has it: "6KB, 10KB"."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


_AS_LISTED = BeforeValidator(_listed)


class _Settings(BaseModel):
    """Every setting of a sweep, as in sweep.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    recipe: Recipe
    sizes: Annotated[tuple[Annotated[ByteSize, Field(gt=0)], ...], _AS_LISTED] = ()
    densities: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], _AS_LISTED] = ()
    drops: Annotated[tuple[Annotated[float, Field(ge=0)], ...], _AS_LISTED] = ()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], _AS_LISTED] = ()
    study: str = Field("prune2onnx", min_length=1)

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not (self.sizes or self.densities or self.drops):
            raise ValueError(
                "no budget to sweep; give some with --sizes 6KB,10KB, --densities 0.01,0.03 "
                "or --drops 0.1,0.3"
            )
        return self

    @property
    def runs(self) -> tuple[Point, ...]:
        """The runs, each once; seeds change fastest, so that workers start from different ones."""
        seeds = self.seeds or (self.recipe.seed,)
        lists = (("size", self.sizes), ("density", self.densities), ("drop", self.drops))
        return tuple(
            dict.fromkeys(
                Point(what, int(limit) if what == "size" else limit, seed)
                for what, limits in lists
                for limit in limits
                for seed in seeds
            )
        )


_EXAMPLES = {
    "sizes": "6KB,10KB",
    "densities": "0.01,0.03",
    "drops": "0.1,0.3",
    "seeds": "0,1,2",
    "study": "lenet5",
}


def _settings(content: dict[str, Any], source: str) -> _Settings:
    try:
        return _Settings.model_validate(content)
    except ValidationError as error:
        told = []
        for one in error.errors():
            if one["type"] == "value_error":
                told.append(str(one["ctx"]["error"]))
                continue
            name = str(one["loc"][0])
            wanted = f"expected such as {_EXAMPLES[name]}" if name in _EXAMPLES else "remove it"
            told.append(f"{name} holds {one['input']!r}: {one['msg'].lower()}; {wanted}")
        raise RecipeError(f"{source}: " + "; ".join(told)) from error


def sweep(
    recipe: Recipe,
    directory: str | Path,
    *,
    sizes: str | Sequence[int | str] = (),
    densities: str | Sequence[float] = (),
    drops: str | Sequence[float] = (),
    seeds: str | Sequence[int] = (),
    storage: str | None = None,
    study: str = "prune2onnx",
    resume: bool = False,
    cpu: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
    on_step: Callable[[Step], None] = lambda _: None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
    on_point: Callable[[Point], None] = lambda _: None,
) -> Front:
    """Compresses to each budget with each seed, and tells what size costs in error.

    Each run has one budget, in place of those of the recipe. All runs of a seed start from one
    dense network, unless the recipe brings weights. A run that fails is noted, and the sweep goes
    on. Any number of processes may work at once: with `resume` in the same folder, or in folders of
    their own, on machines of their own, with the same `storage`; all return the same front.

    Args:
        recipe: the settings of every run.
        directory: the sweep's folder, made if missing.
        sizes: budgets in bytes, as numbers or as "6KB"; a list, or a text with commas.
        densities: budgets of the surviving part of the pruned weights, 0-1.
        drops: budgets of points of validation error that may be added.
        seeds: default: the recipe's.
        storage: URL of a database, as optuna takes it; default: sweep.db in the folder.
        study: name of the sweep in that database.
        resume: continue the sweep in `directory` (`sweep_of` gives its settings); runs that failed
            are tried again.
        cpu: do not use a GPU.
        on_note: told what begins.
        on_step: told every few steps of a run.
        on_epoch: told after each epoch of a run.
        on_point: told what a run came to.

    Returns:
        The front, also written to front.json, front.svg and, to be read, to report.html.

    Raises:
        RecipeError: the settings do not fit, the folder or the study holds another sweep.
        Prune2OnnxError: the model or its data cannot be used, or the storage cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise RecipeError(
            "a sweep's process trains alone; start it without accelerate or torchrun, as many "
            "times as there are GPUs, each with its own CUDA_VISIBLE_DEVICES"
        )
    directory = Path(directory).absolute()
    lists = {"sizes": sizes, "densities": densities, "drops": drops, "seeds": seeds}
    settings = _settings({"recipe": recipe, "study": study, **lists}, "sweep")
    _fits(settings, directory, resume)
    if not resume:
        prepared(settings.recipe)  # fail now, not in every run
    list_ = Study(storage or default_storage(directory), settings.study, settings.recipe, directory)
    with contextlib.closing(list_):
        text = yaml.safe_dump(
            settings.model_dump(mode="json") | {"storage": storage and public_url(storage)},
            sort_keys=False,
        )
        write_whole(directory / SETTINGS, text)
        list_.add(settings.runs, again=resume)
        worker = _Worker(settings.recipe, directory, cpu, on_note, on_step, on_epoch)
        waited = False
        while True:
            claim = list_.claim()
            if claim is not None:
                waited = False
                on_note(f"{claim.point.budget}, seed {claim.point.seed}")
                try:
                    with list_.beating(claim):
                        told = worker.run(claim.point)
                    list_.tell(claim, told)
                finally:  # an interrupted run stays RUNNING, and who has the lock may go on
                    claim.lock.release()
                front = _written(list_, directory)
                on_point(next(p for p in front.points if p.name == claim.point.name))
                continue
            front = _written(list_, directory)
            busy = [p for p in front.points if p.state in ("waiting", "running")]
            if not busy:
                write_page(directory)
                return front
            if not waited:
                waited = True
                on_note(f"waiting for {', '.join(p.name for p in busy)}, run by other workers")
            time.sleep(_POLL)


def sweep_of(directory: str | Path, storage: str | None = None) -> dict[str, Any]:
    """The settings of the sweep in a folder: the arguments of `sweep`, but for the folder.

    Args:
        directory: the sweep's folder.
        storage: in place of the one in sweep.yaml, which keeps no password.

    Raises:
        RecipeError: the folder holds no sweep, or its settings were damaged.
    """
    settings, kept = _read(Path(directory))
    if storage is None and kept and ":***@" in kept:
        raise RecipeError(
            f"{Path(directory) / SETTINGS}: the password of {kept} is not kept; give --storage, or "
            "set PRUNE2ONNX_STORAGE, to the whole URL"
        )
    names = ("recipe", "sizes", "densities", "drops", "seeds", "study")
    return {name: getattr(settings, name) for name in names} | {"storage": storage or kept}


def _read(directory: Path) -> tuple[_Settings, str | None]:
    """The settings in a folder, and the storage's URL without its password."""
    path = directory / SETTINGS
    if not path.exists():
        raise RecipeError(f"{directory}: no {SETTINGS} there, so no sweep to continue")
    content = read_recipe(path)
    storage = content.pop("storage", None)
    if not isinstance(content.get("recipe"), dict):
        raise RecipeError(f"{path}: recipe is missing, expected a mapping of settings")
    content["recipe"] = resolve(content["recipe"], source=str(path))
    return _settings(content, str(path)), storage and str(storage)


def _fits(settings: _Settings, directory: Path, resume: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: a file, expected a folder for the sweep")
    if resume:
        if _read(directory)[0] != settings:
            raise RecipeError(
                f"{directory}: holds a sweep with other settings, see its {SETTINGS}; "
                f"continue that one with --resume {directory}, or choose another folder with -o"
            )
    elif (directory / SETTINGS).exists():
        raise RecipeError(
            f"{directory}: holds a sweep already; continue it with --resume {directory}, or choose "
            "another folder with -o"
        )


def _written(list_: Study, directory: Path) -> Front:
    with list_.writing:
        front = list_.front()
        write_whole(directory / FRONT, front.to_json())
        if front.done:
            write_whole(directory / PICTURE, front.picture())
    return front


@dataclass(frozen=True)
class _Worker:
    """Runs budgets in one folder."""

    recipe: Recipe
    directory: Path
    cpu: bool
    on_note: Callable[[str], None]
    on_step: Callable[[Step], None]
    on_epoch: Callable[[Epoch], None]

    def run(self, point: Point) -> Report | Prune2OnnxError:
        """One budget, from wherever an earlier worker left it; an error is a result, too."""
        try:
            return self._compress(point)
        except Prune2OnnxError as error:
            return error

    def _compress(self, point: Point) -> Report:
        limit = ByteSize(point.limit) if point.what == "size" else point.limit
        recipe = self._without_budgets(point.seed)
        started: dict[str, Any] = {}
        if recipe.first_phase == "dense":
            started = {"weights": str(self._dense(recipe)), "start": "prune"}
        report = compress(
            recipe.model_copy(update={BUDGETS[point.what]: limit, **started}),
            self.directory / RUNS / point.name,
            resume=True,
            cpu=self.cpu,
            on_step=self.on_step,
            on_epoch=self.on_epoch,
        )
        assert report is not None  # there is one process
        return report

    def _without_budgets(self, seed: int) -> Recipe:
        nothing = dict.fromkeys(BUDGETS.values())
        return self.recipe.model_copy(update={**nothing, "seed": seed})

    def _dense(self, recipe: Recipe) -> Path:
        """The dense network of a seed: trained by the worker that needs it first."""
        name = f"dense-seed{recipe.seed}"
        lock = lock_of(self.directory, name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.on_note(f"waiting for {name}, trained by another worker")
            lock.acquire()
        try:
            folder = self.directory / name
            return train_dense(
                recipe, folder, cpu=self.cpu, on_step=self.on_step, on_epoch=self.on_epoch
            )
        finally:
            lock.release()
