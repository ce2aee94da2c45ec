"""Whether onnxruntime folds the decoders of a packed file when it creates a session.

Looks at the graph that it leaves. A decoder that stays in it gives the right weights, at every
inference: a gate that does not open, an operator whose shape is not known, a stream that a caller
may replace.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import ModelProto

from prune2onnx.graph.walk import nodes_in
from prune2onnx.packing.decoding import coded
from prune2onnx.packing.inline import outlined
from prune2onnx.packing.short_names import has_short_names
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.session import data_of, session

LEVELS = {
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "full": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""The levels of optimisation at which decoders must fold."""


@dataclass(frozen=True)
class Folding:
    """What is left of the decoders in the graph that onnxruntime runs.

    Attributes:
        weights: those that nodes of that graph make, so that they are decoded at every inference.
        more: operator, domain:name -> how many more of it there are than in the unpacked file's.
        fewer: the same -> how many fewer.
        level: of optimisation at which this was found; "" where nothing was.
    """

    weights: tuple[str, ...] = ()
    more: tuple[tuple[str, int], ...] = ()
    fewer: tuple[tuple[str, int], ...] = ()
    level: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing is left, and the graph is the unpacked file's."""
        return not (self.weights or self.more or self.fewer)


def optimised(model: ModelProto | Path, level: ort.GraphOptimizationLevel) -> ModelProto:
    """The graph of a model, or of the one in a file, that onnxruntime has optimised.

    Large weights are left out. (Where there is a null device, they are written to it.)
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        if os.name == "posix":
            data_of(path).symlink_to(os.devnull)
        session(model, level=level, optimised=path)
        return onnx.load(path, load_external_data=False)


def operators(model: ModelProto | Path, level: ort.GraphOptimizationLevel) -> list[str]:
    """The operators of a model that onnxruntime has optimised, in its order, bodies included."""
    return _operators(optimised(model, level))


def _operators(model: ModelProto) -> list[str]:
    return [f"{node.domain}:{node.op_type}" for node in nodes_in(model.graph.node)]


def folding(
    packed: ModelProto,
    unpacked: ModelProto | Path | None = None,
    weights: Collection[str] | None = None,
    *,
    file: Path | None = None,
) -> Folding:
    """What onnxruntime leaves of decoders, at the basic and at the full level of optimisation.

    Args:
        packed: the model.
        unpacked: the unpacked model or its file, if one is at hand.
        weights: names of the coded weights, if they are at hand.
        file: of the model, if it is at hand: to open a file takes less memory.
    """
    unpacked = unpack(packed) if unpacked is None else unpacked
    weights = coded(packed).extents if weights is None else weights
    for name, level in LEVELS.items():
        found = named = optimised(packed if file is None else file, level)
        if has_short_names(packed):
            named = optimised(outlined(packed), level)
        made = {output for node in named.graph.node for output in node.output}
        ours = Counter(_operators(found))
        theirs = Counter(operators(unpacked, level))
        seen = Folding(
            tuple(weight for weight in weights if weight in made),
            tuple((ours - theirs).most_common()),
            tuple((theirs - ours).most_common()),
            name,
        )
        if not seen.complete:
            return seen
    return Folding()


def folds(packed: ModelProto, unpacked: ModelProto | None = None) -> bool:
    """Whether onnxruntime folds all decoders into constants, at both levels of optimisation.

    Args:
        packed: the model.
        unpacked: the unpacked model, if it is at hand.
    """
    return folding(packed, unpacked).complete
