"""From a file to a packed file: read, make plain, approximate if asked, pack, prove, write.

The order of the steps and what is told about them; each step lives in a room of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx.errors import RecipeError
from prune2onnx.graphs import opset
from prune2onnx.inline import is_packed
from prune2onnx.intake import plain
from prune2onnx.lossy import Approximation, approximate, search
from prune2onnx.onnxfile import load, nbytes, save
from prune2onnx.pack import pack, unpack
from prune2onnx.report import WeightRow
from prune2onnx.running import UnrunnableError, random_inputs, session
from prune2onnx.shrink import shrink
from prune2onnx.strip import strip
from prune2onnx.structure import BLOCK
from prune2onnx.validate import check_same, outputs_of

_EXAMPLES = 256
"""Examples that a search for the fewest bits looks at: those of the validation split first."""


@dataclass(frozen=True)
class Wish:
    """What is asked of a packed file.

    Attributes:
        load: "small" or "fast", as for `pack`.
        form: "packed", or "sparse-initializer".
        strip: whether what running does not need is left out (`strip`).
        shrink: whether dead channels and neurons are taken away first (`shrink`).
        bits: lossy: bits a weight, 1 to 8.
        prune: lossy: share of the weights that become zero.
        max_rel_error: lossy: largest relative error of each weight, or, with `data`, of outputs.
        data: where inputs come from, as for `load_data`; "random" for made-up ones.
        external: name of a data file for large weights.
        anonymize: as of `pack`.
    """

    load: str = "small"
    form: str = "packed"
    strip: bool = False
    shrink: bool = False
    bits: float | None = None
    prune: float | None = None
    max_rel_error: float | None = None
    data: str | None = None
    external: str | None = None
    anonymize: bool = False

    @property
    def lossy(self) -> bool:
        """Whether weights may change."""
        return not (self.bits is None and self.prune is None and self.max_rel_error is None)


@dataclass(frozen=True)
class Done:
    """What `pack_file` wrote.

    Attributes:
        rows: one per weight.
        notes: what was changed besides the weights' form, in words.
        nbytes_before: of the file that was read, external data included.
        files: those written.
    """

    rows: tuple[WeightRow, ...]
    notes: tuple[str, ...]
    nbytes_before: int
    files: tuple[Path, ...]


def pack_file(
    source: Path,
    target: Path,
    wish: Wish | None = None,
    evaluate: Callable[[ModelProto], float] | None = None,
) -> Done:
    """Packs a file.

    Where the graph had to be changed (an old operator set, dead channels), onnxruntime must find
    the outputs equal before anything is written.

    Args:
        source: the file to pack.
        target: the file to write.
        wish: what is asked of it; by default a packed file without loss.
        evaluate: a model -> its error, for `max_rel_error`, in place of `wish.data`.

    Raises:
        RecipeError: a wish that makes no sense.
        MismatchError: onnxruntime gives other outputs than for the file that was read.
        Prune2OnnxError: the file cannot be read, made plain, or written.
    """
    wish = wish or Wish()
    if wish.data is not None and wish.max_rel_error is None:
        raise RecipeError("--data is for --max-rel-error: the error of the outputs on these data")
    given = load(source)
    before = nbytes(given)
    unpacked = unpack(given)
    intake = plain(unpacked)
    notes = list(intake.notes)
    model, changed = intake.model, False
    if wish.shrink:
        shrunk = shrink(model, multiple=BLOCK)
        model, changed = shrunk.model, bool(shrunk.rows)
        notes.append(f"{shrunk.removed:,} dead channels and neurons removed")
    if changed or opset(given.opset_import) != opset(model.opset_import):
        try:
            check_same(source.name, model, unpacked)
            notes.append("onnxruntime gives equal outputs before and after")
        except UnrunnableError as error:
            notes.append(f"not run in onnxruntime: {error}")
    model = strip(model) if wish.strip else model
    quantized = None
    if wish.lossy:
        made = _approximated(model, wish, evaluate)
        model, quantized = made.model, made.quantized
        if made.bits:
            notes.append(f"{made.bits:.2f} bits a weight, about")
        if made.output_error is not None:
            notes.append(f"relative error of the outputs {made.output_error:.3%}")
    if wish.form == "sparse-initializer":
        from prune2onnx.sparse import to_sparse

        result, rows = to_sparse(model)
    else:
        packed = pack(model, load=wish.load, quantized=quantized, anonymize=wish.anonymize)
        result, rows = packed.model, packed.rows
        if not is_packed(result):
            notes.append("nothing made it smaller; the file is written plain")
    return Done(rows, tuple(notes), before, save(result, target, wish.external))


def _approximated(
    model: ModelProto, wish: Wish, evaluate: Callable[[ModelProto], float] | None
) -> Approximation:
    if wish.data is None and evaluate is None:
        return approximate(
            model, bits=wish.bits, prune=wish.prune, max_rel_error=wish.max_rel_error
        )
    if wish.bits is not None:
        raise RecipeError("--bits and --max-rel-error: give one of them, it settles the other")
    assert wish.max_rel_error is not None  # pack_file asked
    if evaluate is None:
        assert wish.data is not None
        evaluate = output_error(model, inputs_from(wish.data, model))
    return search(model, evaluate, wish.max_rel_error, prune=wish.prune)


def inputs_from(data: str, model: ModelProto) -> list[dict[str, NDArray[Any]]]:
    """Inputs of a model: examples of a data set, or made-up ones for "random".

    Raises:
        Prune2OnnxError: there are no such data.
    """
    opened = session(model)
    if data == "random":
        return [random_inputs(opened, seed) for seed in range(4)]
    from prune2onnx.data import first, load_data

    name = opened.get_inputs()[0].name
    return [{name: x} for x in first(load_data(data).validation, _EXAMPLES)]


def output_error(
    model: ModelProto, inputs: list[dict[str, NDArray[Any]]]
) -> Callable[[ModelProto], float]:
    """Measures how far a model's outputs are from those of `model`: ||Y' - Y|| / ||Y||.

    Y is one output for all inputs together; of several outputs the worst counts.
    """
    wanted = outputs_of(model, inputs)
    count = len(wanted) // len(inputs)

    def evaluate(other: ModelProto) -> float:
        distance, norm = np.zeros(count), np.zeros(count)
        for index, (got, want) in enumerate(zip(outputs_of(other, inputs), wanted, strict=True)):
            if want.dtype.kind == "f":
                off = got.astype(np.float64) - want
                distance[index % count] += float(np.square(off).sum())
                norm[index % count] += float(np.square(want.astype(np.float64)).sum())
        return float(np.sqrt(distance / np.where(norm > 0, norm, 1)).max(initial=0.0))

    return evaluate
