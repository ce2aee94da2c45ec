"""Short names for the weights of a packed file, and the way back to their own names.

A small network's names take kilobytes: each stands in the decode call and in every consumer. In
their place stand the shortest names that are free, and a metadata entry keeps the weights' own
names, compressed, with the facts that the call's attribute has otherwise. `restored` makes the same
model of it that `pack` began with, so no other module has to know the difference.
"""

from __future__ import annotations

import base64
import binascii
import string
import zlib
from collections.abc import Sequence

from onnx import GraphProto, ModelProto, NodeProto

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graph.domain import DOMAIN, MARK, OP
from prune2onnx.graph.names import Names, rename
from prune2onnx.graph.protobuf import copy_but
from prune2onnx.graph.walk import bodies
from prune2onnx.packing.codecs.bundle import UNKNOWN, add_facts, facts_of

_LETTERS = string.ascii_letters + string.digits

_MOST_NBYTES = 1 << 24
"""Longest text of names that is read."""


def shortened(model: ModelProto) -> ModelProto:
    """A packed model with short names; the model itself where its names have to stay.

    They stay where large weights have calls of their own, where another part of the model refers to
    weights by name, and in files of version 1.

    Args:
        model: not modified.
    """
    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    if len(calls) != 1 or calls[0].op_type != OP or model.training_info:
        return model
    (call,) = calls
    checksum, *facts = facts_of(call)
    if _declared(model.graph) & set(call.output) or any("\n" in name for name in call.output):
        return model
    names = Names(model)
    short = {name: names.shortest() for name in call.output}
    result = ModelProto()
    result.CopyFrom(model)
    node = next(node for node in result.graph.node if node.domain == DOMAIN)
    node.ClearField("attribute")
    _rename_outputs(node, list(short.values()))
    function = next(f for f in result.functions if f.domain == DOMAIN and f.name == OP)
    function.ClearField("attribute")
    rename(result.graph, short)
    lines = [str(checksum)]
    each = zip(facts[::3], facts[1::3], short, strict=True)
    lines += [f"{skip} {method} {name}" for skip, method, name in each]
    packed = zlib.compress("\n".join(lines).encode(), 9)
    entry = next(entry for entry in result.metadata_props if entry.key == MARK)
    entry.value = base64.b64encode(packed).decode()
    return result


def has_short_names(model: ModelProto) -> bool:
    """Whether weights have other names in a packed model than their own."""
    return any(entry.key == MARK and entry.value for entry in model.metadata_props)


def restored(model: ModelProto) -> ModelProto:
    """A packed model with the weights' own names; any other as it is.

    Args:
        model: not modified; a decoder that is written out is a call again (`inline`).

    Raises:
        Prune2OnnxError: the names in the metadata are damaged, or do not fit the call.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == MARK), "")
    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    if not text or len(calls) != 1 or calls[0].op_type != OP:
        return model
    if not all(isinstance(name, str) for name in calls[0].output):
        return model  # not UTF-8, which whoever decodes it refuses
    checksum, lines = _read(text)
    outputs = sorted(calls[0].output, key=lambda name: (len(name), [*map(_LETTERS.find, name)]))
    if len(outputs) != len(lines) or len({name for *_, name in lines}) != len(lines):
        raise Prune2OnnxError(
            f"the metadata entry {MARK!r}: {len(lines)} names for {len(outputs)} weights, or one "
            "name twice; the file is damaged, copy or pack it again"
        )
    result = ModelProto()
    copy_but(result, model, "functions", "metadata_props")
    result.metadata_props.extend(entry for entry in model.metadata_props if entry.key != MARK)
    result.metadata_props.add(key=MARK)
    node = next(node for node in result.graph.node if node.domain == DOMAIN)
    for function in model.functions:
        copied = result.functions.add()
        copied.CopyFrom(function)
        if function.domain == DOMAIN and function.name == OP:
            made = dict(zip(calls[0].output, function.output, strict=False))
            copied.ClearField("output")
            copied.output.extend(made[name] for name in outputs if name in made)
    _rename_outputs(node, [name for *_, name in lines])
    rename(result.graph, {old: name for old, (*_, name) in zip(outputs, lines, strict=True)})
    facts = [checksum]
    for skip, method, _ in lines:
        facts += [skip, method, UNKNOWN]
    add_facts(node, facts)
    return result


def _read(text: str) -> tuple[int, list[tuple[int, int, str]]]:
    """The checksum, and for each weight its place, its method and its name."""
    try:
        packed = base64.b64decode(text, validate=True)
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(packed, _MOST_NBYTES)
        if not unpacker.eof:
            raise ValueError(f"longer than {_MOST_NBYTES:,} bytes, or cut off")
        checksum, *lines = content.decode().split("\n")
        found = []
        for line in lines:
            skip, method, name = line.split(" ", 2)
            found.append((_number(skip), _number(method), name))
        return _number(checksum), found
    except (ValueError, binascii.Error, zlib.error) as error:
        raise Prune2OnnxError(
            f"the metadata entry {MARK!r} does not hold names of weights: "
            f"{one_line(error)[:200]}; the file is damaged, copy or pack it again"
        ) from error


def _number(digits: str) -> int:
    if len(digits) > 18:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _rename_outputs(node: NodeProto, names: Sequence[str]) -> None:
    node.ClearField("output")
    node.output.extend(names)


def _declared(graph: GraphProto) -> set[str]:
    """Names that a graph declares types or quantization for, at any depth."""
    found = {value.name for value in graph.value_info}
    found |= {annotation.tensor_name for annotation in graph.quantization_annotation}
    for node in graph.node:
        for body in bodies(node):
            found |= _declared(body)
    return found
