"""From a file to a file without its dead channels: read, make plain, shrink, prove, write."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from prune2onnx.errors import printable
from prune2onnx.inline import is_packed
from prune2onnx.intake import plain
from prune2onnx.onnxfile import load, nbytes, save
from prune2onnx.pack import unpack
from prune2onnx.running import UnrunnableError
from prune2onnx.shrink import Row, shrink
from prune2onnx.structure import BLOCK
from prune2onnx.validate import check_same


@dataclass(frozen=True)
class Done:
    """What `shrink_file` wrote.

    Attributes:
        rows: one for each weight that changed.
        kept: (what, reason) of dead or constant channels that are still there.
        removed: output channels and neurons that were taken from layers.
        bypassed: sums that went, with the branches that added nothing to them.
        difference: largest difference of an output on made-up inputs; None where nothing changed,
            or onnxruntime cannot run the model.
        notes: what else was changed, or could not be done, in words.
        nbytes_before: of the file that was read, external data included.
        nbytes: of what was written, external data included.
        files: those written.
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

    def table(self) -> Table:
        """A line for each weight that changed."""
        table = Table("weight", "shape before", "after", title="shrunk")
        for row in self.rows:
            old, new = ("x".join(map(str, shape)) for shape in (row.before, row.after))
            after = "same" if old == new else new or "gone"
            table.add_row(Text(printable(row.name)), old or "none", after)
        return table

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


def shrink_file(
    source: Path,
    target: Path,
    *,
    gather_inputs: bool = False,
    multiple: int = BLOCK,
    external: str | None = None,
) -> Done:
    """Removes the dead channels and neurons of a file; onnxruntime must find the outputs equal.

    Args:
        source: any ONNX file; a packed one is unpacked first.
        target: the file to write; the same model as `source` where nothing is dead.
        gather_inputs: whether a Gather may leave out unused inputs of the graph (`shrink`).
        multiple: of which convolutions keep their channels; any other number may take longer.
        external: name of a data file for large weights.

    Raises:
        MismatchError: onnxruntime gives other outputs than for the file that was read.
        Prune2OnnxError: the file cannot be read, made plain, or written.
    """
    given = load(source)
    before = unpack(given)
    intake = plain(before)
    made = shrink(intake.model, gather_inputs=gather_inputs, multiple=multiple)
    result, notes, difference = made.model, list(intake.notes), None
    if is_packed(given):
        notes.append("the file was packed; the result is not: pack it again as the last step")
    if result == intake.model:
        result, notes = before, notes[len(intake.notes) :]
    else:
        try:
            difference = check_same(source.name, result, before)
        except UnrunnableError as error:
            notes.append(f"not run in onnxruntime: {error}")
    files = save(result, target, external)
    return Done(
        made.rows,
        made.kept,
        made.removed,
        made.bypassed,
        difference,
        tuple(notes),
        nbytes(given),
        nbytes(result),
        files,
    )
