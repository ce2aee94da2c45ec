"""How pieces that are stored alike become one vector: codes, floats, halves, gaps.

Each storage first looks at what is known of all its weights, for tables that they share. Then it
codes some pieces at a time, which may be done in threads, and writes them, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, TensorProto

from prune2onnx.packing.codecs.book import Book, by_count
from prune2onnx.packing.codecs.methods import Method
from prune2onnx.packing.codecs.staged import floats, functions, words
from prune2onnx.packing.codecs.staged.choice import Known
from prune2onnx.packing.codecs.staged.large import Counted
from prune2onnx.packing.codecs.staged.pieces import Piece
from prune2onnx.packing.codecs.staged.writer import Gated, Writer, by_words
from prune2onnx.packing.codecs.values.planes import tables_of
from prune2onnx.packing.codecs.weight import bits_of, gaps_of, numpy_type

Value = Callable[[Gated], str]
"""Writes what was coded, in a stage; gives the name of the value."""

Whole = tuple[FunctionProto, list[str]]
"""A function that makes a piece in its shape and type, and its inputs."""

Ready = Callable[[Gated], str | Whole]
"""Writes what was coded, in a stage; gives the name of a value with the pieces in a row, or what
makes the only one."""


@dataclass(frozen=True)
class Kind:
    """How a weight is stored: those that are alike are decoded together.

    Attributes:
        how: the method.
        number: ONNX's number of the type in which weights are rebuilt.
        own: what they must have in common besides: the name of a weight with its own codebook;
            whether floats have 16 lower bits; the number of a code (`alike`).
    """

    how: Method
    number: int
    own: str = ""

    @property
    def may_be_matrix(self) -> bool:
        """Whether matrices of this kind may be made in their shape at once."""
        return self.how.positions == "all" and self.own != "half"

    @classmethod
    def of(cls, one: Known, how: Method) -> Kind:
        """That of a weight."""
        own, number = "", one.weight.working
        if how.values.name == "codebook":
            own = one.weight.name
        elif how.values.name == "planes" and number == TensorProto.FLOAT16:
            own, number = "half", TensorProto.FLOAT  # rebuilt in float32, which holds each value
        elif how.values.name == "planes":
            own = "long" if one.survey.lower else "short"
        return cls(how, number, own)


class Storage(Protocol):
    """Codes pieces that are stored alike."""

    def code(self, pieces: list[Piece]) -> Ready:
        """Codes pieces; may be called in several threads at a time."""


def storage_of(writer: Writer, kind: Kind, weights: list[Known]) -> Storage:
    """What codes all weights of a kind."""
    if kind.how.positions == "gap":
        return Gaps(writer, kind, weights)
    if kind.own == "half":
        return Halves(writer, weights)
    if kind.how.values.name == "raw":
        return Raw(writer, kind)
    if kind.how.values.name == "planes":
        return Floats(writer, kind, weights)
    books = [one.survey.book for one in weights]
    return Codes(writer, kind, [book for book in books if book is not None])


class Codes:
    """Values with one codebook."""

    def __init__(self, writer: Writer, kind: Kind, books: Sequence[Counted]) -> None:
        self._writer = writer
        values = np.concatenate([book.values for book in books])
        bits, place = np.unique(bits_of(values), return_inverse=True)
        counts = np.bincount(place, np.concatenate([book.counts for book in books])).astype(int)
        order = by_count(counts)
        self._book, self._rank = Book(bits), np.argsort(order).astype(np.uint8)
        self._size, self._kind = bits.size, kind
        self._levels = writer.levels(counts[order])
        self._values = bits[order].view(values.dtype)

    def code(self, pieces: list[Piece]) -> Ready:
        """As of `Storage`."""
        if piece := self._writer.matrix(pieces):
            return self._matrix(piece)
        return self.entries(np.concatenate([self.codes(piece.coded) for piece in pieces]))

    def _matrix(self, piece: Piece) -> Ready:
        """A matrix, each row of which has a table, with the row's factor in it."""
        writer, kind = self._writer, self._kind
        coded = words.encode(self.codes(piece.coded), self._levels)
        table = by_words(self._levels, self._values)
        if piece.factors is not None:
            table = table * piece.factors
        table = table.reshape(-1, table.shape[-1])

        def ready(gated: Gated) -> Whole:
            inputs = [writer.words(coded, self._size, gated), writer.count(piece.size)]
            inputs += [writer.count(*piece.shape), writer.constant(table, kind.number)]
            inputs.append(writer.count(piece.shape[0], table.shape[1]))
            return functions.matrix(writer.opset, writer.cast(piece, kind.number)), inputs

        return ready

    def entries(self, codes: NDArray[np.uint8]) -> Value:
        """What these codes stand for."""
        writer = self._writer
        coded = words.encode(codes, self._levels)

        def ready(gated: Gated) -> str:
            name = writer.words(coded, self._size, gated)
            function = functions.look_up(writer.opset)
            table = writer.table(self._levels, self._values, self._kind.number)
            return writer.call(function, name, writer.count(codes.size), table)

        return ready

    def codes(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """The codes of values, the most frequent ones first."""
        return self._rank[self._book.codes(bits_of(values))]


class _Symbols:
    """Symbols of a byte, numbered by falling frequency."""

    def __init__(self, writer: Writer, counts: NDArray[np.int64], beside: float = 0.0) -> None:
        self._writer = writer
        order = by_count(counts)
        self.found = order[: np.count_nonzero(counts)].astype(np.uint8)
        self._rank = np.argsort(order).astype(np.uint8)
        self.levels = writer.levels(counts[self.found], beside)

    def code(self, symbols: NDArray[np.uint8]) -> Value:
        """A value with the words of these symbols."""
        coded = words.encode(self._rank[symbols], self.levels)
        return lambda gated: self._writer.words(coded, self.found.size, gated)


def _exponents(weights: Sequence[Known]) -> NDArray[np.int64]:
    counts = [one.survey.exponents for one in weights]
    return np.asarray(np.sum([one for one in counts if one is not None], axis=0))


class Floats:
    """Floats in planes."""

    def __init__(self, writer: Writer, kind: Kind, weights: list[Known]) -> None:
        self._writer, self._kind = writer, kind
        self._short = short = not weights[0].survey.lower
        self._symbols = _Symbols(writer, _exponents(weights), weights[0].rest_bits)
        units = floats.units(self._symbols.found, short=short)
        self._units = writer.table(self._symbols.levels, units, TensorProto.FLOAT)
        self._width = by_words(self._symbols.levels, units).size
        self._table = writer.constant(floats.table(short=short))

    def code(self, pieces: list[Piece]) -> Ready:
        """As of `Storage`."""
        writer = self._writer
        values = np.concatenate([piece.coded for piece in pieces])
        planes = floats.Planes.of(values, short=self._short)
        own, size = values[planes.patches], values.size
        del values
        symbols = self._symbols.code(planes.exponents)
        upper, lower, places = planes.upper, planes.lower, planes.patches.astype(np.int32)
        del planes
        if not places.size and (piece := writer.matrix(pieces)):
            return self._matrix(piece, symbols, upper, lower)

        def ready(gated: Gated) -> str:
            count, name = writer.count(size), symbols(gated)
            inputs = [gated.zero, name, count, self._units, writer.stream(upper), self._table]
            if lower is None:
                value = writer.call(functions.short_floats(writer.opset), *inputs)
            else:
                inputs += [gated.gate, writer.stream(lower)]
                value = writer.call(functions.floats(writer.opset), *inputs)
            if not places.size:
                return value
            streams = [writer.stream(places), writer.stream(own)]
            return writer.call(functions.patched(writer.opset), value, *streams)

        return ready

    def _matrix(
        self,
        piece: Piece,
        symbols: Value,
        upper: NDArray[np.uint8],
        lower: NDArray[np.uint16] | None,
    ) -> Ready:
        writer, kind = self._writer, self._kind

        def ready(gated: Gated) -> Whole:
            rows = piece.shape[0]
            inputs = [gated.zero, symbols(gated), writer.count(piece.size)]
            inputs += [writer.count(*piece.shape), self._units]
            inputs += [writer.count(rows, self._width), writer.stream(upper.reshape(piece.shape))]
            inputs += [self._table, writer.count(rows, 256)]
            if lower is not None:
                inputs += [gated.gate, writer.count(rows)]
                inputs.append(writer.stream(lower.reshape(piece.shape)))
            target = writer.cast(piece, kind.number)
            return functions.float_matrix(lower is None, target, writer.opset), inputs

        return ready


class Raw:
    """Floats that bfloat16 holds, as they are."""

    def __init__(self, writer: Writer, kind: Kind) -> None:
        self._writer, self._kind = writer, kind

    def code(self, pieces: list[Piece]) -> Ready:
        """As of `Storage`."""
        writer, kind = self._writer, self._kind
        values = np.concatenate([piece.coded for piece in pieces]).astype(ml_dtypes.bfloat16)
        piece = writer.matrix(pieces)
        if piece is not None:
            values = values.reshape(piece.shape)

        def ready(gated: Gated) -> str | Whole:
            stored = writer.stream(values, TensorProto.BFLOAT16)
            inputs = [gated.gate, writer.count(values.shape[0]), stored]
            function = functions.raw(kind.number, writer.opset)
            return writer.call(function, *inputs) if piece is None else (function, inputs)

        return ready


class Halves:
    """Values in half precision: the upper byte is a symbol, the lower one stands as it is."""

    def __init__(self, writer: Writer, weights: list[Known]) -> None:
        self._writer = writer
        self._symbols = _Symbols(writer, _exponents(weights), 8.0)
        tables = tables_of(self._symbols.found, TensorProto.FLOAT16)
        levels = self._symbols.levels
        self._tables = [writer.table(levels, one, TensorProto.FLOAT) for one in tables]

    def code(self, pieces: list[Piece]) -> Ready:
        """As of `Storage`."""
        writer = self._writer
        bits = bits_of(np.concatenate([piece.coded for piece in pieces]))
        symbols = self._symbols.code((bits >> np.uint16(8)).astype(np.uint8))
        lower = bits.astype(np.uint8)

        def ready(gated: Gated) -> str:
            inputs = [gated.zero, symbols(gated), writer.count(lower.size), *self._tables]
            return writer.call(functions.halves(writer.opset), *inputs, writer.stream(lower))

        return ready


class Gaps:
    """Entries that are not zero, and the gaps between them; a zero bridges one that is too long."""

    def __init__(self, writer: Writer, kind: Kind, weights: list[Known]) -> None:
        self._writer = writer
        zero = Counted(np.zeros(1, numpy_type(kind.number)), np.ones(1, np.int64))
        others = [one.survey.others for one in weights]
        self._codes = Codes(writer, kind, [*(one for one in others if one is not None), zero])
        self._zero = writer.constant(zero.values)
        self._bridge = self._codes.codes(zero.values)[0]
        self._low = max(one.low_bits for one in weights)
        counts = np.sum([one.steps(self._low) for one in weights], axis=0)
        # those that may occur where weights meet have a number, too
        self._symbols = _Symbols(writer, counts + 1e-3)
        steps = ((self._symbols.found.astype(np.int32) << self._low) + 1).astype(np.int32)
        self._steps = writer.table(self._symbols.levels, steps, TensorProto.INT32)

    def code(self, pieces: list[Piece]) -> Ready:
        """As of `Storage`."""
        writer, low = self._writer, self._low
        found, codes, done = [], [], 0
        for piece in pieces:
            coded = piece.coded
            nonzero = np.flatnonzero(bits_of(coded))
            found.append(nonzero + done)
            codes.append(self._codes.codes(coded[nonzero]))
            done += piece.size
        (gaps,), (real,) = gaps_of([np.concatenate(found)], 256 << low)
        count, size = gaps.size, done
        if not count:
            return lambda gated: writer.call(
                functions.blank(writer.opset), gated.gate, writer.count(size), self._zero
            )
        gaps -= 1
        symbols = self._symbols.code((gaps >> low).astype(np.uint8))
        rest = (gaps & ((1 << low) - 1)).astype(np.uint8)
        parts = words.fields(rest, low) if low else ()
        entries = np.full(count, self._bridge)
        entries[real] = np.concatenate(codes)
        values = self._codes.entries(entries)

        def ready(gated: Gated) -> str:
            name = symbols(gated)
            waits = gated.of(words.FIELDS[low]) if low else []
            inputs = [name, writer.count(count), self._steps, *waits, *map(writer.stream, parts)]
            where = writer.call(functions.places(low, writer.opset), *inputs)
            inputs = [gated.gate, writer.count(size), self._zero, where, values(gated)]
            return writer.call(functions.sparse(writer.opset), *inputs)

        return ready
