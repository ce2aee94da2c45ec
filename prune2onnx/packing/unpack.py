"""Decodes packed models in numpy: back to dense ones, bit for bit, or weight by weight.

A file carries its own decoder, so files of every version are read. A file is not trusted: sizes
are checked before anything is allocated, and time and memory are bounded (`codecs.limits`).
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graph.domain import DOMAIN, MARK, OP, decoder
from prune2onnx.graph.file import InvalidModelError, load
from prune2onnx.graph.protobuf import copy_but, framed, keep, tensor_nbytes
from prune2onnx.graph.tensors import element_type, raw_of
from prune2onnx.graph.walk import used_in
from prune2onnx.packing.codecs import METHODS, decode, described, entropy_nbytes
from prune2onnx.packing.codecs.bundle import facts_of
from prune2onnx.packing.codecs.evaluator import weights_of
from prune2onnx.packing.codecs.limits import Budget
from prune2onnx.packing.codecs.operators import stored
from prune2onnx.packing.codecs.staged import GATES
from prune2onnx.packing.codecs.work import Work
from prune2onnx.packing.inline import FACTS_KEY, is_packed, outlined
from prune2onnx.packing.short_names import has_short_names

FUNCTIONS_IR = 8
"""The first IR version with model-local functions; onnxruntime 1.17 reads up to IR 9."""

MAX_BYTES = 1 << 31
"""Largest array that decoding a file may make, by default."""

_MEASURED_NBYTES = 1 << 26  # a file of some bytes may decode to gigabytes

IR_KEY = "prune2onnx.ir_version"

NOTES_KEY = "prune2onnx.tensors"

KEYS = (MARK, IR_KEY, NOTES_KEY, FACTS_KEY)


Decoding = tuple[NodeProto, dict[str, NDArray[Any]]]
"""A decode call and its outputs by name."""


def read(path: Path, max_bytes: int = MAX_BYTES) -> ModelProto:
    """Reads a file that is to be unpacked, also one that onnx's checker refuses.

    The checker is stricter than runtimes, and so than `pack`, which asks onnxruntime where it
    refuses a file. To open a session takes memory as the file likes, so that is not done here: the
    weights have a checksum, and the graph stays as it is.

    Args:
        path: the file.
        max_bytes: most bytes of external data to read.

    Raises:
        Prune2OnnxError: as for `graph.file.load`.
    """
    try:
        return load(path, max_bytes)
    except InvalidModelError as error:
        if is_packed(error.model) or error.model.graph.sparse_initializer:
            return error.model
        raise


def unpack(model: ModelProto, max_bytes: int = MAX_BYTES, known: Coded | None = None) -> ModelProto:
    """The dense model: every weight an initializer again, bit for bit, in its old place.

    A model that is not packed comes back as an equal copy. The model given is not modified.

    Args:
        model: packed by any version.
        max_bytes: the largest array that decoding may make.
        known: its decoded weights (`coded`), if they are at hand.

    Raises:
        Prune2OnnxError: the decode call is damaged, or takes more than is allowed.
    """
    result = ModelProto()
    given, model = model, outlined(model)
    calls = _calls(model)
    if not calls and not any(entry.domain == DOMAIN for entry in model.opset_import):
        result.CopyFrom(model)
        return result
    try:
        copy_but(result, model, "graph")
        copy_but(result.graph, model.graph, "initializer", "node")
    except UnicodeDecodeError as error:
        raise Prune2OnnxError("a name that is not UTF-8; the file is damaged") from error
    others = [node for node in model.graph.node if node.domain != DOMAIN]
    streams = {source for node in calls for source in node.input}
    streams -= used_in(others) | {value.name for value in model.graph.output}
    result.graph.initializer.extend(
        tensor for tensor in model.graph.initializer if tensor.name not in streams
    )
    between = _between(calls)
    keep(result.graph.value_info, lambda value: value.name not in between)
    # a tool that lists initializers among the inputs lists streams, too
    keep(result.graph.input, lambda value: value.name not in streams)
    props = {entry.key: entry.value for entry in model.metadata_props}
    notes = _notes(props)
    taken = {tensor.name for tensor in result.graph.initializer}
    taken.update(value.name for value in result.graph.input)
    taken.update(name for node in others for name in node.output)
    declared = _declared_types(model)
    places = _places(calls, between)
    every, inserted = sorted(places.values()), list[int]()
    budget = _budget(model, max_bytes)
    decodings = _decodings(given, budget) if known is None else known.of(calls)
    for _, decoded in decodings:
        for name in list(decoded):
            if name in taken:
                raise Prune2OnnxError(
                    f"{name}: a coded weight, and another value has this name; the file is damaged"
                )
            taken.add(name)
            place = places[name]
            stay = place - bisect.bisect_left(every, place)
            at = min(stay + bisect.bisect(inserted, place), len(result.graph.initializer))
            bisect.insort(inserted, place)
            result.graph.initializer.insert(at, TensorProto())
            tensor = result.graph.initializer[at]
            _fill(tensor, name, decoded.pop(name), declared.get(name), budget)
            for key, value in notes.get(name, {}).items():
                if key == "doc_string":
                    tensor.doc_string = value
                else:
                    tensor.metadata_props.add(key=key.removeprefix("."), value=value)
    result.graph.node.extend(others)
    keep(result.functions, lambda function: function.domain != DOMAIN)
    keep(result.opset_import, lambda entry: entry.domain != DOMAIN)
    if IR_KEY in props:
        version = props[IR_KEY]
        if version not in map(str, range(1, FUNCTIONS_IR)):
            raise Prune2OnnxError(
                f"{IR_KEY}: {version[:20]!r}, expected a number below {FUNCTIONS_IR}; "
                "the file is damaged"
            )
        result.ir_version = int(version)
    keep(result.metadata_props, lambda entry: entry.key not in KEYS)
    return result


@dataclass(frozen=True)
class Coded:
    """The decoded weights of a packed model, and what decoding takes.

    Attributes:
        arrays: weight name -> decoded array.
        how: weight name -> (codec, its bytes in the file).
        work: what a runtime does to decode them.
    """

    arrays: Mapping[str, NDArray[Any]]
    how: Mapping[str, tuple[str, int]]
    work: Work

    def of(self, calls: Iterable[NodeProto]) -> Iterator[Decoding]:
        """The outputs of each decode call."""
        for node in calls:
            own = {name: self.arrays[name] for name in node.output if name in self.arrays}
            if own:
                yield node, own


def coded(model: ModelProto, max_bytes: int = MAX_BYTES) -> Coded:
    """Decodes every coded weight in numpy: the oracle for what onnxruntime decodes.

    Raises:
        Prune2OnnxError: the decode call is damaged, or takes more than is allowed.
    """
    given, model = model, outlined(model)
    arrays: dict[str, NDArray[Any]] = {}
    how: dict[str, tuple[str, int]] = {}
    sizes = {tensor.name: framed(tensor_nbytes(tensor)) for tensor in model.graph.initializer}
    budget = _budget(model, max_bytes)
    for node, decoded in _decodings(given, budget):
        if twice := arrays.keys() & decoded.keys():
            raise Prune2OnnxError(f"{min(twice)}: decoded twice; the file is damaged")
        arrays |= decoded
        found = described(node)
        if all(facts.nbytes is not None for facts in found):
            bounds = dict.fromkeys(decoded, 0.0)
        else:  # the file does not say how its bytes divide; far larger weights are all alike
            small = sum(array.nbytes for array in decoded.values()) <= _MEASURED_NBYTES
            bounds = {
                name: 1 + (entropy_nbytes(array) if small else array.nbytes)
                for name, array in decoded.items()
            }
        nbytes = framed(node.ByteSize()) + sum(sizes.get(source, 0) for source in node.input)
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
    return Coded(arrays, how, budget.work)


def decode_graph(model: ModelProto, arrays: Mapping[str, NDArray[Any]] | None = None) -> ModelProto:
    """A model of nothing but the decode calls and their streams; its outputs are the weights.

    Args:
        model: a packed model.
        arrays: its decoded weights (`coded`), if they are at hand.
    """
    arrays = coded(model).arrays if arrays is None else arrays
    if has_short_names(model):
        model = outlined(model)
    calls = decoder(model) or _calls(model)
    streams = {source for node in calls for source in node.input}
    graph = GraphProto(name="decode", node=calls)
    between = {name for node in calls for name in node.output} - arrays.keys()
    graph.value_info.extend(v for v in model.graph.value_info if v.name in between)
    graph.initializer.extend(t for t in model.graph.initializer if t.name in streams)
    declared = _declared_types(model)
    for name, array in arrays.items():
        number = declared.get(name) or helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.output.append(helper.make_tensor_value_info(name, number, array.shape))
    result = ModelProto(ir_version=model.ir_version, graph=graph)
    result.opset_import.extend(e for e in model.opset_import if e.domain in ("", DOMAIN))
    result.functions.extend(f for f in model.functions if f.domain == DOMAIN)
    return result


def facts_by_weight(model: ModelProto) -> dict[str, tuple[int, int, int]]:
    """What decode calls say about each weight, in the order of their places in the dense model.

    Returns:
        Name -> how many initializers stand between it and the coded weight before it, its method's
        number, its bytes.
    """
    calls = _calls(outlined(model))
    places = _places(calls, _between(calls))
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
    budget = _budget(model, MAX_BYTES)
    for _, decoded in _decodings(model, budget):
        for name, array in decoded.items():
            done(name, array.nbytes)
    return budget.work


def _calls(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]


def _between(calls: Sequence[NodeProto]) -> set[str]:
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


def _places(calls: Sequence[NodeProto], between: Collection[str]) -> dict[str, int]:
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


def _budget(model: ModelProto, max_bytes: int) -> Budget:
    """What the decoding of a model may use."""
    wanted = {source for node in _calls(model) for source in node.input}
    streams = (t for t in model.graph.initializer if t.name in wanted)
    return Budget(max_bytes, sum(tensor_nbytes(tensor) for tensor in streams))


def _decodings(model: ModelProto, budget: Budget) -> Iterator[Decoding]:
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
    calls = _calls(model)
    for name in (name for node in calls for name in (*node.input, *node.output)):
        if not isinstance(name, str):
            raise Prune2OnnxError(f"{name!r}: a name that is not UTF-8; the file is damaged")
    between = _between(calls)
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
        for name in node.input:  # memory: a value is dropped after its last reader
            if last[name] == at:
                arrays.pop(name, None)
        arrays |= {name: array for name, array in decoded.items() if name in last}
        for name in between.intersection(decoded):
            del decoded[name]
        if decoded:
            yield node, decoded


def _notes(props: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Doc strings and metadata of the coded weights: name -> field -> text."""
    try:
        notes = json.loads(props.get(NOTES_KEY, "{}"))
        for fields in notes.values():
            for text in (*fields, *fields.values()):
                text.encode()  # fails unless it is text, and without half a surrogate pair
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise Prune2OnnxError(
            f"{NOTES_KEY}: not the notes of weights in JSON: {one_line(error)[:200]}; "
            "the file is damaged, remove that metadata entry"
        ) from error
    return cast("dict[str, dict[str, str]]", notes)


def _declared_types(model: ModelProto) -> dict[str, int]:
    """Element types that value_info declares."""
    return {
        value.name: value.type.tensor_type.elem_type
        for value in model.graph.value_info
        if value.type.HasField("tensor_type")
    }


def _fill(
    tensor: TensorProto, name: str, array: NDArray[Any], declared: int | None, budget: Budget
) -> None:
    """Fills a tensor with a decoded weight; `declared` is the element type in the model."""
    try:
        budget.check(array.shape, array.dtype)
    except Prune2OnnxError as error:
        raise Prune2OnnxError(f"{name}: unpacking needs {error}") from error
    budget.keep(array.nbytes)
    tensor.name = name
    tensor.dims.extend(array.shape)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    if declared and declared != tensor.data_type:
        raise Prune2OnnxError(
            f"{name}: decodes to {element_type(tensor)}, the model declares element type "
            f"{declared}; the file is damaged"
        )
    data = raw_of(array)
    del array  # memory: it, the bytes and their copy in the message would be there at once
    tensor.raw_data = data
