"""Packs and unpacks: any ONNX model to one with coded weights, and back, bit for bit.

The coded weights are the outputs of one call of a model-local function, under their own names, so
no consumer is rewired. Everything else in the model stays as it was, once `intake` has brought it
to the form this room works on. Lossless: what loses precision comes before (`lossy`).

Works on `ModelProto`; how weights are written is the codecs' business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from prune2onnx.codecs import (
    DOMAIN,
    DOMAIN_VERSION,
    OP,
    WORKING,
    Budget,
    Plan,
    Weight,
    decode,
    described,
    entropy_nbytes,
    framed,
    plan,
)
from prune2onnx.codecs.evaluate import stored, weights_of
from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graphs import Names, copy_but, keep, used_in
from prune2onnx.graphs import opset as opset_of
from prune2onnx.inline import MARK, inlined, outlined
from prune2onnx.intake import plain
from prune2onnx.onnxfile import nbytes as nbytes_of
from prune2onnx.quantize import Quantized, step_of
from prune2onnx.report import WeightRow
from prune2onnx.strip import anonymous
from prune2onnx.tensors import declared_nbytes, kind

FUNCTIONS_IR = 8
"""The first IR version with model-local functions; onnxruntime 1.17 reads up to IR 9."""

MAX_BYTES = 1 << 31
"""Largest array that decoding a file may make, unless told otherwise."""

LEAST_NBYTES = 16
"""Smaller tensors stay as they are: their place in the decode call would take as much."""

_IR_KEY = "prune2onnx.ir_version"
_NOTES_KEY = "prune2onnx.tensors"
_KEYS = (MARK, _IR_KEY, _NOTES_KEY)


@dataclass(frozen=True)
class Packed:
    """What `pack` made.

    Attributes:
        model: the packed model, or the plain one where nothing would make it smaller.
        rows: one row per initializer of the plain model, in its order.
        notes: what was changed to make the model plain, in words.
    """

    model: ModelProto
    rows: tuple[WeightRow, ...]
    notes: tuple[str, ...] = ()


def pack(
    model: ModelProto,
    *,
    load: str = "small",
    quantized: Mapping[str, Quantized] | None = None,
    anonymize: bool = False,
) -> Packed:
    """Writes each weight in the fewest bytes that decode to it, bit for bit.

    Args:
        model: any ONNX model, not modified; external data must be loaded. A packed one is unpacked
            first.
        load: "small", the fewest bytes; "fast", no entropy code, so that sessions open quickly.
        quantized: codes, codebook and scale of weights for which they are known; they rebuild the
            model's weights bit for bit.
        anonymize: whether the file may forget what only its readers want: weights get the shortest
            names and are not found by their own, in it or in what is unpacked from it (the rows
            still have these); the decoder may stand in the graph in place of a call (`inline`).

    Raises:
        Prune2OnnxError: the model cannot be made plain (`intake.plain`), is packed and damaged, or
            `quantized` does not fit it.
    """
    intake = plain(unpack(model))
    model = intake.model
    reasons, quantized = dict(intake.reasons), quantized or {}
    own_name: dict[str, str] = {}
    if anonymize:
        model, renamed = anonymous(model)
        own_name = {new: old for old, new in renamed.items()}
        reasons = {renamed.get(name, name): reason for name, reason in reasons.items()}
        quantized = {renamed.get(name, name): known for name, known in quantized.items()}
    opset = opset_of(model.opset_import)
    assert opset is not None  # plain() sees to it
    reasons = _obstacles(model) | reasons
    tensors = model.graph.initializer
    weights = _levelled(
        [
            _weight(tensor, quantized.get(tensor.name))
            for tensor in tensors
            if tensor.name not in reasons
        ]
    )
    dense = {tensor.name: framed(tensor.ByteSize()) for tensor in tensors}
    gained = {tensor.name: dense[tensor.name] - _notes_nbytes(tensor) for tensor in tensors}
    made = plan(weights, gained, opset, load=load)
    result, nbytes = _written(model, made)
    if anonymize:
        result = min(inlined(result), result, key=nbytes_of)
    if made.bundle is not None and nbytes_of(result) >= nbytes_of(model):
        why = dict.fromkeys(made.methods, "the file would not be smaller")
        made = Plan(None, {}, {**made.reasons, **why})
        result = model
    reasons |= made.reasons
    rows = []
    arrays = {weight.name: weight.array for weight in weights}
    for tensor in tensors:
        name = tensor.name
        known_as = own_name.get(name, name)
        array = arrays[name] if name in arrays else numpy_helper.to_array(tensor)
        if name in made.methods:
            rows.append(WeightRow.of(known_as, array, made.methods[name].name, nbytes[name]))
        else:
            rows.append(WeightRow.of(known_as, array, "dense", dense[name], reasons[name]))
    return Packed(result, tuple(rows), intake.notes)


def unpack(model: ModelProto, max_bytes: int = MAX_BYTES) -> ModelProto:
    """The plain dense model: every weight an initializer again, bit for bit, in its old place.

    A model that is not packed comes back as an equal copy. The model given is not modified.

    Args:
        model: packed by any version.
        max_bytes: the largest array that decoding may make.

    Raises:
        Prune2OnnxError: the decode call is damaged, or takes more than allowed.
    """
    result = ModelProto()
    model = outlined(model)
    calls = _calls(model)
    if not calls and not any(entry.domain == DOMAIN for entry in model.opset_import):
        result.CopyFrom(model)
        return result
    try:
        copy_but(result, model, "graph")
        copy_but(result.graph, model.graph, "initializer", "node")
    except UnicodeDecodeError as error:
        raise Prune2OnnxError("a name that is not UTF-8; the file is damaged") from error
    streams = {source for node in calls for source in node.input}
    result.graph.initializer.extend(
        tensor for tensor in model.graph.initializer if tensor.name not in streams
    )
    props = {entry.key: entry.value for entry in model.metadata_props}
    notes = _notes(props)
    kinds = _declared_kinds(model)
    place = 0
    budget = _budget(model, max_bytes)
    for node, decoded in _decodings(model, budget):
        for name, facts in zip(list(decoded), described(node), strict=True):
            place = min(place + max(facts.skip, 0), len(result.graph.initializer))
            result.graph.initializer.insert(place, TensorProto())
            tensor = result.graph.initializer[place]
            _fill(tensor, name, decoded.pop(name), kinds.get(name), budget)
            for key, value in notes.get(name, {}).items():
                if key == "doc_string":
                    tensor.doc_string = value
                else:
                    tensor.metadata_props.add(key=key.removeprefix("."), value=value)
            place += 1
    result.graph.node.extend(node for node in model.graph.node if node.domain != DOMAIN)
    keep(result.functions, lambda function: function.domain != DOMAIN)
    keep(result.opset_import, lambda entry: entry.domain != DOMAIN)
    if _IR_KEY in props:
        version = props[_IR_KEY]
        if version not in map(str, range(1, FUNCTIONS_IR)):
            raise Prune2OnnxError(
                f"{_IR_KEY}: {version[:20]!r}, expected a number below {FUNCTIONS_IR}; "
                "the file is damaged"
            )
        result.ir_version = int(version)
    keep(result.metadata_props, lambda entry: entry.key not in _KEYS)
    return result


@dataclass(frozen=True)
class Coded:
    """What a packed model holds.

    Attributes:
        arrays: weight name -> decoded array.
        how: weight name -> (codec, bytes of its own in the file).
        nodes: operators that a runtime folds to decode them.
        work_nbytes: bytes of those operators' results.
    """

    arrays: Mapping[str, NDArray[Any]]
    how: Mapping[str, tuple[str, int]]
    nodes: int
    work_nbytes: int


def coded(model: ModelProto, max_bytes: int = MAX_BYTES) -> Coded:
    """Decodes every coded weight in numpy: the oracle for what onnxruntime decodes.

    Raises:
        Prune2OnnxError: the decode call is damaged, or takes more than allowed.
    """
    model = outlined(model)
    arrays: dict[str, NDArray[Any]] = {}
    how: dict[str, tuple[str, int]] = {}
    sizes = {tensor.name: framed(tensor.ByteSize()) for tensor in model.graph.initializer}
    budget = _budget(model, max_bytes)
    for node, decoded in _decodings(model, budget):
        if twice := arrays.keys() & decoded.keys():
            raise Prune2OnnxError(f"{min(twice)}: decoded twice; the file is damaged")
        arrays |= decoded
        nbytes = framed(node.ByteSize()) + sum(sizes[source] for source in node.input)
        bounds = {name: 1 + entropy_nbytes(array) for name, array in decoded.items()}
        for name, told in zip(decoded, described(node), strict=True):
            if told.method is not None:
                how[name] = (told.method.name, told.nbytes)
            else:
                codec = "written out" if node.op_type == OP else f"version 1: {node.op_type}"
                how[name] = (codec, round(nbytes * bounds[name] / sum(bounds.values())))
    return Coded(arrays, how, budget.nodes, budget.nbytes)


def decode_graph(model: ModelProto, arrays: Mapping[str, NDArray[Any]] | None = None) -> ModelProto:
    """A model of nothing but the decode calls and their streams; its outputs are the weights.

    Args:
        model: a packed model.
        arrays: its decoded weights (`coded`), if they are at hand.
    """
    model = outlined(model)
    calls = _calls(model)
    streams = {source for node in calls for source in node.input}
    graph = GraphProto(name="decode", node=calls)
    graph.initializer.extend(t for t in model.graph.initializer if t.name in streams)
    kinds = _declared_kinds(model)
    for name, array in (coded(model).arrays if arrays is None else arrays).items():
        number = kinds.get(name) or helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.output.append(helper.make_tensor_value_info(name, number, array.shape))
    result = ModelProto(ir_version=model.ir_version, graph=graph)
    result.opset_import.extend(e for e in model.opset_import if e.domain in ("", DOMAIN))
    result.functions.extend(f for f in model.functions if f.domain == DOMAIN)
    return result


def _weight(tensor: TensorProto, known: Quantized | None) -> Weight:
    array = numpy_helper.to_array(tensor)
    if known is None or known.scale is None:
        return Weight(tensor.name, array, tensor.data_type)
    if known.dense().tobytes() != array.tobytes() or known.codes.shape != array.shape:
        raise Prune2OnnxError(
            f"{tensor.name}: codes, codebook and scale do not give the model's weight; "
            "quantize the model that is packed"
        )
    levels = np.concatenate([np.zeros(1, np.float32), known.codebook])[known.codes]
    return Weight(tensor.name, array, tensor.data_type, known.scale, levels)


def _levelled(weights: list[Weight]) -> list[Weight]:
    """The same weights; those that are multiples of a step have it as their scale.

    Whole numbers need none, unless others have: all that are alike are written together.
    """
    steps: list[np.float32 | None] = []
    for weight in weights:
        found = None
        if weight.kind == TensorProto.FLOAT and weight.scale is None:
            found = weight.shared_nonzero
        steps.append(None if found is None else step_of(found[1]))
    if all(step is None or step % 1 == 0 for step in steps):
        return weights
    common = next(step for step in steps if step is not None)
    return [_multiple(weight, step, common) for weight, step in zip(weights, steps, strict=True)]


def _multiple(weight: Weight, step: np.float32 | None, common: np.float32) -> Weight:
    """A weight with a step as its scale; if nothing in it is nonzero, with the `common` one."""
    if step is None:
        nothing = not weight.nonzero.size and weight.kind == TensorProto.FLOAT
        if not nothing or weight.scale is not None:
            return weight
        step = common
    levels = np.rint(weight.array / step) + np.float32(0)  # no -0
    return Weight(weight.name, weight.array, weight.kind, np.full(1, step), levels)


def _notes_nbytes(tensor: TensorProto) -> int:
    """Bytes of what is said about a tensor, which a packed file keeps elsewhere."""
    noted = framed(len(tensor.doc_string.encode())) if tensor.doc_string else 0
    return noted + sum(framed(entry.ByteSize(), tag=2) for entry in tensor.metadata_props)


def _obstacles(model: ModelProto) -> dict[str, str]:
    """Why some initializers have to stay dense, or are not worth a try: name -> reason."""
    graph = model.graph
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    used = used_in(graph.node)
    reasons = {}
    for tensor in graph.initializer:
        nbytes = declared_nbytes(tensor) or 0
        if tensor.name in inputs:
            reasons[tensor.name] = "also an input of the graph, so a caller may replace it"
        elif tensor.name in outputs:
            reasons[tensor.name] = "also an output of the graph"
        elif tensor.name not in used:
            reasons[tensor.name] = "used by no node"
        elif tensor.data_type not in WORKING:
            reasons[tensor.name] = f"no codec stores {kind(tensor)}"
        elif nbytes < LEAST_NBYTES:
            reasons[tensor.name] = f"{nbytes} bytes are too few to gain from"
    return reasons


def _written(model: ModelProto, made: Plan) -> tuple[ModelProto, dict[str, int]]:
    """The packed model, and the bytes of each coded weight."""
    result = ModelProto()
    if made.bundle is None:
        result.CopyFrom(model)
        return result, {}
    copy_but(result, model, "graph")
    copy_but(result.graph, model.graph, "initializer", "node")
    names = Names(model)
    node = result.graph.node.add()
    node.CopyFrom(made.bundle.node)
    for stream in made.bundle.streams:
        stored = result.graph.initializer.add()
        stored.CopyFrom(stream)
        stored.name = names.shortest()
        node.input.append(stored.name)
    notes: dict[str, dict[str, str]] = {}
    for tensor in model.graph.initializer:
        if tensor.name not in made.methods:
            result.graph.initializer.append(tensor)
            continue
        told = {f".{entry.key}": entry.value for entry in tensor.metadata_props}
        if tensor.doc_string:
            told["doc_string"] = tensor.doc_string
        if told:
            notes[tensor.name] = told
    result.graph.node.extend(model.graph.node)
    result.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
    result.functions.extend(made.bundle.functions)
    result.metadata_props.add(key=MARK)
    if model.ir_version < FUNCTIONS_IR:
        result.metadata_props.add(key=_IR_KEY, value=str(model.ir_version))
        result.ir_version = FUNCTIONS_IR
    if notes:
        result.metadata_props.add(key=_NOTES_KEY, value=json.dumps(notes, ensure_ascii=False))
    for _ in _decodings(result, _budget(result, MAX_BYTES)):
        pass  # holds its checksum
    return result, {
        name: told.nbytes for name, told in zip(node.output, described(node), strict=True)
    }


def _calls(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]


def _budget(model: ModelProto, max_bytes: int) -> Budget:
    """What the decoding of a model may use."""
    wanted = {source for node in _calls(model) for source in node.input}
    streams = (t for t in model.graph.initializer if t.name in wanted)
    return Budget(max_bytes, sum(tensor.ByteSize() for tensor in streams))


def _decodings(
    model: ModelProto, budget: Budget
) -> Iterator[tuple[NodeProto, dict[str, NDArray[Any]]]]:
    """Each decode call and its outputs."""
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
    for node in _calls(model):
        for name in (*node.input, *node.output):
            if not isinstance(name, str):
                raise Prune2OnnxError(f"{name!r}: a name that is not UTF-8; the file is damaged")
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
        yield node, decode(node, [arrays[name] for name in node.input], functions, budget)


def _notes(props: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What was written of the coded weights: name -> field -> text."""
    try:
        notes = json.loads(props.get(_NOTES_KEY, "{}"))
        for fields in notes.values():
            for text in (*fields, *fields.values()):
                text.encode()  # fails where it is no text, or half a surrogate pair
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise Prune2OnnxError(
            f"{_NOTES_KEY}: not the notes of weights in JSON: {one_line(error)[:200]}; "
            "the file is damaged, remove that metadata entry"
        ) from error
    return cast("dict[str, dict[str, str]]", notes)


def _declared_kinds(model: ModelProto) -> dict[str, int]:
    """Element types that value_info declares."""
    return {
        value.name: value.type.tensor_type.elem_type
        for value in model.graph.value_info
        if value.type.HasField("tensor_type")
    }


def _fill(
    tensor: TensorProto, name: str, array: NDArray[Any], number: int | None, budget: Budget
) -> None:
    """Makes a tensor of a decoded weight; `number` is the element type that the model declares."""
    try:
        budget.room(array.shape, array.dtype)
    except Prune2OnnxError as error:
        raise Prune2OnnxError(f"{name}: unpacking needs {error}") from error
    budget.keep(array.nbytes)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    if number and number != tensor.data_type:
        raise Prune2OnnxError(
            f"{name}: decodes to {kind(tensor)}, the model declares element type {number}; "
            "the file is damaged"
        )
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
