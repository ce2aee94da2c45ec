"""The queue of a sweep's runs, in an optuna study that all workers share.

Each run is a trial, WAITING, RUNNING, COMPLETE or FAIL, claimed by one worker at a time:

1. A worker holds a lock on the run's name in its folder from before it claims the run until after
   it has stored the result. The system releases the lock when the process dies, so a run that is
   RUNNING in this folder without a lock has lost its worker: the next worker that finds it
   continues from its checkpoints.
2. Workers in other folders, or on other machines, do not see these locks. For them each run has a
   heartbeat in the study; a run without a recent heartbeat is marked as failed and queued again.
3. One worker at a time makes the tables and adds runs, and adds only those that are missing. So
   workers that start at once have one list, and a list that a killed worker left incomplete is
   completed by the next one.

Nothing is trained here; see `commands.sweep`.
"""

from __future__ import annotations

import contextlib
import socket
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.front import DenseNetwork, Front, Point
from prune2onnx.runs.recipe import Recipe
from prune2onnx.runs.report import Report
from prune2onnx.runs.storage import (
    beating,
    claim_lock,
    close,
    errors_of,
    fail_stale,
    lock_of,
    one_at_a_time,
    opened,
    public_url,
)
from prune2onnx.tasks.task import load_task

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BUDGETS = {"size": "target_size", "density": "target_density", "drop": "max_drop"}
"""Budget -> its setting in the recipe."""


@dataclass(frozen=True)
class Claim:
    """A run that belongs to this worker until it is finished."""

    trial_id: int
    point: Point
    lock: FileLock
    seconds: float


class Study:
    """The queue of runs, in an optuna study that all workers share.

    Args:
        url: of the database.
        name: of the study.
        recipe: of all runs; a study with another recipe is an error.
        directory: the worker's folder.
    """

    def __init__(self, url: str, name: str, recipe: Recipe, directory: Path) -> None:
        import optuna

        self.url, self.directory = public_url(url), directory
        self.metric = load_task(recipe.task).metric
        self.worker = f"{socket.gethostname()}:{directory}"
        self.writing = lock_of(directory, "front")
        self._url = url
        self._claiming = claim_lock(url, directory)
        # when it is opened, drivers, SQLAlchemy, alembic and optuna raise errors of many types
        with self._errors(Exception), self._adding(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._storage = opened(url)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
            self._study.set_metric_names(["bytes", "validation error"])
            self._id = self._storage.get_study_id_from_name(name)
            self._check_recipe(name, recipe)

    def close(self) -> None:
        """Closes the connections."""
        close(self._storage, self._url)

    @contextlib.contextmanager
    def _adding(self) -> Iterator[None]:
        """Lets one worker at a time add to the database, of all workers that share it."""
        with self._claiming, one_at_a_time(self._url):  # in this order everywhere
            yield

    def _errors(self, *types: type[Exception]) -> contextlib.AbstractContextManager[None]:
        return errors_of(self._url, *types)

    def _check_recipe(self, name: str, recipe: Recipe) -> None:
        """Stores the recipe in a new study; else checks that it is the study's."""
        wanted = recipe.model_dump(mode="json")
        for budget in (*BUDGETS.values(), "seed"):
            del wanted[budget]  # each run has its own
        known = self._storage.get_study_user_attrs(self._id).get("recipe")
        if known is None and not self._trials():
            self._storage.set_study_user_attr(self._id, "recipe", wanted)
            return
        if known is not None:  # a version that did not have all settings may have stored it
            default = Recipe(model=recipe.model).model_dump(mode="json")
            known = {key: known.get(key, default[key]) for key in wanted}
        if known == wanted:
            return
        differ = [key for key, value in wanted.items() if (known or {}).get(key) != value]
        raise RecipeError(
            f"{self.url}: study {name!r} holds another sweep, with another "
            f"{', '.join(differ)}; choose another name with --study"
        )

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._id, deepcopy=False)

    def _trial_id(self, trial: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)

    def add(self, runs: Iterable[Point], *, again: bool) -> None:
        """Queues the runs that are not in the study; with `again` also those that failed."""
        from optuna.trial import TrialState

        with self._errors(), self._adding():
            known = set()
            for trial in self._trials():
                # a failed trial without a message has lost its worker, and is queued again
                counts = trial.state != TrialState.FAIL or "message" in trial.user_attrs
                if counts and not (again and trial.state == TrialState.FAIL):
                    known.add(_name_of(trial))
            for point in runs:
                if point.name not in known:
                    self._add(point)

    def _add(self, point: Point, seconds: float = 0.0) -> None:
        from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
        from optuna.trial import TrialState, create_trial

        # parameters are for optuna's own tools; the database stores them as floats, not exactly
        distributions: dict[str, BaseDistribution] = {
            point.what: FloatDistribution(0, max(1.0, 10 * point.limit)),
            "seed": IntDistribution(0, 2**63),
        }
        params = {point.what: float(point.limit), "seed": point.seed}
        exact = {"budget": [point.what, point.limit], "seed": point.seed, "seconds": seconds}
        trial = create_trial(
            state=TrialState.WAITING,
            params=params,
            distributions=distributions,
            user_attrs=exact,
        )
        self._storage.create_new_trial(self._id, trial)

    def _queue_lost(self) -> None:
        """Queues the runs again that have lost their worker, as heartbeats say."""
        fail_stale(self._study)
        if _lost(self._trials()):
            with self._adding():  # another worker may have seen the same
                for trial in _lost(self._trials()):
                    self._add(_point_of(trial), trial.user_attrs["seconds"])

    def claim(self) -> Claim | None:
        """A run for this worker, locked; None where there is none at the moment."""
        from optuna.trial import TrialState

        with self._errors():
            self._queue_lost()
            with self._claiming:
                trials = self._trials()
                taken = {
                    _name_of(trial)
                    for trial in trials
                    if trial.state in (TrialState.RUNNING, TrialState.COMPLETE)
                }
                for trial in trials:
                    lost = (
                        trial.state == TrialState.RUNNING
                        and trial.user_attrs.get("worker") == self.worker
                    )
                    free = trial.state == TrialState.WAITING and _name_of(trial) not in taken
                    if (lost or free) and (claim := self._claim(trial)):
                        return claim
                    if free:  # in a study of an earlier version: the first of its trials counts
                        taken.add(_name_of(trial))
        return None

    def _claim(self, trial: FrozenTrial) -> Claim | None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        lock = lock_of(self.directory, _name_of(trial))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        trial_id = self._trial_id(trial)
        try:
            if trial.state == TrialState.RUNNING:
                claimed = self._storage.get_trial(trial_id).state == TrialState.RUNNING
            else:
                self._storage.record_heartbeat(trial_id)
                claimed = self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            if claimed:
                self._storage.record_heartbeat(trial_id)
                self._storage.set_trial_user_attr(trial_id, "worker", self.worker)
                return Claim(trial_id, _point_of(trial), lock, trial.user_attrs["seconds"])
        except UpdateFinishedTrialError:
            pass  # another worker was faster
        except BaseException:
            lock.release()
            raise
        lock.release()
        return None

    @contextlib.contextmanager
    def beating(self, claim: Claim) -> Iterator[None]:
        """Sends the run's heartbeat, and stores the time that is spent on it."""
        began = time.monotonic()

        def beat() -> None:
            self._storage.record_heartbeat(claim.trial_id)
            seconds = claim.seconds + time.monotonic() - began
            self._storage.set_trial_user_attr(claim.trial_id, "seconds", seconds)

        with beating(self._storage, beat):
            yield

    def finish(self, claim: Claim, result: Report | Prune2OnnxError) -> None:
        """Stores the result of a run."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        # a run may have gone to another worker, if this one was suspended for too long
        with self._errors(), contextlib.suppress(UpdateFinishedTrialError):
            if isinstance(result, Prune2OnnxError):
                self._storage.set_trial_user_attr(claim.trial_id, "message", str(result))
                self._storage.set_trial_state_values(claim.trial_id, TrialState.FAIL)
                return
            figures = _figures(result)
            values = [float(figures["nbytes"]), self.metric.badness(figures["validation_error"])]
            self._storage.set_trial_user_attr(claim.trial_id, "result", figures)
            self._storage.set_trial_state_values(claim.trial_id, TrialState.COMPLETE, values)

    def front(self) -> Front:
        """The state of all runs: of several trials of one run, the one that got furthest counts."""
        from optuna.trial import TrialState

        states = {
            TrialState.FAIL: "failed",
            TrialState.WAITING: "waiting",
            TrialState.RUNNING: "running",
            TrialState.COMPLETE: "done",
        }
        order = list(states)
        with self._errors():
            trials = self._trials()
        best: dict[str, FrozenTrial] = {}
        for trial in trials:
            name = _name_of(trial)
            if name not in best or order.index(best[name].state) <= order.index(trial.state):
                best[name] = trial
        points = []
        dense: dict[int, DenseNetwork] = {}
        for trial in best.values():
            attributes = trial.user_attrs
            point = _point_of(trial)
            result = dict(attributes.get("result", {}))
            if result:
                dense.setdefault(point.seed, DenseNetwork(point.seed, *result.pop("dense")))
            message = result.pop("message", attributes.get("message", ""))
            points.append(
                Point(
                    point.what,
                    point.limit,
                    point.seed,
                    states[trial.state],
                    message=message,
                    seconds=attributes["seconds"] or None,
                    worker=attributes.get("worker", ""),
                    **result,
                )
            )
        points.sort(key=lambda p: (list(BUDGETS).index(p.what), p.limit, p.seed))
        return Front(tuple(points), tuple(dense[seed] for seed in sorted(dense)), self.metric)


def _figures(report: Report) -> dict[str, Any]:
    """The part of a report that the study stores, for workers that do not see its folder."""
    assert report.on_validation is not None  # a run measures it
    before, validation = report.on_validation
    return {
        "nbytes": report.compressed.nbytes,
        "error": report.value(report.compressed),
        "validation_error": validation,
        "drop": report.drop,
        "validation_drop": report.metric.drop(before, validation),
        "density": report.density,
        "ratio": report.ratio,
        "met": not report.missed,
        "message": "; ".join(map(str, report.missed)),
        "dense": [report.dense.nbytes, report.value(report.dense), before],
    }


def _point_of(trial: FrozenTrial) -> Point:
    what, limit = trial.user_attrs["budget"]
    return Point(what, limit, trial.user_attrs["seed"])


def _name_of(trial: FrozenTrial) -> str:
    return _point_of(trial).name


def _lost(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The last trial of each run that has lost its worker: it failed, without a message."""
    from optuna.trial import TrialState

    of_run: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        of_run.setdefault(_name_of(trial), []).append(trial)
    return [
        tried[-1]
        for tried in of_run.values()
        if {trial.state for trial in tried} == {TrialState.FAIL}
        and "message" not in tried[-1].user_attrs
    ]
