"""Codecs: how a weight is written as streams and rebuilt, in numpy and by ONNX's own operators.

The contract is `Codec`; the codecs are the tuple `CODECS`. docs/FORMAT.md is the format for
somebody who writes a decoder. numpy and onnx only: what onnxruntime makes of the functions is
tested, not used, here.
"""

from __future__ import annotations

from prune2onnx.codecs import huffman
from prune2onnx.codecs.codec import Codebook, Codec, Half, Payload
from prune2onnx.codecs.function import DOMAIN, DOMAIN_VERSION
from prune2onnx.codecs.stages import HUFFMAN, NIBBLE, PLAIN
from prune2onnx.codecs.weight import Weight

CODECS: tuple[Codec, ...] = (
    Codec("half", "f", gaps=None, values=Half()),
    Codec("codebook", "c", gaps=None, values=Codebook(PLAIN)),
    Codec("codebook-nibble", "n", gaps=None, values=Codebook(NIBBLE)),
    Codec("codebook-huffman", huffman.OP, gaps=None, values=Codebook(HUFFMAN)),
    Codec("gap-codebook", "g", gaps=PLAIN, values=Codebook(PLAIN)),
    Codec("gap-codebook-huffman", "e", gaps=HUFFMAN, values=Codebook(HUFFMAN)),
)
"""Every codec a file may use. The planner takes the fewest bytes; the order decides ties."""

__all__ = [
    "CODECS",
    "DOMAIN",
    "DOMAIN_VERSION",
    "Codebook",
    "Codec",
    "Half",
    "Payload",
    "Weight",
]
