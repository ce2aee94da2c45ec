"""`shrink`: read, normalize, remove dead channels, compare, write."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto

from prune2onnx.commands.source import read
from prune2onnx.errors import printable
from prune2onnx.graph.file import save
from prune2onnx.graph.protobuf import nbytes
from prune2onnx.runs.defaults import RANDOM_INPUTS, InputOptions
from prune2onnx.runtime.compare import compared
from prune2onnx.shrinking.shrink import Row, Shrunk
from prune2onnx.shrinking.shrink import shrink as remove
from prune2onnx.shrinking.structure import BLOCK


@dataclass(frozen=True)
class ShrinkResult:
    """What `shrink_file` wrote.

    Attributes:
        rows: one for each weight that changed.
        kept: (channels, reason) for dead or constant channels that could not be removed.
        removed: output channels and neurons that were removed from layers.
        bypassed: sums that were removed, with a branch that added only zeros.
        difference: largest difference of an output on random inputs; None where nothing changed,
            or onnxruntime cannot run the model.
        notes: other changes, and what could not be done, in words.
        nbytes_before: size of the file that was read, external data included.
        nbytes: size of what was written, external data included.
        files: the files that were written.
    """

    rows: tuple[Row, ...]
    kept: tuple[tuple[str, str], ...]
    removed: int
    bypassed: int
    difference: float | None
    notes: tuple[str, ...]
    nbytes_before: int
    nbytes: int
    files: tuple[Path, ...]

    def reasons(self) -> list[str]:
        """A line for each weight and reason; of many channels the first three are named."""
        lines = []
        for what, reason in self.kept:
            weight, _, places = what.rpartition("[")
            numbers = places.rstrip("]").split(", ")
            more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
            lines.append(printable(f"kept: {weight}[{', '.join(numbers[:3])}]{more}: {reason}"))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = asdict(self)
        facts["kept"] = [{"what": what, "reason": reason} for what, reason in self.kept]
        facts["files"] = [str(path) for path in self.files]
        return facts


def shrink(
    model: ModelProto,
    *,
    gather_inputs: bool = False,
    multiple: int = 1,
    inputs: InputOptions = RANDOM_INPUTS,
) -> Shrunk:
    """Removes dead channels and neurons, and compares outputs in onnxruntime.

    Args:
        model: not modified; external data loaded.
        gather_inputs: as for `shrinking.shrink.shrink`.
        multiple: as for `shrinking.shrink.shrink`.
        inputs: on which outputs are compared; default: random ones.

    Returns:
        The smaller model; where onnxruntime cannot run it, its notes say so.

    Raises:
        MismatchError: onnxruntime gives other outputs than before.
        Prune2OnnxError: external data are not loaded, or a tensor is damaged.
    """
    made = remove(model, gather_inputs=gather_inputs, multiple=multiple)
    if made.model == model:
        return made
    _, note = compared("the model", made.model, model, inputs)
    return replace(made, notes=(*made.notes, *note))


def shrink_file(
    source: Path,
    target: Path,
    *,
    gather_inputs: bool = False,
    multiple: int = BLOCK,
    external: str | None = None,
    inputs: InputOptions = RANDOM_INPUTS,
) -> ShrinkResult:
    """Removes the dead channels and neurons of a file, and compares outputs in onnxruntime.

    Args:
        source: any ONNX file; a packed one is unpacked first.
        target: the file to write; the same model as `source` where nothing is dead.
        gather_inputs: whether a Gather may leave out unused inputs of the graph (`shrink`).
        multiple: convolutions keep a multiple of so many channels; other numbers may be slower.
        external: name of a data file for large weights.
        inputs: on which outputs are compared; default: random ones.

    Raises:
        MismatchError: onnxruntime gives other outputs than for the file that was read.
        Prune2OnnxError: the file cannot be read, normalized, or written.
    """
    given = read(source)
    made = remove(given.normal.model, gather_inputs=gather_inputs, multiple=multiple)
    result, notes, difference = made.model, list(given.normal.notes), None
    if result == given.normal.model:
        result, notes = given.unpacked, []
    if given.is_packed:
        notes.append("the file was packed; the result is not: pack it again as the last step")
    if result is not given.unpacked:
        difference, note = compared(source.name, result, given.unpacked, inputs)
        notes += note
    files = save(result, target, external, source=source)
    return ShrinkResult(
        made.rows,
        tuple(made.reasons.items()),
        made.removed,
        made.bypassed,
        difference,
        tuple(notes),
        given.nbytes,
        nbytes(result),
        files,
    )
