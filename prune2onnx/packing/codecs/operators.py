"""ONNX operators in numpy: those that decode functions consist of, within a `Budget`.

The size of every result is checked before it is made. What no decode function needs, such as a
quotient of negative numbers, is rejected (ValueError).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from onnx import GraphProto, TensorProto, numpy_helper

from prune2onnx.graph.outside import is_outside
from prune2onnx.graph.tensors import MAX_RANK, rows_of
from prune2onnx.packing.codecs.limits import Array, Budget
from prune2onnx.packing.codecs.weight import numpy_type

_CHUNK = 1 << 20

_ELEMENT_TYPES = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16),
    *(TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8),
    *(TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32, TensorProto.UINT32),
    *(TensorProto.INT64, TensorProto.UINT64, TensorProto.BOOL),
)
"""Element types that values in a decode function may have."""

TYPES = frozenset(numpy_type(element_type) for element_type in _ELEMENT_TYPES)
"""The same, as numpy's."""

_HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))  # numpy computes slowly in them


def stored(tensor: TensorProto, budget: Budget) -> Array:
    """A tensor of the file as an array.

    Raises:
        ValueError: its data lie in another file, or do not fit its shape and element type.
        Prune2OnnxError: it is too large.
    """
    outside = is_outside(tensor)
    if tensor.data_location == TensorProto.EXTERNAL and not outside:
        raise ValueError("data outside of the file")
    budget.spend(4 * budget.check(tensor.dims, _type(tensor.data_type)))
    if not outside and not tensor.HasField("raw_data"):
        budget.spend(50 * tensor.ByteSize())  # typed fields are read as Python's numbers
    array = rows_of(tensor) if outside else np.asarray(numpy_helper.to_array(tensor))
    budget.hold(array)
    return array


def _type(element_type: int) -> np.dtype[Any]:
    if element_type not in _ELEMENT_TYPES:
        raise ValueError(f"element type {element_type}, which no decode function has")
    return numpy_type(element_type)


def _same_type(*inputs: Array) -> np.dtype[Any]:
    dtypes = {array.dtype for array in inputs}
    if len(dtypes) != 1:
        raise ValueError(f"operands of {', '.join(sorted(map(str, dtypes)))}")
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
    if a.dtype.kind not in "iu":
        raise ValueError(f"a remainder of {a.dtype}")
    if b.size and b.min() < 1:
        raise ValueError("a division by a negative number, or by zero")
    return np.asarray(a % b)  # of the divisor's sign, as in ONNX


def _check_division(a: Array, b: Array) -> None:
    # ONNX rounds a quotient towards zero, numpy rounds down: equal where nothing is negative.
    if a.size and b.size and (a.min() < 0 or b.min() < 1):
        raise ValueError("a division of or by a negative number, or by zero")


def _power(a: Array, b: Array) -> Array:
    if b.size and not 0 <= float(b.min()) <= float(b.max()) <= 62:
        raise ValueError("an exponent out of range")
    return np.asarray(a**b)


def _largest(budget: Budget, *inputs: Array) -> Array:
    if len(inputs) == 1:
        return _elementwise(np.copy, 1)(budget, *inputs)
    if inputs and inputs[0].dtype.kind not in "iu":  # of NaN and -0.0 runtimes differ
        raise ValueError(f"the largest of {inputs[0].dtype}")
    return _elementwise(np.maximum)(budget, *inputs)


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
    """The entries of a shape, of axes, or of bounds."""
    if x.dtype.kind not in "iu" or x.ndim > 1 or x.size > MAX_RANK:
        raise ValueError(f"a shape or axes in an array of {x.dtype} {list(x.shape)}")
    return [int(entry) for entry in x.reshape(-1)]


def _shape(x: Array) -> list[int]:
    if x.ndim != 1:  # onnxruntime takes nothing else
        raise ValueError(f"a shape in an array of {x.ndim} axes")
    return _integers(x)


def _axis(axis: int, x: Array) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} of an array of {x.ndim} axes")
    return axis % x.ndim


def _reshape(budget: Budget, x: Array, shape: Array, allowzero: int = 0) -> Array:
    wanted = _shape(shape)
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
    budget.check(index.shape, np.dtype(np.int64))
    return np.take(x, index, axis=axis)


def _gather_elements(budget: Budget, x: Array, index: Array, axis: int = 0) -> Array:
    axis = _axis(axis, x)
    _check_alike(x, index, axis)
    budget.take(index.shape, x.dtype, 32)
    _check_index(index, x.shape[axis])
    if x.size == x.shape[axis]:
        return _taken(x.reshape(-1), index)
    budget.check(index.shape, np.dtype(np.int64))
    return np.take_along_axis(x, index.astype(np.int64), axis)


def _taken(x: Array, index: Array) -> Array:
    """`x[index]` of a vector, for checked indices; in chunks, since numpy copies them to int64."""
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
    budget.check(index.shape, np.dtype(np.int64))
    budget.spend(24 * index.size)
    _check_index(index, x.shape[axis])
    result = x.copy()
    np.put_along_axis(result, index.astype(np.int64, copy=False), updates, axis)
    return result


def _check_alike(x: Array, index: Array, axis: int) -> None:
    # Along other axes ONNX allows fewer indices, and numpy would broadcast one to many.
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
    budget.check(index.shape, np.dtype(np.int64))
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
    fit = 0 < a.ndim < 3 and 0 < b.ndim < 3 and a.ndim + b.ndim > 2
    if dtype.kind not in "iu" or not fit or a.shape[-1] != b.shape[0]:
        what = f"{dtype} {list(a.shape)} times {list(b.shape)}"
        raise ValueError(f"{what}, no matrices or vectors that fit")
    budget.take((*a.shape[:-1], *b.shape[1:]), dtype)
    budget.spend(6 * a.size * (b.size // max(1, b.shape[0])))
    return np.asarray(a @ b)


def _top_k(budget: Budget, x: Array, count: Array) -> list[Array]:
    (wanted,) = _integers(count)
    if x.dtype.kind not in "iu" or x.ndim != 1 or not 0 <= wanted <= x.size:
        raise ValueError(f"the {wanted} largest of {x.dtype} {list(x.shape)}")
    budget.take(x.shape, np.dtype(np.int64), 100)
    order = np.argsort(~x, kind="stable")[:wanted].copy()  # equal elements keep their order
    return [x[order], order]


def _arg_max(budget: Budget, x: Array, axis: int = 0, keepdims: int = 1) -> Array:
    axis = _axis(axis, x)
    if x.dtype.kind not in "iu" or not x.shape[axis]:
        raise ValueError(f"the place of the largest of {x.dtype} {list(x.shape)}")
    shape = [1 if each == axis else extent for each, extent in enumerate(x.shape)]
    budget.take(shape, np.dtype(np.int64))
    budget.spend(4 * x.size)
    return np.asarray(x.argmax(axis=axis, keepdims=bool(keepdims)))


def _concat(budget: Budget, *inputs: Array, axis: int) -> Array:
    dtype = _same_type(*inputs)
    budget.take((sum(x.size for x in inputs),), dtype, 2)
    return np.concatenate(inputs, axis=_axis(axis, inputs[0]))


def _transpose(budget: Budget, x: Array, perm: Sequence[int] | None = None) -> Array:
    budget.take(x.shape, x.dtype, 24)
    return np.ascontiguousarray(x.transpose(perm))


def _expand(budget: Budget, x: Array, shape: Array) -> Array:
    wanted = np.broadcast_shapes(x.shape, tuple(_shape(shape)))
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
    wanted = _shape(shape)
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


def _shifted(budget: Budget, x: Array, by: Array, direction: str | bytes) -> Array:
    dtype = _same_type(x, by)
    if dtype.kind != "u":
        raise ValueError(f"a shift of {dtype}")
    budget.take(np.broadcast_shapes(x.shape, by.shape), dtype)
    if by.size and int(by.max()) >= 8 * dtype.itemsize:
        raise ValueError(f"a shift of {dtype} by {int(by.max())}")
    way = direction.decode() if isinstance(direction, bytes) else direction
    return np.asarray(np.left_shift(x, by) if way == "LEFT" else np.right_shift(x, by))


def _nonzero(budget: Budget, x: Array) -> Array:
    count = int(np.count_nonzero(x))
    budget.take((x.ndim, count), np.dtype(np.int64))
    budget.spend(4 * x.size)
    return np.stack(np.nonzero(x)) if x.ndim else np.zeros((0, count), np.int64)


def _negated(budget: Budget, x: Array) -> Array:
    if x.dtype != bool:
        raise ValueError(f"not of {x.dtype}")
    budget.take(x.shape, x.dtype)
    return ~x


def _either(budget: Budget, a: Array, b: Array) -> Array:
    if _same_type(a, b).kind not in "iu":
        raise ValueError(f"bits of {a.dtype}")
    return _elementwise(np.bitwise_or)(budget, a, b)


def _extents(budget: Budget, x: Array) -> Array:
    return np.array(x.shape, np.int64)


def _copied(budget: Budget, x: Array, body: GraphProto, num_scan_inputs: int) -> Array:
    """A Scan that copies: the only one in decode functions."""
    nodes = list(body.node)
    known = len(nodes) == len(body.input) == len(body.output) == num_scan_inputs == 1
    if not known or nodes[0].op_type != "Identity" or nodes[0].domain:
        raise ValueError("its body is not a single Identity")
    return x


OPERATORS: Mapping[str, Callable[..., Array | list[Array]]] = {
    "Abs": _elementwise(np.abs, 1),
    "Add": _elementwise(np.add),
    "ArgMax": _arg_max,
    "BitShift": _shifted,
    "BitwiseOr": _either,
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
    "Max": _largest,
    "Mod": _elementwise(_remainder, steps=8),
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative, 1),
    "NonZero": _nonzero,
    "Not": _negated,
    "Pow": _elementwise(_power, steps=100),
    "Range": _range,
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "Scan": _copied,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _extents,
    "Slice": _slice,
    "Split": _split,
    "Sub": _elementwise(np.subtract),
    "TopK": _top_k,
    "Transpose": _transpose,
    "Where": _where,
}
"""The operators in decode functions of this and earlier versions."""
