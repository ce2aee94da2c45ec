"""What loads are predicted to take, beside what they take.

    python tools/predict_load.py [FILE.onnx...] [--megabytes 1,10,40] [--rounds 7] [--fit]

Packs each model for `small`, `balanced` and `fast`, and opens the packed and the unpacked files in
fresh processes with one thread, those of a model interleaved, medians. The models are the files,
and the stacks of tools/load_cost.py of so many MB, in all forms. Prints a Markdown table of CPU
time and peak memory, predicted / measured and the error, then how many errors are below 15 and
30 %. With `--fit`, prints the constants of `packing.load_cost` with the least squared relative
errors.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from load_cost import FORMS, stack
from onnx import ModelProto
from scipy.optimize import nnls

from prune2onnx import pack, unpack
from prune2onnx.graph.file import load, save
from prune2onnx.packing import load_cost
from prune2onnx.packing.decoding import coded
from prune2onnx.packing.pack import Load
from prune2onnx.runtime.latency import load_in_fresh_process

LOADS: tuple[Load, ...] = ("small", "balanced", "fast")


@dataclass(frozen=True)
class Seen:
    """A file: what its load is predicted to take by, and what it takes."""

    name: str
    form: str
    amounts: Counter[str]
    cpu_ms: float
    peak_nbytes: float

    @property
    def errors(self) -> tuple[float, float]:
        """Relative errors of the prediction: of CPU time, of peak memory."""
        cost = load_cost.cost(self.amounts)
        return cost.cpu_ms / self.cpu_ms - 1, cost.peak_nbytes / self.peak_nbytes - 1


def models(files: Sequence[Path], megabytes: str) -> Iterator[tuple[str, ModelProto]]:
    """Names and dense models."""
    for path in files:
        yield path.name, unpack(load(path))
    for size in filter(None, megabytes.split(",")):
        for name, form in FORMS.items():
            yield f"{size} MB, {name}", stack(float(size), form)


def seen(name: str, dense: ModelProto, folder: Path, rounds: int) -> list[Seen]:
    """Packs a model, and opens all forms of it."""
    forms = {"dense": folder / "dense.onnx"} | {kind: folder / f"{kind}.onnx" for kind in LOADS}
    amounts = {}
    for form, path in forms.items():
        packed = pack(dense, load=form).model if form in LOADS else dense
        if form == "small":  # normalized
            save(unpack(packed), forms["dense"])
        found = coded(packed)
        save(packed, path)
        sizes = load_cost.sizes(found.extents)
        nbytes = path.stat().st_size
        amounts[form] = load_cost.amounts(packed.graph, sizes, nbytes, found.work)
    runs = [[load_in_fresh_process(path) for path in forms.values()] for _ in range(rounds)]
    middle = np.median(runs, axis=0)
    return [
        Seen(name, form, amounts[form], float(cpu_ms), float(peak))
        for form, (_, cpu_ms, peak) in zip(forms, middle, strict=True)
    ]


def fitted(found: Sequence[Seen], names: Sequence[str], measured: Sequence[float]) -> str:
    """Constants with the least squared relative errors, none negative."""
    matrix = np.array([[one.amounts[name] for name in names] for one in found], float)
    matrix /= np.array(measured)[:, None]
    scale = matrix.max(axis=0)
    scale[scale == 0] = 1
    constants, _ = nnls(matrix / scale, np.ones(len(found)))
    pairs = zip(names, constants / scale, strict=True)
    return "\n".join(f'    "{name}": {constant:.3g},' for name, constant in pairs)


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--megabytes", default="", help="stacks, such as 1,10,40")
@click.option("--rounds", default=7, show_default=True)
@click.option("--fit", is_flag=True, help="print constants that fit these files best")
def main(files: tuple[Path, ...], megabytes: str, rounds: int, fit: bool) -> None:
    """Prints the table."""
    print("| model | --load | CPU ms, predicted / measured | error | peak MB | error |")
    print("| --- " * 6 + "|")
    found: list[Seen] = []
    for name, dense in models(files, megabytes):
        with tempfile.TemporaryDirectory() as folder:
            rows = seen(name, dense, Path(folder), rounds)
        for one in rows:
            cost, (cpu, peak) = load_cost.cost(one.amounts), one.errors
            print(
                f"| {name} | {one.form} | {cost.cpu_ms:.0f} / {one.cpu_ms:.0f} | {cpu:+.0%} | "
                f"{cost.peak_nbytes / 1e6:.0f} / {one.peak_nbytes / 1e6:.0f} | {peak:+.0%} |",
                flush=True,
            )
        found += rows
    errors = np.abs([one.errors for one in found])
    for what, own in zip(("CPU time", "peak memory"), errors.T, strict=True):
        print(
            f"{what}: {np.mean(own < 0.15):.0%} of {len(own)} within 15 %, "
            f"{np.mean(own < 0.3):.0%} within 30 %, at most {own.max():.0%}"
        )
    if fit:
        print("CPU_MS\n" + fitted(found, list(load_cost.CPU_MS), [one.cpu_ms for one in found]))
        peaks = [one.peak_nbytes for one in found]
        print("PEAK_NBYTES\n" + fitted(found, list(load_cost.PEAK_NBYTES), peaks))


if __name__ == "__main__":
    main()
