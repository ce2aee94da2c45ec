"""The codec contract and the one class that composes codecs of stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, NodeProto, TensorProto, helper

from prune2onnx.codecs import huffman
from prune2onnx.codecs.function import DOMAIN, Body, tensor
from prune2onnx.codecs.stages import GAPS, PLAIN, Entropy, Streams, place_nodes, placed
from prune2onnx.codecs.weight import PACKABLE, Entries, Weight, data_type
from prune2onnx.errors import Prune2OnnxError

MAX_NBYTES = 1 << 30
"""Largest dense weight that is coded: onnxruntime from 1.27 on folds no larger output (PR 28055),
so it would be decoded at every inference."""


@dataclass(frozen=True, eq=False)
class Payload:
    """One weight as a codec wrote it: all that enters the file besides the function.

    Attributes:
        name: the weight's name, the output of the decode call.
        codec: the codec that wrote it.
        streams: stream name -> array, in the order of the function's inputs.
        attributes: the call's attributes, lists of integers.
    """

    name: str
    codec: Codec
    streams: Mapping[str, NDArray[Any]]
    attributes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The weight's dtype."""
        return self.codec.values.dtype(self.streams)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, as the file declares it; nothing is allocated for it."""
        if "k" in self.attributes:
            return self.attributes["k"]
        return tuple(next(iter(self.streams.values())).shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file: streams with their tensor headers, and the call (names of 2 bytes)."""
        names = ["xx"] * len(self.streams)
        streams = sum(framed(tensor.ByteSize()) for tensor in self.tensors(names))
        return streams + framed(self.node(names).ByteSize())

    def tensors(self, names: list[str]) -> list[TensorProto]:
        """The streams as initializers with these names."""
        return [
            tensor(name, stream, data_type(stream.dtype))
            for name, stream in zip(names, self.streams.values(), strict=True)
        ]

    def node(self, names: list[str]) -> NodeProto:
        """The decode call; it takes the streams by these names and gives the weight."""
        op = self.codec.function_name(self.dtype)
        attributes: dict[str, Any] = dict(self.attributes)
        return helper.make_node(op, names, [self.name], domain=DOMAIN, **attributes)


def framed(nbytes: int, tag: int = 1) -> int:
    """Bytes of a message inside another: its field's tag, its length as a varint, itself."""
    return tag + max(1, -(-nbytes.bit_length() // 7)) + nbytes


class Half:
    """Values as float16, every one of them exactly; at the graph's end Cast makes them float32."""

    streams = ("half",)
    entropy = PLAIN

    def refusal(self, entries: Entries) -> str:
        """Why the entries are not float16 exactly; "" where they are."""
        if entries.dtype != np.float32:
            return f"{entries.dtype} is not float32"
        values = entries.bits.view(np.float32)
        for begin in range(0, values.size, 1 << 20):
            part = values[begin : begin + (1 << 20)]
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                exact = part.astype(np.float16).astype(np.float32)
            # A converted NaN may keep its payload in one runtime and lose it in another.
            wrong = (exact.view(np.uint32) != part.view(np.uint32)) | np.isnan(part)
            if wrong.any():
                first = int(np.argmax(wrong))
                return f"{part[first]!s} at element {begin + first} is not a float16"
        return ""

    def encode(self, entries: Entries) -> dict[str, NDArray[Any]]:
        """The one stream."""
        values = entries.bits.view(np.float32).astype(np.float16)
        return {"half": values.reshape(entries.shape)}

    def decode(self, streams: Streams, size: int) -> NDArray[Any]:
        """The values [size]."""
        values = streams["half"].reshape(-1)
        if values.size != size:
            raise Prune2OnnxError(f"{values.size} values, {size} expected")
        return values.astype(np.float32)

    def nodes(self, body: Body, inputs: tuple[str, ...], shape: tuple[int, ...] | str) -> str:
        """Adds the Cast."""
        return body.node("Cast", inputs[0], to=TensorProto.FLOAT)

    def dtype(self, streams: Streams) -> np.dtype[Any]:
        """Always float32."""
        return np.dtype(np.float32)


@dataclass(frozen=True)
class Codebook:
    """Values as codes into at most 256 levels; the codes are written by an entropy stage."""

    entropy: Entropy

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams."""
        return self.entropy.streams

    def refusal(self, entries: Entries) -> str:
        """Why there is no codebook; "" where there is one."""
        if entries.shared is None:
            return "more than 256 distinct values"
        return self.entropy.refusal(entries.shared[0], entries.shared[1].size)

    def encode(self, entries: Entries) -> dict[str, NDArray[Any]]:
        """Streams of the codes and the codebook."""
        assert entries.shared is not None  # refusal() came first
        return self.entropy.encode(*entries.shared, entries.shape)

    def decode(self, streams: Streams, size: int) -> NDArray[Any]:
        """The values [size]."""
        return self.entropy.decode(streams, size)

    def nodes(self, body: Body, inputs: tuple[str, ...], shape: tuple[int, ...] | str) -> str:
        """Adds the nodes that look the values up."""
        return self.entropy.nodes(body, inputs, shape)

    def dtype(self, streams: Streams) -> np.dtype[Any]:
        """The codebook's."""
        return streams["alphabet"].dtype


@dataclass(frozen=True)
class Codec:
    """A way to write a weight as integer streams and to rebuild it, in numpy and in the graph.

    The contract, for every codec in `CODECS`:

    - `refusal(weight)` says why a weight does not fit, "" where it does; `encode` raises then.
    - `encode(weight)` gives a `Payload`; `decode(payload)` gives the weight back bit for bit,
      NaN payloads and -0.0 too. `decode` is the oracle the graph is compared with. It checks
      what a payload declares before it allocates, and its errors name the weight.
    - `functions(dtype, opset)` are the model-local functions its decode call needs. They use
      operators whose meaning is the same from opset 13 to the newest, know every shape
      statically, and end on an operator that copies, so that onnxruntime folds them while it
      creates a session and nothing is left of them.
    - `Payload.node` and `Payload.tensors` write the call and its streams into a graph;
      `payload(node, initializers)` reads them from there. The call's output is the weight's name.

    A codec is three choices: which positions (all, or gaps between nonzeros), which values
    (float16, or codes into a codebook), which entropy code for the gaps and the codes.

    Attributes:
        name: in reports and errors.
        op: the name of its function; a weight of another type than float32 gets a function of its
            own where the body depends on the type (`function_name`).
        gaps: how gaps are written; None where all elements are entries.
        values: how values are written.
    """

    name: str
    op: str
    gaps: Entropy | None
    values: Half | Codebook

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams, in the order of the function's inputs."""
        return tuple(f"gap_{name}" for name in self._gap_streams) + self.values.streams

    @property
    def _gap_streams(self) -> tuple[str, ...]:
        if self.gaps is None:
            return ()
        # Plain gaps are numbers, not codes: they need no alphabet.
        return ("codes",) if self.gaps is PLAIN else self.gaps.streams

    def _entries(self, weight: Weight) -> Entries:
        return weight.every if self.gaps is None else weight.nonzero

    def refusal(self, weight: Weight) -> str:
        """Why `weight` does not fit this codec; "" where it does."""
        array = weight.array
        if not array.size or not array.ndim:
            return "empty" if not array.size else "a scalar"
        if data_type(array.dtype) not in PACKABLE:
            return f"{array.dtype} has no codec"
        if self.gaps is not None and data_type(array.dtype) == TensorProto.BFLOAT16:
            # ConstantOfShape knows bfloat16 from opset 20 on, onnxruntime's kernel never.
            return "no operator fills a bfloat16 tensor with zeros"
        if array.nbytes > MAX_NBYTES:
            return f"{array.nbytes:,} bytes are more than onnxruntime folds ({MAX_NBYTES:,})"
        return self.values.refusal(self._entries(weight))

    def encode(self, weight: Weight) -> Payload:
        """Writes a weight.

        Raises:
            Prune2OnnxError: the weight does not fit (`refusal`), or its stream is too long.
        """
        if reason := self.refusal(weight):
            raise Prune2OnnxError(f"{weight.name}: {reason}; {self.name} cannot store it")
        entries = self._entries(weight)
        streams: dict[str, NDArray[Any]] = {}
        try:
            if self.gaps is not None and entries.gaps is not None:
                coded = self.gaps.encode(entries.gaps, GAPS, (-1, 1))
                streams |= {f"gap_{name}": coded[name] for name in self._gap_streams}
            streams |= self.values.encode(entries)
        except Prune2OnnxError as error:
            raise Prune2OnnxError(f"{weight.name}: {error}; {self.name} cannot store it") from error
        return Payload(weight.name, self, streams, self._attributes(weight, entries.bits.size))

    def _attributes(self, weight: Weight, count: int) -> dict[str, tuple[int, ...]]:
        shape = tuple(weight.array.shape)
        attributes = {}
        if self.gaps is not None or self.values.entropy.shaped:
            attributes["k"] = shape
        if self.values.entropy.counted:
            attributes["n"] = (count,)
        if self.gaps is not None:
            attributes["j"] = strides(shape)
        return attributes

    def decode(self, payload: Payload) -> NDArray[Any]:
        """Rebuilds the dense array in numpy.

        Raises:
            Prune2OnnxError: the payload is damaged; the message names the weight.
        """
        shape, name = payload.shape, payload.name
        size = checked_size(name, shape, payload.dtype)
        try:
            if self.gaps is None:
                if payload.attributes.get("n", (size,)) != (size,):
                    raise Prune2OnnxError(f"{payload.attributes['n']} symbols, {size} expected")
                return self.values.decode(payload.streams, size).reshape(shape)
            if payload.attributes["j"] != strides(shape):
                raise Prune2OnnxError(f"strides {payload.attributes['j']} of a shape {shape}")
            gap_streams = {key: payload.streams[f"gap_{key}"] for key in self._gap_streams}
            count = payload.attributes.get("n", (gap_streams[self._gap_streams[0]].size,))[0]
            if not 1 <= count <= size:
                raise Prune2OnnxError(f"{count} entries in a weight of {size} elements")
            gap_streams.setdefault("alphabet", GAPS)
            gaps = self.gaps.decode(gap_streams, count)
            values = self.values.decode(payload.streams, count)
            return placed(gaps, values, shape)
        except Prune2OnnxError as error:
            raise Prune2OnnxError(f"{name}: {error}; {self.name} cannot be decoded") from error

    def function_name(self, dtype: np.dtype[Any]) -> str:
        """The name of the function that decodes weights of this type."""
        float32 = self.gaps is None or dtype == np.float32
        return self.op if float32 else f"{self.op}{data_type(dtype)}"

    def functions(self, dtype: np.dtype[Any], opset: int) -> tuple[FunctionProto, ...]:
        """The functions a decode call needs: its own and those it calls."""
        coded = self.gaps is not None and self.gaps.counted
        shared = huffman.functions(opset) if coded or self.values.entropy.counted else ()
        if self.op == huffman.OP:
            return shared
        attributes = "".join(self._attributes(_ANY, 1))
        body = Body(self.function_name(dtype), len(self.streams), attributes)
        if self.gaps is None:
            shape: tuple[int, ...] | str = "k" if "k" in attributes else ()
            return *shared, body.function(self.values.nodes(body, body.inputs, shape), opset=opset)
        split = len(self._gap_streams)
        gaps = body.inputs[0]
        if split > 1:
            gaps = self.gaps.nodes(body, body.inputs[:split], (-1, 1))
        values = self.values.nodes(body, body.inputs[split:], "n")
        zero = None
        if dtype != np.float32:
            zero = tensor("", np.zeros(1, dtype), data_type(dtype))
        return *shared, body.function(place_nodes(body, gaps, values, zero), opset=opset)

    def payload(self, node: NodeProto, initializers: Mapping[str, NDArray[Any]]) -> Payload:
        """Reads a decode call and its streams from a graph.

        Raises:
            Prune2OnnxError: a stream is missing or of another type, an attribute is missing.
        """
        name = node.output[0] if len(node.output) == 1 else "?"
        if len(node.input) != len(self.streams):
            raise Prune2OnnxError(
                f"{name}: {len(node.input)} streams, {self.name} has {len(self.streams)}"
            )
        streams = {}
        for stream, source in zip(self.streams, node.input, strict=True):
            if source not in initializers:
                raise Prune2OnnxError(f"{name}: the stream {stream} ({source!r}) is missing")
            streams[stream] = array = initializers[source]
            expected = _STREAM_DTYPES.get(stream)
            if not array.size or (expected is not None and array.dtype != expected):
                raise Prune2OnnxError(
                    f"{name}: the stream {stream} is {array.dtype} {list(array.shape)}, "
                    f"{expected or 'a nonempty array'} expected"
                )
        attributes = {
            attribute.name: tuple(int(value) for value in attribute.ints)
            for attribute in node.attribute
        }
        for wanted in self._attributes(_ANY, 1):
            if not attributes.get(wanted):
                raise Prune2OnnxError(f"{name}: the attribute {wanted} of {self.name} is missing")
        payload = Payload(name, self, streams, attributes)
        if self.function_name(payload.dtype) != node.op_type:
            raise Prune2OnnxError(
                f"{name}: a codebook of {payload.dtype} for the function {node.op_type!r}, "
                f"{self.function_name(payload.dtype)!r} expected"
            )
        return payload


_ANY = Weight("", np.zeros(1, np.float32))
_STREAM_DTYPES = {
    prefix + name: np.dtype(dtype)
    for dtype, names in (
        (np.uint8, ("codes", "pairs", "internal")),
        (np.uint16, ("data", "starts")),
        (np.float16, ("half",)),
    )
    for name in names
    for prefix in ("", "gap_")
} | {"gap_alphabet": np.dtype(np.uint8)}


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one index to the next along each dimension, row-major.

    >>> strides((2, 3, 4))
    (12, 4, 1)
    """
    result = [1]
    for extent in shape[:0:-1]:
        result.insert(0, result[0] * extent)
    return tuple(result)


def checked_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Number of elements of a declared shape, refused before anything is allocated for it."""
    size = 1
    for extent in shape:
        size *= extent
        if extent < 1 or size * dtype.itemsize > MAX_NBYTES:
            raise Prune2OnnxError(
                f"{name}: a declared shape of {list(shape)} is impossible or above {MAX_NBYTES:,} "
                "bytes; the file is damaged"
            )
    return size
