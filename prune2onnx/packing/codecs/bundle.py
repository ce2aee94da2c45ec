"""One decode call for all coded weights of a model: its function, its streams, and reading it.

The call is an operator `w`. Its outputs are the weights under their own names, its inputs the
streams. Its attribute `i` holds a checksum and three numbers for each weight: initializers between
it and the coded weight before it, its method, and its bytes.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.domain import DOMAIN, OP
from prune2onnx.graph.protobuf import framed
from prune2onnx.packing.codecs.evaluator import evaluate, weights_of
from prune2onnx.packing.codecs.function import Body
from prune2onnx.packing.codecs.groups import family_key, write
from prune2onnx.packing.codecs.limits import Budget
from prune2onnx.packing.codecs.methods import METHODS, Method
from prune2onnx.packing.codecs.streams import Coder, Streams, runs_within
from prune2onnx.packing.codecs.values.kind import Group
from prune2onnx.packing.codecs.weight import Weight

GROUP_LIMIT = 1 << 29
"""Most bytes of a group's vector, unless one weight is larger; onnxruntime folds up to 1 GB."""

FACTS = "i"
"""The attribute of a call that holds what decoding does not need."""

UNKNOWN = -1
"""In place of a weight's bytes, where the file does not keep them."""


@dataclass(frozen=True)
class Bundle:
    """Coded weights, as they enter a file.

    Attributes:
        node: the call, its inputs unnamed.
        functions: those that the call needs, each before its callers.
        streams: the call's inputs, unnamed.
    """

    node: NodeProto
    functions: tuple[FunctionProto, ...]
    streams: tuple[TensorProto, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in a file, with names of two bytes for the streams."""
        named = 4 * len(self.streams)
        streams = sum(framed(2 + stream.ByteSize()) for stream in self.streams)
        functions = sum(framed(function.ByteSize(), tag=2) for function in self.functions)
        return streams + functions + framed(self.node.ByteSize() + named)


def encode(
    weights: Sequence[Weight],
    methods: Mapping[str, Method],
    opset: int,
    *,
    coder: Coder = "huffman",
    skips: Sequence[int] | None = None,
) -> Bundle:
    """Writes weights as streams, with the function that decodes them.

    Args:
        weights: all of `methods`, in the order of the outputs.
        methods: weight name -> its method, which must fit it (`plan` sees to that).
        opset: of the model that the function will stand in.
        coder: the entropy code of the streams.
        skips: for each weight, the initializers between it and the coded weight before it.
    """
    body = Body(OP, attributes=FACTS, once=True)
    streams = Streams(body, coder)
    found: dict[str, tuple[str, float]] = {}
    first, repeated = _without_repetition(weights)
    for group in grouped(first, methods):
        found |= write(group, streams)
    for name, original in repeated.items():
        # By an operator that copies: an output may not be an alias of another.
        working = next(weight.working for weight in first if weight.name == original)
        found[name] = (body.copy(found[original][0], working), 0.0)
    functions = streams.finish(opset)
    outputs = [found[weight.name][0] for weight in weights]
    facts = [checksum([(weight.name, weight.array) for weight in weights])]
    # The bits of a Rice code are shared out by estimates: together not more than there are.
    held = sum(len(each.raw_data) for each in body.given)
    estimated = sum(nbytes for _, nbytes in found.values())
    part = min(1.0, held / max(estimated, 1.0))
    for weight, skip in zip(weights, skips or [0] * len(weights), strict=True):
        facts += [skip, METHODS.index(methods[weight.name]), round(part * found[weight.name][1])]
    node = helper.make_node(OP, [], [weight.name for weight in weights], domain=DOMAIN)
    add_facts(node, facts)
    function = body.function(*outputs, opset=opset)
    return Bundle(node, (*functions, function), tuple(body.given))


def _without_repetition(
    weights: Sequence[Weight],
) -> tuple[list[Weight], dict[str, str]]:
    """The distinct weights, and for each repeated one: name -> name of the first equal weight."""
    known: dict[tuple[Any, ...], str] = {}
    first, repeated = [], {}
    for weight in weights:
        digest = hashlib.sha256(_bytes(weight.array)).digest()
        # Element types that are made by a last Cast have no operator that copies them.
        own = "" if weight.element_type == weight.working else weight.name
        key = (weight.element_type, weight.shape, weight.scale is None, digest, own)
        original = known.setdefault(key, weight.name)
        if original == weight.name:
            first.append(weight)
        else:
            repeated[weight.name] = original
    return first, repeated


def grouped(weights: Sequence[Weight], methods: Mapping[str, Method]) -> list[Group]:
    """The groups of weights with these methods: families together, the sparsest weights first."""
    members: dict[tuple[Any, ...], list[Weight]] = {}
    for weight in weights:
        method = methods[weight.name]
        # Raw values and planes have a storage type; codes have none.
        storage = weight.storage if method.values.keeps_storage else 0
        own = weight.name if method.values.is_alone else ""
        key = (METHODS.index(method), weight.working, storage, weight.scale is not None, own)
        members.setdefault(key, []).append(weight)
    groups = []
    for (number, _, storage, _, _), inside in members.items():
        families: dict[tuple[Any, ...], list[Weight]] = {}
        for weight in inside:
            families.setdefault(family_key(weight), []).append(weight)
        ordered = [
            weight
            for family in families.values()
            for weight in sorted(family, key=lambda one: one.nonzero.size / one.array.size)
        ]
        groups += [
            Group(METHODS[number].positions, METHODS[number].values, tuple(part), storage)
            for part in runs_within(ordered, lambda one: one.values.nbytes, GROUP_LIMIT)
        ]
    return groups


def decode(
    node: NodeProto,
    streams: Sequence[NDArray[Any]],
    functions: Mapping[str, FunctionProto],
    budget: Budget,
    *,
    written_out: bool = False,
) -> dict[str, NDArray[Any]]:
    """Rebuilds the outputs of a decode call: weight name -> dense array.

    Args:
        node: the call.
        streams: its inputs.
        functions: the decode functions of the model by name.
        budget: the memory and time that it may use.
        written_out: whether the file has no call, and so no checksum (`packing.inline`).

    Raises:
        Prune2OnnxError: the call, its streams or its functions are damaged, or decoding takes more
            than the budget.
    """
    arrays = evaluate(node, streams, functions, budget)
    names = weights_of(node)
    decoded = dict(zip(node.output, arrays, strict=False))
    if not len(arrays) == len(node.output) == len(decoded):
        raise Prune2OnnxError(
            f"{names}: {len(arrays)} weights decoded, {len(node.output)} named, {len(decoded)} "
            "names differ; the file is damaged, copy or pack it again"
        )
    expected = facts_of(node)
    if not expected and node.op_type == OP and not written_out:
        raise Prune2OnnxError(
            f"{names}: the decode call has no checksum; the file is damaged, copy or pack it again"
        )
    if expected and expected[0] != checksum(list(decoded.items())):
        raise Prune2OnnxError(
            f"{names}: the decoded weights do not have the checksum that was stored; the file is "
            "damaged, copy or pack it again"
        )
    return decoded


def add_facts(node: NodeProto, facts: Sequence[int]) -> None:
    """Adds the attribute `i`."""
    packed = TensorProto(dims=[len(facts)], data_type=TensorProto.INT64, int64_data=facts)
    node.attribute.append(AttributeProto(name=FACTS, type=AttributeProto.TENSOR, t=packed))


def facts_of(node: NodeProto) -> list[int]:
    """The attribute `i`; empty in files of version 1."""
    for attribute in node.attribute:
        if attribute.name == FACTS and attribute.HasField("t"):
            facts = attribute.t
            if facts.data_type != TensorProto.INT64 or facts.HasField("data_location"):
                return []
            if facts.HasField("raw_data"):  # another tool has written the file
                count = len(facts.raw_data) // 8
                return list(struct.unpack(f"<{count}q", facts.raw_data[: 8 * count]))
            return list(facts.int64_data)
    return []


@dataclass(frozen=True)
class Described:
    """The facts about a coded weight in a file.

    Attributes:
        skip: initializers between it and the coded weight before it.
        method: how it is written; None where the file does not say.
        nbytes: its bytes in the streams; None where the file does not say.
    """

    skip: int = 0
    method: Method | None = None
    nbytes: int | None = None


def described(node: NodeProto) -> list[Described]:
    """The facts about a decode call's weights, in the order of its outputs."""
    facts = facts_of(node)[1:]
    if len(facts) != 3 * len(node.output):
        return [Described()] * len(node.output)
    found = []
    for skip, number, nbytes in zip(facts[::3], facts[1::3], facts[2::3], strict=True):
        method = METHODS[number] if 0 <= number < len(METHODS) else None
        found.append(Described(skip, method, None if nbytes == UNKNOWN else nbytes))
    return found


def checksum(arrays: Sequence[tuple[str, NDArray[Any]]]) -> int:
    """CRC-32 of names, ONNX's numbers of the element types, shapes and little-endian bytes."""
    total = 0
    for name, array in arrays:
        total = checked(name, array.dtype, array.shape, [array], total)
    return total


def checked(
    name: str,
    dtype: np.dtype[Any],
    shape: Sequence[int],
    rows: Iterable[NDArray[Any]],
    total: int = 0,
) -> int:
    """The checksum of an array that comes in pieces, continued from that of arrays before it."""
    number = helper.np_dtype_to_tensor_dtype(dtype)
    return continued(rows, zlib.crc32(f"{name} {number} {list(shape)} ".encode(), total))


def continued(rows: Iterable[NDArray[Any]], total: int) -> int:
    """A checksum, continued with more rows of the last array."""
    for part in rows:
        total = zlib.crc32(_bytes(part), total)
    return total


def _bytes(array: NDArray[Any]) -> memoryview | bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
