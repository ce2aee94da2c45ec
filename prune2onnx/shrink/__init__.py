"""Exact removal of dead channels and neurons from any ONNX graph.

A channel is dead where nobody reads it (all its weights in the next layers are zero), or where it
is one constant for every input and every reader can take that constant into its bias. It goes from
all weights along which it lies, and what it sent on stays: outputs are equal to rounding. One that
cannot go is kept, with the reason. A branch of which nothing is alive goes whole.

1. `flow`, `rules`: which channels are one, what is constant, who needs whom; an operator that is
   not known keeps all of what it reads.
2. `fate`: who is dead, who can go.
3. `cut`: zeros and constants first (`settle` is this alone), then smaller weights.
4. `branches`: sums with nothing but zero, and what was computed for them.
5. `ties`: while that goes on, each layer has its own bias, also where the file shares one.
6. `costs`: what each layer costs, and which channels are one, for those who prune them.
7. `inputs`: what the first layers do not use of the graph's inputs, where the caller wants it.

Weights are seen in initializers that are no inputs of the graph, and in Constant nodes; `intake`
brings other models to that form. Kept whole: quantised weights, weights that are computed (also
by a Transpose), all that a subgraph, a function or an operator of another domain reads, operator
sets older than 7. A MatMul takes a constant only if an Add of an initializer follows; none is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.shrink import inputs
from prune2onnx.shrink.branches import bypass
from prune2onnx.shrink.costs import multiply_adds, shapes_of, structure
from prune2onnx.shrink.cut import cut, settled
from prune2onnx.shrink.fate import decide
from prune2onnx.shrink.flow import FLOATS, Array
from prune2onnx.shrink.rules import trace
from prune2onnx.shrink.ties import tie, untie

__all__ = ["Row", "Shrunk", "multiply_adds", "settle", "shapes_of", "shrink", "structure"]


@dataclass(frozen=True)
class Row:
    """What became of one weight.

    Attributes:
        name: of the initializer.
        before: its shape; () for one that was added.
        after: its shape; equal to `before` where only constants were added, () where it went whole.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Shrunk:
    """A model without its dead channels.

    Attributes:
        model: equal to the one given, byte for byte, where nothing could go.
        rows: one for each weight that changed, in the order of the model, new ones last.
        kept: (what, reason) of dead or constant channels that are still there.
        removed: output channels and neurons that were taken from layers.
        bypassed: sums that went, with the branches that added nothing to them.
    """

    model: ModelProto
    rows: tuple[Row, ...]
    kept: tuple[tuple[str, str], ...]
    removed: int
    bypassed: int


def shrink(model: ModelProto, *, gather_inputs: bool = False, multiple: int = 1) -> Shrunk:
    """Removes dead channels and neurons; outputs stay equal to rounding.

    `shrink(shrink(m).model).model == shrink(m).model`. Inputs and outputs of the graph keep their
    names, types and shapes, weights their names and types. A layer of which nothing is alive keeps
    one channel, of zeros, unless it is a branch whose sum can do without it.

    Args:
        model: not modified; external data loaded.
        gather_inputs: whether a Gather may leave out inputs of the graph that its first layers do
            not use; that adds a node and its indices, so compare the sizes.
        multiple: of which convolutions keep their channels, dead ones among them, since kernels
            compute as many at a time.

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
        fate = decide(flow, multiple)
        going = bool(fate.gone.any())
        if going:
            removed += sum(int(fate.gone[layer.channels.ids].sum()) for layer in flow.layers)
            cut(flow, fate)
        elif sums := bypass(flow):
            bypassed += sums
            going = True
        changed |= going
    if not changed:
        result.CopyFrom(model)
    tie(result, copies)
    if gather_inputs:
        inputs.gather_inputs(result)
    return Shrunk(result, _rows(model, result), fate.kept, removed, bypassed)


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


def settle(model: ModelProto) -> dict[str, NDArray[np.floating]]:
    """The first step of `shrink` alone: values for which the same channels are dead and zero.

    Weights and biases of dead channels are zero, and the constants that they sent on are in the
    biases of those that read them, so that training can go on from there. A constant whose reader
    has no bias stays, with the channel that makes it; `shrink` makes such a bias.

    Args:
        model: not modified; external data loaded.

    Returns:
        Initializers whose values change, by name, in their shapes and types.

    Raises:
        Prune2OnnxError: external data are not loaded, or a tensor is damaged.
    """
    flow = trace(model, may_add=False)
    values: dict[str, Array] = settled(flow, decide(flow).dead)
    names = {tensor.name for tensor in model.graph.initializer}
    return {name: array for name, array in values.items() if name in names}
