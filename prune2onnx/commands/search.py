"""`search`: settings with which `compress` gives the best validation metric within a budget.

One folder holds a search: search.yaml (every setting, written first), sweep.db (the study, unless
another database is given), dense/ (the network from which all runs start, unless what makes it is
searched), runs/NUMBER/ (one `compress` each), search.json, and best.yaml, a recipe.

The same command continues a search, and more processes with it share the runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prune2onnx.commands.compress import compress
from prune2onnx.commands.prepare import prepared, train_dense
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.files import write_whole
from prune2onnx.runs.front import RUNS
from prune2onnx.runs.history import Callbacks, Epoch
from prune2onnx.runs.recipe import Recipe, read_recipe, resolve
from prune2onnx.runs.report import Report
from prune2onnx.runs.storage import claim_lock, default_storage, lock_of, public_url
from prune2onnx.runs.tuning import DEFAULT_RANGES, Range, Tried, Tuning
from prune2onnx.tasks.quantity import Quantity

SETTINGS, RESULT, BEST = "search.yaml", "search.json", "best.yaml"

_LEAVE_DENSE = ("prune.", "channels.", "tune.", "quantize.", "target_", "max_drop", "distill")
"""Beginnings of settings that leave the dense network as it is."""


class _HopelessError(Exception):
    """A run is worse than the others."""


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        tried: all runs.
        best: of them; None where none is done.
        metric: by which they are compared, on the validation split.
        recipe: file with the settings of the best one.
    """

    tried: tuple[Tried, ...]
    best: Tried | None
    metric: Quantity
    recipe: Path

    def to_json(self) -> str:
        """As search.json has it."""
        content = {
            "metric": self.metric.name,
            "best": self.best and self.best.number,
            "runs": [one.to_dict() for one in self.tried],
        }
        return json.dumps(content, indent=2) + "\n"


def search(
    recipe: Recipe,
    directory: str | Path,
    *,
    vary: Sequence[str] = DEFAULT_RANGES,
    runs: int = 20,
    storage: str | None = None,
    study: str = "search",
    cpu: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
    callbacks: Callbacks | None = None,
) -> Found:
    """Searches for the settings of the best run within the recipe's budgets.

    Choices are made by the metric on the validation split. Any number of processes may work at the
    same search: in the same folder, or elsewhere with the same `storage`. One that is interrupted
    leaves its run to be counted again after two minutes.

    Args:
        recipe: the settings of all runs, with a budget.
        directory: the search's folder, made if missing.
        vary: SETTING=LOW..HIGH, on a log scale from a factor of 10 on, or SETTING=A,B,C.
        runs: of the whole search; more continue a finished one.
        storage: URL of a database, as optuna takes it; default: sweep.db in the folder.
        study: name of the search in that database.
        cpu: do not use a GPU.
        on_note: called with a line when a run begins.
        callbacks: called with the progress of each run's training.

    Returns:
        What was found; also in search.json and, as a recipe, in best.yaml.

    Raises:
        RecipeError: the settings do not fit, there is no budget, or the folder or the study holds
            another search.
        Prune2OnnxError: the model or its data cannot be used, or the storage cannot be reached.
    """
    if recipe.has_no_budget:
        raise RecipeError(
            "no budget: the best metric within which size? Give --target-size, --target-density, "
            "--target-macs or --max-drop"
        )
    if runs < 1:
        raise RecipeError(f"{runs} runs, expected 1 or more")
    ranges = [Range.of(text, recipe) for text in vary]
    if len({one.name for one in ranges}) < len(ranges):
        raise RecipeError(f"{', '.join(vary)}: a setting is varied twice; give it once")
    directory = Path(directory).absolute()
    _record(recipe, vary, directory, storage)
    prepared(recipe)  # fail now, not in every run
    url = storage or default_storage(directory)
    tuning = Tuning(url, study, recipe, ranges, claim_lock(url, directory))
    shares_dense = recipe.first_phase == "dense" and all(
        one.name.startswith(_LEAVE_DENSE) for one in ranges
    )
    worker = _Worker(recipe, directory, tuning, shares_dense, cpu, callbacks or Callbacks())
    with contextlib.closing(tuning):
        worker.write()
        while (claimed := tuning.next(runs)) is not None:
            trial, settings = claimed
            on_note(f"run {trial.number}: {_listed(settings)}")
            with tuning.beating(trial):
                result = worker.run(trial, settings)
            tuning.finish(trial, result)
            worker.write()
        return worker.write()  # with what other workers have done meanwhile


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
    )


def _record(recipe: Recipe, vary: Sequence[str], directory: Path, storage: str | None) -> None:
    """Writes search.yaml; checks that a folder is this search's own."""
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "vary": list(vary),
        "storage": storage and public_url(storage),
    }
    path = directory / SETTINGS
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: a file, expected a folder for the search")
    if directory.is_dir() and any(directory.iterdir()) and not path.exists():
        raise RecipeError(
            f"{directory}: holds other files and no {SETTINGS}; choose another folder with -o"
        )
    with lock_of(directory, SETTINGS):
        if not path.exists():
            write_whole(path, yaml.safe_dump(content, sort_keys=False))
        elif read_recipe(path) != content:
            raise RecipeError(
                f"{directory}: holds a search with other settings, see its {SETTINGS}; give the "
                "same ones to continue it, or choose another folder with -o"
            )


@dataclass(frozen=True)
class _Worker:
    """Does runs of a search, in one folder."""

    recipe: Recipe
    directory: Path
    tuning: Tuning
    shares_dense: bool
    cpu: bool
    callbacks: Callbacks

    def run(self, trial: Any, settings: dict[str, Any]) -> Report | Prune2OnnxError | None:
        """Does a run; an error is returned, and None where it is ended early."""
        epochs = 0

        def on_epoch(epoch: Epoch) -> None:
            nonlocal epochs
            epochs += 1
            self.callbacks.on_epoch(epoch)
            if epoch.phase != "dense" and self.tuning.is_hopeless(trial, epochs, epoch.value):
                raise _HopelessError

        callbacks = Callbacks(self.callbacks.on_step, on_epoch, self.callbacks.on_trial)
        try:
            own = resolve(self.recipe.model_dump(mode="json"), settings, source="search")
            report = compress(
                own.model_copy(update=self._start()),
                self.directory / RUNS / f"{trial.number:04}",
                overwrite=True,
                cpu=self.cpu,
                callbacks=callbacks,
            )
        except _HopelessError:
            return None
        except Prune2OnnxError as error:
            return error
        assert report is not None  # there is one process
        return report

    def _start(self) -> dict[str, Any]:
        """Where a run starts: at the dense network that all share, if they do."""
        if not self.shares_dense:
            return {}
        with lock_of(self.directory, "dense"):
            weights = train_dense(
                self.recipe, self.directory / "dense", cpu=self.cpu, callbacks=self.callbacks
            )
        return {"weights": str(weights), "start": "prune"}

    def write(self) -> Found:
        """Writes what is known so far."""
        tried = self.tuning.tried()
        best = self.tuning.best(tried)
        found = Found(tried, best, self.tuning.metric, self.directory / BEST)
        with lock_of(self.directory, "result"):
            write_whole(self.directory / RESULT, found.to_json())
            if best is not None:
                recipe = resolve(self.recipe.model_dump(mode="json"), best.settings, source="best")
                write_whole(found.recipe, recipe.to_yaml())
        return found
