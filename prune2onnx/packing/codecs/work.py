"""What a runtime has to do to decode: nodes that it folds, and bytes of their operands and results.

Counts only; `packing.load_cost` makes time and memory of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass
class Work:
    """Nodes that decoding folds.

    Attributes:
        nodes: how many.
        made: operator -> bytes of its results.
        read: operator -> bytes of its operands; a runtime copies constants for each node.
        held: stage -> bytes of the results of its nodes, all of which a runtime holds until the
            stage ends.
        stage: the one that is running; 0 is what waits for no gate.
    """

    nodes: int = 0
    made: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    held: Counter[int] = field(default_factory=Counter)
    stage: int = 0

    def ran(
        self, operator: str, results: Sequence[NDArray[Any]], operands: Sequence[NDArray[Any]]
    ) -> None:
        """Counts a node; a Constant is an initializer to a runtime."""
        if operator == "Constant":
            return
        made = sum(array.nbytes for array in results)
        self.add(1, {operator: made}, {operator: sum(array.nbytes for array in operands)})

    def add(self, nodes: int, made: Mapping[str, int], read: Mapping[str, int]) -> None:
        """Counts nodes of the stage that is running."""
        self.nodes += nodes
        self.made.update(made)
        self.read.update(read)
        self.held[self.stage] += sum(made.values())
