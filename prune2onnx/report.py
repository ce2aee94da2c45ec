"""What a person or a program reads at the end: dataclasses, as a table and as JSON.

Holds no measurement of its own (that is `validate`) and imports nothing else of the project.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightRow:
    """How one weight is stored in a file.

    Attributes:
        name: the initializer's name, the same as in the state_dict.
        shape: its dense shape.
        dtype: its dense dtype, as numpy names it.
        nnz: elements that are not zero (-0.0 counts as zero).
        codec: the codec's name; "dense" where none made the file smaller.
        nbytes: bytes the weight adds to the file: streams, tables, names, its decode call.
        reason: why it stays dense; "" for a coded weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    codec: str
    nbytes: int
    reason: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def density(self) -> float:
        """Nonzeros over elements, 0-1; 0 for an empty weight."""
        return self.nnz / self.size if self.size else 0.0

    @property
    def bits_per_nonzero(self) -> float | None:
        """8 * nbytes / nnz; None for a weight without a nonzero."""
        return 8 * self.nbytes / self.nnz if self.nnz else None
