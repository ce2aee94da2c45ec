"""Codecs: how weights are written as streams and rebuilt, in numpy and by ONNX's own operators.

`plan` chooses, `bundle` writes and reads one decode call for all weights of a model, `evaluate` is
the numpy oracle. docs/FORMAT.md is the format for somebody who writes a decoder. numpy and onnx
only: what onnxruntime makes of the functions is tested, not used, here.
"""

from __future__ import annotations

from prune2onnx.codecs.bundle import OP, Bundle, Described, decode, described, encode
from prune2onnx.codecs.evaluate import Budget
from prune2onnx.codecs.function import DOMAIN, DOMAIN_VERSION, framed
from prune2onnx.codecs.methods import METHODS, Method
from prune2onnx.codecs.plan import Plan, entropy_nbytes, plan
from prune2onnx.codecs.weight import WORKING, Weight, bits_of

__all__ = [
    "DOMAIN",
    "DOMAIN_VERSION",
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
