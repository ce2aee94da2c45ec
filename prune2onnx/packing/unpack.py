"""Unpacks models: dense ones again, bit for bit.

How a weight is decoded: see `decoding`. Places, notes and types of the dense model stand in the
packed one.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graph.domain import DOMAIN, MARK
from prune2onnx.graph.file import InvalidModelError, load
from prune2onnx.graph.outside import Spill
from prune2onnx.graph.protobuf import copy_but, keep
from prune2onnx.graph.tensors import element_type, raw_of
from prune2onnx.graph.walk import used_in
from prune2onnx.packing.codecs.limits import Budget
from prune2onnx.packing.decoding import (
    MAX_BYTES,
    Coded,
    between_of,
    budget_of,
    calls_of,
    declared_types,
    decodings_of,
    places_of,
)
from prune2onnx.packing.inline import FACTS_KEY, is_packed, outlined

FUNCTIONS_IR = 8
"""The first IR version with model-local functions; onnxruntime 1.17 reads up to IR 9."""

IR_KEY = "prune2onnx.ir_version"

NOTES_KEY = "prune2onnx.tensors"

KEYS = (MARK, IR_KEY, NOTES_KEY, FACTS_KEY)


def read(path: Path, max_bytes: int = MAX_BYTES, *, lazily: bool = False) -> ModelProto:
    """Reads a file that is to be unpacked, also one that onnx's checker refuses.

    The checker is stricter than runtimes, and so than `pack`, which asks onnxruntime where it
    refuses a file. To open a session takes memory as the file likes, so that is not done here: the
    weights have a checksum, and the graph stays as it is.

    Args:
        path: the file.
        max_bytes: most bytes of external data to read.
        lazily: as for `graph.file.load`.

    Raises:
        Prune2OnnxError: as for `graph.file.load`.
    """
    try:
        return load(path, max_bytes, lazily=lazily)
    except InvalidModelError as error:
        if is_packed(error.model) or error.model.graph.sparse_initializer:
            return error.model
        raise


def unpack(
    model: ModelProto,
    max_bytes: int = MAX_BYTES,
    known: Coded | None = None,
    spill: Spill | None = None,
) -> ModelProto:
    """The dense model: every weight an initializer again, bit for bit, in its old place.

    A model that is not packed comes back as an equal copy. The model given is not modified.

    Args:
        model: packed by any version.
        max_bytes: the largest array that decoding may make.
        known: its decoded weights (`coded`), if they are at hand.
        spill: takes decoded weights, so that they do not stay in memory.

    Raises:
        Prune2OnnxError: the decode call is damaged, or takes more than is allowed.
    """
    result = ModelProto()
    given, model = model, outlined(model)
    calls = calls_of(model)
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
    between = between_of(calls)
    keep(result.graph.value_info, lambda value: value.name not in between)
    # a tool that lists initializers among the inputs lists streams, too
    keep(result.graph.input, lambda value: value.name not in streams)
    props = {entry.key: entry.value for entry in model.metadata_props}
    notes = _notes(props)
    taken = {tensor.name for tensor in result.graph.initializer}
    taken.update(value.name for value in result.graph.input)
    taken.update(name for node in others for name in node.output)
    declared = declared_types(model)
    places = places_of(calls, between)
    every, inserted = sorted(places.values()), list[int]()
    budget = budget_of(model, max_bytes)
    decodings = decodings_of(given, budget) if known is None else known.decodings(calls)
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
            if known is not None and name in known.stored:
                del decoded[name]
                tensor.CopyFrom(known.stored[name])
            else:
                _fill(tensor, name, decoded.pop(name), budget, spill)
            _require_declared(tensor, declared.get(name))
            for key, value in notes.get(name, {}).items():
                if key == "doc_string":
                    tensor.doc_string = value
                else:
                    tensor.metadata_props.add(key=key.removeprefix("."), value=value)
    if spill is not None:
        spill.finish()
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


def _fill(
    tensor: TensorProto,
    name: str,
    array: NDArray[Any],
    budget: Budget,
    spill: Spill | None,
) -> None:
    """Fills a tensor with a decoded weight."""
    try:
        budget.check(array.shape, array.dtype)
    except Prune2OnnxError as error:
        raise Prune2OnnxError(f"{name}: unpacking needs {error}") from error
    tensor.name = name
    tensor.dims.extend(array.shape)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    data = raw_of(array)
    del array  # memory: it, the bytes and their copy in the message would be there at once
    if spill is None:
        budget.keep(len(data))
        tensor.raw_data = data
    else:
        spill.fill(tensor, data)


def _require_declared(tensor: TensorProto, declared: int | None) -> None:
    """Makes sure that a decoded weight has the element type that the model declares."""
    if declared and declared != tensor.data_type:
        raise Prune2OnnxError(
            f"{tensor.name}: decodes to {element_type(tensor)}, the model declares element type "
            f"{declared}; the file is damaged"
        )
