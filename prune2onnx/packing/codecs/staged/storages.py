"""How pieces that are stored alike become one vector: codes, floats, halves, gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs.methods import Method
from prune2onnx.packing.codecs.staged import functions, words
from prune2onnx.packing.codecs.staged.choice import low_bits
from prune2onnx.packing.codecs.staged.floats import Planes
from prune2onnx.packing.codecs.staged.pieces import Piece
from prune2onnx.packing.codecs.staged.writer import Gated, Writer
from prune2onnx.packing.codecs.values.planes import planes_of, tables_of
from prune2onnx.packing.codecs.weight import Weight, indexed, numpy_type, ranked


@dataclass(frozen=True)
class Kind:
    """How a weight is stored: those that are alike are decoded together.

    Attributes:
        how: the method.
        number: ONNX's number of the type in which weights are rebuilt.
        own: what they must have in common besides: the name of a weight with its own codebook;
            whether floats have 16 lower bits.
    """

    how: Method
    number: int
    own: str = ""

    @classmethod
    def of(cls, weight: Weight, how: Method) -> Kind:
        """That of a weight."""
        own, number = "", weight.working
        if how.values.name == "codebook":
            own = weight.name
        elif how.values.name == "planes" and number == TensorProto.FLOAT16:
            own, number = "half", TensorProto.FLOAT  # rebuilt in float32, which holds each value
        elif how.values.name == "planes":
            own = "short" if Planes.of(weight).lower is None else "long"
        return cls(how, number, own)


class Storage(Protocol):
    """Writes the values of pieces that are stored alike."""

    def write(self, pieces: list[Piece], gated: Gated) -> str:
        """A value with the pieces one after the other."""


def storage_of(writer: Writer, kind: Kind, weights: list[Weight]) -> Storage:
    """What writes all weights of a kind."""
    if kind.how.positions == "gap":
        return Gaps(writer, kind, weights)
    if kind.own == "half":
        return Halves(writer, weights)
    if kind.how.values.name == "planes":
        return Floats(writer, weights)
    return Codes(writer, kind, weights, [weight.values for weight in weights])


class Codes:
    """Values with one codebook: those of each weight, and those of no weight at the end."""

    def __init__(
        self, writer: Writer, kind: Kind, weights: list[Weight], values: list[NDArray[Any]]
    ) -> None:
        self._writer = writer
        found = indexed(np.concatenate(values))
        assert found is not None  # `fitting` made sure
        codes, self._book = found
        ends = np.cumsum([part.size for part in values])[:-1]
        names = [*(weight.name for weight in weights), _ZERO][: len(values)]
        self._codes = dict(zip(names, np.split(codes, ends), strict=True))
        self._levels = writer.levels(np.bincount(codes))
        self._table = writer.table(self._levels, self._book, kind.number)

    def write(self, pieces: list[Piece], gated: Gated) -> str:
        """As of `Storage`."""
        codes = [self._codes[piece.weight.name][piece.elements] for piece in pieces]
        return self.entries(np.concatenate(codes), gated)

    def entries(self, codes: NDArray[np.uint8], gated: Gated) -> str:
        """A value with what these codes stand for."""
        name = self._writer.words(codes, self._levels, self._book.size, gated)
        function = functions.look_up(self._writer.opset)
        return self._writer.call(function, name, self._writer.count(codes.size), self._table)

    def of(self, name: str) -> NDArray[np.uint8]:
        """The codes of a weight."""
        return self._codes[name]


class Floats:
    """Floats in planes."""

    def __init__(self, writer: Writer, weights: list[Weight]) -> None:
        self._writer = writer
        self._planes = {weight.name: Planes.of(weight) for weight in weights}
        exponents = [planes.exponents for planes in self._planes.values()]
        symbols, self._found = ranked(np.concatenate(exponents))
        ends = np.cumsum([part.size for part in exponents])[:-1]
        self._symbols = dict(zip(self._planes, np.split(symbols, ends), strict=True))
        one = next(iter(self._planes.values()))
        self._levels = writer.levels(np.bincount(symbols), one.rest_bits)
        units = one.units(self._found)
        self._units = writer.table(self._levels, units, TensorProto.FLOAT)
        self._table = writer.constant(one.table)

    def write(self, pieces: list[Piece], gated: Gated) -> str:
        """As of `Storage`."""
        writer = self._writer
        symbols = np.concatenate([self._symbols[p.weight.name][p.elements] for p in pieces])
        planes = [self._planes[piece.weight.name] for piece in pieces]
        pairs = list(zip(planes, pieces, strict=True))
        name = writer.words(symbols, self._levels, self._found.size, gated)
        upper = writer.stream(np.concatenate([own.upper[p.elements] for own, p in pairs]))
        count = writer.count(symbols.size)
        inputs = [gated.zero, name, count, self._units, upper, self._table]
        if planes[0].lower is None:
            value = writer.call(functions.short_floats(writer.opset), *inputs)
        else:
            parts = [own.lower[p.elements] for own, p in pairs if own.lower is not None]
            inputs += [gated.gate, writer.stream(np.concatenate(parts))]
            value = writer.call(functions.floats(writer.opset), *inputs)
        places, patches, done = [], [], 0
        for own, piece in pairs:
            inside = own.patches[
                slice(*np.searchsorted(own.patches, [piece.elements.start, piece.elements.stop]))
            ]
            places.append(inside - piece.elements.start + done)
            patches.append(piece.weight.values[inside])
            done += piece.size
        where = np.concatenate(places)
        if not where.size:
            return value
        streams = [writer.stream(where.astype(np.int32)), writer.stream(np.concatenate(patches))]
        return writer.call(functions.patched(writer.opset), value, *streams)


class Halves:
    """Values in half precision: the upper byte is a symbol, the lower one stands as it is."""

    def __init__(self, writer: Writer, weights: list[Weight]) -> None:
        self._writer = writer
        cut = {one.name: planes_of(one.values, TensorProto.FLOAT16) for one in weights}
        symbols, found = ranked(np.concatenate([upper for upper, _ in cut.values()]))
        ends = np.cumsum([upper.size for upper, _ in cut.values()])[:-1]
        self._symbols = dict(zip(cut, np.split(symbols, ends), strict=True))
        self._lower = {name: lower.astype(np.uint8) for name, (_, lower) in cut.items()}
        self._count = found.size
        self._levels = writer.levels(np.bincount(symbols), 8.0)
        tables = tables_of(found, TensorProto.FLOAT16)
        self._tables = [writer.table(self._levels, one, TensorProto.FLOAT) for one in tables]

    def write(self, pieces: list[Piece], gated: Gated) -> str:
        """As of `Storage`."""
        writer = self._writer
        symbols, lower = (
            np.concatenate([part[piece.weight.name][piece.elements] for piece in pieces])
            for part in (self._symbols, self._lower)
        )
        name = writer.words(symbols, self._levels, self._count, gated)
        inputs = [gated.zero, name, writer.count(symbols.size), *self._tables]
        return writer.call(functions.halves(writer.opset), *inputs, writer.stream(lower))


class Gaps:
    """Entries that are not zero, and the gaps between them; a zero bridges one that is too long."""

    def __init__(self, writer: Writer, kind: Kind, weights: list[Weight]) -> None:
        self._writer = writer
        values = [weight.values[weight.nonzero] for weight in weights]
        self._codes = Codes(writer, kind, weights, [*values, np.zeros(1, values[0].dtype)])
        self._zero = writer.constant(np.zeros(1, numpy_type(kind.number)))
        self._low = max(map(low_bits, weights))
        every = [np.diff(weight.nonzero, prepend=-1) - 1 for weight in weights]
        high = np.minimum(np.concatenate(every) >> self._low, 255)
        counts = np.bincount(high, minlength=256)
        order = np.argsort(-counts, kind="stable")
        self._rank = np.empty(256, np.uint8)
        self._rank[order] = np.arange(256)
        # those that may occur where weights meet have a number, too
        self._levels = writer.levels(counts[order] + 1e-3)
        steps = ((order << self._low) + 1).astype(np.int32)
        self._steps = writer.table(self._levels, steps, TensorProto.INT32)

    def write(self, pieces: list[Piece], gated: Gated) -> str:
        """As of `Storage`."""
        writer, low = self._writer, self._low
        found, codes, done = [], [], 0
        for piece in pieces:
            nonzero, elements = piece.weight.nonzero, piece.elements
            inside = slice(*np.searchsorted(nonzero, [elements.start, elements.stop]))
            found.append(nonzero[inside] - elements.start + done)
            codes.append(self._codes.of(piece.weight.name)[inside])
            done += piece.size
        size = writer.count(done)
        places, entries = self._bridged(np.concatenate(found), np.concatenate(codes))
        if not places.size:
            return writer.call(functions.blank(writer.opset), gated.gate, size, self._zero)
        count = writer.count(places.size)
        gaps = np.diff(places, prepend=-1) - 1
        name = writer.words(self._rank[gaps >> low], self._levels, 256, gated)
        rest = (gaps & ((1 << low) - 1)).astype(np.uint8)
        fields = [writer.stream(part) for part in words.fields(rest, low)] if low else []
        waits = gated.of(words.FIELDS[low]) if low else []
        function = functions.places(low, writer.opset)
        where = writer.call(function, name, count, self._steps, *waits, *fields)
        values = self._codes.entries(entries, gated)
        return writer.call(
            functions.sparse(writer.opset), gated.gate, size, self._zero, where, values
        )

    def _bridged(
        self, places: NDArray[np.int64], codes: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Places and codes, with zeros where the next entry is too far away."""
        longest = 256 << self._low
        before = np.concatenate([[-1], places[:-1]])
        more = (places - before - 1) // longest
        if not more.any():
            return places, codes
        extra = np.concatenate(
            [before[at] + longest * np.arange(1, more[at] + 1) for at in np.flatnonzero(more)]
        )
        every = np.concatenate([places, extra])
        order = np.argsort(every)
        zero = np.full(extra.size, self._codes.of(_ZERO)[0])
        return every[order], np.concatenate([codes, zero])[order]


_ZERO = ""
"""The name of the zero among the codes."""
