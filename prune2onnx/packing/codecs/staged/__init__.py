"""Staged decoding of large weights: cut into pieces, which a runtime decodes a few at a time.

A **piece** is a large weight or some of its rows. All pieces together are cut into as many stages
as there are gates (`functions`), each with about as many elements as the others, so that the memory
of one stage is free again when the next one begins. Pieces of a stage that are stored alike are
decoded together, as one vector, and split at the end: onnxruntime looks at every node that is left
in each of its passes, so that a node costs more than a thousand elements.

Small weights are not worth a call of their own; `bundle` writes them all in one.

A weight is read a few rows at a time (`large`): once to see what is in it, and once to code it.
`choice` says which weights are decoded so, and `encode` writes them.
"""

from __future__ import annotations

from prune2onnx.packing.codecs.staged.choice import GATED, Bounds, Known, chosen, estimate
from prune2onnx.packing.codecs.staged.encode import Done, encode, in_order
from prune2onnx.packing.codecs.staged.functions import CONSTANTS, GATES, RESOLVE
from prune2onnx.packing.codecs.staged.large import Counted, Large, survey
from prune2onnx.packing.codecs.staged.pieces import STAGE_SIZE

__all__ = [
    "CONSTANTS",
    "GATED",
    "GATES",
    "RESOLVE",
    "STAGE_SIZE",
    "Bounds",
    "Counted",
    "Done",
    "Known",
    "Large",
    "chosen",
    "encode",
    "estimate",
    "in_order",
    "survey",
]
