"""Plans, packs, unpacks and inspects: dense ONNX to coded ONNX and back, bit for bit.

A packed weight is one call of a model-local function whose output has the weight's name, so no
consumer is rewired; its streams stand where the weight stood among the initializers. Everything
else in the model stays as it was. Lossless: what loses precision comes before.

Works on `ModelProto`; how a weight is written is the codecs' business.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from prune2onnx.codecs import CODECS, DOMAIN, DOMAIN_VERSION, Codec, Payload, Weight
from prune2onnx.codecs.codec import framed
from prune2onnx.codecs.plan import candidates, functions, plan
from prune2onnx.codecs.weight import PACKABLE, data_type
from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.report import WeightRow

MIN_NBYTES = 64
"""Smaller tensors are not tried: the shortest decode call and its streams take about as much."""

MIN_OPSET = 13
"""The decode functions use no operator whose meaning changed since (`Codec`)."""

FUNCTIONS_IR = 8
"""The first IR version with model-local functions; onnxruntime 1.17 reads up to IR 9."""

_IR_KEY = "prune2onnx.ir_version"
_STORAGE_KEY = "prune2onnx.typed"


@dataclass(frozen=True)
class Packed:
    """What `pack` made.

    Attributes:
        model: the packed model, or the one given where nothing would make it smaller.
        rows: one row per initializer of the dense model, in its order.
    """

    model: ModelProto
    rows: tuple[WeightRow, ...]


def load(path: str | Path) -> ModelProto:
    """Reads an ONNX file, with external data beside it.

    A file that was cut short may still parse, so the model is checked too.

    Raises:
        Prune2OnnxError: the file is missing, unreadable, empty, not ONNX or damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise Prune2OnnxError(f"{path}: a folder; give the .onnx file in it")
        if not path.stat().st_size:
            raise Prune2OnnxError(f"{path}: an empty file; export or copy the model again")
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise Prune2OnnxError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise Prune2OnnxError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise Prune2OnnxError(
            f"{path}: not an ONNX model, or cut short ({error}); export or copy it again"
        ) from error
    if not model.graph.ByteSize() or not (model.graph.node or model.graph.initializer):
        raise Prune2OnnxError(f"{path}: no graph in it; not an ONNX model, or cut short")
    if not model.opset_import:
        raise Prune2OnnxError(f"{path}: no operator set is imported; not ONNX, or cut short")
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise Prune2OnnxError(
            f"{path}: external data cannot be read: {one_line(error)}; put it beside the file"
        ) from error
    defined = {function.name for function in model.functions if function.domain == DOMAIN}
    for node in _calls(model):
        if node.op_type not in defined:
            raise Prune2OnnxError(
                f"{path}: {node.output[0]}: its decode function {node.op_type!r} is missing; "
                "the file is cut short"
            )
    if model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        return model  # the checker serializes, which protobuf limits to 2 GB
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise Prune2OnnxError(f"{path}: not a valid ONNX model: {one_line(error)}") from error
    return model


def pack(model: ModelProto, codecs: Sequence[Codec] = CODECS) -> Packed:
    """Replaces each weight by the fewest bytes that decode to it, bit for bit.

    Bytes are those of the serialized model: streams with headers and names, the call, and every
    function counted once however many weights call it. A packed model is unpacked first.

    Args:
        model: not modified; external data must be loaded.
        codecs: those the planner may choose from.

    Raises:
        Prune2OnnxError: the default opset is below 13, or the model is packed and damaged.
    """
    model = unpack(model)
    opset = _opset(model)
    tensors = model.graph.initializer
    reasons = _obstacles(model)
    choices: dict[str, list[Payload]] = {}
    for tensor in tensors:
        if tensor.name not in reasons:
            fits, reason = candidates(Weight(tensor.name, numpy_helper.to_array(tensor)), codecs)
            if fits:
                choices[tensor.name] = fits
            else:
                reasons[tensor.name] = reason
    dense = {tensor.name: framed(tensor.ByteSize()) for tensor in tensors}
    chosen = plan(choices, dense, opset)
    for name in choices:
        if name not in chosen:
            best = min(choices[name], key=lambda payload: payload.nbytes)
            reasons[name] = (
                f"{best.codec.name} takes {best.nbytes:,} bytes and its decode function, "
                f"dense {dense[name]:,}"
            )
    if chosen:
        packed, nbytes = _write(model, chosen, opset)
        if packed.ByteSize() < model.ByteSize():
            rows = (
                _row(tensor, chosen[tensor.name].codec.name, nbytes[tensor.name], "")
                if tensor.name in chosen
                else _row(tensor, "dense", dense[tensor.name], reasons[tensor.name])
                for tensor in tensors
            )
            return Packed(packed, tuple(rows))
        for name in chosen:
            reasons[name] = "the decode functions take more than all weights together save"
    rows = (_row(tensor, "dense", dense[tensor.name], reasons[tensor.name]) for tensor in tensors)
    return Packed(model, tuple(rows))


def unpack(model: ModelProto) -> ModelProto:
    """The plain dense model: every weight an initializer again, bit for bit, in its old place.

    A model that is not packed comes back as an equal copy. The model given is not modified.

    Raises:
        Prune2OnnxError: a decode call is damaged; the message names the weight.
    """
    result = ModelProto()
    result.CopyFrom(model)
    payloads = _payloads(model)
    if not payloads and not any(entry.domain == DOMAIN for entry in model.opset_import):
        return result
    streams = {source for _, node in payloads for source in node.input}
    owned = {node.input[0]: payload for payload, node in payloads}
    del result.graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor.name in owned:
            result.graph.initializer.append(_restored(owned[tensor.name], tensor))
        elif tensor.name not in streams:
            result.graph.initializer.append(tensor)
    _keep(result.graph.node, lambda node: node.domain != DOMAIN)
    _keep(result.functions, lambda function: function.domain != DOMAIN)
    _keep(result.opset_import, lambda entry: entry.domain != DOMAIN)
    for entry in result.metadata_props:
        if entry.key == _IR_KEY:
            result.ir_version = int(entry.value)
    _keep(result.metadata_props, lambda entry: entry.key != _IR_KEY)
    return result


def inspect(model: ModelProto) -> tuple[WeightRow, ...]:
    """One row per weight, in the order of the dense model's initializers.

    The decode functions, which all weights share, are in no row.

    Raises:
        Prune2OnnxError: a decode call is damaged; the message names the weight.
    """
    payloads = _payloads(model)
    streams = {source for _, node in payloads for source in node.input}
    owned = {node.input[0]: (payload, node) for payload, node in payloads}
    seen: set[str] = set()
    rows = []
    sizes = {tensor.name: framed(tensor.ByteSize()) for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in owned:
            payload, node = owned[tensor.name]
            nbytes = framed(node.ByteSize())
            nbytes += sum(sizes[source] for source in node.input if source not in seen)
            seen.update(node.input)
            array = payload.codec.decode(payload)
            rows.append(_row_of(payload.name, array, payload.codec.name, nbytes, ""))
        elif tensor.name not in streams:
            rows.append(_row(tensor, "dense", sizes[tensor.name], "stored dense in the file"))
    return tuple(rows)


def decoded_weights(model: ModelProto) -> dict[str, NDArray[Any]]:
    """Every packed weight, decoded in numpy: the oracle for what onnxruntime decodes.

    Raises:
        Prune2OnnxError: a decode call is damaged; the message names the weight.
    """
    return {payload.name: payload.codec.decode(payload) for payload, _ in _payloads(model)}


def decode_graph(model: ModelProto) -> ModelProto:
    """A model of nothing but the decode calls and their streams; its outputs are the weights."""
    payloads = _payloads(model)
    streams = {source for _, node in payloads for source in node.input}
    graph = GraphProto(name="decode", node=[node for _, node in payloads])
    graph.initializer.extend(t for t in model.graph.initializer if t.name in streams)
    graph.output.extend(
        helper.make_tensor_value_info(payload.name, data_type(payload.dtype), payload.shape)
        for payload, _ in payloads
    )
    result = ModelProto(ir_version=model.ir_version, graph=graph)
    result.opset_import.extend(e for e in model.opset_import if e.domain in ("", DOMAIN))
    result.functions.extend(f for f in model.functions if f.domain == DOMAIN)
    return result


def _opset(model: ModelProto) -> int:
    versions = [e.version for e in model.opset_import if e.domain in ("", "ai.onnx")]
    if not versions:
        raise Prune2OnnxError(
            f"the model imports no default operator set; one of {MIN_OPSET} or newer is needed"
        )
    if versions[0] < MIN_OPSET:
        raise Prune2OnnxError(
            f"the model uses opset {versions[0]}, decoding needs {MIN_OPSET} or newer; convert it "
            f"with onnx.version_converter.convert_version(model, {MIN_OPSET}) and try again"
        )
    return int(versions[0])


def _obstacles(model: ModelProto) -> dict[str, str]:
    """Why some initializers have to stay dense, or are not worth a try: name -> reason."""
    graph = model.graph
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    used = {name for node in graph.node for name in node.input}
    inside = {name for node in graph.node for body in _bodies(node) for name in _uses(body)}
    reasons = {}
    for tensor in graph.initializer:
        kind = helper.tensor_dtype_to_string(tensor.data_type).removeprefix("TensorProto.").lower()
        size = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.data_location == TensorProto.EXTERNAL:
            raise Prune2OnnxError(
                f"{tensor.name}: its external data is not loaded; read the model with load()"
            )
        if tensor.name in inputs:
            reasons[tensor.name] = "also an input of the graph, so a caller may replace it"
        elif tensor.name in outputs:
            reasons[tensor.name] = "also an output of the graph"
        elif tensor.name not in used:
            where = "used only inside a subgraph" if tensor.name in inside else "used by no node"
            reasons[tensor.name] = where
        elif tensor.data_type not in PACKABLE:
            reasons[tensor.name] = f"no codec stores {kind}"
        elif data_type(helper.tensor_dtype_to_np_dtype(tensor.data_type)) != tensor.data_type:
            # onnx 1.18 reads bfloat16 as float32.
            reasons[tensor.name] = f"onnx {onnx.__version__} has no numpy type for {kind}"
        elif size * _itemsize(tensor) < MIN_NBYTES:
            reasons[tensor.name] = f"{size * _itemsize(tensor)} bytes are too few to gain from"
    return reasons


def _itemsize(tensor: TensorProto) -> int:
    return int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _write(
    model: ModelProto, chosen: Mapping[str, Payload], opset: int
) -> tuple[ModelProto, dict[str, int]]:
    """The packed model, and the bytes that each weight takes in it.

    A stream that equals one already written is shared, all but the first of each call: that one
    stands in the weight's place, so that `unpack` finds the place again.
    """
    result = ModelProto()
    result.CopyFrom(model)
    names = _fresh_names(model)
    del result.graph.initializer[:]
    del result.graph.node[:]
    written: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    nbytes: dict[str, int] = {}
    for dense in model.graph.initializer:
        if dense.name not in chosen:
            result.graph.initializer.append(dense)
            continue
        payload = chosen[dense.name]
        nbytes[dense.name] = 0
        inputs: list[str] = []
        for index, tensor in enumerate(payload.tensors([""] * len(payload.streams))):
            key = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
            if index and key in written:
                inputs.append(written[key])
                continue
            tensor.name = next(names)
            written.setdefault(key, tensor.name)
            inputs.append(tensor.name)
            if not index:
                _remember(dense, tensor)
            result.graph.initializer.append(tensor)
            nbytes[dense.name] += framed(tensor.ByteSize())
        node = payload.node(inputs)
        result.graph.node.append(node)
        nbytes[dense.name] += framed(node.ByteSize())
    result.graph.node.extend(model.graph.node)
    result.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
    result.functions.extend(functions(chosen.values(), opset))
    if model.ir_version < FUNCTIONS_IR:
        result.metadata_props.add(key=_IR_KEY, value=str(model.ir_version))
        result.ir_version = FUNCTIONS_IR
    return result, nbytes


def _remember(dense: TensorProto, stream: TensorProto) -> None:
    """Keeps on the first stream what the weight's tensor held besides type, shape, name, data."""
    stream.doc_string = dense.doc_string
    if not dense.doc_string:
        stream.ClearField("doc_string")
    if dense.HasField("data_location"):
        stream.data_location = dense.data_location
    stream.metadata_props.extend(dense.metadata_props)
    if not dense.HasField("raw_data"):
        stream.metadata_props.add(key=_STORAGE_KEY)


def _restored(payload: Payload, stream: TensorProto) -> TensorProto:
    """The weight's tensor; the inverse of `_remember`."""
    array = payload.codec.decode(payload)
    kind = data_type(array.dtype)
    props = [entry for entry in stream.metadata_props if entry.key != _STORAGE_KEY]
    if len(props) == len(stream.metadata_props):
        tensor = TensorProto(dims=array.shape, data_type=kind, raw_data=array.tobytes())
    else:
        tensor = _typed(array, kind)
    tensor.name = payload.name
    if stream.HasField("doc_string"):
        tensor.doc_string = stream.doc_string
    if stream.HasField("data_location"):
        tensor.data_location = stream.data_location
    tensor.metadata_props.extend(props)
    return tensor


def _typed(array: NDArray[Any], kind: int) -> TensorProto:
    """A tensor in its typed field (float_data and the like) instead of raw bytes."""
    tensor = TensorProto(dims=array.shape, data_type=kind)
    flat = array.reshape(-1)
    if kind == TensorProto.FLOAT:
        tensor.float_data.extend(flat)
    elif kind == TensorProto.DOUBLE:
        tensor.double_data.extend(flat)
    else:
        half = kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        tensor.int32_data.extend((flat.view(np.uint16) if half else flat).astype(int).tolist())
    return tensor


def _calls(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]


def _payloads(model: ModelProto) -> list[tuple[Payload, NodeProto]]:
    """The decode calls of a model, read but not decoded."""
    calls = _calls(model)
    wanted = {name for node in calls for name in node.input}
    initializers = {}
    for tensor in model.graph.initializer:
        if tensor.name in wanted:
            try:
                initializers[tensor.name] = numpy_helper.to_array(tensor)
            except (ValueError, TypeError) as error:
                raise Prune2OnnxError(
                    f"the stream {tensor.name!r} is damaged: {one_line(error)}"
                ) from error
    return [(_codec_of(node).payload(node, initializers), node) for node in calls]


def _codec_of(node: NodeProto) -> Codec:
    for codec in CODECS:
        if node.op_type.rstrip(string.digits) == codec.op:
            return codec
    raise Prune2OnnxError(
        f"{', '.join(node.output)}: unknown decode function {node.op_type!r}; "
        "the file was written by a newer prune2onnx"
    )


def _row(tensor: TensorProto, codec: str, nbytes: int, reason: str) -> WeightRow:
    return _row_of(tensor.name, numpy_helper.to_array(tensor), codec, nbytes, reason)


def _row_of(name: str, array: NDArray[Any], codec: str, nbytes: int, reason: str) -> WeightRow:
    nnz = int(np.count_nonzero(array)) if array.dtype.kind != "O" else array.size
    return WeightRow(name, tuple(array.shape), str(array.dtype), nnz, codec, nbytes, reason)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The subgraphs of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _uses(graph: GraphProto) -> Iterator[str]:
    """Every name that a graph and its subgraphs mention."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)
    for node in graph.node:
        yield from node.input
        yield from node.output
        for body in _bodies(node):
            yield from _uses(body)


def _fresh_names(model: ModelProto) -> Iterator[str]:
    """Short names that occur nowhere in the model."""
    taken = set(_uses(model.graph))
    letters = string.ascii_lowercase + string.digits
    for length in itertools.count(1):
        for parts in itertools.product(letters, repeat=length):
            if (name := "".join(parts)) not in taken:
                yield name


def _keep(repeated: Any, wanted: Callable[[Any], bool]) -> None:
    kept = [item for item in repeated if wanted(item)]
    del repeated[:]
    repeated.extend(kept)
