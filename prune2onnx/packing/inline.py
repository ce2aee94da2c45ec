"""The decode call written out: its function's nodes in the graph itself, which takes fewer bytes.

A call names each input and output twice and holds facts for `unpack`: about 300 bytes, which count
where a whole file has a few thousand. Written out, the nodes stand before all others, and the last
one of them is named `w`. `outlined` makes a call of them again, so that no other module has to know
the difference; the facts in the call (checksum, methods, positions) are lost.
"""

from __future__ import annotations

from onnx import FunctionProto, ModelProto, NodeProto

from prune2onnx.graph.domain import DOMAIN, MARK, OP
from prune2onnx.graph.names import Names
from prune2onnx.graph.protobuf import copy_but
from prune2onnx.graph.walk import opset, used_in
from prune2onnx.packing.short_names import restored


def inlined(model: ModelProto) -> ModelProto:
    """A packed model with its decoder written out; the model itself where functions call others.

    Args:
        model: not modified.
    """
    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    functions = [function for function in model.functions if function.domain == DOMAIN]
    if len(calls) != 1 or len(functions) != 1:
        return model
    (call,), (function,) = calls, functions
    names = Names(model)
    known = dict(zip(function.input, call.input, strict=True))
    known |= dict(zip(function.output, call.output, strict=True))
    result = ModelProto()
    copy_but(result, model, "graph", "functions", "opset_import")
    copy_but(result.graph, model.graph, "node")
    result.functions.extend(f for f in model.functions if f.domain != DOMAIN)
    result.opset_import.extend(e for e in model.opset_import if e.domain != DOMAIN)
    for node in function.node:
        written = result.graph.node.add()
        written.CopyFrom(node)
        for place in (written.input, written.output):
            for index, name in enumerate(place):
                if name and name not in known:
                    known[name] = names.shortest()
                place[index] = known.get(name, name)
    result.graph.node[-1].name = OP
    result.graph.node.extend(node for node in model.graph.node if node.domain != DOMAIN)
    return result


def outlined(model: ModelProto) -> ModelProto:
    """A packed model with a decode call and the weights' own names; any other as it is.

    Args:
        model: not modified.

    Raises:
        Prune2OnnxError: the names in its metadata are damaged.
    """
    nodes = _decoder(model)
    if not nodes:
        return restored(model)
    rest = model.graph.node[len(nodes) :]
    made = {name: None for node in nodes for name in node.output if name}
    taken = dict.fromkeys(n for node in nodes for n in node.input if n and n not in made)
    wanted = used_in(rest) | {value.name for value in model.graph.output}
    call = NodeProto(
        op_type=OP, domain=DOMAIN, input=taken, output=[n for n in made if n in wanted]
    )
    function = FunctionProto(
        name=OP, domain=DOMAIN, input=call.input, output=call.output, node=nodes
    )
    for node in function.node:
        node.ClearField("name")
    function.opset_import.add(version=opset(model.opset_import))
    result = ModelProto()
    copy_but(result, model, "graph")
    copy_but(result.graph, model.graph, "node")
    result.graph.node.add().CopyFrom(call)
    result.graph.node.extend(rest)
    result.functions.append(function)
    result.opset_import.add(domain=DOMAIN, version=1)
    return restored(result)


def is_packed(model: ModelProto) -> bool:
    """Whether a model has a decoder."""
    return any(node.domain == DOMAIN for node in model.graph.node) or bool(_decoder(model))


def _decoder(model: ModelProto) -> list[NodeProto]:
    """The nodes of a decoder that is written out; none where there is no such decoder."""
    if not any(entry.key == MARK for entry in model.metadata_props):
        return []
    stored = {tensor.name for tensor in model.graph.initializer}
    stored -= {value.name for value in model.graph.input}
    nodes = []
    for node in model.graph.node:
        if node.domain or not all(not name or name in stored for name in node.input):
            return []
        nodes.append(node)
        stored.update(node.output)
        if node.name == OP:
            return nodes
    return []
