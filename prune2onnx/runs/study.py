"""The queue of a sweep's runs, in an optuna study that all workers share.

Each run is a trial, WAITING, RUNNING, COMPLETE or FAIL, claimed by one worker at a time:

1. A worker holds a lock on the run's name in its folder from before it claims the run until after
   it has stored the result. The system releases the lock when the process dies, so a run that is
   RUNNING in this folder without a lock has lost its worker: the next worker that finds it
   continues from its checkpoints.
2. Workers in other folders, or on other machines, do not see these locks. For them each run has a
   heartbeat in the study; a run without a recent heartbeat is marked as failed and queued again.

Nothing is trained here; see `commands.sweep`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.runs.front import DenseNetwork, Front, Point
from prune2onnx.runs.recipe import Recipe
from prune2onnx.runs.report import Report

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STUDY = "sweep.db"

BUDGETS = {"size": "target_size", "density": "target_density", "drop": "max_drop"}
"""Budget -> its setting in the recipe."""

_BEAT = 30  # seconds between heartbeats
_GRACE = 120  # seconds without a heartbeat after which a run has lost its worker


def lock_of(directory: Path, name: str) -> FileLock:
    """A lock in a sweep's folder; it is released when the process that holds it ends."""
    folder = directory / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Prune2OnnxError(
            f"{folder}: cannot be made: {error.strerror or error}; choose another folder with -o"
        ) from error
    return FileLock(folder / name)


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

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.url, self.directory = public_url(url), directory
        self.worker = f"{socket.gethostname()}:{directory}"
        self.writing = lock_of(directory, "front")
        self._claiming = _claim_lock(url, directory)
        options: dict[str, Any] = {}
        if url.startswith("sqlite"):
            options = {"connect_args": {"timeout": 60}}
        # when it is opened, drivers, SQLAlchemy, alembic and optuna raise errors of many types
        with self._errors(Exception), self._claiming, warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._storage = optuna.storages.RDBStorage(
                url,
                options,
                heartbeat_interval=_BEAT,
                grace_period=_GRACE,
                heartbeat_stale_trial_callback=self._lost,
            )
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
        with self._errors():
            self._storage.remove_session()
            self._storage.engine.dispose()

    @contextlib.contextmanager
    def _errors(self, *types: type[Exception]) -> Iterator[None]:
        """Turns the errors of a database, and those of other types, into one clear error."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        caught: tuple[type[Exception], ...] = (StorageInternalError, SQLAlchemyError, *types)
        try:
            yield
        except Prune2OnnxError:
            raise
        except caught as error:
            reason = one_line(error.__cause__ or error)[:300]
            raise Prune2OnnxError(
                f"{self.url}: the sweep's storage cannot be used: {reason}; check the URL, that "
                "the server runs, and that the driver it names is installed"
            ) from error

    def _check_recipe(self, name: str, recipe: Recipe) -> None:
        """Stores the recipe in a new study; else checks that it is the study's."""
        wanted = recipe.model_dump(mode="json")
        for budget in (*BUDGETS.values(), "seed"):
            del wanted[budget]  # each run has its own
        known = self._storage.get_study_user_attrs(self._id).get("recipe")
        if known is None and not self._trials():
            self._storage.set_study_user_attr(self._id, "recipe", wanted)
            return
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

        with self._errors(), self._claiming:
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

    def _lost(self, _: Any, trial: FrozenTrial) -> None:
        """Queues a run again that optuna has marked as failed, since its heartbeat stopped."""
        self._add(_point_of(trial), trial.user_attrs["seconds"])

    def claim(self) -> Claim | None:
        """A run for this worker, locked; None where there is none at the moment."""
        import optuna
        from optuna.trial import TrialState

        with self._errors():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self._study)
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
                    if free:  # several workers may add a run: the first of its trials counts
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
        over = threading.Event()

        def beat() -> None:
            with contextlib.suppress(Exception):  # the next heartbeat may succeed
                self._storage.record_heartbeat(claim.trial_id)
                seconds = claim.seconds + time.monotonic() - began
                self._storage.set_trial_user_attr(claim.trial_id, "seconds", seconds)

        def beats() -> None:
            while not over.wait(_BEAT):
                beat()
            beat()
            self._storage.remove_session()

        thread = threading.Thread(target=beats, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

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
            values = [float(figures["nbytes"]), figures["validation_error"]]
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
        return Front(tuple(points), tuple(dense[seed] for seed in sorted(dense)))


def _figures(report: Report) -> dict[str, Any]:
    """The part of a report that the study stores, for workers that do not see its folder."""
    assert report.validation is not None and report.dense.error is not None
    validation, before = report.validation["error"], report.validation["dense_error"]
    return {
        "nbytes": report.compressed.nbytes,
        "error": report.compressed.error,
        "validation_error": validation,
        "drop": report.drop,
        "validation_drop": validation - before,
        "density": report.density,
        "ratio": report.ratio,
        "met": not report.missed,
        "message": "; ".join(map(str, report.missed)),
        "dense": [report.dense.nbytes, report.dense.error, before],
    }


def _point_of(trial: FrozenTrial) -> Point:
    what, limit = trial.user_attrs["budget"]
    return Point(what, limit, trial.user_attrs["seed"])


def _name_of(trial: FrozenTrial) -> str:
    return _point_of(trial).name


def default_storage(directory: Path) -> str:
    """URL of the database in a sweep's folder."""
    path = str(directory / STUDY).replace("{", "{{").replace("}", "}}")  # optuna fills in a version
    return f"sqlite:///{path}"


def public_url(url: str) -> str:
    """A URL without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError) as error:
        raise RecipeError(
            f"storage is {url.partition('@')[2] or url!r}, expected a URL that optuna takes, such "
            "as sqlite:///sweep.db or postgresql://user@host/database"
        ) from error


def _claim_lock(url: str, directory: Path) -> FileLock:
    """A lock for claiming runs.

    SQLite cannot lock rows, so the lock lies beside the database, for all its workers. Servers lock
    rows themselves: there the lock is the folder's.
    """
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    database = parsed.database
    if parsed.get_backend_name() == "sqlite" and database and database != ":memory:":
        path = Path(database.replace("{{", "{").replace("}}", "}"))
        if path.parent.is_dir():
            return FileLock(path.with_name(f"{path.name}.lock"))
    return lock_of(directory, "study")
