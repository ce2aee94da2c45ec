"""Packs an ONNX model: its weights become coded streams that decode to the same bits.

The coded weights are the outputs of one call of a model-local function, under their own names, so
no consumer is rewired. Everything else in the model stays as `graph.normalize` leaves it.

Lossless: `approximation` runs before where precision may be lost. `unpack` is the way back, and
`codecs` has the coding itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import (
    FunctionProto,
    ModelProto,
    TensorProto,
)

from prune2onnx.graph.domain import DOMAIN, DOMAIN_VERSION, MARK
from prune2onnx.graph.names import Names
from prune2onnx.graph.names import anonymize as anonymized
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.outside import Spill
from prune2onnx.graph.protobuf import copy_but, framed, tensor_nbytes
from prune2onnx.graph.protobuf import keep as keep_those
from prune2onnx.graph.protobuf import nbytes as nbytes_of
from prune2onnx.graph.protobuf import tensor as stored
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
from prune2onnx.packing.codecs.staged import Done, Known
from prune2onnx.packing.codecs.work import Work
from prune2onnx.packing.decoding import verify
from prune2onnx.packing.inline import inlined
from prune2onnx.packing.large import are_many, few_values, is_regular, surveyed, with_step
from prune2onnx.packing.load_cost import Prediction, predict
from prune2onnx.packing.portable import BOUNDS, OPSET, STAGE_SIZE, is_slow
from prune2onnx.packing.portable import portable as written_out
from prune2onnx.packing.quantized import Quantized, multiples, new_steps, scaled
from prune2onnx.packing.rows import WeightRow
from prune2onnx.packing.short_names import shortened
from prune2onnx.packing.unpack import FUNCTIONS_IR, IR_KEY, KEYS, NOTES_KEY, unpack

Load = Literal["small", "balanced", "fast"]
"""What a file is made for: few bytes, or a session that opens in little time and memory."""

_SHORT_NAMES = 0.99
"""Largest size of a file with short names, relative to the same with the weights' own names."""

LEAST_NBYTES = 16
"""Smaller tensors stay dense: their entry in the decode call would take as many bytes."""


Progress = Callable[[str, int, int], None]
"""Is told the name of a weight, and how many bytes of how many are done."""


class _Progress:
    """Counts bytes: each large weight is read, written and checked."""

    def __init__(self, progress: Progress, nbytes: int) -> None:
        self._progress, self._total, self._done = progress, 3 * nbytes, 0

    def __call__(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        if self._total:
            self._progress(name, min(self._done, self._total), self._total)


@dataclass(frozen=True)
class Packed:
    """What `pack` made.

    Attributes:
        model: the packed model, or the normalized one where packing would not make it smaller.
        rows: one row per initializer of the normalized model, in its order.
        notes: what normalizing changed, in words.
        load: what loads of it and of the dense model take; None if it was not checked.
    """

    model: ModelProto
    rows: tuple[WeightRow, ...]
    notes: tuple[str, ...] = ()
    load: Prediction | None = None


def pack(
    model: ModelProto,
    *,
    load: Load = "balanced",
    quantized: Mapping[str, Quantized] | None = None,
    anonymize: bool = False,
    portable: bool = False,
    short_names: bool = False,
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
        short_names: whether a small file may keep the weights' own names in its metadata alone, and
            its decoder in the graph: `unpack` gives them back, other tools see short names.
        portable: whether the decoder's nodes stand in the graph in any case, in operators that
            OpenVINO folds, too (`portable`). The file is larger, and onnxruntime takes more time
            and memory to open it.

    Raises:
        Prune2OnnxError: the model cannot be normalized (`graph.normalize`), is packed and damaged,
            or `quantized` does not fit it.
    """
    return pack_normalized(
        normalize(unpack(model)),
        load=load,
        quantized=quantized,
        anonymize=anonymize,
        portable=portable,
        short_names=short_names,
    )


def pack_normalized(
    normal: Rewritten,
    *,
    load: Load = "balanced",
    quantized: Mapping[str, Quantized] | None = None,
    few_bytes: Collection[str] = (),
    anonymize: bool = False,
    portable: bool = False,
    short_names: bool = False,
    check: bool = True,
    progress: Progress = lambda name, done, total: None,
    spill: Spill | None = None,
) -> Packed:
    """As `pack`, for a model that is unpacked and normalized.

    Args:
        normal: the model, and why some of its weights cannot be packed.
        load: as for `pack`.
        quantized: as for `pack`.
        few_bytes: weights that are coded even where a load takes long for what that saves.
        anonymize: as for `pack`.
        portable: as for `pack`.
        short_names: as for `pack`.
        check: whether to decode the result and compare its checksum.
        progress: is told how far large weights have come: each is read, written and checked.
        spill: takes the streams of large weights, so that they do not stay in memory.
    """
    model, reasons, quantized = normal.model, dict(normal.reasons), quantized or {}
    own_name: dict[str, str] = {}
    if anonymize:
        short = anonymized(model)
        model, new_name = short.model, short.new_name
        own_name = {new: old for old, new in new_name.items()}
        reasons = {new_name.get(name, name): reason for name, reason in reasons.items()}
        quantized = {new_name.get(name, name): known for name, known in quantized.items()}
        few_bytes = [new_name.get(name, name) for name in few_bytes]
    opset = opset_of(model.opset_import)
    assert opset is not None  # normalize() sees to it
    reasons = _obstacles(model) | reasons
    tensors = model.graph.initializer
    free = [tensor for tensor in tensors if tensor.name not in reasons]
    bounds = BOUNDS if portable else staged.GATED
    large: list[Known] = []
    if are_many(free, bounds) and (load == "balanced" or (load == "fast" and not portable)):
        done = _Progress(progress, sum(declared_nbytes(tensor) or 0 for tensor in free))
        large = surveyed(free, bounds, quantized, done)
    else:
        done = _Progress(progress, 0)
    apart = {one.weight.name for one in large}
    weights = [_weight(t, quantized.get(t.name)) for t in free if t.name not in apart]
    weights, large = _with_scales(weights, large)
    dense = {tensor.name: framed(tensor_nbytes(tensor)) for tensor in tensors}
    gained = {tensor.name: dense[tensor.name] - _notes_nbytes(tensor) for tensor in tensors}
    staged_opset = max(opset, OPSET) if portable else opset
    methods, stay = staged.chosen(
        large, gained, staged_opset, bounds, fast=load == "fast", few_bytes=few_bytes
    )
    for one in large if load == "balanced" else ():
        name = one.weight.name
        if name in methods and is_regular(one, staged.estimate(one, methods[name], opset)):
            del methods[name]
    reasons |= stay
    known = {one.weight.name: one for one in large}
    others = {weight.name: weight for weight in weights}
    for tensor in free:  # large ones that no method fits
        if tensor.name in known and tensor.name not in {*methods, *reasons}:
            others[tensor.name] = _weight(tensor, quantized.get(tensor.name))
    ordered = [others[tensor.name] for tensor in free if tensor.name in others]
    given = partial(plan, ordered, gained, opset, absolute=bool(methods))
    made = given(load="fast" if load == "fast" else "small")
    if portable and load == "balanced" and is_slow(made):
        made = given(load="fast")
    large = [one for one in large if one.weight.name in methods]
    result, nbytes = _written(
        model,
        made,
        large,
        methods,
        opset=staged_opset,
        stage_size=STAGE_SIZE if portable else staged.STAGE_SIZE,
        matrices=not portable,
        fast=load == "fast",
        done=done,
        spill=None if portable else spill,
    )
    if portable:
        written = {*made.methods, *methods}
        arrays = {tensor.name: array_of(tensor) for tensor in free if tensor.name in written}
        result = written_out(result, arrays, facts=not anonymize)
    work = verify(result, done) if check else None
    if anonymize:
        result = min(inlined(result), result, key=nbytes_of)
    elif short_names:
        named = shortened(result)
        if named is not result:  # the facts that a call holds are in the metadata, too
            named = min(inlined(named), named, key=nbytes_of)
        if nbytes_of(named) < _SHORT_NAMES * nbytes_of(result):
            result = named
    reasons |= made.reasons
    methods = {**made.methods, **methods}
    before, after = nbytes_of(model), nbytes_of(result)
    if methods and after >= before:
        reasons |= dict.fromkeys(methods, "the file would not be smaller")
        methods, result, work, after = {}, model, work and Work(), before
    rows = []
    for tensor in tensors:
        name = tensor.name
        known_as = own_name.get(name, name)
        how = (methods[name].name, nbytes[name], "") if name in methods else None
        how = how or ("dense", dense[name], reasons[name])
        if name in known:
            row = WeightRow.of_large(known_as, known[name].weight, known[name].survey.nonzero, *how)
        else:
            array = others[name].array if name in others else array_of(tensor)
            row = WeightRow.of(known_as, array, *how)
        rows.append(row)
    coded = {name: (one.weight.size, one.weight.nbytes) for name, one in known.items()}
    coded |= {name: (one.array.size, one.array.nbytes) for name, one in others.items()}
    coded = {name: coded[name] for name in methods}
    load_cost = predict(model.graph, coded, work, after, before) if work else None
    return Packed(result, tuple(rows), normal.notes, load_cost)


def _weight(tensor: TensorProto, known: Quantized | None) -> Weight:
    scale, levels = None, None
    if known := scaled(tensor, known):
        scale, levels = known.scale, known.levels()
    return Weight(tensor.name, array_of(tensor), tensor.data_type, scale, levels)


def _with_scales(weights: list[Weight], large: list[Known]) -> tuple[list[Weight], list[Known]]:
    """The same weights; those that are multiples of a step have it as their scale (`new_steps`)."""
    every = [(weight.scale, _few_values(weight)) for weight in weights]
    every += [(one.weight.scale, few_values(one)) for one in large]
    steps = iter(new_steps(every))
    return (
        [weight if (s := next(steps)) is None else _with_step(weight, s) for weight in weights],
        [one if (s := next(steps)) is None else with_step(one, s) for one in large],
    )


def _few_values(weight: Weight) -> NDArray[np.float32] | None:
    found = weight.indexed_nonzero if weight.element_type == TensorProto.FLOAT else None
    return None if found is None else found[1]


def _with_step(weight: Weight, step: np.float32) -> Weight:
    levels = multiples(weight.array, step)
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
    large: Sequence[Known] = (),
    methods: Mapping[str, Method] = MappingProxyType({}),
    *,
    opset: int = 0,
    stage_size: int = staged.STAGE_SIZE,
    matrices: bool = True,
    fast: bool = False,
    done: Done = lambda name, nbytes: None,
    spill: Spill | None = None,
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
            named = result.graph.initializer.add()
            named.CopyFrom(stream)
            named.name = names.shortest()
            node.input.append(named.name)
        functions += made.bundle.functions
    if large:
        places = {tensor.name: place for place, tensor in enumerate(model.graph.initializer)}
        store = stored if spill is None else spill.tensor
        written = staged.encode(
            large,
            methods,
            places,
            opset,
            names.shortest,
            stage_size=stage_size,
            matrices=matrices,
            fast=fast,
            store=store,
            done=done,
        )
        if spill is not None:
            spill.finish()
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
    keep_those(result.metadata_props, lambda entry: entry.key not in KEYS)
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
