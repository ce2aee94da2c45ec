"""Packs an ONNX model: its weights become coded streams that decode to the same bits.

The coded weights are the outputs of one call of a model-local function, under their own names, so
no consumer is rewired. Everything else in the model stays as `graph.normalize` leaves it.

Lossless: `approximation` runs before where precision may be lost. `unpack` is the way back, and
`codecs` has the coding itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from onnx import (
    FunctionProto,
    ModelProto,
    TensorProto,
    numpy_helper,
)

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.domain import DOMAIN, DOMAIN_VERSION, MARK
from prune2onnx.graph.names import Names
from prune2onnx.graph.names import anonymize as anonymized
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.protobuf import copy_but, framed, keep
from prune2onnx.graph.protobuf import nbytes as nbytes_of
from prune2onnx.graph.rewritten import Rewritten
from prune2onnx.graph.tensors import array_of, declared_nbytes, element_type
from prune2onnx.graph.walk import opset as opset_of
from prune2onnx.graph.walk import used_in
from prune2onnx.packing.codecs import (
    WORKING,
    Method,
    Plan,
    Weight,
    described,
    plan,
    staged,
)
from prune2onnx.packing.inline import inlined
from prune2onnx.packing.quantized import Quantized, step_of
from prune2onnx.packing.rows import WeightRow
from prune2onnx.packing.short_names import shortened
from prune2onnx.packing.unpack import FUNCTIONS_IR, IR_KEY, KEYS, NOTES_KEY, unpack, verify

Load = Literal["small", "balanced", "fast"]
"""What a file is made for: few bytes, or a session that opens in little time and memory."""

_SHORT_NAMES = 0.99
"""Largest size of a file with short names, relative to the same with the weights' own names."""

LEAST_NBYTES = 16
"""Smaller tensors stay dense: their entry in the decode call would take as many bytes."""


@dataclass(frozen=True)
class Packed:
    """What `pack` made.

    Attributes:
        model: the packed model, or the normalized one where packing would not make it smaller.
        rows: one row per initializer of the normalized model, in its order.
        notes: what normalizing changed, in words.
    """

    model: ModelProto
    rows: tuple[WeightRow, ...]
    notes: tuple[str, ...] = ()


def pack(
    model: ModelProto,
    *,
    load: Load = "balanced",
    quantized: Mapping[str, Quantized] | None = None,
    anonymize: bool = False,
) -> Packed:
    """Writes each weight in few bytes that decode to it, bit for bit.

    Args:
        model: any ONNX model, not modified; external data must be loaded. A packed one is unpacked
            first.
        load: "small", the fewest bytes; "balanced", the same, except that large weights are coded
            so that a session opens in little time and memory; "fast", no entropy code.
        quantized: codes, codebook and scale of the weights for which they are known; they rebuild
            the model's weights bit for bit.
        anonymize: whether weights get the shortest names, in the file and in what is unpacked from
            it (the rows keep the original ones), and the decoder's nodes may stand in the graph in
            place of a call (`inline`).

    Raises:
        Prune2OnnxError: the model cannot be normalized (`graph.normalize`), is packed and damaged,
            or `quantized` does not fit it.
    """
    return pack_normalized(
        normalize(unpack(model)), load=load, quantized=quantized, anonymize=anonymize
    )


def pack_normalized(
    normal: Rewritten,
    *,
    load: Load = "balanced",
    quantized: Mapping[str, Quantized] | None = None,
    anonymize: bool = False,
    check: bool = True,
) -> Packed:
    """As `pack`, for a model that is unpacked and normalized.

    Args:
        normal: the model, and why some of its weights cannot be packed.
        load: as for `pack`.
        quantized: as for `pack`.
        anonymize: as for `pack`.
        check: whether to decode the result and compare its checksum.
    """
    model, reasons, quantized = normal.model, dict(normal.reasons), quantized or {}
    own_name: dict[str, str] = {}
    if anonymize:
        short = anonymized(model)
        model, new_name = short.model, short.new_name
        own_name = {new: old for old, new in new_name.items()}
        reasons = {new_name.get(name, name): reason for name, reason in reasons.items()}
        quantized = {new_name.get(name, name): known for name, known in quantized.items()}
    opset = opset_of(model.opset_import)
    assert opset is not None  # normalize() sees to it
    reasons = _obstacles(model) | reasons
    tensors = model.graph.initializer
    weights = _with_scales(
        [
            _weight(tensor, quantized.get(tensor.name))
            for tensor in tensors
            if tensor.name not in reasons
        ]
    )
    dense = {tensor.name: framed(tensor.ByteSize()) for tensor in tensors}
    gained = {tensor.name: dense[tensor.name] - _notes_nbytes(tensor) for tensor in tensors}
    methods: dict[str, Method] = {}
    if load == "balanced":
        methods, stay = staged.chosen(weights, gained, opset)
        reasons |= stay
    others = [weight for weight in weights if weight.name not in {*methods, *reasons}]
    made = plan(
        others, gained, opset, load="fast" if load == "fast" else "small", absolute=bool(methods)
    )
    large = [weight for weight in weights if weight.name in methods]
    result, nbytes = _written(model, made, large, methods)
    if check:
        verify(result)
    if anonymize:
        result = min(inlined(result), result, key=nbytes_of)
    else:
        named = shortened(result)
        if named is not result:  # the facts that a call holds are in the metadata, too
            named = min(inlined(named), named, key=nbytes_of)
        if nbytes_of(named) < _SHORT_NAMES * nbytes_of(result):
            result = named
    reasons |= made.reasons
    methods = {**made.methods, **methods}
    if methods and nbytes_of(result) >= nbytes_of(model):
        reasons |= dict.fromkeys(methods, "the file would not be smaller")
        methods, result = {}, model
    arrays = {weight.name: weight.array for weight in weights}
    rows = []
    for tensor in tensors:
        name = tensor.name
        known_as = own_name.get(name, name)
        array = arrays[name] if name in arrays else array_of(tensor)
        if name in methods:
            rows.append(WeightRow.of(known_as, array, methods[name].name, nbytes[name]))
        else:
            rows.append(WeightRow.of(known_as, array, "dense", dense[name], reasons[name]))
    return Packed(result, tuple(rows), normal.notes)


def _weight(tensor: TensorProto, known: Quantized | None) -> Weight:
    array = numpy_helper.to_array(tensor)
    if known is None or known.scale is None:
        return Weight(tensor.name, array, tensor.data_type)
    if known.dense().tobytes() != array.tobytes() or known.codes.shape != array.shape:
        raise Prune2OnnxError(
            f"{tensor.name}: codes, codebook and scale do not give the model's weight; "
            "pass those of the model that is packed"
        )
    levels = np.concatenate([np.zeros(1, np.float32), known.codebook])[known.codes]
    return Weight(tensor.name, array, tensor.data_type, known.scale, levels)


def _with_scales(weights: list[Weight]) -> list[Weight]:
    """The same weights; those that are multiples of a step have it as their scale.

    Whole numbers need no scale, unless other weights have one: with a scale, like them, they can
    be written in the same group.
    """
    steps = [_step(weight) for weight in weights]
    if all(step is None or step % 1 == 0 for step in steps):
        return weights
    common = next(step for step in steps if step is not None)
    return [_with_scale(weight, step, common) for weight, step in zip(weights, steps, strict=True)]


def _step(weight: Weight) -> np.float32 | None:
    """The step of which all values are multiples: the known one, else one that is searched for."""
    if weight.scale is not None:
        return np.float32(weight.scale.item()) if weight.scale.size == 1 else None
    found = weight.indexed_nonzero if weight.element_type == TensorProto.FLOAT else None
    return None if found is None else step_of(found[1])


def _with_scale(weight: Weight, step: np.float32 | None, common: np.float32) -> Weight:
    """A weight with a step as its scale; an all-zero one gets the `common` step."""
    if weight.scale is not None:
        return weight
    if step is None:
        if weight.nonzero.size or weight.element_type != TensorProto.FLOAT:
            return weight
        step = common
    levels = np.rint(weight.array / step) + np.float32(0)  # no -0
    return Weight(weight.name, weight.array, weight.element_type, np.full(1, step), levels)


def _notes_nbytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's doc string and metadata, which a packed file keeps elsewhere."""
    noted = framed(len(tensor.doc_string.encode())) if tensor.doc_string else 0
    return noted + sum(framed(entry.ByteSize(), tag=2) for entry in tensor.metadata_props)


def _obstacles(model: ModelProto) -> dict[str, str]:
    """Why some initializers stay dense: name -> reason."""
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
            reasons[tensor.name] = f"no codec stores {element_type(tensor)}"
        elif nbytes < LEAST_NBYTES:
            reasons[tensor.name] = f"{nbytes} bytes are too few to gain from"
    return reasons


def _written(
    model: ModelProto,
    made: Plan,
    large: Sequence[Weight] = (),
    methods: Mapping[str, Method] = MappingProxyType({}),
) -> tuple[ModelProto, dict[str, int]]:
    """The packed model, and the bytes of each coded weight."""
    result = ModelProto()
    if made.bundle is None and not large:
        result.CopyFrom(model)
        return result, {}
    copy_but(result, model, "graph")
    copy_but(result.graph, model.graph, "initializer", "node")
    names = Names(model)
    functions: list[FunctionProto] = []
    if made.bundle is not None:
        node = result.graph.node.add()
        node.CopyFrom(made.bundle.node)
        for stream in made.bundle.streams:
            stored = result.graph.initializer.add()
            stored.CopyFrom(stream)
            stored.name = names.shortest()
            node.input.append(stored.name)
        functions += made.bundle.functions
    if large:
        places = {tensor.name: place for place, tensor in enumerate(model.graph.initializer)}
        opset = opset_of(model.opset_import)
        assert opset is not None
        written = staged.encode(large, methods, places, opset, names.shortest)
        result.graph.node.extend(written.nodes)
        result.graph.initializer.extend(written.streams)
        result.graph.value_info.extend(written.places)
        functions += written.functions.values()
    calls = list(result.graph.node)
    notes: dict[str, dict[str, str]] = {}
    for tensor in model.graph.initializer:
        if tensor.name not in made.methods and tensor.name not in methods:
            result.graph.initializer.append(tensor)
            continue
        fields = {f".{entry.key}": entry.value for entry in tensor.metadata_props}
        if tensor.doc_string:
            fields["doc_string"] = tensor.doc_string
        if fields:
            notes[tensor.name] = fields
    result.graph.node.extend(model.graph.node)
    result.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
    result.functions.extend(functions)
    keep(result.metadata_props, lambda entry: entry.key not in KEYS)
    result.metadata_props.add(key=MARK)
    if model.ir_version < FUNCTIONS_IR:
        result.metadata_props.add(key=IR_KEY, value=str(model.ir_version))
        result.ir_version = FUNCTIONS_IR
    if notes:
        result.metadata_props.add(key=NOTES_KEY, value=json.dumps(notes, ensure_ascii=False))
    return result, {
        name: facts.nbytes or 0
        for node in calls
        for name, facts in zip(node.output, described(node), strict=True)
    }
