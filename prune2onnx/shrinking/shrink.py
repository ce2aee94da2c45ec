"""Exact removal of dead channels, neurons and attention heads from any ONNX graph.

A channel is dead where no layer reads it (all its weights in the next layers are zero), or where
it is constant for every input and every reader can absorb the constant into its bias. It is removed
from all weights along which it lies, and its constant is propagated: outputs are equal to rounding.
A channel that cannot be removed is kept, with the reason. A dead branch is removed whole.

1. `flow`, `rules`: which channels are coupled, which are constant, which need which; an unknown
   operator keeps all channels that it reads.
2. `liveness`: which channels are dead, and which can be removed.
3. `cut`: zeros and constants first (`propagate_constants` does only this), then smaller weights.
4. `branches`: sums with zero, and what was computed for them.
5. `shared_biases`: during all this each layer has its own bias, also where the file shares one.
6. `costs`: what each layer costs, and which channels are coupled, for channel pruning.
7. `unused_inputs`: inputs of the graph that its first layers do not use, on request.

Weights are initializers that are not inputs of the graph, and Constant nodes; `graph.normalize`
brings other models to that form. Kept whole: quantised weights, weights that are computed (also
by a Transpose), all that a subgraph, a function or an operator of another domain reads, and models
of opsets before 7. A MatMul absorbs a constant only if an Add of an initializer follows; none is
added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.graph.rewritten import Changes, Rewritten
from prune2onnx.graph.shapes import shapes_of
from prune2onnx.shrinking import unused_inputs
from prune2onnx.shrinking.branches import bypass
from prune2onnx.shrinking.costs import multiply_adds, structure
from prune2onnx.shrinking.cut import cut, with_constants_propagated
from prune2onnx.shrinking.flow import FLOATS, Array
from prune2onnx.shrinking.liveness import liveness_of
from prune2onnx.shrinking.rules import trace
from prune2onnx.shrinking.shared_biases import tie, untie

__all__ = [
    "Row",
    "Shrunk",
    "multiply_adds",
    "propagate_constants",
    "shapes_of",
    "shrink",
    "structure",
]


@dataclass(frozen=True)
class Row:
    """What became of one weight.

    Attributes:
        name: of the initializer.
        before: its shape; () for one that was added.
        after: its shape; `before` where only constants were added, () where it was removed.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Shrunk(Rewritten):
    """A model without its dead channels, equal to the one given where none could be removed.

    `reasons` are those of dead or constant channels that are kept: "weight[channels]" -> why.

    Attributes:
        rows: one for each weight that changed, in the order of the model, new ones last.
        removed: output channels and neurons that were removed from layers.
        bypassed: sums that were removed, with the branches that added nothing to them.
    """

    rows: tuple[Row, ...] = ()
    removed: int = 0
    bypassed: int = 0


def shrink(model: ModelProto, *, gather_inputs: bool = False, multiple: int = 1) -> Shrunk:
    """Removes dead channels and neurons; outputs stay equal to rounding.

    `shrink(shrink(m).model).model == shrink(m).model`. Inputs and outputs of the graph keep their
    names, types and shapes, weights their names and types. A dead layer keeps one channel, of
    zeros, unless it ends a branch that can be removed.

    Args:
        model: not modified; external data loaded.
        gather_inputs: whether to add a Gather that leaves out inputs of the graph which its first
            layers do not use; the node and its indices take space, so compare the sizes.
        multiple: convolutions keep a number of channels that is a multiple of this, dead ones
            among them, since kernels compute that many at a time.

    Raises:
        Prune2OnnxError: external data are not loaded, or a tensor is damaged.
    """
    result = ModelProto()
    result.CopyFrom(model)
    copies = untie(result)
    removed = bypassed = 0
    changed, going = False, True
    while going:
        flow = trace(result)
        liveness = liveness_of(flow, multiple)
        going = bool(liveness.removed.any())
        if going:
            removed += sum(int(liveness.removed[layer.channels.ids].sum()) for layer in flow.layers)
            cut(flow, liveness)
        elif sums := bypass(flow):
            bypassed += sums
            going = True
        changed |= going
    if not changed:
        result.CopyFrom(model)
    tie(result, copies)
    if gather_inputs:
        unused_inputs.gather_inputs(result, Changes())
    notes = (f"{removed:,} dead channels and neurons removed",)
    return Shrunk(result, notes, dict(liveness.kept), _rows(model, result), removed, bypassed)


def _rows(old: ModelProto, new: ModelProto) -> tuple[Row, ...]:
    before, after = (
        {t.name: t for t in model.graph.initializer if t.data_type in FLOATS}
        for model in (old, new)
    )
    shapes = {
        name: tuple(tuple(model[name].dims) if name in model else () for model in (before, after))
        for name in (*before, *(name for name in after if name not in before))
        if before.get(name) != after.get(name)
    }
    return tuple(Row(name, *shape) for name, shape in shapes.items())


def propagate_constants(model: ModelProto) -> dict[str, NDArray[np.floating]]:
    """The first step of `shrink` alone: values for which the same channels are dead and zero.

    Weights and biases of dead channels become zero, and their constants move to the biases of their
    readers, so that training can go on from there. A constant whose reader has no bias stays, with
    its channel; `shrink` adds such a bias.

    Args:
        model: not modified; external data loaded.

    Returns:
        Initializers whose values change, by name, with their shapes and types.

    Raises:
        Prune2OnnxError: external data are not loaded, or a tensor is damaged.
    """
    flow = trace(model, may_add=False)
    values: dict[str, Array] = with_constants_propagated(flow, liveness_of(flow).dead)
    names = {tensor.name for tensor in model.graph.initializer}
    return {name: array for name, array in values.items() if name in names}
