"""What a person or a program reads at the end: dataclasses, as a table and as JSON.

Holds no measurement of its own (that is `validate`) and imports nothing else of the project.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

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
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Nonzeros over elements, 0-1; 0 for an empty weight."""
        return self.nnz / self.size if self.size else 0.0

    @property
    def bits_per_nonzero(self) -> float | None:
        """8 * nbytes / nnz; None for a weight without a nonzero."""
        return 8 * self.nbytes / self.nnz if self.nnz else None

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in report.json."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "nnz": self.nnz,
            "density": self.density,
            "codec": self.codec,
            "nbytes": self.nbytes,
            "bits_per_nonzero": self.bits_per_nonzero,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Measured:
    """One file, as onnxruntime finds it.

    Attributes:
        nbytes: size of the file, external data included.
        error: percent of the test set; None without data.
        load_ms: creating a session, in a fresh process.
        peak_rss_bytes: peak memory of that process, the runtime itself included.
        latency_ms: "p50" and "p95" of one inference, batch 1.
    """

    nbytes: int
    error: float | None
    load_ms: float
    peak_rss_bytes: int
    latency_ms: dict[str, float]


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
            same weights.
        density: nonzeros over elements of the pruned weights, 0-1.
        weights: one row per initializer.
    """

    version: str
    seed: int
    environment: dict[str, Any]
    dense: Measured
    compressed: Measured
    folded: bool
    max_abs_diff: float
    density: float
    weights: tuple[WeightRow, ...]

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
            "density": self.density,
            "folded": self.folded,
            "max_abs_diff": self.max_abs_diff,
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
        table.add_row("file", _bytes(a.nbytes), _bytes(b.nbytes), f"{self.ratio:.1f}x smaller")
        if a.error is not None and b.error is not None:
            table.add_row("test error", f"{a.error:.2f} %", f"{b.error:.2f} %", f"{self.drop:+.2f}")
        table.add_row("load", f"{a.load_ms:.1f} ms", f"{b.load_ms:.1f} ms", "")
        memory = _bytes(a.peak_rss_bytes), _bytes(b.peak_rss_bytes)
        table.add_row("peak memory of a load", *memory, "")
        for name in ("p50", "p95"):
            x, y = a.latency_ms[name], b.latency_ms[name]
            table.add_row(f"latency {name}", f"{x:.3f} ms", f"{y:.3f} ms", f"{y / x:.2f}x")
        folded = "folded away on load" if self.folded else "NOT folded: decoded at every run"
        table.add_row("density", "100 %", f"{100 * self.density:.2f} %", "")
        table.caption = (
            f"decoders {folded}; outputs within {self.max_abs_diff:.1e} of the reference's"
        )
        return table


def weights_table(rows: Sequence[WeightRow], nbytes: int | None = None) -> Table:
    """One line per weight, and a total.

    Args:
        rows: the weights.
        nbytes: of the whole file; the rest is graph and decode functions.
    """
    table = Table(title="weights")
    for heading in ("name", "shape", "density", "codec", "bytes", "bits/nonzero", "why dense"):
        numeric = heading in ("density", "bytes", "bits/nonzero")
        # names and codecs are never cut short; reasons wrap
        table.add_column(
            heading, justify="right" if numeric else "left", no_wrap=heading != "why dense"
        )
    for row in rows:
        bits = "" if row.bits_per_nonzero is None else f"{row.bits_per_nonzero:.2f}"
        shape = "x".join(map(str, row.shape)) or "scalar"
        density = f"{100 * row.density:.2f} %"
        table.add_row(row.name, shape, density, row.codec, f"{row.nbytes:,}", bits, row.reason)
    coded = sum(row.nbytes for row in rows)
    if nbytes is not None:
        table.add_section()
        table.add_row("graph and decoders", "", "", "", f"{nbytes - coded:,}", "", "")
        table.add_row("file", "", "", "", f"{nbytes:,}", "", "")
    return table


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    unit, scale = ("kB", 1e3) if count < 1e6 else ("MB", 1e6)
    return f"{count / scale:,.1f} {unit}"
