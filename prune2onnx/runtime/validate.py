"""Validates a packed file in onnxruntime: equal weights, folding, accuracy, size, time and memory.

What is checked, and measured:

1. every decoded weight equals the numpy decoder's, bit for bit (`check_weights`);
2. the optimised graph has the operators of the unpacked file's, and makes no weight (`folding`);
3. outputs agree with a reference within float tolerance (`compare.check_outputs`);
4. time and memory are measured interleaved with those of the dense file (`latency.measured`).
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from prune2onnx.data import batches as batches_of
from prune2onnx.data import load_data
from prune2onnx.errors import MismatchError, Prune2OnnxError, first_line
from prune2onnx.graph.file import file_nbytes, save
from prune2onnx.graph.outside import Spill
from prune2onnx.packing.decoding import Coded, coded, decode_graph, weight_batches
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.inspection import inspect, load_of
from prune2onnx.packing.load_cost import Prediction
from prune2onnx.packing.rows import WeightRow
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import RANDOM_INPUTS, InputOptions
from prune2onnx.runs.report import Measured, Paired, Report, bytes_text
from prune2onnx.runtime.compare import (
    Batches,
    check_outputs,
    coarsest,
    judged,
    paired,
    require_determined,
    results,
)
from prune2onnx.runtime.folding import Folding, folding
from prune2onnx.runtime.inputs import Inputs, fed, has_labels, in_batches, inputs_of
from prune2onnx.runtime.latency import latencies, measured
from prune2onnx.runtime.memory import BASE_NBYTES, require
from prune2onnx.runtime.session import (
    UnrunnableError,
    environment,
    load_runnable,
    require_memory,
    run,
    run_once,
    session,
)
from prune2onnx.tasks.metrics import CLASS_ERROR
from prune2onnx.tasks.structure import mapped
from prune2onnx.tasks.task import CLASSIFICATION, Task

_BATCH_NBYTES = 1 << 26
"""Bytes of weights that are decoded at a time; decoding makes 5 to 15 times as many meanwhile."""

_NAMED = 3  # weights in an error

_OPENED = 2
"""Sessions with dense weights that are open at a time."""

_FAR_MORE = 1.5
"""Times the predicted peak memory: predictions are within 30 %."""


def check_weights(packed: onnx.ModelProto, known: Coded | None = None) -> int:
    """Decodes every coded weight in onnxruntime and compares it with the numpy decoder's.

    Some weights at a time, so that a model of gigabytes takes less memory than to open it does.

    Args:
        packed: the model.
        known: the weights from the numpy decoder, if they are at hand.

    Returns:
        The number of coded weights.

    Raises:
        MismatchError: a weight differs in a bit; it is named.
    """
    known = coded(packed) if known is None else known
    for batch in weight_batches(packed, known.extents, _BATCH_NBYTES):
        opened = session(decode_graph(packed, batch))
        names = [output.name for output in opened.get_outputs()]
        try:
            found = run(opened, {})
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            require_memory(error, ", ".join(names[:_NAMED]))
            raise MismatchError(
                f"onnxruntime {ort.__version__} cannot decode the weights: {first_line(error)}; do "
                "not ship this file"
            ) from error
        for name, value in zip(names, found, strict=True):
            want = known.arrays[name].astype(value.dtype, copy=False)  # bfloat16 is read as float32
            if value.shape != want.shape or value.tobytes() != want.tobytes():
                raise MismatchError(
                    f"{name}: onnxruntime {ort.__version__} decodes it to other bits than the "
                    "numpy decoder; do not ship this file, and report a bug with it"
                )
    return len(known.extents)


def validate(
    file: Path,
    reference: Path | None = None,
    *,
    batches: Batches | None = None,
    rows: Sequence[WeightRow] | None = None,
    expected: Any = None,
    density: float | None = None,
    seed: int = 0,
    inputs: InputOptions = RANDOM_INPUTS,
    task: Task = CLASSIFICATION,
) -> Report:
    """Validates a packed file, and measures it against a reference.

    A network that cannot be run, or whose outputs prove nothing, is not compared, but its weights
    are decoded and its decoder is folded all the same (`Report.skipped`).

    Args:
        file: the packed file; one that is not packed is its own unpacked file.
        reference: a dense file with the same inputs, measured with `file`; it may have other
            weights, so its outputs are not compared. Default: the unpacked `file`.
        batches: test examples; without them no metric is reported, and outputs are compared on
            random inputs.
        rows: how the weights are stored; default: read from the file.
        expected: [n, ...], the outputs that `file` must give on `batches`, from another runtime
            (torch), a list of several; default: those of the unpacked file in onnxruntime.
        density: nonzeros over elements of the pruned weights; default: of all weights with two
            axes or more.
        seed: written into the report.
        inputs: where there are no `batches`, the data set whose test examples take their place, or
            what outputs are compared on; default: random ones.
        task: by whose metrics the files are judged; one without targets takes the reference's
            outputs as such.

    Raises:
        MismatchError: a decoded weight differs from the numpy decoder's, or an output from
            `expected`.
        Prune2OnnxError: a file cannot be read, or onnxruntime cannot open it.
    """
    packed = load_runnable(file, lazily=True)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "weights").open("wb") as stream:
        spill = Spill(stream, Path(folder) / "weights")
        known = coded(packed, spill=spill)
        load = load_of(packed, known.extents, known.work)
        require(
            f"opening {file.name}, and beside it what it unpacks to,",
            BASE_NBYTES + max(load.packed.peak_nbytes, _OPENED * load.dense.peak_nbytes),
            "inspect and unpack take less, or use a machine with more",
        )
        check_weights(packed, known)
        rows = inspect(packed, known=known).rows if rows is None else tuple(rows)
        if density is None:
            matrices = [row for row in rows if len(row.shape) > 1]
            size = sum(row.size for row in matrices)
            density = sum(row.nnz for row in matrices) / size if size else 1.0
        skipped = ""
        difference = pairs = None
        dense_file = Path(folder) / "unpacked.onnx"
        unpacked = unpack(packed, known=known)
        save(unpacked, dense_file)
        other_file = dense_file if reference is None else reference
        sessions: list[ort.InferenceSession] = []
        try:
            sessions = _sessions(file, dense_file)
            taken = None if batches is None else list(batches)
            if taken is None and has_labels(inputs.data, sessions[0]):
                taken = list(batches_of(load_data(inputs.data, task=task).test))
            given = _given(unpacked, sessions[1], taken, inputs)
        except UnrunnableError as error:
            skipped = str(error).removeprefix(f"{dense_file}: ")
            dense, compressed = (Measured(file_nbytes(path)) for path in (other_file, file))
        else:
            ran = _run(
                (file, dense_file, other_file), sessions, taken, expected, given, unpacked, task
            )
            difference, pairs = ran.difference, ran.pairs
            sessions.clear()  # memory, which loads in other processes need
            dense, compressed = (
                replace(one, metrics=metrics)
                for one, metrics in zip(
                    measured([other_file, file], ran.times, ran.errors(task)),
                    ran.metrics,
                    strict=True,
                )
            )
        left = Folding()
        notes: tuple[str, ...] = ()
        if is_packed(packed):  # in any other file there is nothing to fold
            if skipped:
                sessions.clear()
                decoder = decode_graph(packed, known.extents)
                left = folding(decoder, unpack(decoder, known=known), known.extents)
            else:
                left = folding(packed, dense_file, known.extents, file=file)
            notes = _memory_notes(load, compressed)
    return Report(
        version=importlib.metadata.version("prune2onnx"),
        seed=seed,
        environment=environment(),
        dense=dense,
        compressed=compressed,
        folded=left.complete,
        unfolded=left.weights,
        notes=notes,
        max_abs_diff=difference,
        density=density,
        weights=rows,
        skipped=skipped,
        paired=pairs,
        task=task.name,
        metric=task.metric,
    )


def _memory_notes(load: Prediction, measured: Measured) -> tuple[str, ...]:
    """That memory is not freed between stages, where a load takes far more than predicted."""
    peak = measured.peak_rss_bytes
    if not load.stages or peak is None or peak <= _FAR_MORE * load.packed.peak_nbytes:
        return ()
    return (
        f"a load takes {bytes_text(peak)} at its peak, {bytes_text(load.packed.peak_nbytes)} are "
        f"expected: onnxruntime {ort.__version__} does not free memory between the "
        f"{load.stages} stages of decoding",
    )


def _given(
    model: onnx.ModelProto,
    opened: ort.InferenceSession,
    batches: Sequence[tuple[Any, Any]] | None,
    options: InputOptions,
) -> Inputs:
    """One inference's inputs, to compare and to measure with.

    Raises:
        UnrunnableError: there are none, or outputs would prove nothing.
    """
    require_determined(model)
    if batches is None:
        return inputs_of(model, opened, options, count=1, examples=1)[0]
    example, _ = next(in_batches(opened, mapped(lambda array: array[:1], batches[0][0])))
    return fed(opened, example)


def _sessions(file: Path, dense_file: Path) -> list[ort.InferenceSession]:
    """Of a packed file and of what it unpacks to; the one that takes more memory is opened first.

    Raises:
        UnrunnableError: the unpacked file cannot be run.
        Prune2OnnxError: a file cannot be opened.
    """
    try:
        opened = session(file)
    except UnrunnableError as error:
        session(dense_file)  # where that works, it is not the network
        raise Prune2OnnxError(str(error)) from error
    return [opened, session(dense_file)]


@dataclass(frozen=True)
class _Ran:
    """What two files gave, and how fast.

    Attributes:
        difference: the largest one of an output.
        pairs: both files' right and wrong answers, counted in pairs.
        metrics: of the reference and of the file, by name; empty without data.
        times: milliseconds of the same, [rounds, 2].
    """

    difference: float
    pairs: Paired | None
    metrics: Sequence[dict[str, float]]
    times: NDArray[np.float64]

    def errors(self, task: Task) -> list[float | None]:
        """In percent, of classifiers."""
        classes = task is CLASSIFICATION
        return [each.get(CLASS_ERROR.name) if classes else None for each in self.metrics]


def _run(
    files: tuple[Path, Path, Path],
    sessions: Sequence[ort.InferenceSession],
    batches: Sequence[tuple[Any, Any]] | None,
    expected: Any,
    inputs: Inputs,
    model: onnx.ModelProto,
    task: Task,
) -> _Ran:
    """Outputs of a file against those of its unpacked one, and of a reference.

    Args:
        files: the file, the unpacked one, the reference, which may be the same.
        sessions: of the first two.
        batches: as of `validate`.
        expected: as of `validate`.
        inputs: of one inference.
        model: the unpacked one.
        task: whose metrics count, with `batches`.
    """
    file, dense_file, other_file = files
    opened, reference = sessions
    against = reference if other_file == dense_file else session(other_file)
    values: list[dict[str, float]] = [{}, {}]
    examples: Paired | None = None
    if batches is not None:
        outputs, targets = results(opened, batches)
        dense_outputs, _ = results(against, batches)
        if task.targets == "outputs":
            targets = dense_outputs[0] if len(dense_outputs) == 1 else tuple(dense_outputs)
        values = [judged(task, each, targets) for each in (dense_outputs, outputs)]
        if task is CLASSIFICATION:
            examples = paired(dense_outputs[0], outputs[0], targets)
        if expected is None:
            known = other_file == dense_file
            expected = dense_outputs if known else results(reference, batches)[0]
        wanted = expected if isinstance(expected, list) else [expected]
        difference = max(map(partial(check_outputs, file.name), outputs, wanted))
    else:
        wanted = run_once(reference, inputs, dense_file)
        rounding = coarsest(model)
        pairs = zip(run_once(opened, inputs, file), wanted, strict=True)
        difference = max(check_outputs(file.name, got, want, rounding) for got, want in pairs)
    renamed = [i.name for i in against.get_inputs()]
    if renamed != list(inputs):
        raise Prune2OnnxError(
            f"{other_file}: its inputs are {renamed}, expected those of {file}, {list(inputs)}; "
            "give a --reference with the same inputs"
        )
    run_once(against, inputs, other_file)
    times = latencies([other_file, file], [against, opened], inputs)
    return _Ran(difference, examples, values, times)
