"""Runs decode functions in numpy.

The oracle that onnxruntime is compared with, and the way `unpack` reads any packed file, for a file
carries its own decoder.

Knows the standard operators that decode functions are made of, static shapes and no control flow,
and nothing of how weights are coded. A file may come from a stranger, so every result's size is
worked out before it is made, and `Budget` bounds memory and time. Where an operator of ONNX would
do something that no decode function needs, such as a quotient of negative numbers, it is refused.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from prune2onnx.codecs import huffman
from prune2onnx.codecs.function import DOMAIN
from prune2onnx.codecs.weight import numpy_type
from prune2onnx.errors import Prune2OnnxError, one_line

Array = NDArray[Any]

_MAX_DEPTH = 16
_MAX_RANK = 64  # numpy's
_NAMED = 3  # weights in an error
_MOST_TEXT = 300  # characters of a reason: a shape may have any number of axes

# A step is about a nanosecond of one core: sixteen seconds, and more for larger files.
_FREE_STEPS = 1 << 34
_STEPS_PER_BYTE = 4096
_NODE_STEPS = 100_000
_HELD_PER_BYTE = 256

_CHUNK = 1 << 20

_KINDS = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16),
    *(TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8),
    *(TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32, TensorProto.UINT32),
    *(TensorProto.INT64, TensorProto.UINT64, TensorProto.BOOL),
)
"""Element types that values in a decode function may have."""

_HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))  # numpy computes them slowly


class Budget:
    """What the decoding of a file may use.

    Args:
        max_bytes: the largest array it may make. All arrays that it holds at a time may take twice
            as much, and 256 bytes for each byte of the streams.
        given: bytes of the streams it starts from: honest work grows with them.

    Attributes:
        nodes: operators run so far.
        nbytes: bytes of their results.
    """

    def __init__(self, max_bytes: int, given: int) -> None:
        self._max_bytes = max_bytes
        self._max_held = 2 * max_bytes + _HELD_PER_BYTE * given
        self._steps = _FREE_STEPS + _STEPS_PER_BYTE * given
        self._held = 0
        self._owners: dict[int, weakref.ref[Array]] = {}
        self.nodes = 0
        self.nbytes = 0

    def take(self, shape: Sequence[int], dtype: np.dtype[Any], steps: int = 4) -> None:
        """Allows a result before it is made, at some steps an element.

        Raises:
            ValueError: there is no such shape.
            Prune2OnnxError: it is too large, or all together are.
        """
        size = self.room(shape, dtype)
        self.nbytes += size * dtype.itemsize
        self.spend(size * steps)

    def room(self, shape: Sequence[int], dtype: np.dtype[Any]) -> int:
        """Allows an array that is no result; as `take` does. Returns its elements."""
        if len(shape) > _MAX_RANK:
            raise ValueError(f"an array of {len(shape)} axes, at most {_MAX_RANK} are known")
        extents = [int(extent) for extent in shape]
        if min(extents, default=0) < 0:
            raise ValueError(f"an array of shape {extents}")
        size = math.prod(extents)
        nbytes = size * dtype.itemsize
        if nbytes >= 1 << 64:
            raise ValueError("an array of 2^64 bytes or more")
        if nbytes > self._max_bytes:
            raise Prune2OnnxError(
                f"an array of {nbytes:,} bytes, {self._max_bytes:,} are allowed; raise --max-bytes "
                "if the file is to be trusted"
            )
        if nbytes + self._held > self._max_held:
            raise Prune2OnnxError(
                f"arrays of {nbytes + self._held:,} bytes in all, {self._max_held:,} are allowed; "
                "raise --max-bytes if the file is to be trusted"
            )
        return size

    def spend(self, steps: int) -> None:
        """Counts steps.

        Raises:
            Prune2OnnxError: there were too many.
        """
        self._steps -= steps
        if self._steps < 0:
            raise Prune2OnnxError("far more work than its streams warrant")

    def keep(self, nbytes: int) -> None:
        """Counts memory that is held to the end."""
        self._held += nbytes

    def hold(self, array: Array) -> None:
        """Counts an array, or the one whose memory it shows, for as long as it is there."""
        while isinstance(array.base, np.ndarray):
            array = array.base
        key, nbytes = id(array), array.nbytes
        if key in self._owners:
            return

        def release(_: object) -> None:
            del self._owners[key]
            self._held -= nbytes

        self._owners[key] = weakref.ref(array, release)
        self._held += nbytes


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
        budget: what it may use.

    Returns:
        One array per output of the call.

    Raises:
        Prune2OnnxError: the function or its streams are damaged, or it takes more than it may.
    """
    try:
        for array in inputs:
            _known(array)
        with np.errstate(all="ignore"):
            arrays = _Machine(functions, budget).call(node, list(inputs), None, 0)
        for array in arrays:  # several may show the same memory, but each is read and stored
            budget.spend(4 * array.nbytes)
        return arrays
    except Exception as error:  # a stranger's program: whatever it does to us, it is at fault
        reason = one_line(error) or type(error).__name__
        if len(reason) > _MOST_TEXT:
            reason = f"{reason[:_MOST_TEXT]} ..."
        what = "decoding needs" if isinstance(error, Prune2OnnxError) else "cannot be decoded:"
        advice = "" if "--max-bytes" in reason else "; the file is damaged, copy or pack it again"
        raise Prune2OnnxError(f"{weights_of(node)}: {what} {reason}{advice}") from error


def weights_of(node: NodeProto) -> str:
    """The first weights of a decode call, for an error."""
    more = ", ..." if len(node.output) > _NAMED else ""
    return ", ".join(str(name) for name in node.output[:_NAMED]) + more


def stored(tensor: TensorProto, budget: Budget) -> Array:
    """A tensor of the file as an array.

    Raises:
        ValueError: its data lie elsewhere, or do not fit its shape and element type.
        Prune2OnnxError: it is too large.
    """
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ValueError("data outside of the file")
    budget.spend(4 * budget.room(tensor.dims, _type(tensor.data_type)))
    if not tensor.HasField("raw_data"):
        budget.spend(50 * tensor.ByteSize())  # from Python's numbers
    array = np.asarray(numpy_helper.to_array(tensor))
    budget.hold(array)
    return array


@dataclass(frozen=True)
class _Frame:
    """A call: the values it knows and the attributes it was given."""

    values: dict[str, Array]
    attributes: Mapping[str, AttributeProto]


@dataclass(frozen=True)
class _Machine:
    """Runs the calls and operators of one decoding.

    Whatever is wrong with the program shows as ValueError or any other error; `evaluate` says so in
    one place.
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
            self.budget.nodes += 1
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
            for name in each.input:  # memory: a value goes with its last reader
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
        operator = None if node.domain else _OPERATORS.get(node.op_type)
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
        except Prune2OnnxError:
            raise
        except Exception as error:
            raise ValueError(f"{node.op_type}: {one_line(error) or 'fails'}") from error
        return result if isinstance(result, list) else [result]

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
    """Whether `huffman.decode` does what this function says, only faster."""
    opset = next((entry.version for entry in function.opset_import if not entry.domain), 0)
    return any(
        all(
            functions.get(each.name) == each
            for each in huffman.functions(function.name, opset, limit)
        )
        for limit in huffman.LIMITS
    )


def _huffman(op: str, inputs: list[Array], budget: Budget) -> Array:
    data, internal, starts, tails, base, *lanes = inputs
    kinds = ["uint16", "uint8", "uint16", *["int32"] * (2 + len(lanes))]
    if op == "l" and starts.dtype == np.uint8:
        kinds[2] = "uint8"
    for array, kind in zip(inputs, kinds, strict=True):
        if array.dtype != kind:
            raise ValueError(f"a Huffman stream has {array.dtype}, {kind} expected")
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
    nodes, nbytes = huffman.work(op, data.size, starts.size, tails.size, limit)
    tables = (4 * tails.size, 1 << limit)
    budget.spend(8 * budget.room(tables, np.dtype(np.int32)))
    budget.spend(24 * budget.room((starts.size, lane), np.dtype(np.int32)))
    budget.nodes += nodes
    budget.nbytes += nbytes
    codes = internal.reshape(-1, limit)
    stream = huffman.Stream(op, data.reshape(-1), codes, starts, tails, tuple(lanes))
    symbols = huffman.decode(stream).reshape(-1, lane)
    return (symbols + base.reshape(-1)[stream.segments][:, None]).reshape(-1)


def _type(kind: int) -> np.dtype[Any]:
    if kind not in _KINDS:
        raise ValueError(f"element type {kind}, which no decode function has")
    return numpy_type(kind)


_TYPES = frozenset(numpy_type(kind) for kind in _KINDS)


def _known(array: Array) -> None:
    if array.dtype not in _TYPES:
        raise ValueError(f"a stream of {array.dtype}, which no decode function has")


def _same_type(*inputs: Array) -> np.dtype[Any]:
    kinds = {array.dtype for array in inputs}
    if len(kinds) != 1:
        raise ValueError(f"operands of {', '.join(sorted(map(str, kinds)))}")
    return inputs[0].dtype


def _elementwise(
    function: Callable[..., Array], count: int = 2, steps: int = 6
) -> Callable[..., Array]:
    def run(budget: Budget, *inputs: Array) -> Array:
        if len(inputs) != count:
            raise ValueError(f"{len(inputs)} operands, {count} expected")
        dtype = _same_type(*inputs)
        shape = np.broadcast_shapes(*(x.shape for x in inputs))
        budget.take(shape, dtype, 8 * steps if dtype in _HALF else steps)
        result = np.asarray(function(*inputs))
        return result if result.dtype == bool else result.astype(dtype, copy=False)

    return run


def _quotient(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return np.asarray(a / b)
    _check_division(a, b)
    return np.asarray(a // b)


def _remainder(a: Array, b: Array) -> Array:
    _check_division(a, b)
    return np.asarray(a % b)


def _check_division(a: Array, b: Array) -> None:
    # ONNX rounds a quotient towards zero, numpy down: the same where nothing is negative.
    if a.dtype.kind not in "iu":
        raise ValueError(f"a remainder of {a.dtype}")
    if a.size and b.size and (a.min() < 0 or b.min() < 1):
        raise ValueError("a division of or by a negative number, or by zero")


def _power(a: Array, b: Array) -> Array:
    if b.size and not 0 <= float(b.min()) <= float(b.max()) <= 62:
        raise ValueError("an exponent out of range")
    return np.asarray(a**b)


def _constant(budget: Budget, **attributes: Any) -> Array:
    ((name, value),) = attributes.items()
    if name == "value" and isinstance(value, TensorProto):
        return stored(value, budget)
    dtype = {"int": np.int64, "float": np.float32}[name.removeprefix("value_").removesuffix("s")]
    return np.asarray(value, dtype)


def _cast(budget: Budget, x: Array, to: int) -> Array:
    dtype = _type(to)
    budget.take(x.shape, dtype, 8 if dtype in _HALF or x.dtype in _HALF else 4)
    return x.astype(dtype)


def _cumsum(budget: Budget, x: Array, axis: Array, exclusive: int = 0, reverse: int = 0) -> Array:
    (along,) = _integers(axis)
    along = _axis(along, x)
    budget.take(x.shape, x.dtype, 4 if x.ndim == 1 and x.dtype not in _HALF else 40)
    x = np.flip(x, along) if reverse else x
    total = np.cumsum(x, axis=along, dtype=x.dtype)
    if exclusive:
        np.subtract(total, x, out=total)
    return np.flip(total, along) if reverse else total


def _integers(x: Array) -> list[int]:
    """The entries of a shape, or of a list of axes or bounds."""
    if x.dtype.kind not in "iu" or x.ndim > 1 or x.size > _MAX_RANK:
        raise ValueError(f"a shape or axes in an array of {x.dtype} {list(x.shape)}")
    return [int(entry) for entry in x.reshape(-1)]


def _axis(axis: int, x: Array) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} of an array of {x.ndim} axes")
    return axis % x.ndim


def _reshape(budget: Budget, x: Array, shape: Array, allowzero: int = 0) -> Array:
    wanted = _integers(shape)
    if not allowzero:
        wanted = [x.shape[i] if extent == 0 else extent for i, extent in enumerate(wanted)]
    if not x.flags.c_contiguous:
        budget.take(x.shape, x.dtype)
    return x.reshape(wanted)


def _gather(budget: Budget, x: Array, index: Array, axis: int = 0) -> Array:
    axis = _axis(axis, x)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    budget.take(shape, x.dtype, 16)
    _check_index(index, x.shape[axis])
    if x.ndim == 1:
        return _taken(x, index)
    budget.room(index.shape, np.dtype(np.int64))
    return np.take(x, index, axis=axis)


def _gather_elements(budget: Budget, x: Array, index: Array, axis: int = 0) -> Array:
    axis = _axis(axis, x)
    _check_alike(x, index, axis)
    budget.take(index.shape, x.dtype, 32)
    _check_index(index, x.shape[axis])
    if x.size == x.shape[axis]:
        return _taken(x.reshape(-1), index)
    budget.room(index.shape, np.dtype(np.int64))
    return np.take_along_axis(x, index.astype(np.int64), axis)


def _taken(x: Array, index: Array) -> Array:
    """`x[index]` of a vector and indices that were checked; numpy would copy them all to int64."""
    result = np.empty(index.size, x.dtype)
    flat = index.reshape(-1)
    for begin in range(0, index.size, _CHUNK):
        result[begin : begin + _CHUNK] = x[flat[begin : begin + _CHUNK]]
    return result.reshape(index.shape)


def _scatter_elements(
    budget: Budget, x: Array, index: Array, updates: Array, axis: int = 0
) -> Array:
    axis = _axis(axis, x)
    _same_type(x, updates)
    _check_alike(x, index, axis)
    if index.shape != updates.shape:
        raise ValueError(f"{list(index.shape)} places for {list(updates.shape)} values")
    budget.take(x.shape, x.dtype, 2)
    budget.room(index.shape, np.dtype(np.int64))
    budget.spend(24 * index.size)
    _check_index(index, x.shape[axis])
    result = x.copy()
    np.put_along_axis(result, index.astype(np.int64, copy=False), updates, axis)
    return result


def _check_alike(x: Array, index: Array, axis: int) -> None:
    # ONNX would take fewer indices along other axes, numpy would take one for many.
    wanted = (
        *x.shape[:axis],
        index.shape[axis] if index.ndim == x.ndim else 0,
        *x.shape[axis + 1 :],
    )
    if index.shape != wanted:
        raise ValueError(f"indices of shape {list(index.shape)} into shape {list(x.shape)}")


def _scatter_nd(budget: Budget, x: Array, index: Array, updates: Array) -> Array:
    _same_type(x, updates)
    if not index.ndim or not 0 < index.shape[-1] <= x.ndim:
        raise ValueError(f"indices of shape {list(index.shape)} into shape {list(x.shape)}")
    if updates.shape != (*index.shape[:-1], *x.shape[index.shape[-1] :]):
        raise ValueError(f"{list(index.shape)} places for {list(updates.shape)} values")
    budget.take(x.shape, x.dtype, 2)
    budget.room(index.shape, np.dtype(np.int64))
    budget.spend(24 * max(index.size, updates.size))
    columns = [index[..., i] for i in range(index.shape[-1])]
    for column, extent in zip(columns, x.shape, strict=False):
        _check_index(column, extent)
    result = x.copy()
    result[tuple(columns)] = updates
    return result


def _check_index(index: Array, extent: int) -> None:
    if index.dtype.kind not in "iu":
        raise ValueError(f"indices of {index.dtype}")
    if index.size and not -extent <= int(index.min()) <= int(index.max()) < extent:
        raise ValueError(
            f"an index from {int(index.min())} to {int(index.max())} into {extent} elements"
        )


def _range(budget: Budget, start: Array, limit: Array, delta: Array) -> Array:
    dtype = _same_type(start, limit, delta)
    bounds = [_integers(x) for x in (start, limit, delta)]
    ((first,), (end,), (step,)) = bounds
    budget.take((len(range(first, end, step)),), dtype)
    return np.arange(first, end, step, dtype=dtype)


def _reduce_sum(budget: Budget, x: Array, axes: Array, keepdims: int = 1) -> Array:
    along = tuple(_axis(axis, x) for axis in _integers(axes))
    shape = [1 if axis in along else extent for axis, extent in enumerate(x.shape)]
    budget.take(shape, x.dtype)
    budget.spend(24 * x.size)
    return np.asarray(x.sum(axis=along, keepdims=bool(keepdims), dtype=x.dtype))


def _matmul(budget: Budget, a: Array, b: Array) -> Array:
    dtype = _same_type(a, b)
    if dtype.kind not in "iu" or a.ndim != 2 or b.shape != a.shape[1:]:
        raise ValueError(f"{dtype} {list(a.shape)} times {list(b.shape)}, no matrix and vector")
    budget.take(a.shape[:1], dtype)
    budget.spend(6 * a.size)
    return np.asarray(a @ b)


def _top_k(budget: Budget, x: Array, count: Array) -> list[Array]:
    (wanted,) = _integers(count)
    if x.dtype.kind not in "iu" or x.ndim != 1 or not 0 <= wanted <= x.size:
        raise ValueError(f"the {wanted} largest of {x.dtype} {list(x.shape)}")
    budget.take(x.shape, np.dtype(np.int64), 100)
    order = np.argsort(~x, kind="stable")[:wanted].copy()  # of equal ones the first comes first
    return [x[order], order]


def _concat(budget: Budget, *inputs: Array, axis: int) -> Array:
    dtype = _same_type(*inputs)
    budget.take((sum(x.size for x in inputs),), dtype, 2)
    return np.concatenate(inputs, axis=_axis(axis, inputs[0]))


def _transpose(budget: Budget, x: Array, perm: Sequence[int] | None = None) -> Array:
    budget.take(x.shape, x.dtype, 24)
    return np.ascontiguousarray(x.transpose(perm))


def _expand(budget: Budget, x: Array, shape: Array) -> Array:
    wanted = np.broadcast_shapes(x.shape, tuple(_integers(shape)))
    budget.take(wanted, x.dtype)
    return np.broadcast_to(x, wanted).copy()


def _split(budget: Budget, x: Array, sizes: Array, *, count: int, axis: int = 0) -> list[Array]:
    axis = _axis(axis, x)
    if sizes.shape != (count,) or sizes.dtype.kind not in "iu":
        raise ValueError(f"{count} parts, sizes of shape {list(sizes.shape)}")
    parts = [int(size) for size in sizes]
    if min(parts, default=0) < 0 or sum(parts) != x.shape[axis]:
        raise ValueError(f"{x.shape[axis]} elements are split into {sum(parts)}")
    return np.split(x, np.cumsum(parts)[:-1], axis=axis)


def _filled(budget: Budget, shape: Array, value: TensorProto | None = None) -> Array:
    fill = np.zeros(1, np.float32) if value is None else stored(value, budget)
    (entry,) = fill.reshape(-1)
    wanted = _integers(shape)
    budget.take(wanted, fill.dtype, 2)
    return np.full(wanted, entry, fill.dtype)


def _slice(budget: Budget, x: Array, starts: Array, ends: Array) -> Array:
    bounds = zip(_integers(starts), _integers(ends), strict=True)
    return x[tuple(slice(begin, end) for begin, end in bounds)]


def _identity(budget: Budget, x: Array) -> Array:
    return x


def _where(budget: Budget, condition: Array, a: Array, b: Array) -> Array:
    if condition.dtype != bool:
        raise ValueError(f"a condition of {condition.dtype}")
    dtype = _same_type(a, b)
    budget.take(np.broadcast_shapes(condition.shape, a.shape, b.shape), dtype)
    return np.where(condition, a, b)


_OPERATORS: Mapping[str, Callable[..., Array | list[Array]]] = {
    "Add": _elementwise(np.add),
    "Cast": _cast,
    "Clip": _elementwise(np.clip, 3),
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "CumSum": _cumsum,
    "Div": _elementwise(_quotient),
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Identity": _identity,
    "Less": _elementwise(np.less),
    "MatMul": _matmul,
    "Max": _elementwise(np.copy, 1),
    "Mod": _elementwise(_remainder, steps=8),
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative, 1),
    "Pow": _elementwise(_power, steps=100),
    "Range": _range,
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "Split": _split,
    "Sub": _elementwise(np.subtract),
    "TopK": _top_k,
    "Transpose": _transpose,
    "Where": _where,
}
"""What decode functions of this and earlier versions are made of."""
