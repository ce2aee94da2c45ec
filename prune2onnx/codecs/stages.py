"""The stages a codec is composed of: which positions, what values, which entropy code.

Each stage says how it encodes, how numpy decodes it, and which nodes decode it in the graph. A
stage knows sequences; which sequences a weight becomes is the codec's business (`codec.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.codecs import huffman
from prune2onnx.codecs.function import Body
from prune2onnx.codecs.weight import MAX_GAP
from prune2onnx.errors import Prune2OnnxError

Streams = Mapping[str, NDArray[Any]]


class Entropy(ABC):
    """Writes a sequence of byte-sized codes.

    Attributes:
        streams: names of the streams of a sequence, in the order of the function's inputs.
        shaped: whether decoding needs the shape (attribute k), and `counted`: the count (n).
    """

    streams: tuple[str, ...]
    shaped = False
    counted = False

    def refusal(self, codes: NDArray[np.uint8], levels: int) -> str:
        """Why these codes cannot be written; "" where they can."""
        return ""

    @abstractmethod
    def encode(
        self, codes: NDArray[np.uint8], alphabet: NDArray[Any], shape: tuple[int, ...]
    ) -> dict[str, NDArray[Any]]:
        """Streams of `codes`, uint8 [n], which index `alphabet` [k]; `shape` has n elements."""

    @abstractmethod
    def decode(self, streams: Streams, size: int) -> NDArray[Any]:
        """The symbols `alphabet[codes]` [n], in the alphabet's dtype, or a Prune2OnnxError."""

    @abstractmethod
    def nodes(self, body: Body, inputs: tuple[str, ...], shape: tuple[int, ...] | str) -> str:
        """Adds the nodes that decode the streams `inputs`.

        Args:
            body: the function they are written into.
            inputs: the names of the streams there.
            shape: of the result: with one -1, or the name of an attribute.
        """


class Plain(Entropy):
    """One byte a code, in the shape of the result: `alphabet[codes]`."""

    streams = ("codes", "alphabet")

    def encode(
        self, codes: NDArray[np.uint8], alphabet: NDArray[Any], shape: tuple[int, ...]
    ) -> dict[str, NDArray[Any]]:
        """Both streams; the codes as they are."""
        return {"codes": codes.reshape(shape), "alphabet": alphabet}

    def decode(self, streams: Streams, size: int) -> NDArray[Any]:
        """Looks the codes up."""
        return looked_up(streams["codes"].reshape(-1), streams["alphabet"], size)

    def nodes(self, body: Body, inputs: tuple[str, ...], shape: tuple[int, ...] | str) -> str:
        """Adds Cast and Gather."""
        return body.node("Gather", inputs[1], body.node("Cast", inputs[0], to=TensorProto.INT32))


class Nibble(Entropy):
    """Two codes a byte, the first in the high half; at most 16 levels, an even count."""

    streams = ("pairs", "alphabet")
    shaped = True

    def refusal(self, codes: NDArray[np.uint8], levels: int) -> str:
        """Levels or a count that do not fit."""
        if levels > 16:
            return f"{levels} levels do not fit 4 bits"
        return "an odd number of elements does not fill bytes with pairs" if codes.size % 2 else ""

    def encode(
        self, codes: NDArray[np.uint8], alphabet: NDArray[Any], shape: tuple[int, ...]
    ) -> dict[str, NDArray[Any]]:
        """Both streams; two neighbours to a byte."""
        pairs = codes[0::2] << 4 | codes[1::2]
        return {"pairs": pairs.reshape(-1, 1), "alphabet": alphabet}

    def decode(self, streams: Streams, size: int) -> NDArray[Any]:
        """Splits the bytes, then looks the codes up."""
        pairs = streams["pairs"].reshape(-1, 1)
        codes = np.concatenate([pairs >> 4, pairs & 15], axis=1).reshape(-1)
        return looked_up(codes, streams["alphabet"], size)

    def nodes(self, body: Body, inputs: tuple[str, ...], shape: tuple[int, ...] | str) -> str:
        """Adds the split of the bytes and a Gather."""
        pairs = body.node("Cast", inputs[0], to=TensorProto.INT32)
        halves = body.node(
            "Mod", body.node("Div", pairs, body.constant([16, 1])), body.constant(16)
        )
        return body.node("Gather", inputs[1], body.node("Reshape", halves, _shape(body, shape)))


class Huffman(Entropy):
    """A canonical Huffman code of at most 12 bits; see `huffman.py`."""

    streams = ("data", "internal", "starts", "alphabet")
    shaped = True
    counted = True

    def encode(
        self, codes: NDArray[np.uint8], alphabet: NDArray[Any], shape: tuple[int, ...]
    ) -> dict[str, NDArray[Any]]:
        """The four streams; the alphabet in the order of the codewords."""
        code, data, starts = huffman.encode(codes)
        if 16 * data.size > huffman.MAX_BITS:
            raise Prune2OnnxError(
                f"{16 * data.size} bits of codewords are more than {huffman.MAX_BITS}"
            )
        return {
            "data": data.reshape(-1, 1),
            "internal": np.array(code.internal, np.uint8).reshape(-1, 1),
            "starts": starts,
            "alphabet": alphabet[list(code.order)],
        }

    def decode(self, streams: Streams, size: int) -> NDArray[Any]:
        """Walks the lanes."""
        return huffman.decode(
            streams["data"], streams["internal"], streams["starts"], streams["alphabet"], size
        )

    def nodes(self, body: Body, inputs: tuple[str, ...], shape: tuple[int, ...] | str) -> str:
        """Adds a call of `h`."""
        if isinstance(shape, str):
            return body.call(huffman.OP, *inputs, passed={"n": "n", "k": shape})[0]
        return body.call(huffman.OP, *inputs, passed={"n": "n"}, k=shape)[0]


PLAIN = Plain()
NIBBLE = Nibble()
HUFFMAN = Huffman()

GAPS = np.arange(MAX_GAP + 1, dtype=np.uint8)
"""The alphabet of gaps before an entropy code reorders it: each gap is its own code."""


def placed(gaps: NDArray[np.uint8], values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The dense array: entry i at flat index gaps[0] + ... + gaps[i], +0 elsewhere.

    Raises:
        Prune2OnnxError: an entry lies past the end, or two entries share an element.
    """
    size = int(np.prod(shape, dtype=np.int64))
    index = np.cumsum(gaps, dtype=np.int64)
    if index[-1] >= size:
        first = int(np.argmax(index >= size))
        raise Prune2OnnxError(
            f"entry {first} lies at element {int(index[first])} of {size}: the gaps are damaged"
        )
    if gaps.size > 1 and not gaps[1:].all():
        raise Prune2OnnxError("two entries share an element: the gaps are damaged")
    dense = np.zeros(size, values.dtype)
    dense[index] = values
    return dense.reshape(shape)


def place_nodes(body: Body, gaps: str, values: str, zero: TensorProto | None) -> str:
    """Adds the nodes of `placed`: gaps are [m, 1], values [m], attributes k (shape), j (strides).

    Flat indices become coordinates, index // stride % extent, and ScatterND writes straight into
    the weight's own shape: a flat result would need a Reshape of the whole weight, a copy in
    memory and an alias at the end (onnxruntime issue 29788).
    """
    shape = body.integers("k")
    steps = body.node("Cast", gaps, to=TensorProto.INT64)
    index = body.node("CumSum", steps, body.constant(0))
    coordinates = body.node("Mod", body.node("Div", index, body.integers("j")), shape)
    value = {} if zero is None else {"value": zero}
    return body.node("ScatterND", body.node("ConstantOfShape", shape, **value), coordinates, values)


def looked_up(codes: NDArray[np.uint8], alphabet: NDArray[Any], size: int) -> NDArray[Any]:
    """`alphabet[codes]` [n]; an error where a code or the count does not fit."""
    if codes.size != size:
        raise Prune2OnnxError(f"{codes.size} codes, {size} expected")
    if int(codes.max()) >= alphabet.size:
        raise Prune2OnnxError(f"code {int(codes.max())} in a codebook of {alphabet.size}")
    return alphabet.reshape(-1)[codes]


def _shape(body: Body, shape: tuple[int, ...] | str) -> str:
    return body.integers(shape) if isinstance(shape, str) else body.indices(*shape)
