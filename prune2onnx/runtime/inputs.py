"""Inputs on which any model runs: random ones, of sizes found by trying, and arrays of a file.

A graph states types and some extents of its inputs; the rest is inferred from what reads them.

1. A token is a number below the rows of the table that it picks from (`Gather`), a mask is all
   ones, a state is all zeros, and other floats are standard normal.
2. An extent that the graph leaves open is what its first layer expects, or grows until the model
   runs; one symbol is one number in all inputs, and `past + 1` is computed.
3. What still cannot be run raises UnrunnableError: nothing is proven then, and nothing disproven.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from prune2onnx.data import first, load_data
from prune2onnx.data.npz import read_named
from prune2onnx.data.text import is_text
from prune2onnx.errors import Prune2OnnxError, RecipeError, first_line
from prune2onnx.graph.shapes import shapes_of
from prune2onnx.graph.walk import attribute, nodes_in
from prune2onnx.runs.defaults import InputOptions
from prune2onnx.runtime.session import UnrunnableError, element_type, input_text, run, session
from prune2onnx.runtime.texts import text_inputs
from prune2onnx.tasks.structure import described, leaves, mapped, stacked

Inputs = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]

RANDOM = frozenset(
    (
        *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
        "RandomUniformLike",
    )
)
"""Operators that give other outputs in each session."""

_SIZES = (8, 16, 32, 64, 128, 224, 256, 320, 384, 512, 640, 1, 2, 4, 24, 28, 48, 80, 96, 100, 160)
_EACH = (8, 16, 32, 64, 128, 1)  # where symbols have different numbers
_MOST_TRIES = 150
_MOST_SECONDS = 120.0  # of all tries: a damaged Loop may go on for ever
_MOST_BYTES = 1 << 30
_MOVES = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_MASK = re.compile(r"mask", re.IGNORECASE)
_STATE = re.compile(r"(^|[._])(h0?|c0?|hx|cx|state\w*|hidden\w*|past\w*|cache\w*)([._\d]|$)", re.I)
_PAST = re.compile(r"past|cache", re.IGNORECASE)


def random_operators(model: ModelProto) -> list[str]:
    """The operators of a model whose results are random, in alphabetical order."""
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    used = {node.op_type for body in bodies for node in nodes_in(body)}
    return sorted(used & RANDOM)


def random_inputs(
    model: ModelProto,
    seeds: Iterable[int] = (0,),
    *,
    opened: ort.InferenceSession | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
) -> list[Inputs]:
    """Random inputs on which a model runs; it is run once or more to find their sizes.

    Args:
        model: not packed, where tokens are to be found; its weights may be missing if it is opened.
        seeds: one set of inputs for each.
        opened: the model in onnxruntime; by default it is opened here.
        batch: extent of open first axes.
        shapes: of inputs whose sizes are known, by name.

    Raises:
        RecipeError: a shape is of no input, or contradicts what the graph states.
        UnrunnableError: there are no random values of an input's type, or the model ran at none of
            the sizes that were tried, or gave only NaN.
    """
    graph = _Graph(model, opened or session(model), batch, dict(shapes or {}))
    sizes = graph.sizes()
    return [graph.inputs(sizes, seed) for seed in seeds]


class _Graph:
    """The inputs of a graph, and what is known of their values and extents."""

    def __init__(
        self, model: ModelProto, opened: ort.InferenceSession, batch: int, shapes: Shapes
    ) -> None:
        self._opened = opened
        self._batch = batch
        self._infos = opened.get_inputs()
        self._types = {info.name: element_type(info.type) for info in self._infos}
        unfit = [i for i in self._infos if self._types[i.name] in (None, TensorProto.STRING)]
        if unfit:
            raise UnrunnableError(
                f"input {unfit[0].name} has type {unfit[0].type}, of which there are no random "
                "values"
            )
        self._readers: dict[str, list[NodeProto]] = {}
        for node in nodes_in(model.graph.node):
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        self._inferred: dict[str, list[int]] | None = None
        self._model = model
        self._fixed: dict[str, int] = {}
        self._shapes = self._stated(shapes)

    def _stated(self, given: Shapes) -> dict[str, list[int | str]]:
        """Extents of each input; an open one is its symbol, or a text of its own."""
        known = {info.name for info in self._infos}
        if unknown := [name for name in given if name not in known]:
            raise RecipeError(
                f"--input-shape {unknown[0]}: the model has no such input; its inputs are "
                f"{input_text(self._opened)}"
            )
        stated: dict[str, list[int | str]] = {}
        for info in self._infos:
            extents: list[int | str] = [
                extent
                if isinstance(extent, int) and extent >= 0
                else (extent if isinstance(extent, str) and extent else f"{info.name}/{axis}")
                for axis, extent in enumerate(info.shape or ())
            ]
            if info.name in given:
                shape = given[info.name]
                fits = len(shape) == len(extents) or not info.shape
                if not fits or any(
                    isinstance(own, int) and own != size
                    for own, size in zip(extents, shape, strict=False)
                ):
                    raise RecipeError(
                        f"--input-shape {info.name}={','.join(map(str, shape))}: the model states "
                        f"{info.shape}"
                    )
                for own, size in zip(extents, shape, strict=False):
                    if isinstance(own, str) and self._fixed.setdefault(own, size) != size:
                        raise RecipeError(
                            f"--input-shape: {own} is {self._fixed[own]} in one input and {size} "
                            f"in {info.name}"
                        )
                extents = list(shape)
            stated[info.name] = extents
        return stated

    def sizes(self) -> dict[str, int]:
        """The extent of each symbol with which the model runs."""
        tries, why = 0, ""
        end = time.monotonic() + _MOST_SECONDS
        for sizes in self._candidates():
            try:
                given = self.inputs(sizes, 0)
                outputs = run(self._opened, given, max(end - time.monotonic(), 0.001))
            except TimeoutError:
                why = f"it runs for more than {_MOST_SECONDS:g} s"
                break
            except _TooLargeError as error:
                why = why or str(error)
                continue
            except Exception as error:  # onnxruntime's own exceptions have no common base class
                why = why or first_line(error)
            else:
                if says_something(outputs):
                    return sizes
                why = "its outputs are empty or NaN"
            tries += 1
            if tries >= _MOST_TRIES:
                break
        shapes = ", ".join(f"{name} {extents}" for name, extents in self._shapes.items())
        raise UnrunnableError(
            f"it did not run on random inputs ({shapes}): {why}; give --input-shape NAME=SIZES, or "
            "--data"
        )

    def _candidates(self) -> Iterator[dict[str, int]]:
        """Assignments of extents to symbols, likely ones first."""
        known = dict(self._fixed)
        names: list[str] = []
        for name, extents in self._shapes.items():
            for axis, extent in enumerate(extents):
                if not isinstance(extent, str):
                    continue
                names += [n for n in _symbols(extent) if n not in names]
                if (wanted := self._expected(name, axis)) is not None:
                    known.setdefault(extent, wanted)
        for extents in self._shapes.values():
            first = extents[0] if extents else 0
            if isinstance(first, str) and (len(extents) > 1 or len(self._shapes) == 1):
                known.setdefault(first, self._batch)
        known.update({name: self._batch for name in names if "batch" in name and name not in known})
        free = [name for name in names if name not in known]
        if not free:
            yield known
            return
        past = {name: 0 for name in free if _PAST.search(name)}
        for size in _SIZES:
            yield known | dict.fromkeys(free, size) | past
        for chosen in itertools.product(_EACH, repeat=min(len(free), 3)):
            rest = dict.fromkeys(free[3:], chosen[-1])
            yield known | dict(zip(free, chosen, strict=False)) | rest
        for size in (*range(3, 65), *range(72, 1025, 8)):
            yield known | dict.fromkeys(free, size)

    def _expected(self, name: str, axis: int) -> int | None:
        """What the layer that reads an input needs along an axis; None where it is open."""
        rank = len(self._shapes[name])
        for node in self._through(name, ("Cast", "Identity")):
            if len(node.input) < 2 or node.input[1] not in self._stored:
                continue
            weight = self._stored[node.input[1]]
            if node.op_type == "Conv" and axis == 1:
                return weight[1] * int(attribute(node, "group", 1))
            if node.op_type == "ConvTranspose" and axis == 1:
                return weight[0]
            if node.op_type == "MatMul" and axis == rank - 1 and len(weight) > 1:
                return weight[-2]
            if node.op_type == "Gemm" and axis == 1:
                return weight[1] if attribute(node, "transB", 0) else weight[0]
            if node.op_type in ("GRU", "LSTM", "RNN") and axis == 2:
                return weight[2]
            if node.op_type == "BatchNormalization" and axis == 1:
                return weight[0]
        return None

    def _through(self, name: str, moves: Sequence[str]) -> Iterator[NodeProto]:
        """The nodes that read a value, also behind nodes that hand it on."""
        waiting, seen = [name], {name}
        while waiting:
            for node in self._readers.get(waiting.pop(), ()):
                if node.op_type not in moves:
                    yield node
                elif node.output[0] not in seen:
                    seen.add(node.output[0])
                    waiting.append(node.output[0])

    def _rows(self, name: str) -> int | None:
        """The number of rows that an input of integers may pick from."""
        found = []
        for node in self._through(name, _MOVES):
            if node.op_type != "Gather" or node.input[0] == name:
                continue
            shape: Sequence[int] | None = self._stored.get(node.input[0])
            if shape is None:
                if self._inferred is None:
                    self._inferred = shapes_of(self._model)
                shape = self._inferred.get(node.input[0], [])
            axis = int(attribute(node, "axis", 0))
            if -len(shape) <= axis < len(shape) and shape[axis]:
                found.append(shape[axis])
        return min(found, default=None)

    def inputs(self, sizes: Mapping[str, int], seed: int) -> Inputs:
        """Inputs of these sizes."""
        generator = np.random.default_rng(seed)
        made: Inputs = {}
        for name, extents in self._shapes.items():
            shape = [e if isinstance(e, int) else _evaluated(e, sizes) for e in extents]
            kind = self._types[name]
            assert kind is not None  # checked in the constructor
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            if min(shape, default=0) < 0 or math.prod(shape) * 8 > _MOST_BYTES:
                raise _TooLargeError(f"input {name} would have the shape {shape}")
            made[name] = self._values(name, shape, dtype, generator)
        return made

    def _values(
        self, name: str, shape: list[int], dtype: np.dtype[Any], generator: np.random.Generator
    ) -> NDArray[Any]:
        if dtype.kind == "c":
            raise UnrunnableError(f"input {name} is complex, of which there are no random values")
        if dtype.kind not in "iub":  # floats; bfloat16 and its like are of kind V
            if _STATE.search(name):
                return np.zeros(shape, dtype)
            if _MASK.search(name):
                return np.ones(shape, dtype)
            return generator.standard_normal(shape).astype(np.float32).astype(dtype)
        if _MASK.search(name):
            return np.ones(shape, dtype)
        if dtype.kind != "b" and (rows := self._rows(name)) is not None:
            return generator.integers(0, min(rows, np.iinfo(dtype).max), shape).astype(dtype)
        if dtype.itemsize == 1 and dtype.kind != "b" and len(shape) > 2:  # pixels
            return generator.integers(0, 128, shape).astype(dtype)
        return np.zeros(shape, dtype)


class _TooLargeError(Exception):
    """Inputs of these sizes are not tried."""


def _symbols(text: str) -> list[str]:
    """The names in a symbolic extent; the whole text where it is no sum or product."""
    tree = _parsed(text)
    if tree is None:
        return [text]
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def _parsed(text: str) -> ast.expr | None:
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    allowed = (ast.BinOp, ast.Name, ast.Load, ast.Constant, ast.Add, ast.Sub, ast.Mult)
    for node in ast.walk(tree):
        if not isinstance(node, (*allowed, ast.FloorDiv, ast.Div)):
            return None
        if isinstance(node, ast.Constant) and type(node.value) is not int:
            return None
    return tree


def _evaluated(text: str, sizes: Mapping[str, int]) -> int:
    """The number that a symbolic extent stands for."""
    if text in sizes:
        return sizes[text]
    tree = _parsed(text)
    assert tree is not None  # else the text itself is a symbol

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            return left * right if isinstance(node.op, ast.Mult) else left // max(right, 1)
        return sizes[node.id] if isinstance(node, ast.Name) else int(node.value)  # type: ignore[attr-defined]

    return value(tree)


def says_something(outputs: Iterable[Any]) -> bool:
    """Whether outputs can tell two models apart: one is not empty, and not only NaN."""
    for output in outputs:
        array = np.asarray(output) if isinstance(output, np.ndarray) else None
        if array is None:
            if output:  # a list, of maps or tensors
                return True
        elif array.size and not (array.dtype.kind == "f" and np.isnan(array).all()):
            return True
    return False


def inputs_of(
    model: ModelProto,
    opened: ort.InferenceSession,
    options: InputOptions,
    *,
    count: int,
    examples: int,
    batch: int = 1,
) -> list[Inputs]:
    """Inputs of a model: examples of a data set, arrays of a file, or random ones.

    Args:
        model: as for `random_inputs`.
        opened: the model in onnxruntime.
        options: where inputs come from. An archive with one array [n, ...] per input name and text
            need no labels; of a source of `load_data`, the validation split is taken.
        count: how many sets of random inputs.
        examples: how many examples at most.
        batch: examples at a time, where the model leaves that open; of text, as for `text_inputs`.

    Raises:
        RecipeError: a shape contradicts the model, or the source of the data is unknown.
        Prune2OnnxError: the data cannot be read, or the arrays have different lengths.
        UnrunnableError: as for `random_inputs`.
    """
    data = options.data
    if data is None or data == "random":
        return random_inputs(model, range(count), opened=opened, batch=batch, shapes=options.shapes)
    if options.shapes:
        raise RecipeError("--input-shape is for random inputs, and --data gives others; give one")
    if is_text(data):
        return text_inputs(opened, options, examples=examples, batch=batch)
    infos = {info.name: info for info in opened.get_inputs()}
    arrays = named_arrays(data, opened)
    if arrays is None:
        x = first(load_data(data).validation, examples, examples)
        arrays = fed(opened, stacked(x, np.concatenate))
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(lengths.values())) > 1:
        raise Prune2OnnxError(
            f"{data}: arrays of {lengths} examples, expected as many for each input"
        )
    total = min(next(iter(lengths.values()), 0), examples)
    size = next(filter(None, (_fixed_extent(infos[name]) for name in lengths)), min(batch, total))
    if total < max(size, 1):
        raise Prune2OnnxError(f"{data}: {total} examples, and the model takes {size} at a time")
    return [
        {name: a[at : at + size] if a.ndim else a for name, a in arrays.items()}
        for at in range(0, total - total % size, size)
    ]


def named_arrays(data: str, opened: ort.InferenceSession) -> dict[str, NDArray[Any]] | None:
    """The arrays of `npz:FILE`, one for each input by its name; None for other data.

    Raises:
        Prune2OnnxError: the file cannot be read.
    """
    head, _, argument = data.partition(":")
    names = [info.name for info in opened.get_inputs()]
    return read_named(argument, names) if head == "npz" else None


def has_labels(data: str | None, opened: ort.InferenceSession) -> TypeGuard[str]:
    """Whether `data` is a data set with labels, not text or arrays for the inputs by name."""
    if data is None or data == "random" or is_text(data):
        return False
    return named_arrays(data, opened) is None


def fixed_batch(opened: ort.InferenceSession) -> int:
    """The number of examples that a model's first input always has; 0 where it is open."""
    inputs = opened.get_inputs()
    return _fixed_extent(inputs[0]) if inputs else 0


def _fixed_extent(info: Any) -> int:
    extent = info.shape[0] if info.shape else 0
    return extent if isinstance(extent, int) and extent > 0 else 0


def in_batches(opened: ort.InferenceSession, x: Any) -> Iterator[tuple[Any, int]]:
    """Examples [n, ...] in batches of the size that the model declares, or all at once.

    Args:
        opened: the model.
        x: an array, or a tuple or dict of arrays, one for each input.

    Returns:
        (a batch, how many of its examples count): a last one that is too small is filled up with
        repetitions of its last example.
    """
    info, head = opened.get_inputs()[0], leaves(x)[0]
    size = fixed_batch(opened)
    if not size or size == len(head) or len(info.shape) != head.ndim:
        yield x, len(head)
        return
    for begin in range(0, len(head), size):
        count = min(size, len(head) - begin)

        def part(array: NDArray[Any], begin: int = begin, count: int = count) -> NDArray[Any]:
            own = array[begin : begin + count]
            return np.concatenate([own, *[own[-1:]] * (size - count)])

        yield mapped(part, x), count


def fed(opened: ort.InferenceSession, x: Any) -> Inputs:
    """Arrays as inputs of a model: those of a dict by name, others in order; in its types.

    Raises:
        Prune2OnnxError: there are not as many as the model has inputs, or others.
    """
    infos = opened.get_inputs()
    names = [info.name for info in infos]
    given = x if isinstance(x, dict) else dict(zip(names, leaves(x), strict=False))
    if sorted(given) != sorted(names) or len(leaves(x)) != len(names):
        raise Prune2OnnxError(
            f"the model's inputs are {input_text(opened)}, and the data's examples are "
            f"{described(x)}; give data with an array for each input, by its name"
        )
    return {info.name: _cast(given[info.name], info) for info in infos}


def _cast(array: NDArray[Any], info: Any) -> NDArray[Any]:
    """Integers that a data set holds as float32 for want of knowing better, as integers again."""
    kind = element_type(info.type)
    dtype = None if kind is None else helper.tensor_dtype_to_np_dtype(kind)
    if dtype is None or dtype == array.dtype or dtype.kind not in "iu" or array.dtype.kind != "f":
        return array
    return array.astype(dtype) if not (array % 1).any() else array
