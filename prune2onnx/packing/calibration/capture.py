"""Values in the bodies of If, Loop and Scan, as outputs of the node that has them."""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto, helper

from prune2onnx.graph.walk import DEFAULT_DOMAINS, attribute, set_attribute
from prune2onnx.packing.calibration.rows import states_of, with_states
from prune2onnx.packing.readers import Path

_BODIES = {"If": 0, "Loop": 1, "Scan": 0}
"""Outputs of a body that its node does not have: a Loop's condition."""

CAPTURED = "/prune2onnx.captured"


def can_capture(model: ModelProto, path: Path) -> bool:
    """Whether values of a body can be made outputs of its node in the main graph."""
    graph = model.graph
    for place, name in path:
        node = graph.node[place]
        if node.op_type not in _BODIES or node.domain not in DEFAULT_DOMAINS:
            return False
        graph = attribute(node, name)
    return True


def repeats(node: NodeProto, path: Path) -> int:
    """How many axes of a captured value count steps of a Loop or Scan."""
    count = 0
    for (_, name), (place, _) in zip(path, (*path[1:], (-1, "")), strict=True):
        count += node.op_type in ("Loop", "Scan")
        if place >= 0:
            node = attribute(node, name).node[place]
    return count


def capturing(node: NodeProto, path: Path, name: str, kind: int) -> NodeProto:
    """A node with one more output: a value of one of its bodies.

    Where another branch of an If is taken, the value is empty; in a Loop or Scan, the values of all
    steps follow each other along a new first axis.

    Args:
        node: of the main graph; not modified.
        path: where the value is defined, this node first.
        name: of the value.
        kind: the element type to which it is cast.
    """
    made = NodeProto()
    made.CopyFrom(node)
    (_, wanted), *rest = path
    new = f"{name}{CAPTURED}{len(rest)}"
    for one in made.attribute:
        if not one.HasField("g"):
            continue
        if one.name == wanted:
            _capture(one.g, tuple(rest), name, kind, new)
        else:
            empty = helper.make_tensor("", kind, [0], [])
            one.g.node.append(helper.make_node("Constant", [], [new], value=empty))
        one.g.output.append(helper.make_empty_tensor_value_info(new))
        one.g.output[-1].type.tensor_type.elem_type = kind
        count = len(one.g.output) - _BODIES[node.op_type] - 1
    made.output.extend([""] * (count - len(made.output)))
    made.output.append(new)
    for key in ("scan_output_axes", "scan_output_directions"):
        if (listed := attribute(made, key)) is not None:
            set_attribute(made, key, [*listed, 0])
    return made


def _capture(body: GraphProto, rest: Path, name: str, kind: int, new: str) -> None:
    """Appends a node that makes `new` of a value at a path in a body."""
    source = name
    if rest:
        inner = body.node[rest[0][0]]
        inner.CopyFrom(capturing(inner, rest, name, kind))
        source = inner.output[-1]
    for node in body.node:
        if not rest and states_of(node) == name:
            node.CopyFrom(with_states(node))
    body.node.append(helper.make_node("Cast", [source], [new], to=kind))
