"""Models that people ship, rounded with and without examples: size and error of the outputs.

    PRUNE2ONNX_DATA=DIR python tools/calibrated.py FILE.onnx --examples text|photos [--size 48x320]
        [--bits 3,4,5]

"text" draws lines of words, for recognition of text; "photos" takes images of the CIFAR-10 copy,
enlarged, for detectors. 128 examples calibrate, 32 more are held out by the command, and 64 others
are tested. Each line is `pack --bits B`, and `pack --data` with the same number of bytes for
`--target-size`: ||Y' - Y|| / ||Y|| of the outputs on the tested examples; the worst output counts.
"""

from __future__ import annotations

import io
import os
import random
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from prune2onnx import unpack
from prune2onnx.commands.pack import pack_file
from prune2onnx.graph.file import file_nbytes, load
from prune2onnx.runs.defaults import InputOptions, PackOptions
from prune2onnx.runtime.compare import output_error
from prune2onnx.runtime.session import session

DATA = Path(os.environ.get("PRUNE2ONNX_DATA", "data"))
CALIBRATED, TESTED = 160, 64
TEXT = """
the quick brown fox jumps over a lazy dog Invoice No. 2041 total amount due date 17 March please
return this form before Friday Hotel Street 12 b open daily 9 to 17:30 price per kg 3.95 no smoking
platform exit left right push pull danger high voltage fresh bread milk
"""


def lines(height: int, width: int) -> NDArray[np.float32]:
    """Lines of random words, dark on light or light on dark: [n, 3, height, width] in -1 ... 1."""
    found = []
    rng = random.Random(0)
    for _ in range(CALIBRATED + TESTED):
        paper, ink = rng.randrange(170, 256), rng.randrange(0, 90)
        if rng.random() < 0.3:
            paper, ink = ink, paper
        image = Image.new("L", (width, height), paper)
        font = ImageFont.load_default(rng.randrange(height // 2, height * 3 // 4))
        text = " ".join(rng.sample(TEXT.split(), rng.randrange(2, 5)))
        ImageDraw.Draw(image).text((rng.randrange(2, 12), rng.randrange(1, 9)), text, ink, font)
        grain = np.random.default_rng(rng.randrange(2**32)).normal(0, 6, (height, width))
        found.append(np.clip(np.asarray(image, np.float32) + grain, 0, 255) / 127.5 - 1)
    return np.repeat(np.stack(found)[:, None], 3, 1).astype(np.float32)


def photos(height: int, width: int) -> NDArray[np.float32]:
    """Images of the CIFAR-10 copy: [n, 3, height, width] in 0 ... 1."""
    found: list[NDArray[np.float32]] = []
    with tarfile.open(DATA / "cifar10-jpeg.tar.gz") as archive:
        for member in archive:
            picture = archive.extractfile(member) if member.name.endswith(".jpg") else None
            if picture is None or zlib.crc32(member.name.encode()) % 97:
                continue
            image = Image.open(io.BytesIO(picture.read())).convert("RGB").resize((width, height))
            found.append(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)
            if len(found) == CALIBRATED + TESTED:
                break
    return np.stack(found)


@click.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--examples", type=click.Choice(["text", "photos"]), required=True)
@click.option("--size", default="48x320", show_default=True)
@click.option("--bits", default="3,4,5", show_default=True)
def main(file: Path, examples: str, size: str, bits: str) -> None:
    """Prints a line for each number of bits."""
    height, width = map(int, size.split("x"))
    x = {"text": lines, "photos": photos}[examples](height, width)
    name = session(file).get_inputs()[0].name
    dense = load(file)
    error = output_error(dense, [{name: one[None]} for one in x[CALIBRATED:]])
    print(f"{file.name}: {file_nbytes(file):,} bytes\n")
    print(f"| bits | bytes | error | with examples, bytes | error | CPU s |\n{'| --- ' * 6}|")
    with tempfile.TemporaryDirectory() as folder:
        data, target = Path(folder) / "data.npz", Path(folder) / "out.onnx"
        np.savez(data, **{name: x[:CALIBRATED]})
        for each in bits.split(","):
            pack_file(file, target, PackOptions(bits=float(each), strip=True))
            nbytes, without = file_nbytes(target), error(unpack(load(target)))
            began = time.process_time()
            given = InputOptions(f"npz:{data}")
            pack_file(file, target, PackOptions(target_size=nbytes, inputs=given, strip=True))
            spent = time.process_time() - began
            print(
                f"| {each} | {nbytes:,} | {without:.2%} | {file_nbytes(target):,} "
                f"| {error(unpack(load(target))):.2%} | {spent:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
