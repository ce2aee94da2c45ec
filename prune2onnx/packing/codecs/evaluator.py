"""Runs decode functions in numpy.

It is the oracle for what onnxruntime decodes, and `unpack` reads every packed file by it, since a
file carries its own decoder.

It runs calls and nodes in order, without control flow; `operators` has what the nodes do. How
weights are coded is not known here, except that Huffman streams which our own functions decode take
a faster way. A file is not trusted, so `Budget` bounds memory and time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, helper

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.graph.domain import DOMAIN
from prune2onnx.packing.codecs import huffman, huffman_graph
from prune2onnx.packing.codecs.limits import Array, Budget
from prune2onnx.packing.codecs.operators import OPERATORS, TYPES

_MAX_DEPTH = 16
_NAMED = 3  # weights in an error
_MOST_TEXT = 300  # characters of a reason: a shape may have any number of axes

_NODE_STEPS = 100_000


def evaluate(
    node: NodeProto,
    inputs: Sequence[Array],
    functions: Mapping[str, FunctionProto],
    budget: Budget,
) -> list[Array]:
    """Runs a call of a decode function.

    Args:
        node: the call.
        inputs: its streams.
        functions: the decode functions of the model by name.
        budget: the memory and time that it may use.

    Returns:
        One array per output of the call.

    Raises:
        Prune2OnnxError: the function or its streams are damaged, or decoding exceeds the budget.
    """
    try:
        for array in inputs:
            _known(array)
        with np.errstate(all="ignore"):
            arrays = _Machine(functions, budget).call(node, list(inputs), None, 0)
        for array in arrays:  # several may be views of one memory, but each is read and stored
            budget.spend(4 * array.nbytes)
        return arrays
    except MemoryError:  # within the budget, so it is the machine's fault
        raise
    except Exception as error:  # the program is not trusted: any error is the file's fault
        reason = one_line(error)
        if len(reason) > _MOST_TEXT:
            reason = f"{reason[:_MOST_TEXT]} ..."
        what = "decoding needs" if isinstance(error, Prune2OnnxError) else "cannot be decoded:"
        advice = "" if "--max-bytes" in reason else "; the file is damaged, copy or pack it again"
        raise Prune2OnnxError(f"{weights_of(node)}: {what} {reason}{advice}") from error


def weights_of(node: NodeProto) -> str:
    """The first weights of a decode call, for an error."""
    more = ", ..." if len(node.output) > _NAMED else ""
    return ", ".join(str(name) for name in node.output[:_NAMED]) + more


@dataclass(frozen=True)
class _Frame:
    """A call in progress: its values so far, and its attributes."""

    values: dict[str, Array]
    attributes: Mapping[str, AttributeProto]


@dataclass(frozen=True)
class _Machine:
    """Runs the calls and operators of one decoding.

    Any error means that the program is wrong; `evaluate` turns it into one message.
    """

    functions: Mapping[str, FunctionProto]
    budget: Budget
    ours: dict[str, bool] = field(default_factory=dict)

    def call(
        self, node: NodeProto, inputs: list[Array], caller: _Frame | None, depth: int
    ) -> list[Array]:
        function = self.functions.get(node.op_type)
        if function is None:
            raise ValueError(f"the decode function {node.op_type!r} is missing")
        if depth > _MAX_DEPTH:
            raise ValueError("decode functions call each other without end")
        if node.op_type in huffman.LANES:
            if node.op_type not in self.ours:
                self.ours[node.op_type] = _is_ours(function, self.functions)
            if self.ours[node.op_type]:
                return [_huffman(node.op_type, inputs, self.budget)]
        if len(inputs) != len(function.input):
            raise ValueError(
                f"{node.op_type!r} is given {len(inputs)} streams, it takes {len(function.input)}"
            )
        attributes = {a.name: self._resolved(a, caller) for a in node.attribute}
        frame = _Frame(dict(zip(function.input, inputs, strict=True)), attributes)
        kept = set(function.output)
        last = {name: index for index, each in enumerate(function.node) for name in each.input}
        inputs.clear()  # memory: the frame has them
        for index, each in enumerate(function.node):
            self.budget.spend(_NODE_STEPS + 1000 * (len(each.input) + len(each.output)))
            results = self._results(each, frame, depth)
            if len(results) != len(each.output):
                raise ValueError(
                    f"{each.op_type!r} gives {len(results)} values, {len(each.output)} are named"
                )
            for array in results:
                self.budget.hold(array)
            frame.values.update(zip(each.output, results, strict=True))
            del results
            for name in each.input:  # memory: a value is dropped after its last reader
                if last[name] == index and name not in kept:
                    frame.values.pop(name, None)
        if missing := kept - frame.values.keys():
            raise ValueError(f"{node.op_type!r} never makes its output {min(map(str, missing))!r}")
        return [frame.values[name] for name in function.output]

    def _results(self, node: NodeProto, frame: _Frame, depth: int) -> list[Array]:
        for name in node.input:
            if name not in frame.values:
                raise ValueError(f"{node.op_type!r} takes {name!r}, which nothing made before it")
        inputs = [frame.values[name] for name in node.input]
        if node.domain == DOMAIN:
            return self.call(node, inputs, frame, depth + 1)
        operator = None if node.domain else OPERATORS.get(node.op_type)
        if operator is None:
            name = ".".join(filter(None, (str(node.domain), str(node.op_type))))
            raise ValueError(f"the operator {name}, which no decode function has")
        attributes = {}
        for attribute in node.attribute:
            self.budget.spend(50 * attribute.ByteSize())
            value = helper.get_attribute_value(self._resolved(attribute, frame))
            attributes[attribute.name] = value
        if node.op_type == "Split":
            attributes["count"] = len(node.output)
        try:
            result = operator(self.budget, *inputs, **attributes)
        except (Prune2OnnxError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"{node.op_type}: {one_line(error) or 'fails'}") from error
        results = result if isinstance(result, list) else [result]
        self.budget.work.ran(node.op_type, results, inputs)
        return results

    def _resolved(self, attribute: AttributeProto, frame: _Frame | None) -> AttributeProto:
        if not attribute.ref_attr_name:
            return attribute
        if frame is None or attribute.ref_attr_name not in frame.attributes:
            raise ValueError(f"the attribute {attribute.ref_attr_name!r} is missing")
        passed = frame.attributes[attribute.ref_attr_name]
        self.budget.spend(50 * passed.ByteSize())
        given = AttributeProto()
        given.CopyFrom(passed)
        given.name = attribute.name
        return given


def _is_ours(function: FunctionProto, functions: Mapping[str, FunctionProto]) -> bool:
    """Whether `huffman.decode` computes the same as this function, only faster."""
    opset = next((entry.version for entry in function.opset_import if not entry.domain), 0)
    return any(
        all(
            functions.get(each.name) == each
            for each in huffman_graph.functions(function.name, opset, limit)
        )
        for limit in huffman.LIMITS
    )


def _huffman(op: str, inputs: list[Array], budget: Budget) -> Array:
    data, internal, starts, tails, base, *lanes = inputs
    dtypes = ["uint16", "uint8", "uint16", *["int32"] * (2 + len(lanes))]
    if op == "l" and starts.dtype == np.uint8:
        dtypes[2] = "uint8"
    for array, dtype in zip(inputs, dtypes, strict=True):
        if array.dtype != dtype:
            raise ValueError(f"a Huffman stream has {array.dtype}, {dtype} expected")
    if any(array.size != tails.size for array in lanes) or len(lanes) != 3 * (op == "l"):
        raise ValueError(f"lanes of shapes {[array.shape for array in lanes]}")
    limit = internal.shape[1] if internal.ndim == 3 else 0
    expected = (tails.size, limit, 1)
    if internal.shape != expected or limit not in huffman.LIMITS or base.shape != (tails.size, 1):
        raise ValueError(
            f"codes of shape {internal.shape} and bases of shape {base.shape} for {tails.size} "
            "segments"
        )
    lane = huffman.LANES[op]
    tables = (4 * tails.size, 1 << limit)
    budget.spend(8 * budget.check(tables, np.dtype(np.int32)))
    budget.spend(24 * budget.check((starts.size, lane), np.dtype(np.int32)))
    budget.work.add(*huffman_graph.work(op, data.size, starts.size, tails.size, limit))
    codes = internal.reshape(-1, limit)
    stream = huffman.Stream(op, data.reshape(-1), codes, starts, tails, tuple(lanes))
    symbols = huffman.decode(stream).reshape(-1, lane)
    return (symbols + base.reshape(-1)[stream.segments][:, None]).reshape(-1)


def _known(array: Array) -> None:
    if array.dtype not in TYPES:
        raise ValueError(f"a stream of {array.dtype}, which no decode function has")
