"""The decode call written out: its function's nodes in the graph itself.

That takes fewer bytes: a call names each input and output twice and holds facts for `unpack`, about
300 bytes, which count where a whole file has a few thousand. And engines that do not expand
functions can read it (`portable`). Written out, the nodes stand before all others, and the last one
of them is named `w`. `outlined` makes a call of them again, so that no other module has to know the
difference; the facts of the call (checksum, methods, places) are lost, unless a metadata entry
holds them (`Facts`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import FunctionProto, ModelProto, NodeProto

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graph.domain import DOMAIN, OP, decoder
from prune2onnx.graph.names import Names
from prune2onnx.graph.protobuf import copy_but, keep
from prune2onnx.graph.walk import opset, used_in
from prune2onnx.packing.codecs.bundle import add_facts
from prune2onnx.packing.short_names import restored

FACTS_KEY = "prune2onnx.weights"
"""The metadata entry of a written-out decoder that holds what a call's attribute `i` would."""


@dataclass(frozen=True)
class Facts:
    """What a file without calls says about its coded weights.

    Attributes:
        checksum: as of `bundle.checksum`, of all weights in this order.
        weights: name -> the three numbers of attribute `i`: initializers between it and the coded
            weight before it, its method, its bytes.
    """

    checksum: int
    weights: Mapping[str, Sequence[int]]

    def write(self, model: ModelProto) -> None:
        """Adds the entry to a model."""
        text = json.dumps([self.checksum, self.weights], ensure_ascii=False, separators=(",", ":"))
        model.metadata_props.add(key=FACTS_KEY, value=text)

    @classmethod
    def of(cls, model: ModelProto) -> Facts | None:
        """Those of a model; None where it has no entry.

        Raises:
            Prune2OnnxError: the entry is damaged.
        """
        text = next((e.value for e in model.metadata_props if e.key == FACTS_KEY), None)
        if text is None:
            return None
        try:
            checksum, weights = json.loads(text)
            numbers = [checksum, *(n for each in weights.values() for n in each)]
            if len(numbers) != 1 + 3 * len(weights):
                raise ValueError(f"{len(numbers) - 1} numbers for {len(weights)} weights")
            for number in numbers:
                if not isinstance(number, int) or not -(1 << 63) <= number < 1 << 63:
                    raise ValueError(f"{number!r:.40}, a whole number expected")
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise Prune2OnnxError(
                f"{FACTS_KEY}: not a checksum and three numbers for each weight in JSON: "
                f"{one_line(error)[:200]}; the file is damaged, copy or pack it again"
            ) from error
        return cls(checksum, weights)


def inlined(model: ModelProto) -> ModelProto:
    """A packed model with its decoder written out; the model itself where functions call others.

    Args:
        model: not modified.
    """
    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    functions = [function for function in model.functions if function.domain == DOMAIN]
    if len(calls) != 1 or len(functions) != 1:
        return model
    result = expanded(model, Names(model))
    result.graph.node[len(functions[0].node) - 1].name = OP
    return result


def expanded(model: ModelProto, names: Names) -> ModelProto:
    """A packed model in which the nodes of all decode functions stand in the graph, in order.

    Args:
        model: not modified.
        names: of the model; it gives the values of functions new ones.
    """
    functions = {one.name: one for one in model.functions if one.domain == DOMAIN}
    result = ModelProto()
    copy_but(result, model, "graph", "functions", "opset_import")
    copy_but(result.graph, model.graph, "node")
    result.functions.extend(f for f in model.functions if f.domain != DOMAIN)
    result.opset_import.extend(e for e in model.opset_import if e.domain != DOMAIN)

    def write(call: NodeProto) -> None:
        function = functions[call.op_type]
        known = dict(zip(function.input, call.input, strict=True))
        known |= dict(zip(function.output, call.output, strict=True))
        for node in function.node:
            written = NodeProto()
            written.CopyFrom(node)
            for place in (written.input, written.output):
                for index, name in enumerate(place):
                    if name and name not in known:
                        known[name] = names.shortest()
                    place[index] = known.get(name, name)
            if written.domain == DOMAIN:
                write(written)
            else:
                result.graph.node.append(written)

    for node in model.graph.node:
        if node.domain == DOMAIN:
            write(node)
        else:
            result.graph.node.append(node)
    return result


def outlined(model: ModelProto) -> ModelProto:
    """A packed model with a decode call and the weights' own names; any other as it is.

    Args:
        model: not modified.

    Raises:
        Prune2OnnxError: its facts or names are damaged.
    """
    nodes = decoder(model)
    if not nodes:
        return restored(model)
    rest = model.graph.node[len(nodes) :]
    made = {name: None for node in nodes for name in node.output if name}
    taken = dict.fromkeys(n for node in nodes for n in node.input if n and n not in made)
    wanted = used_in(rest) | {value.name for value in model.graph.output}
    call = NodeProto(
        op_type=OP, domain=DOMAIN, input=taken, output=[n for n in made if n in wanted]
    )
    if facts := Facts.of(model):
        if other := facts.weights.keys() ^ set(call.output):
            raise Prune2OnnxError(
                f"{min(other)}: named in {FACTS_KEY} or decoded, but not both; the file is "
                "damaged, copy or pack it again"
            )
        call.output[:] = facts.weights
        every = [facts.checksum, *(number for each in facts.weights.values() for number in each)]
        add_facts(call, every)
    function = FunctionProto(
        name=OP, domain=DOMAIN, input=call.input, output=call.output, node=nodes
    )
    inside = made.keys() - set(call.output)
    for node in function.node:
        node.ClearField("name")
    function.opset_import.add(version=opset(model.opset_import))
    result = ModelProto()
    copy_but(result, model, "graph")
    copy_but(result.graph, model.graph, "node")
    keep(result.graph.value_info, lambda value: value.name not in inside)
    result.graph.node.add().CopyFrom(call)
    result.graph.node.extend(rest)
    result.functions.append(function)
    result.opset_import.add(domain=DOMAIN, version=1)
    return restored(result)


def is_packed(model: ModelProto) -> bool:
    """Whether a model has a decoder."""
    return any(node.domain == DOMAIN for node in model.graph.node) or bool(decoder(model))
