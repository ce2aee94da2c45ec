"""One decode call for all coded weights of a model: its function, its streams, and back.

The call is named `w`; its outputs are the weights under their own names, its inputs the streams,
its attribute `i` holds a checksum, and of each weight how many initializers stood between it and
the one before, how it is written, and how many bytes that takes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from prune2onnx.codecs.evaluate import Budget, evaluate, weights_of
from prune2onnx.codecs.function import DOMAIN, Body, framed
from prune2onnx.codecs.groups import family_key, write
from prune2onnx.codecs.methods import METHODS, Group, Method
from prune2onnx.codecs.streams import Coder, Streams, runs_within
from prune2onnx.codecs.weight import Weight
from prune2onnx.errors import Prune2OnnxError

OP = "w"
"""Name of the decode call and its function."""

GROUP_LIMIT = 1 << 29
"""Most bytes of a group's vector, but for a larger weight alone: above 1 GB nothing is folded."""

_FACTS = "i"


@dataclass(frozen=True)
class Bundle:
    """Coded weights, as they enter a file.

    Attributes:
        node: the call, its inputs unnamed.
        functions: those the call needs, the called before the calling.
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
    """Writes weights.

    Args:
        weights: all of `methods`, in the order of the outputs.
        methods: weight name -> how it is written; the planner knows which one fits.
        opset: of the model the function will stand in.
        coder: the entropy code of the streams.
        skips: initializers that stand before each weight, after the weight before it.
    """
    body = Body(OP, attributes=_FACTS, once=True)
    streams = Streams(body, coder)
    found: dict[str, tuple[str, float]] = {}
    first, repeated = _without_repetition(weights)
    for group in grouped(first, methods):
        found |= write(group, streams)
    for name, original in repeated.items():
        # A copy, and an operator that copies: an output may not be another's alias.
        kind = next(weight.working for weight in first if weight.name == original)
        found[name] = (body.copy(found[original][0], kind), 0.0)
    functions = streams.finish(opset)
    outputs = [found[weight.name][0] for weight in weights]
    facts = [_checksum([(weight.name, weight.array) for weight in weights])]
    for weight, skip in zip(weights, skips or [0] * len(weights), strict=True):
        facts += [skip, METHODS.index(methods[weight.name]), round(found[weight.name][1])]
    node = helper.make_node(OP, [], [weight.name for weight in weights], domain=DOMAIN)
    packed = TensorProto(dims=[len(facts)], data_type=TensorProto.INT64, int64_data=facts)
    node.attribute.append(AttributeProto(name=_FACTS, type=AttributeProto.TENSOR, t=packed))
    function = body.function(*outputs, opset=opset)
    return Bundle(node, (*functions, function), tuple(body.given))


def _without_repetition(
    weights: Sequence[Weight],
) -> tuple[list[Weight], dict[str, str]]:
    """The weights that differ, and name -> name of an equal one before it for all others."""
    known: dict[tuple[Any, ...], str] = {}
    first, repeated = [], {}
    for weight in weights:
        digest = hashlib.sha256(_bytes(weight.array)).digest()
        # A last Cast makes types that few operators know; they could not be copied after it.
        own = "" if weight.kind == weight.working else weight.name
        key = (weight.kind, weight.shape, weight.scale is None, digest, own)
        original = known.setdefault(key, weight.name)
        if original == weight.name:
            first.append(weight)
        else:
            repeated[weight.name] = original
    return first, repeated


def grouped(weights: Sequence[Weight], methods: Mapping[str, Method]) -> list[Group]:
    """The groups that weights with these methods form, families together, sparse ones first."""
    members: dict[tuple[Any, ...], list[Weight]] = {}
    for weight in weights:
        method = methods[weight.name]
        # Codes have no storage type; raw bits and planes have.
        storage = weight.storage if method.values in ("raw", "planes") else 0
        key = (METHODS.index(method), weight.working, storage, weight.scale is not None)
        members.setdefault(key, []).append(weight)
    groups = []
    for (number, _, storage, _), inside in members.items():
        families: dict[tuple[Any, ...], list[Weight]] = {}
        for weight in inside:
            families.setdefault(family_key(weight), []).append(weight)
        ordered = [
            weight
            for family in families.values()
            for weight in sorted(family, key=lambda one: one.nonzero.size / one.array.size)
        ]
        groups += [
            Group(METHODS[number], tuple(part), storage)
            for part in runs_within(ordered, lambda one: one.values.nbytes, GROUP_LIMIT)
        ]
    return groups


def decode(
    node: NodeProto,
    streams: Sequence[NDArray[Any]],
    functions: Mapping[str, FunctionProto],
    budget: Budget,
) -> dict[str, NDArray[Any]]:
    """Rebuilds the outputs of a decode call: weight name -> dense array.

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
    if expected and expected[0] != _checksum(list(decoded.items())):
        raise Prune2OnnxError(
            f"{names}: the decoded weights do not have the checksum that was stored; the file is "
            "damaged, copy or pack it again"
        )
    return decoded


def facts_of(node: NodeProto) -> list[int]:
    """The attribute `i`; empty in files of version 1."""
    for attribute in node.attribute:
        if attribute.name == _FACTS and attribute.HasField("t"):
            return list(attribute.t.int64_data)
    return []


@dataclass(frozen=True)
class Described:
    """What a file says of a coded weight.

    Attributes:
        skip: initializers that stood between it and the coded weight before it.
        method: how it is written; None where the file does not say.
        nbytes: of its own in the streams.
    """

    skip: int = 0
    method: Method | None = None
    nbytes: int = 0


def described(node: NodeProto) -> list[Described]:
    """What a decode call says of its weights, in the order of its outputs."""
    facts = facts_of(node)[1:]
    if len(facts) != 3 * len(node.output):
        return [Described()] * len(node.output)
    found = []
    for skip, number, nbytes in zip(facts[::3], facts[1::3], facts[2::3], strict=True):
        method = METHODS[number] if 0 <= number < len(METHODS) else None
        found.append(Described(skip, method, nbytes))
    return found


def _checksum(arrays: list[tuple[str, NDArray[Any]]]) -> int:
    """CRC-32 of names, ONNX's numbers of the element types, shapes and little-endian bytes."""
    total = 0
    for name, array in arrays:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        total = zlib.crc32(f"{name} {kind} {list(array.shape)} ".encode(), total)
        total = zlib.crc32(_bytes(array), total)
    return total


def _bytes(array: NDArray[Any]) -> memoryview | bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
