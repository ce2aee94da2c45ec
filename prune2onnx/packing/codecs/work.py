"""What a runtime has to do to decode: nodes that it folds, and bytes of their operands and results.

Counts, and what a byte takes; `packing.load_cost` makes time and memory of a whole load of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

MADE_NS, READ_NS, SCATTERED_NS = 0.36, 0.35, 1.13
"""CPU time of a byte of a result; of an operand; besides, of a result that is put in places or
summed up. By onnxruntime 1.32 on a server's core, as all constants of tools/predict_load.py."""

FILE_NS, LAID_OUT_NS = 1.76, 1.10
"""CPU time of a byte of a file; besides, of a constant that MatMul lays out anew."""

DENSE_NS = FILE_NS + LAID_OUT_NS
"""CPU time of a byte of a dense weight."""

MAPPED = 32 << 20
"""Larger blocks than these, glibc's malloc gets from the system anew each time, page by page."""


def mapped(sizes: Iterable[int]) -> int:
    """Bytes of the operands that are larger than `MAPPED`."""
    return sum(size for size in sizes if size > MAPPED)


@dataclass
class Work:
    """Nodes that decoding folds.

    Attributes:
        nodes: how many.
        made: operator -> bytes of its results.
        read: operator -> bytes of its operands, which a runtime copies for each node.
        mapped: bytes of those operands that are larger than `MAPPED` each.
        held: stage -> bytes of the results of its nodes, all of which a runtime holds until the
            stage ends.
        left: stage -> bytes of the weights that it leaves, less those of streams that end with it.
        stage: the one that is running; 0 is what waits for no gate.
    """

    nodes: int = 0
    made: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    mapped: int = 0
    held: Counter[int] = field(default_factory=Counter)
    left: Counter[int] = field(default_factory=Counter)
    stage: int = 0

    @property
    def peak(self) -> int:
        """The most bytes that a stage holds, with what those before it have left."""
        peak = before = 0
        for stage in sorted(self.held):
            peak = max(peak, before + self.held[stage])
            before += self.left[stage]
        return peak

    def ran(
        self, operator: str, results: Sequence[NDArray[Any]], operands: Sequence[NDArray[Any]]
    ) -> None:
        """Counts a node; a Constant is an initializer to a runtime."""
        if operator == "Constant":
            return
        made = sum(array.nbytes for array in results)
        sizes = [array.nbytes for array in operands]
        self.add(1, {operator: made}, {operator: sum(sizes)}, mapped(sizes))

    def add(
        self, nodes: int, made: Mapping[str, int], read: Mapping[str, int], mapped: int
    ) -> None:
        """Counts nodes of the stage that is running."""
        self.nodes += nodes
        self.mapped += mapped
        self.made.update(made)
        self.read.update(read)
        self.held[self.stage] += sum(made.values())
