"""Validates a packed file in onnxruntime: equal weights, folding, accuracy, size, time and memory.

What is checked, and measured:

1. every decoded weight equals the numpy decoder's, bit for bit (`check_weights`);
2. the optimised graph has the operators of the unpacked file's, and makes no weight (`folding`);
3. outputs agree with a reference within float tolerance (`compare.check_outputs`);
4. time and memory are measured interleaved with those of the dense file (`latency.measure`).
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import onnx
import onnxruntime as ort

from prune2onnx.data import batches as batches_of
from prune2onnx.data import load_data
from prune2onnx.errors import MismatchError, Prune2OnnxError, first_line
from prune2onnx.graph.file import file_nbytes, save
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.inspection import inspect, load_of
from prune2onnx.packing.load_cost import Prediction
from prune2onnx.packing.rows import WeightRow
from prune2onnx.packing.unpack import Coded, coded, decode_graph, unpack
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
from prune2onnx.runtime.inputs import Inputs, fed, in_batches, inputs_of, named_arrays
from prune2onnx.runtime.latency import measure
from prune2onnx.runtime.session import (
    UnrunnableError,
    environment,
    load_runnable,
    run,
    run_once,
    session,
)
from prune2onnx.tasks.metrics import CLASS_ERROR
from prune2onnx.tasks.structure import mapped
from prune2onnx.tasks.task import CLASSIFICATION, Task

_FAR_MORE = 1.5
"""Times the predicted peak memory: predictions are within 30 %."""


def check_weights(packed: onnx.ModelProto, known: Coded | None = None) -> int:
    """Decodes every coded weight in onnxruntime and compares it with the numpy decoder's.

    Args:
        packed: the model.
        known: the weights from the numpy decoder, if they are at hand.

    Returns:
        The number of coded weights.

    Raises:
        MismatchError: a weight differs in a bit; it is named.
    """
    expected = (coded(packed) if known is None else known).arrays
    if not expected:
        return 0
    opened = session(decode_graph(packed, expected))
    names = [output.name for output in opened.get_outputs()]
    try:
        found = run(opened, {})
    except Exception as error:  # onnxruntime's own exceptions have no common base class
        raise MismatchError(
            f"onnxruntime {ort.__version__} cannot decode the weights: {first_line(error)}; do not "
            "ship this file"
        ) from error
    for name, value in zip(names, found, strict=True):
        want = expected[name].astype(value.dtype, copy=False)  # bfloat16 is read as float32
        if value.shape != want.shape or value.tobytes() != want.tobytes():
            raise MismatchError(
                f"{name}: onnxruntime {ort.__version__} decodes it to other bits than the numpy "
                "decoder; do not ship this file, and report a bug with it"
            )
    return len(names)


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
    packed = load_runnable(file)
    known = coded(packed)
    check_weights(packed, known)
    rows = inspect(packed, known=known).rows if rows is None else tuple(rows)
    if density is None:
        matrices = [row for row in rows if len(row.shape) > 1]
        size = sum(row.size for row in matrices)
        density = sum(row.nnz for row in matrices) / size if size else 1.0
    skipped = ""
    difference = pairs = None
    with tempfile.TemporaryDirectory() as folder:
        dense_file = Path(folder) / "unpacked.onnx"
        unpacked = unpack(packed, known=known)
        save(unpacked, dense_file)
        other_file = dense_file if reference is None else reference
        opened = None
        try:
            opened = session(dense_file)
            taken = None if batches is None else list(batches)
            if taken is None and _has_labels(inputs.data, opened):
                taken = list(batches_of(load_data(inputs.data, task=task).test))
            given = _given(unpacked, opened, taken, inputs)
        except UnrunnableError as error:
            skipped = str(error).removeprefix(f"{dense_file}: ")
            dense, compressed = (Measured(file_nbytes(path)) for path in (other_file, file))
        else:
            difference, (dense, compressed), pairs = _run_and_measured(
                file, (dense_file, opened), other_file, taken, expected, given, unpacked, task
            )
    left = Folding()
    notes: tuple[str, ...] = ()
    if is_packed(packed):  # in any other file there is nothing to fold
        if opened is None:
            packed = decode_graph(packed, known.arrays)
            unpacked = unpack(packed, known=known)
        left = folding(packed, unpacked, known.arrays)
        notes = _memory_notes(load_of(packed, known), compressed)
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


def _has_labels(data: str | None, opened: ort.InferenceSession) -> TypeGuard[str]:
    """Whether `data` is a data set, not arrays for the inputs by name."""
    return data is not None and data != "random" and named_arrays(data, opened) is None


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


def _run_and_measured(
    file: Path,
    unpacked: tuple[Path, ort.InferenceSession],
    other_file: Path,
    batches: Sequence[tuple[Any, Any]] | None,
    expected: Any,
    inputs: Inputs,
    model: onnx.ModelProto,
    task: Task,
) -> tuple[float, list[Measured], Paired | None]:
    """Outputs of `file` against `unpacked` and `other_file`.

    Returns:
        The largest difference of an output; `other_file` and `file` measured; both files' right and
        wrong answers, counted in pairs.
    """
    dense_file, reference = unpacked
    opened = session(file)
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
    errors = [each.get(CLASS_ERROR.name) if task is CLASSIFICATION else None for each in values]
    made = measure([other_file, file], [against, opened], inputs, errors)
    made = [replace(one, metrics=metrics) for one, metrics in zip(made, values, strict=True)]
    return difference, made, examples
