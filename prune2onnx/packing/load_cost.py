"""Predicts what a load takes: CPU time and peak memory of a session, of a packed and a dense file.

A load is a sum of amounts (bytes of the file, bytes of constants by the operator that takes them,
nodes, bytes that folding reads, makes and holds) times a constant each. Nothing is run here:
`runtime.latency` measures, and tools/predict_load.py fits the constants to what it measures.
"""

from __future__ import annotations

import math
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Protocol

from onnx import GraphProto, NodeProto, TensorProto

from prune2onnx.graph.domain import DOMAIN
from prune2onnx.graph.protobuf import MAX_NBYTES
from prune2onnx.graph.tensors import declared_nbytes
from prune2onnx.graph.walk import bodies, is_constant
from prune2onnx.packing.codecs.staged.choice import LEAST_SIZE, LEAST_TOTAL
from prune2onnx.packing.codecs.work import (
    FILE_NS,
    LAID_OUT_NS,
    MADE_NS,
    READ_NS,
    SCATTERED_NS,
    Work,
    mapped,
)
from prune2onnx.packing.rows import WeightRow

CPU_MS = {
    "session": 5.5,
    "nodes": 0.101,
    "file": 1e-6 * FILE_NS,
    "outside": 0.73e-6,
    "matmul": 1e-6 * LAID_OUT_NS,
    "conv": 0.92e-6,
    "folded": 0.059,
    "divided": 1.54e-6,
    "scattered": 1e-6 * SCATTERED_NS,
    "made": 1e-6 * MADE_NS,
    "read": 1e-6 * READ_NS,
    "mapped": 0.56e-6,
    "held": 0.18e-6,
}
"""Amount -> milliseconds of CPU time for each, by onnxruntime 1.32 on one core of a server.

What makes a session at all; nodes of the graph; bytes of the file, and of a data file beside it,
which is mapped into memory; bytes of constants that MatMul and Conv lay out anew; nodes that are
folded. Of what is folded: bytes of results of Div and Mod; of results that are put in places or
summed up, and of what is searched; of all results; of all operands; of those whose copies are
memory that the process has to get; and of the largest stage's results, which are that, too."""

PEAK_NBYTES = {
    "session": 58.8e6,
    "nodes": 16.9e3,
    "file": 1.6,
    "outside": 1.02,
    "held": 1.10,
    "kept": 1.0,
    "copied": 0.143,
}
"""Amount -> bytes of peak memory for each.

Python with the runtime; nodes; bytes of the file, and of a data file beside it; of what a stage
holds at most, with what those before it have left; of weights that are decoded in stages, between
which the heap has holes; of operands in files without stages, whose copies leave holes, too."""

_MOST_HOLES = 40_000_000
"""Bytes of holes; larger arrays have memory of their own, which is given back."""

_TAKERS = {
    **dict.fromkeys(("Gemm", "GRU", "LSTM", "MatMul", "RNN"), "matmul"),
    **dict.fromkeys(("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger"), "matmul"),
    **dict.fromkeys(("Conv", "ConvTranspose", "FusedConv"), "conv"),
}
"""Operators that lay out constants anew when a session is created."""

_SAME_SIZE = frozenset(
    {"Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
)
"""Operators that dense files apply to large constants, and whose result is as large as the largest
operand."""

_SLOW = ("ScatterElements", "ScatterND", "CumSum")
_SEARCHES = ("NonZero", "TopK")

Size = tuple[int, int]
"""Elements and bytes of a constant."""


class Sized(Protocol):
    """An array, or what is known of one."""

    @property
    def size(self) -> int:
        """Number of elements."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""


UNPACK = "where that matters more than its size, unpack it there, by prune2onnx unpack"
"""The advice where no form takes less."""

WARN_MS = 50.0
"""CPU time that a packed file must add before there is a warning: less is not felt."""

WARN_TIMES = 2.0
"""The dense file's CPU time or peak memory, of which more is worth a warning."""


@dataclass(frozen=True)
class LoadCost:
    """What it takes to create a session in a fresh process, with one thread.

    Attributes:
        cpu_ms: CPU time.
        peak_nbytes: peak memory of the process, of which Python and the runtime take 59 MB.
    """

    cpu_ms: float
    peak_nbytes: int

    def __str__(self) -> str:
        """In words: '325 ms of CPU time and 166 MB of memory'."""
        return f"{self.cpu_ms:,.0f} ms of CPU time and {self.peak_nbytes / 1e6:,.0f} MB of memory"


@dataclass(frozen=True)
class Prediction:
    """What loads of a packed and of the unpacked file take.

    Attributes:
        packed: of the packed file.
        dense: of the unpacked one.
        stages: in which weights are decoded; 0 where all are decoded at once, or none.
    """

    packed: LoadCost
    dense: LoadCost
    stages: int = 0

    @property
    def cpu_ratio(self) -> float:
        """CPU time over that of the dense file."""
        return self.packed.cpu_ms / self.dense.cpu_ms

    @property
    def peak_ratio(self) -> float:
        """Peak memory over that of the dense file."""
        return self.packed.peak_nbytes / self.dense.peak_nbytes

    @property
    def is_heavy(self) -> bool:
        """Whether the packed file takes more than twice what the dense one does, and it is felt."""
        slow = self.cpu_ratio > WARN_TIMES and self.packed.cpu_ms - self.dense.cpu_ms >= WARN_MS
        return slow or self.peak_ratio > WARN_TIMES

    def __str__(self) -> str:
        """In words."""
        a, b = self.packed, self.dense
        if a == b:
            return f"about {a}"
        ratios = f"{self.cpu_ratio:.1f} and {self.peak_ratio:.1f} times"
        return f"about {a}, {ratios} those of the dense file ({b})"

    def warning(self, advice: str) -> str:
        """A line that says what a load takes and what to do; "" unless it `is_heavy`."""
        return f"a load takes {self}; {advice}" if self.is_heavy else ""

    def to_dict(self) -> dict[str, float]:
        """As it stands in JSON."""
        return {
            "cpu_ms": self.packed.cpu_ms,
            "peak_nbytes": self.packed.peak_nbytes,
            "dense_cpu_ms": self.dense.cpu_ms,
            "dense_peak_nbytes": self.dense.peak_nbytes,
        }


def predict(
    graph: GraphProto,
    weights: Mapping[str, Size],
    work: Work,
    packed_nbytes: int,
    dense_nbytes: int,
) -> Prediction:
    """Predicts loads of a packed file, and of what it unpacks to.

    Args:
        graph: of either file.
        weights: name -> size of the coded weights.
        work: what decoding takes.
        packed_nbytes: size of the packed file.
        dense_nbytes: size of the unpacked file.
    """
    packed = amounts(graph, weights, packed_nbytes, work)
    dense = amounts(graph, weights, dense_nbytes)
    return Prediction(cost(packed), cost(dense), packed["stages"])


def lighter(load: Prediction, rows: Iterable[WeightRow], *, entropy_coded: bool) -> str:
    """The `--load` of pack with which a file of these weights would take less; "" for none.

    Args:
        load: what loads take as the weights are stored now.
        rows: how they are.
        entropy_coded: whether there is an entropy code, in stages or not.
    """
    large = [row for row in rows if row.size >= LEAST_SIZE and row.codec != "dense"]
    size = sum(row.size for row in large)
    if not load.stages and size >= LEAST_TOTAL:
        return "balanced"
    return "fast" if entropy_coded else ""


def sizes(weights: Mapping[str, Sized]) -> dict[str, Size]:
    """The sizes of weights, by name."""
    return {name: (weight.size, weight.nbytes) for name, weight in weights.items()}


def cost(amount: Mapping[str, float]) -> LoadCost:
    """Time and memory of `amounts`."""
    return LoadCost(
        sum(each * amount.get(name, 0) for name, each in CPU_MS.items()),
        round(sum(each * amount.get(name, 0) for name, each in PEAK_NBYTES.items())),
    )


def amounts(
    graph: GraphProto, weights: Mapping[str, Size], nbytes: int, work: Work | None = None
) -> Counter[str]:
    """The amounts that time and memory of a load go by.

    Args:
        graph: of the file, decode calls or not.
        weights: name -> size of the coded weights.
        nbytes: size of the file; one above 2 GB has its weights in a data file.
        work: what decoding takes; None where the weights are dense.
    """
    own = Work() if work is None else work
    folded = Work()
    calls = [node for node in graph.node if node.domain == DOMAIN]
    streams = {name for node in calls for name in node.input}
    known = dict(weights)
    for tensor in graph.initializer:
        if tensor.name not in streams:
            known[tensor.name] = _size(tensor)
    for sparse in graph.sparse_initializer:
        kind = sparse.values.data_type
        known[sparse.values.name] = _size(TensorProto(dims=sparse.dims, data_type=kind))
    outside = nbytes if nbytes > MAX_NBYTES else 0
    found = Counter(session=1, file=nbytes - outside, outside=outside)
    _walk((node for node in graph.node if node.domain != DOMAIN), known, found, folded)
    made, read = own.made + folded.made, own.read + folded.read
    found["folded"] = own.nodes + folded.nodes
    found["stages"] = max(own.held, default=0)
    if found["stages"]:
        found["kept"] = min(_MOST_HOLES, sum(size for _, size in weights.values()))
    found["divided"] = made["Div"] + made["Mod"]
    found["scattered"] = sum(made[name] for name in _SLOW) + sum(read[name] for name in _SEARCHES)
    found["made"], found["read"] = made.total(), read.total()
    found["held"] = own.peak + folded.held.total()
    found["mapped"] = own.mapped + folded.mapped
    found["copied"] = 0 if found["stages"] else found["read"] - found["mapped"]
    return found


def _walk(
    nodes: Iterable[NodeProto],
    known: MutableMapping[str, Size],
    found: Counter[str],
    folded: Work,
) -> None:
    """Counts the nodes of a graph, the constants that they take, and those that are folded."""
    inside: dict[str, Size] = {}
    every = ChainMap(inside, known)
    for node in nodes:
        if is_constant(node):
            for value in (one.t for one in node.attribute if one.HasField("t")):
                inside[node.output[0]] = _size(value)
            continue
        found["nodes"] += 1
        taken = [every[name] for name in node.input if name in every]
        found[_TAKERS.get(node.op_type, "")] += sum(size for _, size in taken)
        constant = bool(taken) and all(name in every for name in node.input)
        if constant and node.op_type in _SAME_SIZE and node.output:
            inside[node.output[0]] = made = _result(node, taken)
            read = [size for _, size in taken]
            folded.add(1, {node.op_type: made[1]}, {node.op_type: sum(read)}, mapped(read))
        for body in bodies(node):
            own = {tensor.name: _size(tensor) for tensor in body.initializer}
            _walk(body.node, ChainMap(own, every), found, folded)


def _result(node: NodeProto, operands: list[Size]) -> Size:
    elements, nbytes = max(operands)
    targets = [one.i for one in node.attribute if one.name == "to"]
    if node.op_type == "Cast" and targets and targets[0] in TensorProto.DataType.values():
        nbytes = declared_nbytes(TensorProto(dims=[elements], data_type=targets[0])) or nbytes
    return elements, nbytes


def _size(tensor: TensorProto) -> Size:
    return max(math.prod(tensor.dims), 0), max(declared_nbytes(tensor) or 0, 0)
