"""Decodes the weights of packed models in numpy, one after the other.

A file carries its own decoder, so files of every version are read. A file is not trusted: sizes
are checked before anything is allocated, and time and memory are bounded (`codecs.limits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graph.domain import DOMAIN, OP
from prune2onnx.graph.domain import decoder as decoder_nodes
from prune2onnx.graph.outside import Spill
from prune2onnx.graph.protobuf import framed, tensor_nbytes
from prune2onnx.graph.tensors import array_of, raw_of
from prune2onnx.packing.codecs import METHODS, decode, described, entropy_nbytes
from prune2onnx.packing.codecs.bundle import facts_of
from prune2onnx.packing.codecs.evaluator import weights_of
from prune2onnx.packing.codecs.limits import Budget
from prune2onnx.packing.codecs.operators import stored
from prune2onnx.packing.codecs.staged import GATES
from prune2onnx.packing.codecs.work import Work
from prune2onnx.packing.inline import outlined
from prune2onnx.packing.short_names import has_short_names

MAX_BYTES = 1 << 31
"""Largest array that decoding a file may make, by default."""

_MEASURED_NBYTES = 1 << 26  # a file of some bytes may decode to gigabytes

Decoding = tuple[NodeProto, dict[str, NDArray[Any]]]
"""A decode call and its outputs by name."""


class Shaped(Protocol):
    """What is known of a weight without its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its type, as numpy has it."""


@dataclass(frozen=True)
class Extent:
    """Shape and type of a weight that need not be in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements in memory."""
        return self.size * self.dtype.itemsize


class Decoded(NamedTuple):
    """A decoded weight.

    Attributes:
        name: the initializer's.
        array: its values.
        codec: how it is stored.
        nbytes: its bytes in the file.
    """

    name: str
    array: NDArray[Any]
    codec: str
    nbytes: int


class Decoder:
    """Decodes the coded weights of a packed model in numpy, one call after the other.

    Args:
        model: packed by any version; not modified.
        max_bytes: the largest array that decoding may make.
    """

    def __init__(self, model: ModelProto, max_bytes: int = MAX_BYTES) -> None:
        self._given, self._model = model, outlined(model)
        self._budget = budget_of(self._model, max_bytes)

    @property
    def work(self) -> Work:
        """What a runtime does to decode what was decoded so far."""
        return self._budget.work

    def __iter__(self) -> Iterator[Decoded]:
        """Each weight, once.

        Raises:
            Prune2OnnxError: the decode call is damaged, or takes more than is allowed.
        """
        model = self._model
        sizes = {tensor.name: framed(tensor_nbytes(tensor)) for tensor in model.graph.initializer}
        seen: set[str] = set()
        for node, decoded in decodings_of(self._given, self._budget):
            if twice := seen & decoded.keys():
                raise Prune2OnnxError(f"{min(twice)}: decoded twice; the file is damaged")
            seen |= decoded.keys()
            nbytes = framed(node.ByteSize()) + sum(sizes.get(source, 0) for source in node.input)
            for name, (codec, own) in _how(node, decoded, nbytes).items():
                yield Decoded(name, decoded.pop(name), codec, own)


def _how(
    node: NodeProto, decoded: Mapping[str, NDArray[Any]], nbytes: int
) -> dict[str, tuple[str, int]]:
    """Codec and bytes of the weights of a decode call, which takes so many."""
    found = described(node)
    if all(facts.nbytes is not None for facts in found):
        bounds = dict.fromkeys(decoded, 0.0)
    else:  # the file does not say how its bytes divide; far larger weights are all alike
        small = sum(array.nbytes for array in decoded.values()) <= _MEASURED_NBYTES
        bounds = {
            name: 1 + (entropy_nbytes(array) if small else array.nbytes)
            for name, array in decoded.items()
        }
    how = {}
    for name, facts in zip(node.output, found, strict=True):
        if name not in decoded:
            continue
        codec = "written out" if node.op_type == OP else f"version 1: {node.op_type}"
        if facts.method is not None:
            codec = facts.method.name
        own = facts.nbytes
        if own is None:
            own = round(nbytes * bounds[name] / sum(bounds.values()))
        how[name] = (codec, own)
    return how


@dataclass(frozen=True)
class Coded:
    """The decoded weights of a packed model, and what decoding takes.

    Attributes:
        arrays: weight name -> decoded array; of those in a file, read anew each time.
        how: weight name -> (codec, its bytes in the file).
        work: what a runtime does to decode them.
        extents: weight name -> shape and type.
        stored: weight name -> an initializer of what is in a file.
    """

    arrays: Mapping[str, NDArray[Any]]
    how: Mapping[str, tuple[str, int]]
    work: Work
    extents: Mapping[str, Extent]
    stored: Mapping[str, TensorProto]

    def __iter__(self) -> Iterator[Decoded]:
        """Each weight."""
        for name, (codec, nbytes) in self.how.items():
            yield Decoded(name, self.arrays[name], codec, nbytes)

    def decodings(self, calls: Iterable[NodeProto]) -> Iterator[Decoding]:
        """Each weight, with its decode call; one in a file is not read."""
        nothing = np.zeros(0)
        for node in calls:
            for name in node.output:
                if name in self.how:
                    yield node, {name: nothing if name in self.stored else self.arrays[name]}


class _Stored(Mapping[str, NDArray[Any]]):
    """Arrays that are read when they are asked for."""

    def __init__(self, tensors: Mapping[str, TensorProto]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        return array_of(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def coded(model: ModelProto, max_bytes: int = MAX_BYTES, spill: Spill | None = None) -> Coded:
    """Decodes every coded weight in numpy: the oracle for what onnxruntime decodes.

    Args:
        model: packed.
        max_bytes: the largest array that decoding may make.
        spill: takes the weights, so that they do not stay in memory.

    Raises:
        Prune2OnnxError: the decode call is damaged, or takes more than is allowed.
    """
    arrays: dict[str, NDArray[Any]] = {}
    stored: dict[str, TensorProto] = {}
    how: dict[str, tuple[str, int]] = {}
    extents: dict[str, Extent] = {}
    decoder = Decoder(model, max_bytes)
    for name, array, codec, nbytes in decoder:
        how[name] = codec, nbytes
        extents[name] = Extent(array.shape, array.dtype)
        if spill is None:
            arrays[name] = array
        else:
            number = helper.np_dtype_to_tensor_dtype(array.dtype)
            stored[name] = TensorProto(name=name, dims=array.shape, data_type=number)
            spill.fill(stored[name], raw_of(array))
    if spill is None:
        return Coded(arrays, how, decoder.work, extents, {})
    spill.finish()
    return Coded(_Stored(stored), how, decoder.work, extents, stored)


def decode_graph(model: ModelProto, weights: Mapping[str, Shaped] | None = None) -> ModelProto:
    """A model of nothing but decode calls and their streams; its outputs are the weights.

    Args:
        model: a packed model.
        weights: those that are wanted; default: all.
    """
    weights = coded(model).extents if weights is None else weights
    if has_short_names(model):
        model = outlined(model)
    calls = _needed(decoder_nodes(model) or calls_of(model), weights)
    streams = {source for node in calls for source in node.input}
    graph = GraphProto(name="decode", node=calls)
    between = {name for node in calls for name in node.output} - weights.keys()
    graph.value_info.extend(v for v in model.graph.value_info if v.name in between)
    graph.initializer.extend(t for t in model.graph.initializer if t.name in streams)
    declared = declared_types(model)
    for name, weight in weights.items():
        number = declared.get(name) or helper.np_dtype_to_tensor_dtype(weight.dtype)
        graph.output.append(helper.make_tensor_value_info(name, number, weight.shape))
    result = ModelProto(ir_version=model.ir_version, graph=graph)
    result.opset_import.extend(e for e in model.opset_import if e.domain in ("", DOMAIN))
    result.functions.extend(f for f in model.functions if f.domain == DOMAIN)
    return result


def _needed(nodes: Sequence[NodeProto], names: Collection[str]) -> list[NodeProto]:
    """The nodes, in order, that values of these names come from."""
    wanted = set(names)
    found = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]


def weight_batches(
    model: ModelProto, weights: Mapping[str, Extent], nbytes: int
) -> Iterator[dict[str, Extent]]:
    """Coded weights, those of some decode calls at a time.

    Args:
        model: packed.
        weights: its coded weights.
        nbytes: of a batch's weights, from which on there is another batch.
    """
    batch: dict[str, Extent] = {}
    for node in calls_of(outlined(model)):
        batch |= {name: weights[name] for name in node.output if name in weights}
        if sum(weight.nbytes for weight in batch.values()) >= nbytes:
            yield batch
            batch = {}
    if batch:
        yield batch


def facts_by_weight(model: ModelProto) -> dict[str, tuple[int, int, int]]:
    """What decode calls say about each weight, in the order of their places in the dense model.

    Returns:
        Name -> how many initializers stand between it and the coded weight before it, its method's
        number, its bytes.
    """
    calls = calls_of(outlined(model))
    places = places_of(calls, between_of(calls))
    own = {
        name: facts
        for node in calls
        for name, facts in zip(node.output, described(node), strict=True)
    }
    found, before = {}, -1
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        method = own[name].method
        number = METHODS.index(method) if method is not None else -1
        found[name] = (place - before - 1, number, own[name].nbytes or 0)
        before = place
    return found


def verify(model: ModelProto, done: Callable[[str, int], None] = lambda name, nbytes: None) -> Work:
    """Decodes every coded weight and compares each decode call's checksum.

    Args:
        model: packed.
        done: is told the name and the bytes of each weight that was decoded.

    Returns:
        What a runtime does to decode them.

    Raises:
        Prune2OnnxError: they do not agree.
    """
    budget = budget_of(model, MAX_BYTES)
    for _, decoded in decodings_of(model, budget):
        for name, array in decoded.items():
            done(name, array.nbytes)
    return budget.work


def calls_of(model: ModelProto) -> list[NodeProto]:
    """The decode calls of a model, in order."""
    return [node for node in model.graph.node if node.domain == DOMAIN]


def between_of(calls: Sequence[NodeProto]) -> set[str]:
    """Values of staged calls that are no weights: those that have no place."""
    if not _is_staged(calls):
        return set()
    return {
        name
        for node in calls
        for name, facts in zip(node.output, described(node), strict=True)
        if facts.skip < 0 or not facts_of(node)
    }


def _is_staged(calls: Sequence[NodeProto]) -> bool:
    """Whether calls take values of other calls; their weights then have absolute places."""
    return any(node.op_type == GATES for node in calls)


def places_of(calls: Sequence[NodeProto], between: Collection[str]) -> dict[str, int]:
    """Where each weight stood among all initializers."""
    absolute = _is_staged(calls)
    places: dict[str, int] = {}
    at = -1
    for node in calls:
        for name, facts in zip(node.output, described(node), strict=True):
            if name not in between:
                at = max(facts.skip, 0) + (0 if absolute else at + 1)
                places[name] = at
    return places


def budget_of(model: ModelProto, max_bytes: int) -> Budget:
    """What the decoding of a model may use."""
    wanted = {source for node in calls_of(model) for source in node.input}
    streams = (t for t in model.graph.initializer if t.name in wanted)
    return Budget(max_bytes, sum(tensor_nbytes(tensor) for tensor in streams))


def decodings_of(model: ModelProto, budget: Budget) -> Iterator[Decoding]:
    """Each decode call and its outputs."""
    given, model = model, outlined(model)
    stored_as = {tensor.name: tensor for tensor in model.graph.initializer}
    functions: dict[str, FunctionProto] = {}
    for function in model.functions:
        if function.domain == DOMAIN and function.name in functions:
            raise Prune2OnnxError(
                f"two decode functions are called {function.name!r}; the file is damaged"
            )
        if function.domain == DOMAIN:
            functions[function.name] = function
    arrays: dict[str, NDArray[Any]] = {}
    calls = calls_of(model)
    for name in (name for node in calls for name in (*node.input, *node.output)):
        if not isinstance(name, str):
            raise Prune2OnnxError(f"{name!r}: a name that is not UTF-8; the file is damaged")
    between = between_of(calls)
    last = {name: at for at, node in enumerate(calls) for name in node.input}
    stage_of: dict[str, int] = {}
    for at, node in enumerate(calls):
        for name in node.input:
            if name in arrays:
                continue
            if name not in stored_as:
                raise Prune2OnnxError(
                    f"{weights_of(node)}: the stream {name!r} is missing; the file is damaged"
                )
            try:
                arrays[name] = stored(stored_as[name], budget)
            except (Prune2OnnxError, ValueError, TypeError, KeyError, OverflowError) as error:
                raise Prune2OnnxError(
                    f"{weights_of(node)}: the stream {name!r} is damaged: {one_line(error)[:300]}"
                ) from error
        stage = budget.work.stage = max((stage_of.get(name, 0) for name in node.input), default=0)
        for number, name in enumerate(node.output):
            stage_of[name] = number + 1 if node.op_type == GATES else stage
        decoded = decode(
            node,
            [arrays[name] for name in node.input],
            functions,
            budget,
            written_out=model is not given,
        )
        ended = [name for name in dict.fromkeys(node.input) if last[name] == at]
        dropped = {name: arrays.pop(name) for name in ended}  # memory
        arrays |= {name: array for name, array in decoded.items() if name in last}
        for name in between.intersection(decoded):
            del decoded[name]
        left = sum(array.nbytes for array in decoded.values())
        left -= sum(array.nbytes for name, array in dropped.items() if name in stored_as)
        budget.work.left[stage] += left
        del dropped
        if decoded:
            yield node, decoded


def declared_types(model: ModelProto) -> dict[str, int]:
    """Element types that value_info declares."""
    return {
        value.name: value.type.tensor_type.elem_type
        for value in model.graph.value_info
        if value.type.HasField("tensor_type")
    }
