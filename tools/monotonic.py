"""Do more bytes ever mean a larger error? Twenty settings of each model, calibrated.

    PRUNE2ONNX_DATA=DIR python tools/monotonic.py resnet20 resnet32 FILE.onnx:text:48x192 ...

A model is one of the trained ResNets with images of the CIFAR-10 copy, or a file with drawn lines
of words ("text") or enlarged images ("photos") of a size, as in tools/calibrated.py. 64 examples
calibrate, 64 others are held out. Slopes are spaced evenly between those of about 7 bits and 1.5
bits for each weight. Each row is a file: its bytes, and the relative error of the outputs on
held-out examples. The last line of a table says how many files have more error than a smaller one,
and by how much of it at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from calibrated import lines, photos
from lossy import images, resnet
from numpy.typing import NDArray
from onnx import ModelProto

from prune2onnx import pack
from prune2onnx.graph.file import load
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.strip import strip
from prune2onnx.packing.calibration.calibrate import Calibration
from prune2onnx.runtime.compare import output_error, run_all
from prune2onnx.runtime.inputs import in_batches
from prune2onnx.runtime.session import session

EXAMPLES, SETTINGS = 64, 20
FINEST, COARSEST = 7.0, 1.5


def subject(name: str) -> tuple[ModelProto, NDArray[np.float32]]:
    """A model, and its examples."""
    if name in ("resnet20", "resnet32"):
        return resnet(name), images("train", 2 * EXAMPLES)[0]
    file, kind, size = name.rsplit(":", 2)
    height, width = map(int, size.split("x"))
    made = {"text": lines, "photos": photos}[kind](height, width)
    return load(Path(file)), made[: 2 * EXAMPLES]


def curve(name: str) -> Iterator[tuple[int, float]]:
    """Bytes and held-out error of each setting, from the finest to the coarsest."""
    given, x = subject(name)
    model = strip(normalize(given).model).model
    opened = session(given)
    fed = opened.get_inputs()[0].name
    shuffled = x[np.random.default_rng(0).permutation(len(x))]
    batches, held = (
        [{fed: part} for part, _ in in_batches(opened, some)]
        for some in np.split(shuffled, [EXAMPLES])
    )
    error = output_error(model, held)
    calibration = Calibration(model, batches, run_all)
    calibration.measure(output_error(model, batches[:1]))
    ends = [calibration.slope(bits) for bits in (FINEST, COARSEST)]
    for slope in np.geomspace(*ends, SETTINGS):
        made = calibration.at(float(slope))
        packed = pack(made.model, quantized=made.quantized, short_names=True)
        yield packed.model.ByteSize(), error(made.model)


@click.command()
@click.argument("models", nargs=-1, required=True)
def main(models: tuple[str, ...]) -> None:
    """Prints a table for each model, and how many steps go the wrong way."""
    for name in models:
        title = Path(name.rsplit(":", 2)[0]).name
        print(f"**{title}**\n\n| bytes | error |\n{'| --- ' * 2}|", flush=True)
        found = []
        for nbytes, error in curve(name):
            found.append((nbytes, error))
            print(f"| {nbytes:,} | {error:.3%} |", flush=True)
        least, wrong = np.inf, []
        for _, error in sorted(found):
            if error > least:
                wrong.append(error / least - 1)
            least = min(least, error)
        worst = f", the largest by {max(wrong):.1%}" if wrong else ""
        print(f"\n{len(wrong)} of {SETTINGS} settings the wrong way{worst}\n", flush=True)


if __name__ == "__main__":
    main()
