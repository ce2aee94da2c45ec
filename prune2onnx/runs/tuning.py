"""The runs of a search for settings, in an optuna study that all workers share.

Each run is a trial with settings that optuna's sampler draws from ranges, by what earlier runs gave
(TPE; Bergstra et al., NIPS 2011). Its value is the task's metric on the validation split; a budget
that is missed is a constraint. A run that is worse than the median of the others at the same epoch
is ended early. Nothing is trained here; see `commands.search`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.recipe import Recipe, resolve, settings
from prune2onnx.runs.report import Goal, Report
from prune2onnx.runs.storage import (
    beating,
    close,
    errors_of,
    fail_stale,
    one_at_a_time,
    opened,
    public_url,
)
from prune2onnx.tasks.task import load_task

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

DEFAULT_RANGES = (
    "prune.lr=3e-4..3e-3",
    "prune.threshold_lr=3e-3..3e-2",
    "tune.lr=3e-4..3e-3",
    "quantize.lr=1e-4..2e-3",
    "quantize.levels=2..7",
)
"""What is searched where nothing is said: rates, and how many levels there are."""

_WIDE = 10.0  # from the least to the greatest number of a range that is drawn on a log scale
_STARTUP = 5  # runs before any is ended early


@dataclass(frozen=True)
class Range:
    """The values that a setting may have.

    Attributes:
        name: dotted, such as "prune.lr".
        low: the least number; None where there are choices.
        high: the greatest one.
        choices: values.
    """

    name: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values of which each has to fit."""
        return self.choices or (self.low, self.high)

    @property
    def is_whole(self) -> bool:
        """Whether both ends are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def drawn(self, trial: Trial) -> Any:
        """A value, as optuna suggests it."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        assert self.low is not None and self.high is not None
        log = self.low > 0 and self.high / self.low >= _WIDE
        if self.is_whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=log)
        return trial.suggest_float(self.name, self.low, self.high, log=log)

    @staticmethod
    def of(text: str, recipe: Recipe) -> Range:
        """Reads NAME=LOW..HIGH or NAME=A,B,C.

        Raises:
            RecipeError: it is neither, or a value does not fit the setting.
        """
        import yaml

        name, equals, values = text.partition("=")
        name = name.strip()
        form = "expected SETTING=LOW..HIGH or SETTING=A,B, such as prune.lr=1e-4..1e-2"
        expected = f"{text!r}: {form}"
        if not equals:
            raise RecipeError(expected)
        if name not in settings() or name in ("model", "data", "seed"):
            raise RecipeError(f"{text!r}: {name!r} is no setting that can be searched; {form}")
        low, dots, high = values.partition("..")
        if dots:
            least, greatest = _number(low, expected), _number(high, expected)
            if not least < greatest:
                raise RecipeError(f"{expected}; LOW is not below HIGH")
            found = Range(name, least, greatest)
        else:
            found = Range(name, choices=tuple(yaml.safe_load(f"[{values}]")))
            if len(found.choices) < 2:
                raise RecipeError(f"{expected}; one value is no choice")
        for value in found.ends:
            resolve(recipe.model_dump(mode="json"), {name: value}, source=f"--vary {text}")
        return found


def _number(text: str, expected: str) -> float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise RecipeError(expected) from None


@dataclass(frozen=True)
class Tried:
    """A run of a search.

    Attributes:
        number: from 0 on.
        state: "done", "ended early", "failed" or "running".
        settings: those that were drawn, by dotted name.
        value: the task's metric on the validation split; None unless it is done.
        nbytes: size of the file; None unless it is done.
        met: whether the budgets were met.
        message: why it failed, or which budgets were missed.
    """

    number: int
    state: str
    settings: dict[str, Any]
    value: float | None = None
    nbytes: int | None = None
    met: bool = False
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON has it."""
        return asdict(self)


class Tuning:
    """A search, in an optuna study.

    Args:
        url: of the database.
        name: of the study.
        recipe: of all runs, except for what is searched; a study of another one is an error.
        ranges: what is searched.
        claiming: lock of the workers, while one of them adds to the database.
    """

    def __init__(
        self, url: str, name: str, recipe: Recipe, ranges: Sequence[Range], claiming: FileLock
    ) -> None:
        import optuna

        self.metric = load_task(recipe.task).metric
        self._url, self._ranges = url, ranges
        wanted = {
            "recipe": recipe.model_dump(mode="json"),
            "ranges": [asdict(one) | {"choices": list(one.choices)} for one in ranges],
        }
        with errors_of(url, Exception), claiming, one_at_a_time(url), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._storage = opened(url)
            self._study: Study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction="minimize",
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=recipe.seed, n_startup_trials=2 * _STARTUP),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP),
            )
            known = self._study.user_attrs.get("search")
            if known is None and not self._study.get_trials(deepcopy=False):
                self._study.set_user_attr("search", wanted)
            elif known != wanted:
                raise RecipeError(
                    f"{public_url(url)}: study {name!r} holds another search, or a sweep; choose "
                    "another folder with -o, or another name with --study"
                )

    def close(self) -> None:
        """Closes the connections."""
        close(self._storage, self._url)

    def next(self, most: int) -> tuple[Trial, dict[str, Any]] | None:
        """A run to do, with its settings; None where there are so many already."""
        with errors_of(self._url), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage")  # `beating` sends it
            fail_stale(self._study)
            if sum(_counts(trial) for trial in self._study.get_trials(deepcopy=False)) >= most:
                return None
            trial = self._study.ask()
            return trial, {one.name: one.drawn(trial) for one in self._ranges}

    @contextlib.contextmanager
    def beating(self, trial: Trial) -> Iterator[None]:
        """Sends the run's heartbeat."""
        number = self._storage.get_trial_id_from_study_id_trial_number(
            self._storage.get_study_id_from_name(self._study.study_name), trial.number
        )
        with beating(self._storage, lambda: self._storage.record_heartbeat(number)):
            yield

    def is_hopeless(self, trial: Trial, epoch: int, value: float) -> bool:
        """Whether to end a run that has this value of the metric after so many epochs."""
        with errors_of(self._url):
            trial.report(self.metric.badness(value), epoch)
            return trial.should_prune()

    def finish(self, trial: Trial, result: Report | Prune2OnnxError | None) -> None:
        """Stores the result of a run; None: it was ended early."""
        from optuna.trial import TrialState

        with errors_of(self._url):
            if result is None:
                self._study.tell(trial, state=TrialState.PRUNED)
            elif isinstance(result, Prune2OnnxError):
                trial.set_user_attr("message", str(result))
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                assert result.on_validation is not None  # a run measures it
                value = result.on_validation[1]
                over = [_relative_excess(goal) for goal in result.missed]
                trial.set_user_attr("nbytes", result.compressed.nbytes)
                trial.set_user_attr("value", value)
                trial.set_user_attr("met", not over)
                trial.set_constraint("budgets", sum(over))
                trial.set_user_attr("message", "; ".join(map(str, result.missed)))
                self._study.tell(trial, self.metric.badness(value))

    def tried(self) -> tuple[Tried, ...]:
        """All runs, in order; a run that lost its worker is not among them."""
        from optuna.trial import TrialState

        states = {
            TrialState.COMPLETE: "done",
            TrialState.PRUNED: "ended early",
            TrialState.FAIL: "failed",
            TrialState.RUNNING: "running",
        }
        with errors_of(self._url):
            trials = [one for one in self._study.get_trials(deepcopy=False) if _counts(one)]
        found = []
        for trial in trials:
            known = trial.user_attrs
            done = trial.state == TrialState.COMPLETE
            found.append(
                Tried(
                    trial.number,
                    states[trial.state],
                    dict(trial.params),
                    known.get("value"),
                    known.get("nbytes"),
                    done and bool(known.get("met")),
                    known.get("message", ""),
                )
            )
        return tuple(found)

    def best(self, tried: Sequence[Tried]) -> Tried | None:
        """The run within its budgets with the best metric on the validation split, then bytes.

        Where none is within them, the best of the others; None where none is done.
        """
        done = [one for one in tried if one.state == "done" and one.value is not None]

        def rank(one: Tried) -> tuple[bool, float, int]:
            assert one.value is not None and one.nbytes is not None
            return not one.met, self.metric.badness(one.value), one.nbytes

        return min(done, key=rank, default=None)


def _counts(trial: FrozenTrial) -> bool:
    """Whether a run is done or under way; not one that has lost its worker."""
    from optuna.trial import TrialState

    return trial.state != TrialState.FAIL or "message" in trial.user_attrs


def _relative_excess(goal: Goal) -> float:
    """By how much a budget was missed, above 0."""
    return max((goal.reached - goal.limit) / max(abs(goal.limit), 1e-9), 1e-9)
