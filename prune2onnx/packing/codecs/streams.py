"""The streams of all weights together: Huffman codes, Rice codes, bytes or nibbles.

`groups` asks for a sequence of small integers and gets the name of the value that will hold it in
the decode function; how the sequence is written is decided here, by the fewest bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, TensorProto, helper

from prune2onnx.graph.protobuf import tensor
from prune2onnx.packing.codecs import huffman, huffman_graph, rice
from prune2onnx.packing.codecs.function import Body
from prune2onnx.packing.codecs.weight import entropy_bits, narrowest, numpy_type

_T = TypeVar("_T")

Coder = Literal["huffman", "rice", "none"]
"""Entropy codes: Huffman for large files, Rice for small ones, none where loading is to be fast."""

SEGMENT_NBYTES = 30
"""Bytes that a Huffman segment adds: its code, a lane start, half a word, entries in constants."""

RUN_NBYTES = 25
"""About how many bytes each further sequence with a Rice code adds: its place in constants and in
nodes."""

STREAM_BITS = 3 * (huffman.MAX_BITS >> 2)
"""Most bits of codewords in a stream; beyond, another stream is begun."""


@dataclass(frozen=True, eq=False)
class Symbols:
    """A sequence of symbols to be written.

    Attributes:
        name: of the value that will hold it, integers [n].
        symbols: uint8 [n].
        base: added to every symbol.
    """

    name: str
    symbols: NDArray[np.uint8]
    base: int

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """How often each symbol occurs."""
        return np.bincount(self.symbols)

    @cached_property
    def bits(self) -> int:
        """Bits of its codewords."""
        return huffman.coded_bits(self.counts)

    @property
    def is_coded(self) -> bool:
        """Whether a Huffman code takes less than a byte per symbol, and fits one stream."""
        return self.bits / 8 + SEGMENT_NBYTES < self.symbols.size and self.bits <= STREAM_BITS


@dataclass
class Streams:
    """The streams of a decode function under construction.

    Args:
        body: the function.
        coder: the entropy code for sequences.
    """

    body: Body
    coder: Coder = "huffman"
    sequences: list[Symbols] = field(default_factory=list)
    rising: list[rice.Run] = field(default_factory=list)

    @property
    def origin(self) -> int:
        """Added to every symbol: tables begin with this many unused entries."""
        return int(self.coder == "rice")

    def raw(self, array: NDArray[Any], element_type: int) -> str:
        """An input that holds an array as it is."""
        return self.body.give(tensor("", array, element_type))

    def table(self, array: NDArray[np.float32]) -> str:
        """A value that holds a float32 array, stored in the narrowest type that is exact."""
        stored_as = narrowest(array)
        name = self.raw(array.astype(numpy_type(stored_as)), stored_as)
        return (
            name
            if stored_as == TensorProto.FLOAT
            else self.body.node("Cast", name, to=TensorProto.FLOAT)
        )

    def rising_integers(self, integers: NDArray[np.int64]) -> str:
        """A value that holds ascending integers, int32 [n], the first at least 1 (Rice code)."""
        run = rice.Run(self.body.fresh(), integers, rising=True)
        self.rising.append(run)
        return run.name

    def symbols(self, symbols: NDArray[np.uint8], base: int = 0) -> str:
        """A value that holds `symbols + base + origin`, integers [n]."""
        sequence = Symbols(self.body.fresh(), symbols, base)
        self.sequences.append(sequence)
        return sequence.name

    def joined(self, parts: Sequence[NDArray[np.uint8]], base: int = 0) -> tuple[str, list[float]]:
        """A value that holds `part + base + origin` of several parts, concatenated.

        Neighbouring parts get one Huffman code where that takes fewer bytes.

        Args:
            parts: uint8 [n] each; some may be empty, not all.
            base: added to each symbol.

        Returns:
            The value's name, and the bits each part takes.
        """
        present = [part for part in parts if part.size]
        names: list[str] = []
        bits: list[float] = []
        counts = [np.bincount(part, minlength=256) for part in present]
        for begin, end in partition(counts) if self.coder == "huffman" else [(0, len(present))]:
            run = np.concatenate(present[begin:end])
            names.append(self.symbols(run, base))
            bits += self._bits(run, present[begin:end])
        of_present = iter(bits)
        return self.concatenated(names), [next(of_present) if part.size else 0.0 for part in parts]

    def bits(self, symbols: NDArray[np.uint8]) -> float:
        """The bits that a sequence takes by itself."""
        return self._bits(symbols, [symbols])[0]

    def _bits(self, run: NDArray[np.uint8], parts: Sequence[NDArray[np.uint8]]) -> list[float]:
        if self.coder == "none":
            width = 4 if run.max() < 16 else 8
            return [float(width * part.size) for part in parts]
        if self.coder == "rice":
            return [rice.about_bits(np.bincount(part)) for part in parts]
        lengths = np.array(huffman.code_of(run).lengths)
        return [float(lengths[part].sum()) for part in parts]

    def concatenated(self, names: Sequence[str]) -> str:
        """Several vectors, concatenated."""
        return names[0] if len(names) == 1 else self.body.node("Concat", *names, axis=0)

    def finish(self, opset: int) -> tuple[FunctionProto, ...]:
        """Adds the nodes that decode the streams, before all other nodes.

        Returns:
            The functions they call.
        """
        before = len(self.body)
        huffman_coded = self.coder == "huffman"
        coded = [one for one in self.sequences if huffman_coded and one.is_coded]
        others = [one for one in self.sequences if one not in coded]
        if self.coder == "rice":
            runs = [rice.Run(one.name, one.symbols, base=one.base) for one in others]
            if runs := self.rising + runs:
                rice.write(self.body, runs)
            others = []
        halves = [one for one in others if not huffman_coded and one.symbols.max() < 16]
        functions: dict[str, FunctionProto] = {}
        if coded:
            limit = huffman.limit_for([one.counts for one in coded])
            for part in runs_within(coded, lambda one: one.bits, STREAM_BITS):
                for function in self._huffman(part, opset, limit):
                    functions[function.name] = function
        if halves:
            self._nibbles(halves)
        if rest := [one for one in others if one not in halves]:
            self._bytes(rest)
        self.body.move_to_front(before)
        return tuple(functions.values())

    def _huffman(
        self, sequences: list[Symbols], opset: int, limit: int
    ) -> tuple[FunctionProto, ...]:
        body = self.body
        stream = huffman.encode([one.symbols for one in sequences], limit)
        inputs = [
            self.raw(stream.data.reshape(-1, 1), TensorProto.UINT16),
            self.raw(stream.internal[..., None], TensorProto.UINT8),
            self.raw(stream.starts, helper.np_dtype_to_tensor_dtype(stream.starts.dtype)),
            body.constant(stream.tails.tolist(), (len(sequences), 1)),
            body.constant([one.base for one in reversed(sequences)], (len(sequences), 1)),
            *(body.constant(array.tolist()) for array in stream.lanes),
        ]
        (flat,) = body.call(stream.op, *inputs)
        names, sizes = [], []
        for one in sequences:
            names.append(one.name)
            sizes.append(one.symbols.size)
            if filling := -one.symbols.size % stream.lane:
                names.append(body.fresh())
                sizes.append(filling)
        body.named("Split", [flat, body.indices(*sizes)], names)
        return huffman_graph.functions(stream.op, opset, limit)

    def _nibbles(self, sequences: list[Symbols]) -> None:
        body = self.body
        codes = np.concatenate([one.symbols for one in sequences])
        codes = np.concatenate([codes, np.zeros(codes.size % 2, np.uint8)])
        source = self.raw((codes[0::2] << 4 | codes[1::2]).reshape(-1, 1), TensorProto.UINT8)
        pairs = body.node("Cast", source, to=TensorProto.INT32)
        halves = body.node(
            "Mod", body.node("Div", pairs, body.constant([16, 1])), body.constant(16)
        )
        flat = body.node("Reshape", halves, body.indices(-1))
        self._split(flat, sequences, codes.size)

    def _bytes(self, sequences: list[Symbols]) -> None:
        codes = np.concatenate([one.symbols for one in sequences])
        flat = self.body.node("Cast", self.raw(codes, TensorProto.UINT8), to=TensorProto.INT32)
        self._split(flat, sequences, codes.size)

    def _split(self, flat: str, sequences: list[Symbols], size: int) -> None:
        """Splits codes, to which no base is added yet, into the sequences."""
        body = self.body
        sizes = [one.symbols.size for one in sequences]
        names = [body.fresh() if one.base else one.name for one in sequences]
        if filling := size - sum(sizes):
            names.append(body.fresh())
            sizes.append(filling)
        body.named("Split", [flat, body.indices(*sizes)], names)
        for name, one in zip(names, sequences, strict=False):
            if one.base:
                body.named("Add", [name, body.constant(one.base)], [one.name])


def coded_nbytes(counts: NDArray[np.integer[Any]], coder: Coder) -> float:
    """About how many bytes a sequence takes in which symbol s occurs counts[s] times.

    The numbering of the symbols does not matter. Without a code a symbol takes half a byte, or a
    byte where there are more than 16 symbols.
    """
    if coder == "huffman":
        return huffman.about_bits(counts) / 8 + SEGMENT_NBYTES
    if coder == "rice":
        return rice.about_bits(-np.sort(-counts)) / 8
    return float(counts.sum()) * (0.5 if np.flatnonzero(counts).max(initial=0) < 16 else 1)


def runs_within(items: Sequence[_T], size: Callable[[_T], int], limit: int) -> list[list[_T]]:
    """Cuts a list into runs of items with at most `limit` in all; a larger item is a run alone."""
    runs: list[list[_T]] = [[]]
    left = limit
    for item in items:
        if runs[-1] and size(item) > left:
            runs.append([])
            left = limit
        runs[-1].append(item)
        left -= size(item)
    return runs


def partition(counts: Sequence[NDArray[np.integer[Any]]]) -> list[tuple[int, int]]:
    """Cuts a list of sequences into runs with one Huffman code each, by the fewest bytes.

    Args:
        counts: how often each symbol occurs in each sequence.

    Returns:
        (begin, end) of each run.
    """
    best = [0.0] + [float("inf")] * len(counts)
    cut = [0] * (len(counts) + 1)
    for end in range(1, len(counts) + 1):
        total = np.zeros_like(counts[0])
        for begin in range(end - 1, max(-1, end - 65), -1):
            total = total + counts[begin]
            cost = best[begin] + entropy_bits(total) / 8 + SEGMENT_NBYTES
            if cost < best[end]:
                best[end], cut[end] = cost, begin
    runs: list[tuple[int, int]] = []
    end = len(counts)
    while end:
        runs.insert(0, (cut[end], end))
        end = cut[end]
    return runs
