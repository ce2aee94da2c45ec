"""Writes pieces as calls of the functions of staged decoding, stage after stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, NodeProto, TensorProto, ValueInfoProto, helper

from prune2onnx.graph.domain import DOMAIN
from prune2onnx.graph.protobuf import framed
from prune2onnx.packing.codecs.bundle import add_facts, checked, continued
from prune2onnx.packing.codecs.methods import METHODS, Method
from prune2onnx.packing.codecs.staged import functions, words
from prune2onnx.packing.codecs.staged.choice import SIMPLE_BELOW
from prune2onnx.packing.codecs.staged.large import Large
from prune2onnx.packing.codecs.staged.pieces import Piece
from prune2onnx.packing.codecs.weight import numpy_type

Levels = Sequence[words.Level]
"""The levels of a sequence of symbols."""


@dataclass(frozen=True)
class Gated:
    """Values that become known with a stage: zero, int64; and uint8 constants for fields."""

    gate: str
    zero: str
    four: str
    places: str

    def of(self, widths: Iterable[int]) -> list[str]:
        """What the fields of these widths wait for."""
        return [{8: self.zero, 1: self.places}.get(width, self.four) for width in widths]


@dataclass
class Staged:
    """Calls that decode weights, as they enter a file.

    Attributes:
        nodes: the calls, in order.
        functions: by name.
        streams: initializers.
        places: `value_info` of the places of escapes.
    """

    nodes: list[NodeProto] = field(default_factory=list)
    functions: dict[str, FunctionProto] = field(default_factory=dict)
    streams: list[TensorProto] = field(default_factory=list)
    places: list[ValueInfoProto] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        calls = (*self.nodes, *self.streams, *self.places)
        total = sum(framed(one.ByteSize()) for one in calls)
        return total + sum(framed(one.ByteSize(), tag=2) for one in self.functions.values())


@dataclass
class _Parts:
    """The pieces of a weight, so far."""

    weight: Large
    names: list[str]
    checksum: int
    nbytes: int


def by_words(levels: Levels, values: NDArray[Any]) -> NDArray[Any]:
    """A table for words: its first entries are of no symbol, modulo 256."""
    origin = levels[0].origin
    table = np.zeros(min(values.size + origin, 256), values.dtype)
    table[(np.arange(values.size) + origin) % 256] = values
    return table


class Writer:
    """Writes calls.

    Args:
        places: weight name -> its index among all initializers of the dense model.
        opset: of the model.
        fresh: gives names that are not in the model.
        store: makes an initializer of a name, an array and ONNX's number of its type.
        matrices: whether large matrices are made in their shape at once.
        fast: whether symbols have words of one field and no escapes.

    Attributes:
        made: what was written so far.
        nbytes: bytes of the initializers among it.
    """

    def __init__(
        self,
        places: Mapping[str, int],
        opset: int,
        fresh: Callable[[], str],
        store: Callable[[str, NDArray[Any], int], TensorProto],
        *,
        matrices: bool,
        fast: bool,
    ) -> None:
        self.made = Staged()
        self._store = store
        self._matrices, self._fast = matrices, fast
        self._places = places
        self.opset, self._fresh = opset, fresh
        self._simple = opset < SIMPLE_BELOW
        self._shared: dict[tuple[Any, ...], str] = {}
        self.nbytes = 0
        self._parts: dict[str, _Parts] = {}  # of weights that are in several pieces
        self._ends = 0  # functions that split a vector, so far

    # --- the parts of a file ---

    def gates(self, count: int) -> list[Gated]:
        """The gates of so many stages, and the constants that become known with them."""
        names = [self._fresh() for _ in range(count)]
        self.call_as(functions.gates(count, self.opset), [], names)
        late = functions.constants(self.opset)
        return [Gated(name, *self.outputs(late, [name])) for name in names]

    def outputs(self, function: FunctionProto, inputs: Sequence[str]) -> list[str]:
        """A call; the names of its outputs."""
        names = [self._fresh() for _ in function.output]
        self.call_as(function, inputs, names)
        return names

    def call(self, function: FunctionProto, *inputs: str) -> str:
        """A call; the name of its only output."""
        return self.outputs(function, inputs)[0]

    def call_as(
        self, function: FunctionProto, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        """A call whose outputs have these names."""
        self.made.functions.setdefault(function.name, function)
        node = helper.make_node(function.name, list(inputs), list(outputs), domain=DOMAIN)
        self.made.nodes.append(node)

    def stream(self, array: NDArray[Any], element_type: int | None = None) -> str:
        """An initializer."""
        name = self._fresh()
        number = element_type or helper.np_dtype_to_tensor_dtype(array.dtype)
        self.made.streams.append(self._store(name, array, number))
        head = TensorProto(name=name, dims=array.shape, data_type=number)
        self.nbytes += framed(head.ByteSize() + framed(array.nbytes))
        return name

    def constant(self, array: NDArray[Any], element_type: int | None = None) -> str:
        """A small initializer, which is stored once."""
        key = (element_type, array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.stream(array, element_type)
        return self._shared[key]

    def count(self, *values: int) -> str:
        """A shape."""
        return self.constant(np.array(values, np.int64))

    # --- symbols ---

    def levels(self, counts: NDArray[Any], beside: float = 0.0) -> Levels:
        """The levels in which symbols are written that occur so often."""
        if self._fast:
            return (words.single(counts.size),)
        return words.plan(counts, beside=beside, simple=self._simple)

    def words(self, coded: Sequence[words.Coded], count: int, gated: Gated) -> str:
        """A value with symbols and the first level's `origin`, uint8, filled up at its end.

        Args:
            coded: the symbols of some pieces, in all levels.
            count: number of different symbols in all pieces.
            gated: the constants of the stage.
        """
        levels = [one.level for one in coded]
        found: list[list[str]] = []
        for one in coded:
            fields = [self.stream(part) for part in one.fields]
            waits = gated.of(words.FIELDS[one.level.bits])
            outputs = self.outputs(functions.level(one.level, self.opset), [*waits, *fields])
            found.append(outputs)
            if not one.level.is_last:
                info = helper.make_tensor_value_info(
                    outputs[1], TensorProto.INT64, [1, one.escapes]
                )
                self.made.places.append(info)
        counts = [count]
        for level in levels[:-1]:
            counts.append(max(1, ((counts[-1] - 1) >> level.low) + 1 - level.digits))
        result = found[-1][0]
        for at in reversed(range(len(coded) - 1)):
            level, following = levels[at], levels[at + 1]
            table = self.constant(words.escape_table(level, following, counts[at]))
            function = functions.resolve(bool(level.low), self.opset)
            result = self.call(function, *found[at], result, table)
        return result

    def table(self, levels: Levels, values: NDArray[Any], number: int) -> str:
        """A table that is looked up by words."""
        return self.constant(by_words(levels, values), number)

    # --- weights ---

    def split(self, pieces: list[Piece], how: Method, number: int, flat: str, nbytes: int) -> None:
        """Splits a vector into its pieces, and joins those of weights that are complete.

        Args:
            pieces: those that differ in their first extent alone stand together.
            how: the method by which they were written.
            number: ONNX's number of the vector's element type.
            flat: the vector.
            nbytes: bytes that it takes.
        """
        factors = [None if one.factors is None else self._factor(one) for one in pieces]
        targets = [self.target(one, number) for one in pieces]
        function = functions.end(
            f"{functions.END}{self._ends}",
            [piece.shape for piece in pieces],
            [one is not None for one in factors],
            targets,
            number,
            self.opset,
        )
        self._ends += 1
        outputs = [self._output(piece) for piece in pieces]
        self.call_as(function, [flat, *(one for one in factors if one)], outputs)
        self._made(pieces, outputs, targets, how, number, nbytes)

    def whole(
        self,
        piece: Piece,
        how: Method,
        number: int,
        function: FunctionProto,
        inputs: Sequence[str],
        nbytes: int,
    ) -> None:
        """A piece that a call gives in its shape and type; arguments as of `split`."""
        output = self._output(piece)
        self.call_as(function, inputs, [output])
        self._made([piece], [output], [self.target(piece, number)], how, number, nbytes)

    def matrix(self, pieces: Sequence[Piece]) -> Piece | None:
        """The piece that is made in its shape at once."""
        return pieces[0] if self._matrices and len(pieces) == 1 and pieces[0].is_matrix else None

    def target(self, piece: Piece, number: int) -> int:
        """The type in which a piece leaves its call."""
        return piece.weight.element_type if piece.is_whole else number

    def cast(self, piece: Piece, number: int) -> int:
        """The type into which a piece is cast at last; 0: none, as it is rebuilt in it."""
        target = self.target(piece, number)
        return 0 if target == number else target

    def _output(self, piece: Piece) -> str:
        return piece.weight.name if piece.is_whole else self._fresh()

    def _made(
        self,
        pieces: Sequence[Piece],
        outputs: Sequence[str],
        targets: Sequence[int],
        how: Method,
        number: int,
        nbytes: int,
    ) -> None:
        """Adds the facts about pieces that a call gives; joins weights that are complete."""
        size = sum(piece.size for piece in pieces)
        facts, total = [], 0
        for piece, output, target in zip(pieces, outputs, targets, strict=True):
            place = self._places[piece.weight.name] if piece.is_whole else -1
            facts += [place, METHODS.index(how), round(nbytes * piece.size / size)]
            rows = piece.rows
            made = rows.astype(numpy_type(target), copy=False)
            total = checked(output, made.dtype, made.shape, [made], total)
            if not piece.is_whole:
                self._part(piece, output, rows, round(nbytes * piece.size / size))
        self._keep(total, facts)
        for piece in pieces:
            if not piece.is_whole and piece.end == piece.weight.shape[0]:
                self._join(self._parts.pop(piece.weight.name), how, number)

    def _part(self, piece: Piece, output: str, rows: NDArray[Any], nbytes: int) -> None:
        """Adds to what is known of a weight in several pieces."""
        weight = piece.weight
        if not piece.begin:
            begun = checked(weight.name, rows.dtype, weight.shape, [])
            self._parts[weight.name] = _Parts(weight, [], begun, 0)
        part = self._parts[weight.name]
        part.names.append(output)
        part.checksum = continued([rows], part.checksum)
        part.nbytes += nbytes

    def _join(self, parts: _Parts, how: Method, number: int) -> None:
        """Joins the pieces of a weight."""
        weight = parts.weight
        target = 0 if weight.element_type == number else weight.element_type
        function = functions.join(len(parts.names), target, self.opset)
        self.call_as(function, parts.names, [weight.name])
        self._keep(parts.checksum, [self._places[weight.name], METHODS.index(how), parts.nbytes])

    def same(self, weight: Large, original: Large, how: Method) -> None:
        """A weight that is equal to another one."""
        self.call_as(functions.join(1, 0, self.opset), [original.name], [weight.name])
        every = (weight.rows(*span) for span in weight.blocks())
        dtype = numpy_type(weight.element_type)
        total = checked(weight.name, dtype, weight.shape, every)
        self._keep(total, [self._places[weight.name], METHODS.index(how), 0])

    def _factor(self, piece: Piece) -> str:
        """A piece's scale, with as many axes as the piece."""
        factors = piece.factors
        assert factors is not None
        return self.constant(
            factors.reshape((1,) * (len(piece.shape) - factors.ndim) + factors.shape)
        )

    def _keep(self, checksum: int, facts: list[int]) -> None:
        """Adds the facts about the outputs of the last call."""
        add_facts(self.made.nodes[-1], [checksum, *facts])
