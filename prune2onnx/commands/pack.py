"""`pack`: read, normalize, shrink and approximate if asked, pack, compare, write.

The order of the steps, and what is reported about them; each step lives in a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from onnx import ModelProto

from prune2onnx.commands.compute.computing import Computing
from prune2onnx.commands.lossy import Lossy, changed
from prune2onnx.commands.source import read
from prune2onnx.errors import RecipeError
from prune2onnx.files import scratch
from prune2onnx.graph.file import save
from prune2onnx.graph.outside import Spill
from prune2onnx.graph.protobuf import nbytes, tensor_nbytes
from prune2onnx.graph.rewritten import Rewritten
from prune2onnx.graph.strip import strip
from prune2onnx.packing.calibration.journal import Journal, journal_of
from prune2onnx.packing.compute.narrow import Layer, Narrowed
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.load_cost import UNPACK, Prediction, lighter
from prune2onnx.packing.pack import Load, Progress, pack_normalized
from prune2onnx.packing.rows import WeightRow
from prune2onnx.runs.defaults import PackOptions
from prune2onnx.runs.report import CurvePoint, Goal
from prune2onnx.runtime.calibration import CalibrationData
from prune2onnx.runtime.compare import compared
from prune2onnx.runtime.memory import BASE_NBYTES, require
from prune2onnx.shrinking.shrink import shrink
from prune2onnx.shrinking.structure import BLOCK

_MUCH_GRAPH = 0.2
_SPILLED_NBYTES = 1 << 28

_LARGEST = 6
"""Times the largest weight that packing takes where it reads some rows at a time."""

_WHOLE = {"--load small": 19, "--portable": 6, "a lossy option": 10}
"""Times all weights that packing takes where it holds the whole model; 7 to 19 were measured of the
first, 3 to 6 of the second, 8 to 13 of the third."""


@dataclass(frozen=True)
class PackResult:
    """What `pack_file` wrote.

    Attributes:
        rows: one per weight.
        notes: changes besides the weights' encoding, in words.
        nbytes_before: size of the file that was read, external data included.
        files: the files that were written.
        load: what loads of the file and of the dense one take; None for sparse initializers.
        warning: that it takes far more than the dense one, and what to do; "" where it does not.
        goals: one for each budget: a size, an error of the outputs, an accuracy loss.
        curve: as of `commands.lossy.Lossy`.
        errors: the same; empty where nothing is lost.
        hows: the same.
        layers: what each matrix computes in; empty unless it was asked for.
    """

    rows: tuple[WeightRow, ...]
    notes: tuple[str, ...]
    nbytes_before: int
    files: tuple[Path, ...]
    load: Prediction | None = None
    warning: str = ""
    goals: tuple[Goal, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    hows: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()

    @property
    def missed(self) -> tuple[Goal, ...]:
        """The budgets that were missed."""
        return tuple(goal for goal in self.goals if not goal.met)


def pack_file(
    source: Path,
    target: Path,
    options: PackOptions | None = None,
    evaluate: Callable[[ModelProto], float] | None = None,
    progress: Progress = lambda name, done, total: None,
) -> PackResult:
    """Packs a file.

    If the graph changes (an old operator set, dead channels), outputs are compared in onnxruntime
    before anything is written.

    Args:
        source: the file to pack.
        target: the file to write.
        options: by default, lossless packing.
        evaluate: a model -> its error, for `max_rel_error`, in place of the outputs' error.
        progress: is told how far large weights have come.

    Raises:
        RecipeError: options that exclude each other, or one out of range.
        MismatchError: onnxruntime gives other outputs than for the file that was read.
        Prune2OnnxError: the file cannot be read, normalized, or written.
    """
    options = options or PackOptions()
    if options.portable and options.form != "packed":
        raise RecipeError(
            f"--portable and --format {options.form}: such a file has no decoder to write out; "
            "give one of them"
        )
    if options.curve and not options.lossy:
        raise RecipeError(
            "--curve shows what other sizes cost; give --bits, --target-size or --max-error, too"
        )
    given = read(source, lazily=True)
    _require_memory(source, given.model, options)
    normal, is_changed = given.normal, given.is_upgraded
    notes = list(normal.notes)
    if options.shrink:
        shrunk = shrink(normal.model, multiple=BLOCK)
        normal = replace(normal, model=shrunk.model)
        is_changed |= bool(shrunk.rows)
        notes += shrunk.notes
    if is_changed:
        _, note = compared(source.name, normal.model, given.unpacked, options.inputs)
        notes += note or ["onnxruntime gives equal outputs before and after"]
    elif options.inputs.data is not None and not options.lossy and options.compute == "float32":
        notes.append("nothing changes the outputs, so --data was not used")
    if options.strip:
        normal = replace(normal, model=strip(normal.model).model)
    computing = Computing(normal.model, options)
    made: Lossy | None = None
    with ExitStack() as until_written:
        if options.lossy or computing.calibrates:

            def size_of(form: Narrowed) -> int:
                own = replace(normal, model=form.model)
                return nbytes(_written(own, options, form, check=False)[0])

            def journal(data: CalibrationData) -> Journal:
                kept = journal_of(target, normal.model, data.batches, _settings(options))
                return until_written.enter_context(kept)

            made = changed(normal.model, options, size_of, computing, evaluate, progress, journal)
            form = computing.of(made.model, made.quantized)
            notes += made.notes
        else:
            form = computing.plain()
        notes += [*form.notes, *computing.notes]
        normal = replace(normal, model=form.model)
        spill = until_written.enter_context(_spill(target, nbytes(normal.model)))
        result, rows, load = _written(normal, options, form, progress=progress, spill=spill)
        if options.form == "packed" and not is_packed(result):
            notes.append("packing would not make the file smaller; its weights stay dense")
        notes += _size_notes(result, rows, given.nbytes, options.strip)
        files = save(result, target, options.external, source=source)
    lost = (
        (made.goals, made.curve, made.errors, made.hows) if made is not None else ((), (), {}, {})
    )
    warning = "" if load is None else load.warning(_advice(load, rows, options.load))
    return PackResult(rows, tuple(notes), given.nbytes, files, load, warning, *lost, form.layers)


def _settings(options: PackOptions) -> str:
    """What results of calibration depend on besides the model and its examples."""
    versions = [f"{name} {version(name)}" for name in ("prune2onnx", "numpy", "onnxruntime")]
    return "; ".join([*versions, repr(replace(options, external=None))])


def _written(
    normal: Rewritten,
    options: PackOptions,
    form: Narrowed,
    *,
    check: bool = True,
    progress: Progress = lambda name, done, total: None,
    spill: Spill | None = None,
) -> tuple[ModelProto, tuple[WeightRow, ...], Prediction | None]:
    """A model in the form that the options ask for, its weights, and what a load takes."""
    if options.form == "sparse-initializer":
        from prune2onnx.packing.sparse import to_sparse

        return *to_sparse(normal.model), None
    packed = pack_normalized(
        normal,
        load=options.load,
        quantized=form.quantized,
        few_bytes=form.narrow if options.lossy else (),
        anonymize=options.anonymize,
        portable=options.portable,
        short_names=options.strip,
        check=check,
        progress=progress,
        spill=spill,
    )
    return packed.model, packed.rows, packed.load


def _require_memory(source: Path, model: ModelProto, options: PackOptions) -> None:
    """Makes sure that there is memory to pack a model.

    Raises:
        OutOfMemoryError: there is far less.
    """
    sizes = [tensor_nbytes(tensor) for tensor in model.graph.initializer]
    streamed = BASE_NBYTES + min(sum(sizes), _SPILLED_NBYTES) + _LARGEST * max(sizes, default=0)
    asked = {
        "--load small": options.load == "small",
        "--portable": options.portable,
        "a lossy option": options.lossy,
    }
    ways = [name for name, given in asked.items() if given and options.form == "packed"]
    each = max((_WHOLE[name] for name in ways), default=0)
    advice = "use a machine with more"
    if ways:
        advice = f"without {' and '.join(ways)} it is {streamed / 1e9:.1f} GB"
    require(f"packing {source.name}", max(streamed, BASE_NBYTES + each * sum(sizes)), advice)


def _advice(cost: Prediction, rows: Sequence[WeightRow], load: Load) -> str:
    """What to do about a file that takes long to open."""
    other = lighter(cost, rows, entropy_coded=load != "fast")
    return f"--load {other} takes less" if other else UNPACK


@contextmanager
def _spill(target: Path, size: int) -> Iterator[Spill | None]:
    """A place for the streams of a model of so many bytes; none for one that fits into memory."""
    if size < _SPILLED_NBYTES:
        yield None
        return
    with scratch(target, size) as (stream, path):
        yield Spill(stream, path)


def _size_notes(
    result: ModelProto, rows: Sequence[WeightRow], before: int, stripped: bool
) -> list[str]:
    """What a user would want to know about the size of the result."""
    size, notes = nbytes(result), []
    if size > before:
        notes.append(f"the result is {size - before:,} bytes larger than the file that was read")
    share = 1 - sum(row.nbytes for row in rows) / max(size, 1)
    if not stripped and share > _MUCH_GRAPH:
        saved = size - nbytes(strip(result).model)
        if saved > size // 100:
            notes.append(f"{share:.0%} of it is graph; --strip would save {saved:,} bytes")
    return notes
