"""`sweep`: `compress` for a list of budgets and seeds, by any number of workers.

One folder holds a sweep: sweep.yaml (every setting, written first), sweep.db (the study, unless
another database is given), dense-seedN/ (the dense network from which all runs of a seed start),
runs/NAME/ (one `compress` each), locks/, front.json, front.svg and report.html.

The same command, given while a worker is at work in the folder, joins it; so workers may start at
once. Afterwards the folder is kept, and only `--resume` goes on there.

For the list of runs, and how workers share it, see `runs.study`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
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

from prune2onnx.commands.compress import compress
from prune2onnx.commands.prepare import prepared, train_dense
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.files import write_whole
from prune2onnx.runs.folder import FRONT
from prune2onnx.runs.front import RUNS, Front, Point
from prune2onnx.runs.history import Callbacks
from prune2onnx.runs.pages.charts import front_picture
from prune2onnx.runs.pages.page import write_page
from prune2onnx.runs.recipe import Recipe, read_recipe, resolve
from prune2onnx.runs.report import Report
from prune2onnx.runs.storage import default_storage, lock_of, public_url
from prune2onnx.runs.study import BUDGETS, Study

SETTINGS, PICTURE = "sweep.yaml", "front.svg"

_POLL = 2.0  # seconds between checks whether other workers have finished


def _listed(value: Any) -> Any:
    """The items of a list that is given as text, as on the command line: "6KB, 10KB"."""
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
    def _has_a_budget(self) -> Self:
        if not (self.sizes or self.densities or self.drops):
            raise ValueError(
                "no budget to sweep; give some with --sizes 6KB,10KB, --densities 0.01,0.03 "
                "or --drops 0.1,0.3"
            )
        return self

    @property
    def runs(self) -> tuple[Point, ...]:
        """The runs, each once; seeds vary fastest, so that workers begin with different ones."""
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
        messages = []
        for one in error.errors():
            if one["type"] == "value_error":
                messages.append(str(one["ctx"]["error"]))
                continue
            name = str(one["loc"][0])
            wanted = f"expected such as {_EXAMPLES[name]}" if name in _EXAMPLES else "remove it"
            messages.append(f"{name} holds {one['input']!r}: {one['msg'].lower()}; {wanted}")
        raise RecipeError(f"{source}: " + "; ".join(messages)) from error


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
    callbacks: Callbacks | None = None,
    on_point: Callable[[Point], None] = lambda _: None,
) -> Front:
    """Compresses to each budget with each seed: error against size.

    Each run has one budget, which replaces those of the recipe. All runs of a seed start from one
    dense network, unless the recipe names weights. A run that fails is noted, and the sweep goes
    on. Any number of processes may work, and start, at the same time: in the same folder, or in
    other folders, or on other machines, with the same `storage`; all return the same front. A
    process that comes to a folder later needs `resume`, unless another one is at work there.

    Args:
        recipe: the settings of every run.
        directory: the sweep's folder, made if missing.
        sizes: budgets in bytes, as numbers or as "6KB"; a list, or a text with commas.
        densities: budgets for the surviving fraction of the pruned weights, 0-1.
        drops: budgets for the points of validation error that may be added.
        seeds: default: the recipe's.
        storage: URL of a database, as optuna takes it; default: sweep.db in the folder.
        study: name of the sweep in that database.
        resume: continue the sweep in `directory` (`sweep_of` reads its settings); failed runs are
            tried again.
        cpu: do not use a GPU.
        on_note: called with a line when a run, or waiting for other workers, begins.
        callbacks: called with the progress of each run's training.
        on_point: called with the result of a run.

    Returns:
        The front, also written to front.json, front.svg and, for people, to report.html.

    Raises:
        RecipeError: the settings do not fit, or the folder or the study holds another sweep.
        Prune2OnnxError: the model or its data cannot be used, or the storage cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise RecipeError(
            "WORLD_SIZE is above 1, expected one process per run of a sweep; start sweep without "
            "accelerate or torchrun, once per GPU, each with its own CUDA_VISIBLE_DEVICES"
        )
    directory = Path(directory).absolute()
    lists = {"sizes": sizes, "densities": densities, "drops": drops, "seeds": seeds}
    settings = _settings({"recipe": recipe, "study": study, **lists}, "sweep")
    with _present(settings, directory, resume):
        if not resume:
            prepared(settings.recipe)  # fail now, not in every run
        url = storage or default_storage(directory)
        queue = Study(url, settings.study, settings.recipe, directory)
        with contextlib.closing(queue):
            _record(settings, directory, storage and public_url(storage))
            queue.add(settings.runs, again=resume)
            worker = _Worker(settings.recipe, directory, cpu, on_note, callbacks)
            return _work(queue, worker, on_point)


def _work(queue: Study, worker: _Worker, on_point: Callable[[Point], None]) -> Front:
    """Does runs until none is left, here or elsewhere."""
    waited = False
    while True:
        claim = queue.claim()
        if claim is not None:
            waited = False
            worker.on_note(f"{claim.point.budget}, seed {claim.point.seed}")
            try:
                with queue.beating(claim):
                    result = worker.run(claim.point)
                queue.finish(claim, result)
            finally:  # an interrupted run stays RUNNING; the next holder of the lock continues
                claim.lock.release()
            front = _written(queue, worker.directory)
            on_point(next(p for p in front.points if p.name == claim.point.name))
            continue
        front = _written(queue, worker.directory)
        busy = [p for p in front.points if p.state in ("waiting", "running")]
        if not busy:
            write_page(worker.directory)
            return front
        if not waited:
            waited = True
            worker.on_note(f"waiting for {', '.join(p.name for p in busy)}, run by other workers")
        time.sleep(_POLL)


def sweep_of(directory: str | Path, storage: str | None = None) -> dict[str, Any]:
    """The settings of the sweep in a folder: the arguments of `sweep` except the folder.

    Args:
        directory: the sweep's folder.
        storage: replaces the one in sweep.yaml, which has no password.

    Raises:
        RecipeError: the folder holds no sweep, or its settings are damaged.
    """
    settings, kept = _read(Path(directory))
    if storage is None and kept and ":***@" in kept:
        raise RecipeError(
            f"{Path(directory) / SETTINGS}: the password of {kept} is not stored; give the whole "
            "URL with --storage or PRUNE2ONNX_STORAGE"
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


@contextlib.contextmanager
def _present(settings: _Settings, directory: Path, resume: bool) -> Iterator[None]:
    """Shows other workers that there is one in the folder; checks that the folder is its own.

    Raises:
        RecipeError: it holds another sweep, or this one, but nobody is at work.
    """
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: a file, expected a folder for the sweep")
    if resume:
        _read(directory)
    with contextlib.ExitStack() as held:
        joins = resume
        try:
            held.enter_context(lock_of(directory, "present").acquire(timeout=0))
        except Timeout:  # one worker holds it for all
            joins = True
        if (directory / SETTINGS).exists():
            if not joins:
                raise RecipeError(
                    f"{directory}: holds a sweep already; continue it with --resume {directory}, "
                    "or choose another folder with -o"
                )
            _check_same(settings, directory)
        yield


def _check_same(settings: _Settings, directory: Path) -> None:
    if _read(directory)[0] != settings:
        raise RecipeError(
            f"{directory}: holds a sweep with other settings, see its {SETTINGS}; "
            f"continue that one with --resume {directory}, or choose another folder with -o"
        )


def _record(settings: _Settings, directory: Path, storage: str | None) -> None:
    """Writes sweep.yaml; of several sweeps that begin at once in a folder the first one stays."""
    with lock_of(directory, SETTINGS):
        if (directory / SETTINGS).exists():
            _check_same(settings, directory)
        content = settings.model_dump(mode="json") | {"storage": storage}
        write_whole(directory / SETTINGS, yaml.safe_dump(content, sort_keys=False))


def _written(queue: Study, directory: Path) -> Front:
    with queue.writing:
        front = queue.front()
        write_whole(directory / FRONT, front.to_json())
        if front.done:
            write_whole(directory / PICTURE, front_picture(front))
    return front


@dataclass(frozen=True)
class _Worker:
    """Runs `compress` for budgets, in one folder."""

    recipe: Recipe
    directory: Path
    cpu: bool
    on_note: Callable[[str], None]
    callbacks: Callbacks | None

    def run(self, point: Point) -> Report | Prune2OnnxError:
        """Runs a budget, or continues it where an earlier worker stopped; an error is returned."""
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
            callbacks=self.callbacks,
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
            return train_dense(recipe, folder, cpu=self.cpu, callbacks=self.callbacks)
        finally:
            lock.release()
