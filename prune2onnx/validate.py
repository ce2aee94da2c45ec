"""Proof by onnxruntime: parity, folding, accuracy, size, load time, memory and latency.

What a claim rests on:

1. every decoded weight equals the numpy decoder's, bit for bit (`check_weights`);
2. the graph onnxruntime is left with has the operators of the unpacked file's (`folds`);
3. outputs agree with a reference within float tolerance (`max_abs_diff`, `check_outputs`);
4. numbers are measured beside the dense file's, by turns (`running`).
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from prune2onnx.errors import MismatchError, Prune2OnnxError
from prune2onnx.inline import is_packed
from prune2onnx.inspection import inspect
from prune2onnx.onnxfile import load, save
from prune2onnx.pack import coded, decode_graph, unpack
from prune2onnx.report import Measured, Paired, Report, WeightRow
from prune2onnx.running import (
    UnrunnableError,
    environment,
    file_nbytes,
    first_line,
    input_text,
    measure,
    random_inputs,
    run_once,
    session,
)

Batches = Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]

# float32 sums in another order: relative to the largest score, with room for deep networks
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5


def check_weights(packed: onnx.ModelProto) -> int:
    """Decodes every coded weight in onnxruntime and compares it with the numpy decoder's.

    Returns:
        The number of coded weights.

    Raises:
        MismatchError: one differs in a bit; it is named.
    """
    expected = coded(packed).arrays
    if not expected:
        return 0
    names = list(expected)
    got = session(decode_graph(packed, expected)).run(names, {})
    for name, value in zip(names, got, strict=True):
        want = expected[name]
        if value.shape != want.shape or value.tobytes() != want.tobytes():
            raise MismatchError(
                f"{name}: onnxruntime {ort.__version__} decodes it to other bits than the numpy "
                "decoder; do not ship this file, and report this with the file"
            )
    return len(names)


def operators(model: onnx.ModelProto, level: ort.GraphOptimizationLevel) -> list[str]:
    """The operators onnxruntime is left with after optimising a model, in its order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session(model, level=level, optimised=path)
        optimised = onnx.load(path)
    return [f"{node.domain}:{node.op_type}" for node in optimised.graph.node]


def folds(packed: onnx.ModelProto, plain: onnx.ModelProto | None = None) -> bool:
    """Whether onnxruntime folds every decoder away when it creates the session.

    True when the optimised graph has the operators of the unpacked model's, as many of each, at
    the basic and at the full level of optimisation.

    Args:
        packed: the model.
        plain: what it unpacks to, if that is at hand.
    """
    plain = unpack(packed) if plain is None else plain
    levels = (
        ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    )
    return all(
        Counter(operators(packed, level)) == Counter(operators(plain, level)) for level in levels
    )


def outputs_of(model: onnx.ModelProto, inputs: Sequence[dict[str, NDArray[Any]]]) -> list[Any]:
    """All outputs of a model for several inputs, in a row.

    Raises:
        Prune2OnnxError: onnxruntime cannot open the model, or fails on the inputs.
    """
    opened = session(model)
    return [out for each in inputs for out in run_once(opened, each, Path("the model"))]


def check_same(name: str, model: onnx.ModelProto, reference: onnx.ModelProto) -> float:
    """Compares a model with the one it was made of, on made-up inputs.

    Returns:
        The largest difference of an output.

    Raises:
        MismatchError: they differ by more than rounding explains.
        UnrunnableError: onnxruntime cannot run the reference either.
    """
    inputs = [random_inputs(session(model), seed) for seed in range(2)]
    wanted = outputs_of(reference, inputs)
    got = outputs_of(model, inputs)
    return max((check_outputs(name, a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


def max_abs_diff(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest absolute difference of two outputs of one shape."""
    return float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0))


def check_outputs(name: str, got: NDArray[Any], want: NDArray[Any]) -> float:
    """Compares outputs with a reference's within float tolerance; returns the largest difference.

    Raises:
        MismatchError: they differ by more than rounding explains.
        Prune2OnnxError: an output is no tensor of numbers.
    """
    for one in (got, want):
        if not isinstance(one, np.ndarray) or one.dtype.kind not in "fiub":
            raise Prune2OnnxError(
                f"{name}: an output is a {type(one).__name__}, expected a tensor of numbers; "
                "validate the model without the nodes after the scores"
            )
    if got.shape != want.shape:
        raise MismatchError(f"{name}: output shape {got.shape}, the reference's is {want.shape}")
    same_special = np.array_equal(np.isfinite(got), np.isfinite(want))
    finite = np.isfinite(want)
    difference = max_abs_diff(got[finite], want[finite]) if same_special else float("inf")
    allowed = _ABSOLUTE + _RELATIVE * float(np.max(np.abs(want[finite]), initial=0.0))
    if difference > allowed:
        raise MismatchError(
            f"{name}: outputs differ from the reference's by up to {difference:.3g}, "
            f"at most {allowed:.3g} is rounding; do not ship this file"
        )
    return difference


def scores(
    opened: ort.InferenceSession, batches: Batches
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Runs a classifier over a data set.

    Returns:
        (its first output [n, classes], labels [n]).
    """
    out, labels = answers(opened, batches)
    if out.ndim != 2:
        raise Prune2OnnxError(
            f"the model's first output has shape {list(out.shape)}, expected [n, classes]"
        )
    return out, labels


def answers(
    opened: ort.InferenceSession, batches: Batches
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Runs a model of one input over a data set.

    Returns:
        (its first output [n, ...], labels [n]).
    """
    name = opened.get_inputs()[0].name
    outputs, labels = [], []
    for x, y in batches:
        try:
            outputs.append(opened.run(None, {name: x})[0])
        except Exception as error:
            raise Prune2OnnxError(
                f"the model does not take the data: {first_line(error)}; its input is "
                f"{input_text(opened)}, the data's examples are {list(x.shape[1:])}"
            ) from error
        shape = np.shape(outputs[-1])
        if shape[:1] != x.shape[:1]:
            raise Prune2OnnxError(
                f"an output of shape {list(shape)} for {len(x)} examples, expected one for each"
            )
        labels.append(y)
    return np.concatenate(outputs), np.concatenate(labels)


def error_percent(outputs: NDArray[Any], labels: NDArray[np.int64]) -> float:
    """Percent of examples whose highest score is not their label's."""
    return 100 * float(np.mean(outputs.argmax(1) != labels))


def paired(dense: NDArray[Any], compressed: NDArray[Any], labels: NDArray[np.int64]) -> Paired:
    """Which of two networks get each example right, from their scores [n, classes]."""
    right, also_right = dense.argmax(1) == labels, compressed.argmax(1) == labels
    counts = (right & also_right, right & ~also_right, ~right & also_right, ~right & ~also_right)
    return Paired(*(int(count.sum()) for count in counts))


def validate(
    file: Path,
    reference: Path | None = None,
    *,
    batches: Batches | None = None,
    rows: Sequence[WeightRow] | None = None,
    expected: NDArray[Any] | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Report:
    """Proves a packed file and measures it beside a reference.

    Args:
        file: the packed file (a plain one is its own unpacked file).
        reference: a dense file with the same inputs, measured beside `file`; its weights may be
            others, so its outputs are not compared. Default: what `file` unpacks to.
        batches: test examples; without them no error is reported and outputs are compared on
            random inputs.
        rows: how the weights are stored; default: read off the file.
        expected: [n, classes], the scores `file` must give on `batches`, from another runtime
            (torch); default: what the unpacked file gives in onnxruntime.
        density: nonzeros over elements of the pruned weights; default: of all weights with two
            axes or more.
        seed: written into the report.

    A network with operators that onnxruntime does not have is not run; that its weights decode and
    that their decoder folds is proved all the same (`Report.skipped`).

    Raises:
        MismatchError: a decoded weight differs from the numpy decoder's, or an output from
            `expected`.
        Prune2OnnxError: a file cannot be read, or onnxruntime cannot open it.
    """
    packed = load(file)
    check_weights(packed)
    rows = inspect(packed).rows if rows is None else tuple(rows)
    if density is None:
        matrices = [row for row in rows if len(row.shape) > 1]
        size = sum(row.size for row in matrices)
        density = sum(row.nnz for row in matrices) / size if size else 1.0
    skipped = ""
    difference = pairs = None
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "unpacked.onnx"
        unpacked = unpack(packed)
        save(unpacked, plain)
        beside = plain if reference is None else reference
        try:
            opened = session(plain)
        except UnrunnableError as error:
            skipped = str(error).removeprefix(f"{plain}: ")
            dense, compressed = (Measured(file_nbytes(path)) for path in (beside, file))
        else:
            taken = None if batches is None else list(batches)
            difference, (dense, compressed), pairs = _run_and_measured(
                file, (plain, opened), beside, taken, expected, seed
            )
    if not skipped:
        folded = folds(packed, unpacked)
    elif is_packed(packed):
        folded = folds(decode_graph(packed))
    else:  # nothing to fold
        folded = True
    return Report(
        version=importlib.metadata.version("prune2onnx"),
        seed=seed,
        environment=environment(),
        dense=dense,
        compressed=compressed,
        folded=folded,
        max_abs_diff=difference,
        density=density,
        weights=rows,
        skipped=skipped,
        paired=pairs,
    )


def _run_and_measured(
    file: Path,
    unpacked: tuple[Path, ort.InferenceSession],
    beside: Path,
    batches: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]] | None,
    expected: NDArray[Any] | None,
    seed: int,
) -> tuple[float, list[Measured], Paired | None]:
    """The largest difference of an output of `file`; `beside` and `file` measured, and paired."""
    plain, reference = unpacked
    opened = session(file)
    against = reference if beside == plain else session(beside)
    error: float | None = None
    reference_error: float | None = None
    examples: Paired | None = None
    if batches is not None:
        outputs, labels = scores(opened, batches)
        error = error_percent(outputs, labels)
        dense_outputs, _ = scores(against, batches)
        reference_error = error_percent(dense_outputs, labels)
        examples = paired(dense_outputs, outputs, labels)
        if expected is None:
            expected = dense_outputs if beside == plain else scores(reference, batches)[0]
        difference = check_outputs(file.name, outputs, expected)
        inputs = {opened.get_inputs()[0].name: batches[0][0][:1]}
    else:
        inputs = random_inputs(opened, seed)
        wanted = run_once(reference, inputs, plain)
        pairs = zip(run_once(opened, inputs, file), wanted, strict=True)
        difference = max(check_outputs(file.name, got, want) for got, want in pairs)
    renamed = [i.name for i in against.get_inputs()]
    if renamed != list(inputs):
        raise Prune2OnnxError(
            f"{beside}: its inputs are {renamed}, those of {file} are {list(inputs)}; "
            "they cannot be compared"
        )
    run_once(against, inputs, beside)
    return difference, measure([beside, file], inputs, [reference_error, error]), examples
