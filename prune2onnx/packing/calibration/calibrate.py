"""A trained network compressed with a few examples, without training, layer by layer.

Each layer sees what the compressed layers before it hand on, and aims at what the original layer
gave for the original inputs: W* is the least-squares solution of X~ W* = X W (a refit, which
compensates for the errors before it), and W* is then rounded, or pruned, one input after the other
(`rounding`). A bias takes up the difference of means. How much error a layer may add is one slope
for all layers, as without data (`approximation`): the relative squared error of a layer's outputs
that a bit has to save.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.protobuf import tensor as stored
from prune2onnx.graph.tensors import array_of
from prune2onnx.packing.approximation.candidates import Written
from prune2onnx.packing.approximation.subject import Approximation, Subject
from prune2onnx.packing.calibration.channels import Read, channels_in, read_by, refit_inputs
from prune2onnx.packing.calibration.grids import Grid
from prune2onnx.packing.calibration.journal import Journal
from prune2onnx.packing.calibration.layers import Layer, Use, layers_of
from prune2onnx.packing.calibration.made import Made
from prune2onnx.packing.calibration.moments import (
    DAMPING,
    PRUNING,
    Moments,
    Sums,
    joined,
    sums,
)
from prune2onnx.packing.calibration.rounding import (
    Factor,
    looked_up,
    pruned,
    refit,
    rounded,
    step_for,
)
from prune2onnx.packing.calibration.walk import Run, Values, Walk
from prune2onnx.packing.calibration.zeros import Pattern
from prune2onnx.packing.compute.codes import each_input, in_blocks
from prune2onnx.packing.pack import Progress
from prune2onnx.shrinking.costs import structure

_ROUNDS = 2  # of choosing codes: their prices are those of the codes before
_MEASURED = 32  # most layers, or runs of layers, whose influence on the outputs is measured
_GRIDS = ("grid", "channel grid")


class Calibration:
    """A model that is compressed with examples.

    Args:
        model: unpacked, normalized, external data loaded; not modified.
        batches: inputs by name, for each batch of examples.
        run: runs a model on batches.
        pattern: which weights become zero.
        on_grids: weights that are whole multiples of a scale for each output.
        in_blocks: those that are codes of 4 bits, with a scale for each block of inputs.
        progress: is told how far a pass has come.
        journal: what an interrupted run has done is taken from it.

    Raises:
        Prune2OnnxError: the model is packed.
    """

    def __init__(
        self,
        model: ModelProto,
        batches: Sequence[Values],
        run: Run,
        *,
        pattern: Pattern | None = None,
        on_grids: Collection[str] = (),
        in_blocks: Collection[str] = (),
        progress: Progress = lambda name, done, total: None,
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal or Journal(None)
        self._subject = Subject(model, None, on_grids)
        self._batches, self._run, self._progress = batches, run, progress
        self._pattern, self._blocks = pattern or Pattern(), frozenset(in_blocks)
        self._layers = layers_of(self._subject)
        self._fractions: dict[str, float] = {}
        self._inputs: dict[str, NDArray[np.bool_]] = {}  # those that stay

    @property
    def names(self) -> list[str]:
        """The weights that examples are used for."""
        return [layer.name for layer in self._layers]

    def measure(self, evaluate: Callable[[ModelProto], float], bits: float = 3.5) -> None:
        """Compares how much errors of each weight change the outputs, for slopes.

        Later layers compensate for errors of early ones in part, which a measurement of each
        alone does not see: so the importance is the geometric mean of what is measured and of 1.

        Args:
            evaluate: a model -> the relative error of its outputs.
            bits: for each weight, at which errors are compared.
        """
        subject = self._subject
        chosen = subject.within(bits)
        numbers = itertools.count()

        def measured(model: ModelProto) -> float:
            name = ("importance", self._pattern, next(numbers))
            return self._journal.number(lambda: evaluate(model), *name)

        each = max(1, -(-len(chosen) // _MEASURED))
        names = list(dict.fromkeys([*self.names, *chosen]))
        runs = (
            {name: chosen[name] for name in names[begin : begin + each]}
            for begin in range(0, len(names), each)
        )
        for run, squared, own in subject.alone(measured, runs):
            if squared > 0:
                subject.importance |= dict.fromkeys(run, math.sqrt(squared / own))

    def slope(self, bits: float) -> float:
        """About the slope at which weights take so many bits each."""
        return self._subject.slope_for(bits)

    def at(self, slope: float | None) -> Approximation:
        """The model in which each bit saves so much error; None: weights are only made zero.

        Deterministic for the same batches.
        """
        subject = self._subject
        written: dict[str, Written] = {}
        hows: dict[str, str] = {}
        biases: dict[str, NDArray[Any]] = {}
        tensors = {tensor.name: tensor for tensor in subject.model.graph.initializer}
        current = dict(tensors)
        if slope is None and not self._pattern.makes_zeros:
            return subject.result({}, halve=0.0)
        if self._pattern.fraction and not self._fractions:
            self._fractions = self._spread_zeros()
        if self._pattern.channels and not self._inputs:
            self._inputs = self._spread_channels()
        calibrated = set(self.names)
        for name, weight in subject.weights.items():
            if slope is not None and name not in calibrated:
                candidate = subject.best_at(name, slope)
                written[name], hows[name] = weight.write(candidate), candidate.how
                current[name] = _with(tensors[name], written[name].array)
        errors: dict[str, float] = {}
        total = sum(layer.weight.array.nbytes for layer in self._layers)
        done = 0
        with (
            Walk(subject.model, current, self._batches, self._run) as now,
            Walk(subject.model, tensors, self._batches, self._run) as original,
        ):
            known: dict[str, tuple[Made, NDArray[np.float64] | None]] = {}

            def is_known(layer: Layer) -> bool:
                known.update(self._restored(layer, slope))
                return layer.name in known

            for layer, found in self._visited(now, original, is_known):
                before = known.pop(layer.name, None)
                if before is not None:
                    made, bias = before
                else:
                    made, bias = self._alone(layer, slope), None
                    if found is not None:
                        made, bias = self._compressed(layer, found, slope)
                    self._keep(layer, slope, made, bias)
                if made.error is not None:
                    errors[layer.name] = math.sqrt(max(made.error, 0.0))
                written[layer.name], hows[layer.name] = made.written, made.how
                current[layer.name] = _with(tensors[layer.name], made.written.array)
                if bias is not None:
                    first = array_of(tensors[layer.bias])
                    biases[layer.bias] = layer.with_bias(first, bias)
                    current[layer.bias] = _with(tensors[layer.bias], biases[layer.bias])
                done += layer.weight.array.nbytes
                self._progress(layer.name, done, total)
        result = subject.result(written, hows, halve=math.inf if slope else 0.0, changed=biases)
        rows = (replace(row, layer_error=errors.get(row.name)) for row in result.rows)
        return replace(result, rows=tuple(rows))

    def _keep(
        self, layer: Layer, slope: float | None, made: Made, bias: NDArray[np.float64] | None
    ) -> None:
        arrays = made.arrays() | ({} if bias is None else {"shift": bias})
        self._journal.put(arrays, "layer", self._pattern, slope, layer.name)

    def _restored(
        self, layer: Layer, slope: float | None
    ) -> dict[str, tuple[Made, NDArray[np.float64] | None]]:
        """A layer as an interrupted run has made it, by its name; empty where it has not."""
        found = self._journal.get("layer", self._pattern, slope, layer.name)
        return {} if found is None else {layer.name: (Made.of(found), found.get("shift"))}

    # Layers

    def _groups(self, walk: Walk) -> list[tuple[int, list[Layer]]]:
        """Places of the graph, and the layers whose inputs are there."""
        left = list(self._layers)
        found = []
        makers = walk.makers
        while left:
            at = left[0].uses[0].at
            inside = [
                one
                for one, use in ((each, each.uses[0]) for each in left)
                if use.at == at or (not use.path and makers.get(use.source, -1) < at)
            ]
            left = [one for one in left if one not in inside]
            found.append((at, inside))
        return found

    def _visited(
        self, now: Walk, original: Walk, is_known: Callable[[Layer], bool] = lambda layer: False
    ) -> Iterator[tuple[Layer, Moments | None]]:
        """Each layer when its inputs are there, with their moments.

        None where it has no inputs, or is known. Nodes are run in the same pieces in any case, so
        that rounding is the same.
        """
        for at, layers in self._groups(now):
            now.advance(at)
            original.advance(at)
            shared: dict[Hashable, Moments | None] = {}
            for layer in layers:
                if is_known(layer):
                    yield layer, None
                    continue
                if layer.view not in shared:
                    parts = (self._seen(layer, use, at, now, original) for use in layer.uses)
                    met = [part for part in parts if part is not None]
                    shared[layer.view] = joined(layer, met) if met else None
                yield layer, shared[layer.view]

    def _seen(self, layer: Layer, use: Use, at: int, now: Walk, original: Walk) -> Sums | None:
        """What one reader sees; one that comes later, in the original network."""
        if use.at > at and (use.path or not now.has(use.source)):
            return self._ahead[layer.name, use.number]
        return _sums(layer, use, now, original)

    @cached_property
    def _ahead(self) -> dict[tuple[str, int], Sums | None]:
        """What the later readers of each weight see in the original network."""
        later = [(use, layer) for layer in self._layers for use in layer.uses[1:]]
        found: dict[tuple[str, int], Sums | None] = {}
        tensors = {tensor.name: tensor for tensor in self._subject.model.graph.initializer}
        with Walk(self._subject.model, tensors, self._batches, self._run) as walk:
            for use, layer in sorted(later, key=lambda one: one[0].number):
                walk.advance(use.at)
                found[layer.name, use.number] = _sums(layer, use, walk, walk)
        return found

    def _compressed(
        self, layer: Layer, found: Moments, slope: float | None
    ) -> tuple[Made, NDArray[np.float64] | None]:
        """A layer's weight, and what is added to its bias."""
        first = layer.values()
        if layer.is_table and layer.name in self._blocks:
            return self._table_in_blocks(layer, first[0].astype(np.float32)), None
        if layer.is_table:
            return self._looked_up(layer, first[0], found.own[0], slope), None
        hessian = found.damped(PRUNING if self._pattern.makes_zeros else DAMPING)
        target = first + np.linalg.solve(hessian, (found.cross - found.own) @ first)
        # what the outputs' error is relative to
        power = _product(first, found.own, first)
        if not power > 0:
            return self._alone(layer, slope), None
        made = self._rounded(layer, target, hessian, power, slope)
        if not layer.bias:
            return made, None
        now = layer.values_of(made.written.array)
        shift = np.einsum("gi,gio->go", found.original_mean, first)
        shift -= np.einsum("gi,gio->go", found.mean, now)
        return made, shift.reshape(-1)

    def _kept(self, layer: Layer) -> Written:
        return layer.stored.write(layer.stored.candidates[-1])

    def _alone(self, layer: Layer, slope: float | None) -> Made:
        """A weight without examples: they never reach it, or give it zeros."""
        if slope is None:
            return Made(self._kept(layer), "kept")
        best = self._subject.best_at(layer.name, slope)
        return Made(layer.stored.write(best), best.how)

    def _rounded(
        self,
        layer: Layer,
        target: NDArray[np.float64],
        hessian: NDArray[np.float64],
        power: float,
        slope: float | None,
    ) -> Made:
        factors = [Factor.of(one, in_order=self._pattern.has_neighbours) for one in hessian]
        stay: list[NDArray[np.bool_] | None] = [None] * layer.groups
        values = [one.astype(np.float32) for one in target]
        if self._pattern.fraction:
            fraction = self._fractions.get(layer.name, 0.0)
            for group, factor in enumerate(factors):
                chosen = self._pattern.chosen_in(target[group], factor, fraction)
                values[group], found = pruned(target[group], factor, chosen, self._pattern.together)
                stay[group] = found
                values[group] = refit(target[group], hessian[group], values[group], found)
        elif layer.name in self._inputs:
            inputs = self._inputs[layer.name]
            values = list(refit_inputs(target, hessian, inputs).astype(np.float32))
            stay = [np.broadcast_to(one[:, None], layer.shape[1:]) for one in inputs]
        if slope is None and layer.scale is None:
            off = np.stack(values) - target
            return self._as_floats(layer, values, _product(off, hessian, off) / power)
        price, step = 0.0, 0.0
        if slope is not None:
            price = slope * power / self._subject.importance[layer.name]
            step = step_for(np.concatenate([factor.spread for factor in factors]), price)
        if layer.name in self._blocks:
            blocked = self._blocked(layer, values[0], factors[0], stay[0], price)
            off = target - layer.values_of(blocked.array)
            return Made(blocked, "4-bit blocks", _product(off, hessian, off) / power)
        most = np.stack([np.abs(one).max(0) for one in values])
        grid = Grid.of(layer, step, most)
        codes = grid.nearest(np.stack(values))
        for _ in range(_ROUNDS):
            codes = np.stack(
                [
                    rounded(
                        target[group],
                        factor,
                        grid.steps[group],
                        price,
                        codes,
                        stay[group],
                        (grid.low[group], grid.high[group]),
                    )
                    for group, factor in enumerate(factors)
                ]
            )
        steps = grid.steps
        whole: NDArray[Any] = codes * steps[:, None].astype(np.float64)
        if not np.ptp(steps) and layer.scale is None:  # the step that fits best
            fit = _product(target, hessian, whole)
            norm = _product(whole, hessian, whole)
            scale = fit / norm if fit > 0 and norm > 0 else 1.0
            steps, whole = (steps * scale).astype(np.float32), whole * scale
        off = target - whole
        error = _product(off, hessian, off) / power
        written = layer.written(layer.as_rows(codes), steps.reshape(-1), grid.parameter)
        made = Made(written, "calibrated grid", error)
        return made if slope is None else self._cheaper(layer, made, slope)

    def _blocked(
        self,
        layer: Layer,
        values: NDArray[np.float32],
        factor: Factor,
        stay: NDArray[np.bool_] | None,
        price: float,
    ) -> Written:
        """Codes of 4 bits; arguments as in `_rounded`, of the only group."""
        first, scales = in_blocks(np.ascontiguousarray(values.T))
        steps = np.ascontiguousarray(each_input(scales, len(values)).T)
        codes = first.T.astype(np.int16)
        for _ in range(_ROUNDS):
            codes = rounded(values, factor, steps, price, codes, stay, (-8, 7))
        return layer.stored.in_blocks(layer.as_rows(codes[None]), layer.as_rows(steps[None]))

    def _table_in_blocks(self, layer: Layer, table: NDArray[np.float32]) -> Made:
        codes, scales = in_blocks(table)
        steps = each_input(scales, table.shape[1])
        made = layer.stored.in_blocks(layer.as_rows(codes[None]), layer.as_rows(steps[None]))
        off = float(np.square(table - codes * steps).sum())
        return Made(made, "4-bit blocks", off / max(float(np.square(table).sum()), 1e-30))

    def _cheaper(self, layer: Layer, made: Made, slope: float) -> Made:
        """What takes the least error and bits: codes, or more precision than they have."""
        if self._pattern.makes_zeros or layer.stored.only_grids:
            return made
        importance = self._subject.importance[layer.name]
        *others, exact = layer.stored.candidates
        others = [one for one in others if one.how not in (*_GRIDS, "codebook")] + [exact]
        best = min(others, key=lambda one: importance * one.error + slope * one.bits)
        cost = importance * (made.error or 0.0) + slope * made.written.bits
        if importance * best.error + slope * best.bits < cost:
            return Made(layer.stored.write(best), best.how, best.error)
        return made

    def _as_floats(self, layer: Layer, values: Sequence[NDArray[np.float32]], error: float) -> Made:
        rows = layer.as_rows(np.stack(values))
        array = layer.restored(layer.weight.unfolded(rows).astype(layer.weight.array.dtype))
        return Made(replace(self._kept(layer), array=array, quantized=None), "pruned", error)

    def _looked_up(
        self,
        layer: Layer,
        first: NDArray[np.float64],
        frequency: NDArray[np.float64],
        slope: float | None,
    ) -> Made:
        """A table, in which rows that are looked up often may have less error."""
        power = float(np.square(first).sum(1) @ frequency)
        if slope is None or not power > 0:
            return self._alone(layer, slope)
        price = slope * power / self._subject.importance[layer.name]
        step = step_for(frequency, price, coarser=1.0)
        grid = Grid.of(layer, step, np.abs(first).max(1)[None], table=True)
        steps = grid.steps[0]
        codes = grid.nearest(first.T[None])[0].T
        bounds = grid.low[0].T, grid.high[0].T
        for _ in range(_ROUNDS):
            codes = looked_up(first, frequency, steps, price, codes, bounds)
        error = float(np.square(first - codes * steps[:, None]).sum(1) @ frequency) / power
        written = layer.written(layer.as_rows(codes[None]), steps, grid.parameter)
        return self._cheaper(layer, Made(written, "calibrated grid", error), slope)

    # Zeros

    def _spread_channels(self) -> dict[str, NDArray[np.bool_]]:
        """The inputs of each layer that stay, where some go."""
        found = structure(self._subject.model)
        costs = {cost.weight: cost for cost in found.layers}
        tensors = {tensor.name: tensor for tensor in self._subject.model.graph.initializer}
        reads: dict[str, Read] = {}
        with Walk(self._subject.model, tensors, self._batches, self._run) as walk:
            for layer, seen in self._visited(walk, walk):
                if seen is not None and layer.name in costs:
                    importance = self._subject.importance[layer.name]
                    read = read_by(layer, seen, costs[layer.name], importance)
                    reads |= {} if read is None else {layer.name: read}
        gone = channels_in(found, reads, self._pattern.channels)
        return {
            name: ~gone[read.columns] for name, read in reads.items() if gone[read.columns].any()
        }

    def _spread_zeros(self) -> dict[str, float]:
        """The fraction of each layer's weights that becomes zero: those with the least effect."""
        if self._pattern.keep is not None:
            return dict.fromkeys(self.names, self._pattern.fraction)
        tensors = {tensor.name: tensor for tensor in self._subject.model.graph.initializer}
        effects: dict[str, NDArray[np.float32]] = {}
        with Walk(self._subject.model, tensors, self._batches, self._run) as walk:
            for layer, found in self._visited(walk, walk):
                if not layer.is_table and found is not None:
                    effects[layer.name] = self._effects(layer, found)
        every = np.sort(np.concatenate([np.zeros(0, np.float32), *effects.values()]))
        if not every.size:
            return {}
        limit = every[min(int(self._pattern.fraction * every.size), every.size - 1)]
        return {name: float((own < limit).mean()) for name, own in effects.items()}

    def _effects(self, layer: Layer, found: Moments) -> NDArray[np.float32]:
        """What each weight does to the outputs, as far as others cannot take its place."""
        first = layer.values()
        power = _product(first, found.own, first)
        inverse = np.linalg.inv(found.damped(PRUNING))
        effect = np.square(first) / np.diagonal(inverse, axis1=1, axis2=2)[:, :, None]
        scale = self._subject.importance[layer.name] / power if power > 0 else 0.0
        return self._pattern.shared((effect * scale).astype(np.float32)).reshape(-1)


def _sums(layer: Layer, use: Use, now: Walk, original: Walk) -> Sums | None:
    """The moments of one reader; None where it is never reached, or differs from step to step."""
    try:
        values = now.seen(use)
        return sums(layer, use, values, values if original is now else original.seen(use))
    except Prune2OnnxError:
        if not use.path:
            raise
        return None  # a loop whose values have different shapes


def _product(a: NDArray[Any], moments: NDArray[np.float64], b: NDArray[Any]) -> float:
    """The sum over outputs of a' H b; all are [groups, inputs, ...]."""
    return float((a * (moments @ b)).sum())


def _with(tensor: TensorProto, array: NDArray[Any]) -> TensorProto:
    """An initializer with other values."""
    return stored(tensor.name, array, tensor.data_type)
