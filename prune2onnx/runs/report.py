"""The report of a packed file against its dense reference, as dataclasses and as JSON.

Holds numbers only: `runtime.validate` measures them, `cli.tables` and `pages.page` show them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from prune2onnx.packing.compute.narrow import Layer
from prune2onnx.packing.rows import WeightRow
from prune2onnx.tasks.quantity import ERROR, Quantity

SCHEMA = 1

_NAMED = 3  # weights in a message


@dataclass(frozen=True)
class Measured:
    """Measurements of one file in onnxruntime.

    Attributes:
        nbytes: size of the file, external data included.
        error: of a classifier, percent of the test set; None without data.
        load_ms: time to create a session in a fresh process with one thread; None where the
            network was not run, like the next two.
        peak_rss_bytes: peak memory of that process, the runtime itself included.
        latency_ms: "p50" and "p95" of one inference, batch 1.
        macs: multiply-adds of one example, in layers with weights; None where not counted.
        load_cpu_ms: CPU time of `load_ms`; None also in reports of before it was measured.
        metrics: of the task, on the test set, by name; {} without data, and in older reports.
    """

    nbytes: int
    error: float | None = None
    load_ms: float | None = None
    peak_rss_bytes: int | None = None
    latency_ms: dict[str, float] | None = None
    macs: int | None = None
    load_cpu_ms: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Paired:
    """Right and wrong answers of two networks on the same test examples.

    The four counts add up to the test set. The networks differ in the examples that only one of
    them gets right, so an interval from these counts is narrower than one from two error rates.

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
        """Number of examples."""
        return self.both + self.only_dense + self.only_compressed + self.neither

    @property
    def added(self) -> float:
        """Error added, in percentage points."""
        return 100 * (self.only_dense - self.only_compressed) / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the error added, in percentage points.

        Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10: the Wilson intervals of
        both proportions, squared and added with the correlation phi between them. It keeps its
        level with few examples, too, and its width is never 0, unlike Wald's interval where the
        networks agree. The example is from that paper.

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
        if excess > 0:  # continuity correction, since a correlation narrows the interval
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
    """A budget, and what was reached.

    Attributes:
        what: "size" in bytes, "density" of the pruned weights, 0-1, "multiply-adds" over the
            dense network's, 0-1, or "drop": how much worse the task's metric is on the validation
            split, such as points of error.
        limit: the budget.
        reached: the result.
        metric: that of a drop.
    """

    what: str
    limit: float
    reached: float
    metric: Quantity = ERROR

    @property
    def met(self) -> bool:
        """Whether the limit was kept; for a density, within a tolerance of 0.1 %."""
        return self.reached <= self.limit * (1.001 if self.what == "density" else 1)

    @property
    def verdict(self) -> str:
        """In words: 'met', or 'missed by 12 bytes'."""
        return "met" if self.met else f"missed by {self.text(self.reached - self.limit)}"

    def __str__(self) -> str:
        """In words: 'size 11,980 bytes of 12,000 bytes (met)'.

        >>> print(Goal("drop", 1.0, -2.083))
        error 2.08 points lower than dense, 1 point allowed (met)
        """
        reached, limit = self.text(abs(self.reached)), self.text(self.limit)
        if self.what != "drop":
            return f"{self.what} {reached} of {limit} ({self.verdict})"
        change = "the same as dense"
        if self.reached:
            higher = (self.reached > 0) != self.metric.higher_is_better
            change = f"{reached} {'higher' if higher else 'lower'} than dense"
        return f"{self.metric.name} {change}, {limit} allowed ({self.verdict})"

    def text(self, value: float) -> str:
        """A value with its unit."""
        if self.what == "size":
            return _counted(f"{value:,.0f}", "byte")
        if self.what == "drop":
            return self.metric.amount(value)
        return f"{100 * value:.3g} %"

    def to_dict(self) -> dict[str, Any]:
        """The goal as it stands in report.json."""
        return asdict(self) | {"met": self.met}


def _counted(number: str, unit: str) -> str:
    """A number and its unit, in the singular or the plural: '1 point', '2 points'."""
    return f"{number} {unit}" if number in ("1", "-1") else f"{number} {unit}s"


@dataclass(frozen=True)
class Report:
    """A packed file against its dense reference; `to_json` gives report.json (schema 1).

    Attributes:
        version: of prune2onnx.
        seed: of the run that made the file.
        environment: versions, processor, cores.
        dense: the reference.
        compressed: the packed file.
        folded: whether onnxruntime's optimised graph has no decode node, and is the dense file's.
        max_abs_diff: largest difference of the outputs from those of a dense file with the same
            weights; None where the network was not run.
        density: nonzeros over elements of the pruned weights, 0-1.
        weights: one row per initializer.
        skipped: why the network was not run, only its decoder; "" where it was run.
        budget: each budget, and what was reached.
        validation: "dense_error" and "error" of a classifier, percent of the validation split, on
            which all choices were made; of other tasks, "dense" and "compressed", the metric. None
            where nothing was chosen.
        notes: further remarks, in words.
        paired: both files' right and wrong answers; None without data.
        parameters: of the network: "pruned" are elements of the pruned weights, which the density
            counts, "others" those of all other parameters; None where the file alone is known.
        unfolded: weights that onnxruntime decodes at every inference; () where it folds them all.
        task: what the network is for.
        metric: by which budgets and choices went.
        layers: what each matrix computes in, and why it is float32; () unless narrower types were
            asked for.
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
    parameters: dict[str, int] | None = None
    unfolded: tuple[str, ...] = ()
    task: str = "classification"
    metric: Quantity = ERROR
    layers: tuple[Layer, ...] = ()

    @property
    def missed(self) -> tuple[Goal, ...]:
        """The budgets that were not met."""
        return tuple(goal for goal in self.budget if not goal.met)

    @property
    def counted(self) -> str:
        """What the density counts, in words: '4,224 of 35,716 parameters'; "" where unknown."""
        if self.parameters is None:
            return ""
        pruned = self.parameters["pruned"]
        return f"{pruned:,} of {pruned + self.parameters['others']:,} parameters"

    @property
    def left(self) -> str:
        """The weights that are decoded at every inference, in words: 'a, b, c and 9 more'.

        "" where decoders fold, or where the graph has other operators but makes no weight.
        """
        named = ", ".join(self.unfolded[:_NAMED])
        more = len(self.unfolded) - _NAMED
        return f"{named} and {more:,} more" if more > 0 else named

    @property
    def ratio(self) -> float:
        """Dense bytes over compressed bytes, of the files themselves."""
        return self.dense.nbytes / self.compressed.nbytes

    @property
    def drop(self) -> float | None:
        """How much worse the metric is: of error, percentage points added; None without data."""
        before, after = self.value(self.dense), self.value(self.compressed)
        if before is None or after is None:
            return None
        return self.metric.drop(before, after)

    def value(self, measured: Measured) -> float | None:
        """The metric of one of the files on the test set; None without data."""
        return measured.metrics.get(self.metric.name, measured.error)

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the further metrics that were measured."""
        return tuple(
            name
            for name in self.compressed.metrics
            if name != self.metric.name and name in self.dense.metrics
        )

    @property
    def on_validation(self) -> tuple[float, float] | None:
        """The metric of the dense network, and of the compressed one, on the validation split."""
        known = self.validation
        if known is None:
            return None
        if "dense_error" in known:
            return known["dense_error"], known["error"]
        return known["dense"], known["compressed"]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "metric": asdict(self.metric),
            "version": self.version,
            "seed": self.seed,
            "environment": self.environment,
            "dense": asdict(self.dense),
            "compressed": asdict(self.compressed),
            "ratio": self.ratio,
            "drop": self.drop,
            "paired": self.paired and asdict(self.paired),
            "density": self.density,
            "parameters": self.parameters,
            "folded": self.folded,
            "unfolded": list(self.unfolded),
            "max_abs_diff": self.max_abs_diff,
            "skipped": self.skipped,
            "budget": [goal.to_dict() for goal in self.budget],
            "validation": self.validation,
            "notes": list(self.notes),
            "weights": [row.to_dict() for row in self.weights],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def to_json(self) -> str:
        """The report as JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True)
class CurvePoint:
    """One size on a curve.

    Attributes:
        nbytes: of the file.
        error: relative error of the outputs on held-out examples.
        drop: points of error that it adds there; None without labels.
        is_chosen: whether this is the file that was written.
    """

    nbytes: int
    error: float
    drop: float | None
    is_chosen: bool

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON has it."""
        return asdict(self)


def bytes_text(count: float) -> str:
    """A number of bytes as people read it: '512 B', '6.1 kB', '1.7 MB'."""
    if count < 1000:
        return f"{count:.0f} B"
    unit, scale = ("kB", 1e3) if count < 1e6 else ("MB", 1e6)
    return f"{count / scale:,.1f} {unit}"
