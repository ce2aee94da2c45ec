"""Codecs: how weights are written as streams and rebuilt, in numpy and by ONNX's own operators.

`plan` chooses the methods, `bundle` writes and reads one decode call for all weights of a model,
`evaluator` is the numpy oracle. docs/FORMAT.md describes the format for authors of a decoder.
Needs numpy and onnx alone: onnxruntime runs the decode functions in tests only.
"""

from __future__ import annotations

from prune2onnx.graph.domain import DOMAIN, DOMAIN_VERSION, OP
from prune2onnx.graph.protobuf import framed
from prune2onnx.packing.codecs.bundle import Bundle, Described, decode, described, encode
from prune2onnx.packing.codecs.limits import Budget
from prune2onnx.packing.codecs.methods import METHODS, Method
from prune2onnx.packing.codecs.plan import MAX_NBYTES, Plan, entropy_nbytes, plan
from prune2onnx.packing.codecs.weight import WORKING, Weight, bits_of

__all__ = [
    "DOMAIN",
    "DOMAIN_VERSION",
    "MAX_NBYTES",
    "METHODS",
    "OP",
    "WORKING",
    "Budget",
    "Bundle",
    "Described",
    "Method",
    "Plan",
    "Weight",
    "bits_of",
    "decode",
    "described",
    "encode",
    "entropy_nbytes",
    "framed",
    "plan",
]
