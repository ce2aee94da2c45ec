"""The lossy part of `pack`: weights approximated without data, or calibrated with examples.

What is tried and in which order; how weights change is in `packing.approximation` and
`packing.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from onnx import ModelProto

from prune2onnx.errors import RecipeError
from prune2onnx.packing.approximation.approximate import approximate, search
from prune2onnx.packing.approximation.subject import Approximation
from prune2onnx.packing.calibration import budget
from prune2onnx.packing.calibration.calibrate import Calibration, Pattern
from prune2onnx.packing.pack import Progress
from prune2onnx.packing.quantized import Quantized
from prune2onnx.runs.defaults import PackOptions
from prune2onnx.runs.report import Goal
from prune2onnx.runtime.calibration import calibration_data
from prune2onnx.runtime.compare import output_error
from prune2onnx.runtime.inputs import inputs_of
from prune2onnx.runtime.session import run_all, session

_EXAMPLES = 256
"""Random inputs for a search for the fewest bits; examples, where they have no labels."""

_BATCH = 64  # of them at a time
_START_BITS = 4.0
_TRIES = 6
_CURVE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0)
"""Octaves from the slope that was chosen, for a curve of size against error."""


@dataclass(frozen=True)
class CurvePoint:
    """One size on a curve.

    Attributes:
        nbytes: of the file.
        error: relative error of the outputs on held-out examples.
        drop: points of error that it adds there; None without labels.
        is_chosen: whether this is the file that was written.
    """

    nbytes: int
    error: float
    drop: float | None
    is_chosen: bool

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON has it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Lossy:
    """A model with other weights.

    Attributes:
        model: the model, with the same initializers.
        quantized: codes and scale of the weights that have them.
        notes: what was done, in words.
        goals: one for each budget.
        curve: sizes and errors, from small to large.
    """

    model: ModelProto
    quantized: Mapping[str, Quantized]
    notes: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    curve: tuple[CurvePoint, ...] = ()


def changed(
    model: ModelProto,
    options: PackOptions,
    nbytes_of: Callable[[Approximation], int],
    evaluate: Callable[[ModelProto], float] | None = None,
    progress: Progress = lambda name, done, total: None,
) -> Lossy:
    """A model with fewer bits in its weights.

    Args:
        model: normalized.
        options: which weights may change how far.
        nbytes_of: size of the file with some weights.
        evaluate: a model -> the outputs' error, for a search without calibration.
        progress: is told how far a pass of calibration has come.

    Raises:
        RecipeError: options that exclude each other, or need data that are not given.
        Prune2OnnxError: the data do not fit, or no trial was within a limit.
    """
    if evaluate is None and options.inputs.data not in (None, "random"):
        return _Calibrated(model, options, nbytes_of, progress).result()
    _require_no_examples(options)
    return _approximated(model, options, evaluate)


def _require_no_examples(options: PackOptions) -> None:
    """Without data nothing can be held out, so that some budgets cannot be kept."""
    asked = {
        "--target-size": options.target_size,
        "--max-error": options.max_error,
        "--max-drop": options.max_drop,
        "--curve": options.curve or None,
        f"--prune {':'.join(map(str, options.pattern or ()))}": options.pattern,
    }
    for name, value in asked.items():
        if value is not None:
            raise RecipeError(
                f"{name} needs examples; give --data, a data set as for compress, or npz:FILE with "
                "an array per input"
            )


def _approximated(
    model: ModelProto, options: PackOptions, evaluate: Callable[[ModelProto], float] | None
) -> Lossy:
    if options.bits is not None and options.max_rel_error is not None:
        raise RecipeError("--bits and --max-rel-error: give one of them, it determines the other")
    if evaluate is None and options.inputs.data is not None:
        opened = session(model)
        inputs = inputs_of(model, opened, options.inputs, count=4, examples=_EXAMPLES)
        evaluate = output_error(model, inputs)
    if evaluate is not None and options.max_rel_error is not None:
        made = search(model, evaluate, options.max_rel_error, prune=options.prune)
    else:
        made = approximate(
            model, bits=options.bits, prune=options.prune, max_rel_error=options.max_rel_error
        )
        made = made if evaluate is None else replace(made, output_error=evaluate(made.model))
    return Lossy(made.model, made.quantized, made.notes)


@dataclass
class _Calibrated:
    """A model that is calibrated until its budget is met."""

    model: ModelProto
    options: PackOptions
    nbytes_of: Callable[[Approximation], int]
    progress: Progress
    _pass: int = field(default=0, init=False)

    def result(self) -> Lossy:
        options = self.options
        error = options.max_error if options.max_error is not None else options.max_rel_error
        if options.bits is not None and options.target_size is not None:
            raise RecipeError("--bits and --target-size: give one of them, it determines the other")
        if options.bits is not None and not 1 <= options.bits <= 8:
            raise RecipeError(f"{options.bits} bits for each weight, expected 1 to 8")
        data = calibration_data(self.model, options.inputs, options.examples, _BATCH)
        if options.max_drop is not None and data.wrong is None:
            raise RecipeError(
                f"--max-drop {options.max_drop:g} counts wrong labels, and --data "
                f"{options.inputs.data} has none; limit the error of the outputs by --max-error"
            )
        fraction = options.prune or 0.0
        if options.pattern is not None:
            fraction = 1 - options.pattern[0] / options.pattern[1]
        calibration = Calibration(
            self.model,
            data.batches,
            run_all,
            pattern=Pattern(fraction, options.pattern),
            progress=self._told,
        )
        calibration.measure(data.error)
        base = data.wrong(self.model) if data.wrong is not None else 0.0

        def trial(slope: float | None) -> budget.Trial:
            self._pass += 1
            made = calibration.at(slope)
            made = replace(made, output_error=data.error(made.model))
            drop = data.wrong(made.model) - base if data.wrong is not None else None
            sized = options.target_size is not None or options.curve
            nbytes = self.nbytes_of(made) if sized else made.nbytes
            return budget.Trial(slope or 0.0, made, nbytes, drop)

        goals = self._budgets(error)
        if not goals:  # only zeros
            tried = [trial(None)]
        else:
            start = calibration.slope(options.bits or _START_BITS)
            tried = budget.search(trial, start, goals[0], _TRIES)
            for other in goals[1:]:
                if self._best(tried, goals[:1], error) not in self._met(tried, [other]):
                    tried += budget.search(trial, tried[-1].slope, other, _TRIES)
        best = self._best(tried, goals, error)
        curve = self._curve(trial, best) if options.curve else []
        reached = self._goals(best, error)
        notes = list(best.made.notes)
        if data.wrong is not None and best.drop is not None:
            notes.append(
                f"{best.drop:+.2f} points of error on {data.labelled} held-out examples, of which "
                f"one is {100 / data.labelled:.2g} points"
            )
        left = [row.name for row in best.made.rows if row.how in ("grid", "channel grid")]
        if left:
            notes.append(
                f"{len(left)} weights were rounded without examples, {left[0]} the first: read by "
                "several nodes, or by none that is calibrated"
            )
        return Lossy(best.made.model, best.made.quantized, tuple(notes), reached, tuple(curve))

    def _told(self, name: str, done: int, total: int) -> None:
        self.progress(f"calibrating, pass {self._pass}: {name}", done, total)

    def _budgets(self, error: float | None) -> list[budget.Budget]:
        options = self.options
        found = []
        if options.target_size is not None:
            found.append(budget.of_size(options.target_size))
        if options.bits is not None:
            found.append(budget.of_bits(options.bits))
        if error is not None:
            found.append(budget.of_error(error))
        if options.max_drop is not None:
            found.append(budget.of_drop(options.max_drop))
        return found

    def _met(self, tried: list[budget.Trial], goals: list[budget.Budget]) -> list[budget.Trial]:
        return [one for one in tried if all(goal.excess(one) <= 0 for goal in goals)]

    def _best(
        self, tried: list[budget.Trial], goals: list[budget.Budget], error: float | None
    ) -> budget.Trial:
        """Within all budgets, the fewest bytes; of a size alone, the least error."""
        sized = self.options.target_size is not None or self.options.bits is not None
        if met := self._met(tried, goals):
            only_size = sized and error is None and self.options.max_drop is None
            return min(met, key=lambda one: one.error if only_size else one.nbytes)
        return min(tried, key=lambda one: max(goal.excess(one) for goal in goals))

    def _goals(self, best: budget.Trial, error: float | None) -> tuple[Goal, ...]:
        found = []
        if self.options.target_size is not None:
            found.append(Goal("size", float(self.options.target_size), float(best.nbytes)))
        if error is not None:
            found.append(Goal("error of the outputs", error, best.error))
        if self.options.max_drop is not None:
            found.append(Goal("drop", self.options.max_drop, best.drop or 0.0))
        return tuple(found)

    def _curve(
        self, trial: Callable[[float], budget.Trial], best: budget.Trial
    ) -> list[CurvePoint]:
        trials = [best if not octaves else trial(best.slope * 2.0**octaves) for octaves in _CURVE]
        points = [CurvePoint(one.nbytes, one.error, one.drop, one is best) for one in trials]
        return sorted(points, key=lambda point: point.nbytes)
