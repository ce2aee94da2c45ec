"""The lossy part of `pack`: weights approximated without data, or calibrated with examples.

What is tried and in which order; how weights change is in `packing.approximation` and
`packing.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from onnx import ModelProto

from prune2onnx.commands.compute.computing import Computing
from prune2onnx.errors import RecipeError
from prune2onnx.graph.protobuf import nbytes
from prune2onnx.packing.approximation.approximate import approximate, search
from prune2onnx.packing.approximation.subject import Approximation, check_limits
from prune2onnx.packing.calibration import budget
from prune2onnx.packing.calibration.calibrate import Calibration
from prune2onnx.packing.calibration.journal import Journal
from prune2onnx.packing.calibration.zeros import Pattern
from prune2onnx.packing.compute.narrow import Narrowed
from prune2onnx.packing.pack import Progress
from prune2onnx.packing.quantized import Quantized
from prune2onnx.runs.defaults import PackOptions
from prune2onnx.runs.report import CurvePoint, Goal
from prune2onnx.runtime.calibration import CalibrationData
from prune2onnx.runtime.compare import output_error, run_all
from prune2onnx.runtime.inputs import Inputs
from prune2onnx.shrinking.shrink import shrink, structure
from prune2onnx.shrinking.structure import BLOCK

_START_BITS = 4.0
_TRIES = 6
_NO_PRICE = 2.0**-60  # slope at which bits cost nothing
_CURVE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0)
"""Octaves from the slope that was chosen, for a curve of size against error."""


@dataclass(frozen=True, eq=False)
class Lossy:
    """A model with other weights.

    Attributes:
        model: the model, with the same initializers.
        quantized: codes and scale of the weights that have them.
        notes: what was done, in words.
        errors: by weight: relative error of its layer's outputs on examples; without examples, of
            the weight.
        hows: by weight: how it changed, such as "calibrated grid", "float16", "pruned", or, of a
            bias that makes up for others, "shifted".
        goals: one for each budget.
        curve: sizes and errors, from small to large.
    """

    model: ModelProto
    quantized: Mapping[str, Quantized]
    notes: tuple[str, ...]
    errors: Mapping[str, float]
    hows: Mapping[str, str]
    goals: tuple[Goal, ...] = ()
    curve: tuple[CurvePoint, ...] = ()


def changed(
    model: ModelProto,
    options: PackOptions,
    nbytes_of: Callable[[Narrowed], int],
    computing: Computing,
    evaluate: Callable[[ModelProto], float] | None = None,
    progress: Progress = lambda name, done, total: None,
    journal: Callable[[CalibrationData], Journal] = lambda data: Journal(None),
) -> Lossy:
    """A model with fewer bits in its weights.

    Args:
        model: normalized.
        options: which weights may change how far.
        nbytes_of: size of the file with some weights, as they compute.
        computing: what its layers compute in.
        evaluate: a model -> the outputs' error, for a search without calibration.
        progress: is told how far a pass of calibration has come.
        journal: examples -> what an interrupted run has done with them.

    Raises:
        RecipeError: options that exclude each other, or need data that are not given.
        Prune2OnnxError: the data do not fit, or no trial was within a limit.
    """
    if evaluate is None and options.inputs.has_examples:
        data = computing.data
        return _Calibrated(
            model, options, data, nbytes_of, computing, progress, journal(data)
        ).result()
    _require_no_examples(options)
    return _approximated(model, options, computing, evaluate)


def _require_no_examples(options: PackOptions) -> None:
    """Without data nothing can be held out, so that some budgets cannot be kept."""
    blocks = "x".join(map(str, options.blocks or ()))
    asked = {
        "--target-size": options.target_size,
        "--max-error": options.max_error,
        "--max-drop": options.max_drop,
        "--curve": options.curve or None,
        f"--prune {':'.join(map(str, options.pattern or ()))}": options.pattern,
        f"--prune {blocks}:{options.prune or 0:g}": options.blocks,
        f"--prune channels:{options.channels or 0:g}": options.channels,
    }
    for name, value in asked.items():
        if value is not None:
            raise RecipeError(
                f"{name} needs examples; give --data, a data set as for compress, or npz:FILE with "
                "an array per input"
            )


def _approximated(
    model: ModelProto,
    options: PackOptions,
    computing: Computing,
    evaluate: Callable[[ModelProto], float] | None,
) -> Lossy:
    if options.bits is not None and options.max_rel_error is not None:
        raise RecipeError("--bits and --max-rel-error: give one of them, it determines the other")
    if evaluate is None and options.inputs.data is not None:
        evaluate = computing.error
    if evaluate is not None and options.max_rel_error is not None:
        made = search(
            model,
            evaluate,
            options.max_rel_error,
            form=computing.model_of,
            prune=options.prune,
            on_grids=computing.on_grids,
        )
    else:
        made = approximate(
            model,
            bits=options.bits,
            prune=options.prune,
            max_rel_error=options.max_rel_error,
            on_grids=computing.on_grids,
        )
        if evaluate is not None:
            made = replace(made, output_error=evaluate(computing.model_of(made)))
    return Lossy(made.model, made.quantized, made.notes, _errors(made), _hows(made))


def _errors(made: Approximation) -> dict[str, float]:
    return {
        row.name: row.relative_error if row.layer_error is None else row.layer_error
        for row in made.rows
    }


def _hows(made: Approximation) -> dict[str, str]:
    return {row.name: row.how for row in made.rows if row.how != "kept"}


def calibrate(
    model: ModelProto,
    batches: Sequence[Inputs],
    held_out: Sequence[Inputs],
    *,
    bits: float | None = None,
    prune: float | tuple[int, int] | None = None,
    blocks: tuple[int, int] | None = None,
    channels: float | None = None,
    max_error: float | None = None,
) -> Lossy:
    """Rounds and prunes weights with examples, without training.

    `pack(made.model, quantized=made.quantized)` then writes them in few bytes.

    Args:
        model: normalized, as `pack` gives it back with `unpack`, or a plain export.
        batches: inputs by name, to calibrate with: a few hundred examples.
        held_out: others, on which outputs are compared with the model's own.
        bits: of each weight on average, 1 to 8.
        prune: fraction of the weights to make zero, or (n, m): n of m neighbours stay.
        blocks: outputs and inputs whose weights become zero together, with a fraction.
        channels: fraction of the weights that goes first, with whole channels and neurons.
        max_error: largest relative error of the outputs on `held_out`.

    Raises:
        RecipeError: nothing is asked for, or a number is out of range.
        Prune2OnnxError: the model is packed, or does not run on the examples.
    """
    options = PackOptions(
        bits=bits,
        prune=None if isinstance(prune, tuple) else prune,
        pattern=prune if isinstance(prune, tuple) else None,
        blocks=blocks,
        channels=channels,
        max_error=max_error,
    )
    if not options.lossy:
        raise RecipeError("nothing to do: give bits, a fraction to prune or a largest error")
    data = CalibrationData(list(batches), output_error(model, list(held_out)))
    computing = Computing(model, options)
    return _Calibrated(model, options, data, lambda form: nbytes(form.model), computing).result()


def _size(model: ModelProto) -> int:
    """Elements of all weights of layers."""
    return sum(layer.size for layer in structure(model).layers)


@dataclass
class _Calibrated:
    """A model that is calibrated until its budget is met."""

    model: ModelProto
    options: PackOptions
    data: CalibrationData
    nbytes_of: Callable[[Narrowed], int]
    computing: Computing
    progress: Progress = lambda name, done, total: None
    journal: Journal = field(default_factory=lambda: Journal(None))
    _pass: int = field(default=0, init=False)
    _last: tuple[float, Approximation] | None = field(default=None, init=False)
    _removed: tuple[str, ...] = field(default=(), init=False)

    def result(self) -> Lossy:
        options, data = self.options, self.data
        self._check()
        if options.channels is not None:
            self._remove_channels(options.channels)
        goals = self._budgets()
        if not goals:  # only zeros, or only blocks
            tried = [self._trial(_NO_PRICE if self.computing.in_blocks else 0.0)]
        else:
            start = self._calibration.slope(options.bits or _START_BITS)
            tried = budget.search(self._trial, start, goals[0], _TRIES)
            for other in goals[1:]:
                best = self._best(tried, goals[:1])
                if other.excess(best) > 0:
                    tried += budget.search(self._trial, best.slope, other, _TRIES)
        best = self._best(tried, goals)
        made = replace(self._made(best.slope), output_error=best.error)
        curve = self._curve(best) if options.curve and best.slope else ()
        notes = [*self._removed, *made.notes]
        if best.drop is not None:
            notes.append(
                f"{best.drop:+.2f} points of error on {data.labelled} held-out examples, of which "
                f"one is {100 / data.labelled:.2g} points"
            )
        if self.journal.restored:
            notes.append("continued: an interrupted run had done a part of this")
        left = [row.name for row in made.rows if row.how in ("grid", "channel grid")]
        if left:
            notes.append(
                f"{len(left)} weights were rounded without examples, {left[0]} the first: what "
                "reads them is not known, or no example reaches it"
            )
        return Lossy(
            made.model,
            made.quantized,
            tuple(notes),
            _errors(made),
            _hows(made),
            self._goals(best),
            curve,
        )

    def _check(self) -> None:
        options = self.options
        if options.bits is not None and options.target_size is not None:
            raise RecipeError("--bits and --target-size: give one of them, it determines the other")
        check_limits(bits=options.bits, prune=options.prune, error=self._error)
        check_limits(prune=options.channels)
        if options.max_drop is not None and self.data.wrong is None:
            raise RecipeError(
                f"--max-drop {options.max_drop:g} counts wrong labels, and --data "
                f"{options.inputs.data} has none; limit the error of the outputs by --max-error"
            )

    @property
    def _error(self) -> float | None:
        """The largest error of the outputs that is asked for."""
        options = self.options
        return options.max_rel_error if options.max_error is None else options.max_error

    @cached_property
    def _calibration(self) -> Calibration:
        fraction = self.options.prune or 0.0
        if self.options.pattern is not None:
            fraction = 1 - self.options.pattern[0] / self.options.pattern[1]
        return self._measured(Pattern(fraction, self.options.pattern, blocks=self.options.blocks))

    def _measured(self, pattern: Pattern) -> Calibration:
        found = Calibration(
            self.model,
            self.data.batches,
            run_all,
            pattern=pattern,
            on_grids=self.computing.on_grids,
            in_blocks=self.computing.in_blocks,
            progress=self._told,
            journal=self.journal,
        )
        found.measure(output_error(self.model, self.data.batches[:1]))
        return found

    def _remove_channels(self, fraction: float) -> None:
        """Takes whole channels away; what reads them is refit."""
        before = _size(self.model)
        made = self._measured(Pattern(channels=fraction)).at(None)
        shrunk = shrink(made.model, multiple=BLOCK)
        self.model = shrunk.model
        part = 1 - _size(self.model) / max(before, 1)
        note = f"{shrunk.removed:,} channels and neurons are gone, with {part:.0%} of the weights"
        if part < 0.95 * fraction:
            note += f", not {fraction:.0%}: the others must stay, or cannot be followed"
        self._removed = (note,)

    @cached_property
    def _wrong(self) -> float:
        """Percent of held-out examples that the model gets wrong before it changes."""
        return self.data.wrong(self.model) if self.data.wrong is not None else 0.0

    def _made(self, slope: float) -> Approximation:
        """The model at a slope; the last one is kept, since models are large."""
        if self._last is None or self._last[0] != slope:
            self._pass += 1
            self._last = None
            self._last = slope, self._calibration.at(slope or None)
        return self._last[1]

    def _trial(self, slope: float) -> budget.Trial:
        known = self.journal.get("trial", slope)
        if known is not None:
            return budget.Trial(**{name: number.item() for name, number in known.items()})
        trial = self._tried(slope)
        given = {name: number for name, number in asdict(trial).items() if number is not None}
        self.journal.put({name: np.array(number) for name, number in given.items()}, "trial", slope)
        return trial

    def _tried(self, slope: float) -> budget.Trial:
        made = self._made(slope)
        form = self.computing.of(made.model, made.quantized)
        sized = self.options.target_size is not None or self.options.curve
        size = self.nbytes_of(form) if sized else made.nbytes
        wrong = self.data.wrong
        drop = None if wrong is None else wrong(form.model) - self._wrong
        return budget.Trial(slope, made.bits, size, self.data.error(form.model), drop)

    def _told(self, name: str, done: int, total: int) -> None:
        self.progress(f"calibrating, pass {self._pass}: {name}", done, total)

    def _budgets(self) -> list[budget.Budget]:
        options = self.options
        found = []
        if options.target_size is not None:
            found.append(budget.of_size(options.target_size))
        if options.bits is not None:
            found.append(budget.of_bits(options.bits))
        if self._error is not None:
            found.append(budget.of_error(self._error))
        if options.max_drop is not None:
            found.append(budget.of_drop(options.max_drop))
        return found

    def _best(self, tried: list[budget.Trial], goals: list[budget.Budget]) -> budget.Trial:
        """Within all budgets, the fewest bytes; of a size or of bits alone, the least error."""
        met = [one for one in tried if all(goal.excess(one) <= 0 for goal in goals)]
        if not met:
            return min(tried, key=lambda one: max(goal.excess(one) for goal in goals))
        if self._error is None and self.options.max_drop is None:
            return min(met, key=lambda one: one.error)
        return min(met, key=lambda one: one.nbytes)

    def _goals(self, best: budget.Trial) -> tuple[Goal, ...]:
        found = []
        if self.options.target_size is not None:
            found.append(Goal("size", float(self.options.target_size), float(best.nbytes)))
        if self._error is not None:
            found.append(Goal("error of the outputs", self._error, best.error))
        if self.options.max_drop is not None:
            found.append(Goal("drop", self.options.max_drop, best.drop or 0.0))
        return tuple(found)

    def _curve(self, best: budget.Trial) -> tuple[CurvePoint, ...]:
        trials = [
            best if not octaves else self._trial(best.slope * 2.0**octaves) for octaves in _CURVE
        ]
        points = [CurvePoint(one.nbytes, one.error, one.drop, one is best) for one in trials]
        return tuple(sorted(points, key=lambda point: point.nbytes))
