"""Sizes of files beside xz and zstd, and what they take to open: dense, balanced and small.

    python tools/real_sizes.py FILE.onnx... [--rounds 5]

All columns start from the file, normalized and stripped of what inference does not need, names
included (`--anonymize`), so that no compressor gains from text. Loads: fresh processes with one
thread, files interleaved, medians. Prints a Markdown table.
"""

from __future__ import annotations

import lzma
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import zstandard
from onnx import ModelProto

from prune2onnx.commands.source import read
from prune2onnx.graph.file import save
from prune2onnx.graph.names import anonymize
from prune2onnx.graph.strip import strip
from prune2onnx.packing.pack import pack_normalized
from prune2onnx.runtime.latency import load_in_fresh_process

LOADS = ("balanced", "small")


def forms(path: Path) -> dict[str, ModelProto]:
    """The dense model and the packed ones."""
    normal = read(path).normal
    dense = anonymize(strip(normal.model).model).model
    given = replace(normal, model=dense, reasons={})
    made = {load: pack_normalized(given, load=load, anonymize=True).model for load in LOADS}
    return {"dense": dense, **made}


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=5, help="fresh processes for each file")
def main(files: tuple[Path, ...], rounds: int) -> None:
    """Prints sizes and loads of each file."""
    print(
        "| file | dense | xz -9 | zstd -19 | balanced | small | balanced / xz | small / xz "
        "| CPU ms, dense | balanced | small | peak MB, dense | balanced | small |"
    )
    print(f"|{' --- |' * 14}")
    for path in files:
        made = forms(path)
        content = made["dense"].SerializeToString()
        xz = len(lzma.compress(content, preset=9))
        zstd = len(zstandard.ZstdCompressor(19).compress(content))
        with tempfile.TemporaryDirectory() as folder:
            stored = {
                name: save(one, Path(folder) / f"{name}.onnx")[0] for name, one in made.items()
            }
            opened = {name: [load_in_fresh_process(file)] for name, file in stored.items()}
            for _ in range(rounds - 1):
                for name, file in stored.items():
                    opened[name].append(load_in_fresh_process(file))
            sizes = {name: file.stat().st_size for name, file in stored.items()}
        cpu = {name: median(one.cpu_ms for one in every) for name, every in opened.items()}
        peak = {name: median(one.peak_rss_bytes for one in every) for name, every in opened.items()}
        cells = [path.name, *(f"{size:,}" for size in (len(content), xz, zstd))]
        cells += [f"{sizes[load]:,}" for load in LOADS]
        cells += [f"{sizes[load] / xz:.3f}" for load in LOADS]
        cells.append(f"{cpu['dense']:.0f}")
        cells += [f"{cpu[load]:.0f} ({cpu[load] / cpu['dense']:.2f}x)" for load in LOADS]
        cells.append(f"{peak['dense'] / 1e6:.0f}")
        cells += [f"{peak[load] / 1e6:.0f} ({peak[load] / peak['dense']:.2f}x)" for load in LOADS]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
