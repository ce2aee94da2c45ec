"""What a person or a program reads at the end: dataclasses, as a table and as JSON.

Holds no measurement of its own (that is `validate`) and imports nothing else of the project.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from prune2onnx.errors import printable

SCHEMA = 1


@dataclass(frozen=True)
class WeightRow:
    """How one weight is stored in a file.

    Attributes:
        name: the initializer's name, the same as in the state_dict.
        shape: its dense shape.
        dtype: its dense dtype, as numpy names it.
        nnz: elements that are not zero (-0.0 counts as zero).
        codec: the codec's name; "dense" where none made the file smaller.
        nbytes: bytes of its own in the file: a dense tensor whole; of a coded weight its part of
            the streams, to the byte, while the decoder belongs to all.
        reason: why it stays dense; "" for a coded weight.
        entropy_nbytes: bytes that the zero-order entropies of its positions and values come to;
            None where nobody asked, as the next two.
        sparse_nbytes: bytes as ONNX's own sparse initializer.
        zipped_nbytes: bytes of the dense data after zlib.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    codec: str
    nbytes: int
    reason: str = ""
    entropy_nbytes: float | None = None
    sparse_nbytes: int | None = None
    zipped_nbytes: int | None = None

    @classmethod
    def of(
        cls, name: str, array: NDArray[Any], codec: str, nbytes: int, reason: str = ""
    ) -> WeightRow:
        """The row of a weight with these values; strings all count as nonzeros."""
        nnz = array.size if array.dtype.kind == "O" else int(np.count_nonzero(array))
        return cls(name, tuple(array.shape), str(array.dtype), nnz, codec, nbytes, reason)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Nonzeros over elements, 0-1; 0 for an empty weight."""
        return self.nnz / self.size if self.size else 0.0

    @property
    def bits_per_nonzero(self) -> float | None:
        """8 * nbytes / nnz; None for a weight without a nonzero."""
        return 8 * self.nbytes / self.nnz if self.nnz else None

    @property
    def bits_per_weight(self) -> float | None:
        """8 * nbytes / size; None for an empty weight."""
        return 8 * self.nbytes / self.size if self.size else None

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in report.json; what was not asked for is left out."""
        known = {
            "entropy_nbytes": self.entropy_nbytes,
            "sparse_nbytes": self.sparse_nbytes,
            "zipped_nbytes": self.zipped_nbytes,
        }
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "nnz": self.nnz,
            "density": self.density,
            "codec": self.codec,
            "nbytes": self.nbytes,
            "bits_per_nonzero": self.bits_per_nonzero,
            "bits_per_weight": self.bits_per_weight,
            "reason": self.reason,
            **{key: value for key, value in known.items() if value is not None},
        }


@dataclass(frozen=True)
class Measured:
    """One file, as onnxruntime finds it.

    Attributes:
        nbytes: size of the file, external data included.
        error: percent of the test set; None without data.
        load_ms: creating a session, in a fresh process; None where it was not run, as the next two.
        peak_rss_bytes: peak memory of that process, the runtime itself included.
        latency_ms: "p50" and "p95" of one inference, batch 1.
        macs: multiply-adds of one example, in layers with weights; None where nobody counted.
    """

    nbytes: int
    error: float | None = None
    load_ms: float | None = None
    peak_rss_bytes: int | None = None
    latency_ms: dict[str, float] | None = None
    macs: int | None = None


@dataclass(frozen=True)
class Paired:
    """How two networks fare on the same test examples; counts that add up to the test set.

    What they differ by is in the examples that only one gets right, so an interval from these is
    narrower than one from two error rates.

    Attributes:
        both: examples that both get right.
        only_dense: examples that only the reference gets right.
        only_compressed: examples that only the packed file gets right.
        neither: examples that both get wrong.
    """

    both: int
    only_dense: int
    only_compressed: int
    neither: int

    @property
    def examples(self) -> int:
        """All of them."""
        return self.both + self.only_dense + self.only_compressed + self.neither

    @property
    def added(self) -> float:
        """Error added, in percentage points."""
        return 100 * (self.only_dense - self.only_compressed) / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the error added, in percentage points.

        Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10: the Wilson intervals of
        both proportions, squared and added with the correlation phi between them. It holds its
        level at few examples, too, and never has a width of 0, as Wald's has where the networks
        agree. The example is one of his.

        >>> low, high = Paired(both=36, only_dense=12, only_compressed=2, neither=0).interval
        >>> f"{low:.2f} {high:.2f}"
        '5.69 34.04'
        """
        e, f, g, h, n = *self._cells, self.examples
        low_1, high_1 = _wilson(e + f, n)
        low_2, high_2 = _wilson(e + g, n)
        p_1, p_2 = (e + f) / n, (e + g) / n
        product = (e + f) * (g + h) * (e + g) * (f + h)
        excess: float = e * h - f * g
        if excess > 0:  # corrected for continuity, for a correlation narrows the interval
            excess = max(excess - n / 2, 0)
        phi = excess / math.sqrt(product) if product else 0.0

        def added(a: float, b: float) -> float:
            return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0))

        low = p_1 - p_2 - added(p_1 - low_1, high_2 - p_2)
        high = p_1 - p_2 + added(high_1 - p_1, p_2 - low_2)
        return 100 * max(low, -1), 100 * min(high, 1)

    @property
    def _cells(self) -> tuple[int, int, int, int]:
        return self.both, self.only_dense, self.only_compressed, self.neither


_Z = 1.959963984540054  # the normal quantile of 97.5 %


def _wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), at 95 %."""
    p, z = successes / n, _Z
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@dataclass(frozen=True)
class Goal:
    """A budget and what became of it.

    Attributes:
        what: "size" in bytes, "density" of the pruned weights, 0-1, "multiply-adds" over the
            dense network's, 0-1, or "drop" in points of validation error.
        limit: what was asked for.
        reached: what came out.
    """

    what: str
    limit: float
    reached: float

    @property
    def met(self) -> bool:
        """Whether the limit was kept; a density to one part in a thousand."""
        return self.reached <= self.limit * (1.001 if self.what == "density" else 1)

    def __str__(self) -> str:
        """In words: 'size 11,980 B of 12,000 B'."""
        reached, limit = self._shown(self.reached), self._shown(self.limit)
        verdict = "met" if self.met else f"missed by {self._shown(self.reached - self.limit)}"
        return f"{self.what} {reached} of {limit} ({verdict})"

    def _shown(self, value: float) -> str:
        if self.what == "size":
            return f"{value:,.0f} bytes"
        if self.what == "drop":
            return f"{value:.3g} points"
        return f"{100 * value:.3g} %"

    def to_dict(self) -> dict[str, Any]:
        """The goal as it stands in report.json."""
        return asdict(self) | {"met": self.met}


@dataclass(frozen=True)
class Report:
    """A packed file beside its dense reference; `to_json` gives report.json (schema 1).

    Attributes:
        version: of prune2onnx.
        seed: of the run that made the file.
        environment: versions, processor, cores.
        dense: the reference.
        compressed: the packed file.
        folded: onnxruntime left no decode node in the optimised graph.
        max_abs_diff: largest difference of the outputs from those of the reference model with the
            same weights; None where it was not run.
        density: nonzeros over elements of the pruned weights, 0-1.
        weights: one row per initializer.
        skipped: why the network was not run, only its decoder; "" where it was.
        budget: what was asked for, and what became of it.
        validation: "dense_error" and "error", percent of the validation split, on which all
            choices were made; None where nothing was chosen.
        notes: what there is to know besides, in words.
        paired: both files on each test example; None without data.
    """

    version: str
    seed: int
    environment: dict[str, Any]
    dense: Measured
    compressed: Measured
    folded: bool
    max_abs_diff: float | None
    density: float
    weights: tuple[WeightRow, ...]
    skipped: str = ""
    budget: tuple[Goal, ...] = ()
    validation: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    paired: Paired | None = None

    @property
    def missed(self) -> tuple[Goal, ...]:
        """The budgets that were not kept."""
        return tuple(goal for goal in self.budget if not goal.met)

    @property
    def ratio(self) -> float:
        """Dense bytes over compressed bytes, of the files themselves."""
        return self.dense.nbytes / self.compressed.nbytes

    @property
    def drop(self) -> float | None:
        """Error added, in percentage points; None without data."""
        if self.compressed.error is None or self.dense.error is None:
            return None
        return self.compressed.error - self.dense.error

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema": SCHEMA,
            "version": self.version,
            "seed": self.seed,
            "environment": self.environment,
            "dense": asdict(self.dense),
            "compressed": asdict(self.compressed),
            "ratio": self.ratio,
            "drop": self.drop,
            "paired": self.paired and asdict(self.paired),
            "density": self.density,
            "folded": self.folded,
            "max_abs_diff": self.max_abs_diff,
            "skipped": self.skipped,
            "budget": [goal.to_dict() for goal in self.budget],
            "validation": self.validation,
            "notes": list(self.notes),
            "weights": [row.to_dict() for row in self.weights],
        }

    def to_json(self) -> str:
        """The report as JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def table(self) -> Table:
        """Dense beside compressed, a line per quantity."""
        table = Table(title="dense and compressed, in onnxruntime")
        for heading in ("", "dense", "compressed", ""):
            table.add_column(heading, justify="left" if not heading else "right")
        a, b = self.dense, self.compressed
        sizes = bytes_text(a.nbytes), bytes_text(b.nbytes)
        table.add_row("file", *sizes, f"{self.ratio:.1f}x smaller")
        if a.error is not None and b.error is not None:
            table.add_row("test error", f"{a.error:.2f} %", f"{b.error:.2f} %", f"{self.drop:+.2f}")
        if a.macs and b.macs:
            fewer = f"{a.macs / b.macs:.2f}x fewer"
            table.add_row("multiply-adds", f"{a.macs:,}", f"{b.macs:,}", fewer)
        if a.load_ms is not None and b.load_ms is not None:
            table.add_row("load", f"{a.load_ms:.1f} ms", f"{b.load_ms:.1f} ms", "")
        if a.peak_rss_bytes is not None and b.peak_rss_bytes is not None:
            memory = bytes_text(a.peak_rss_bytes), bytes_text(b.peak_rss_bytes)
            table.add_row("peak memory of a load", *memory, "")
        if a.latency_ms is not None and b.latency_ms is not None:
            for name in ("p50", "p95"):
                x, y = a.latency_ms[name], b.latency_ms[name]
                table.add_row(f"latency {name}", f"{x:.3f} ms", f"{y:.3f} ms", f"{y / x:.2f}x")
        if self.validation is not None:
            c, d = self.validation["dense_error"], self.validation["error"]
            table.add_row("validation error", f"{c:.2f} %", f"{d:.2f} %", f"{d - c:+.2f}")
        folded = "folded away on load" if self.folded else "NOT folded: decoded at every run"
        table.add_row("density", "100 %", f"{100 * self.density:.2f} %", "")
        if self.max_abs_diff is None:
            told = f"the network was not run: {self.skipped}"
        else:
            told = f"outputs within {self.max_abs_diff:.1e} of the reference's"
        asked = "".join(f"\n{line}" for line in (*self.budget, *self.notes))
        table.caption = f"decoders {folded}; {told}{asked}"
        return table


def weights_table(rows: Sequence[WeightRow], nbytes: int | None = None) -> Table:
    """One line per weight, and totals.

    Args:
        rows: the weights; where they know their entropy, columns compare with other forms.
        nbytes: of the whole file; the rest is graph and decoder.
    """
    table = Table(title="weights")
    compared = any(row.entropy_nbytes is not None for row in rows)
    others = ("entropy", "sparse", "zipped") if compared else ()
    headings = ("name", "shape", "type", "density", "codec", "bytes", "bits/weight")
    for heading in (*headings, *others, "why dense"):
        numeric = heading in ("density", "bytes", "bits/weight", *others)
        # names and codecs are never cut short; reasons wrap
        table.add_column(
            heading, justify="right" if numeric else "left", no_wrap=heading != "why dense"
        )
    for row in rows:
        bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        shape = "x".join(map(str, row.shape)) or "scalar"
        density = f"{100 * row.density:.2f} %"
        cells: list[str | Text] = [
            Text(printable(row.name)),
            shape,
            row.dtype,
            density,
            row.codec,
            f"{row.nbytes:,}",
            bits,
        ]
        if compared:
            forms = (row.entropy_nbytes, row.sparse_nbytes, row.zipped_nbytes)
            cells += ["" if form is None else f"{form:,.0f}" for form in forms]
        table.add_row(*cells, Text(printable(row.reason)))
    own = sum(row.nbytes for row in rows)
    blank = [""] * 4
    table.add_section()
    if compared:
        totals = [
            f"{sum(form or 0 for form in column):,.0f}"
            for column in (
                [row.entropy_nbytes for row in rows],
                [row.sparse_nbytes for row in rows],
                [row.zipped_nbytes for row in rows],
            )
        ]
        table.add_row("weights", *blank, f"{own:,}", "", *totals, "")
    if nbytes is not None:
        table.add_row("graph and decoder", *blank, f"{nbytes - own:,}")
        table.add_row("file", *blank, f"{nbytes:,}")
    return table


def bytes_text(count: float) -> str:
    """A number of bytes as people read it: '512 B', '6.1 kB', '1.7 MB'."""
    if count < 1000:
        return f"{count:.0f} B"
    unit, scale = ("kB", 1e3) if count < 1e6 else ("MB", 1e6)
    return f"{count / scale:,.1f} {unit}"
