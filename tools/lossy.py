"""Lossy packing without training: size, error of the outputs, and accuracy.

    PRUNE2ONNX_DATA=DIR python tools/lossy.py [resnet20] [resnet32] [slim320] [--only TEXT]

Each row is `prune2onnx pack` with the given options, on the dense file. ResNet-20 and -32 are
trained, with BatchNorm folded, and run on the 10,000 test images of the CIFAR-10 copy. Rows with
`--data` are calibrated with 1,024 training images, and 256 others are held out. "each alone" rounds
each weight by itself, with the error of the outputs searched for on 256 training images: what
`--max-rel-error --data` did before there was calibration. slim320.onnx, a detector, comes without
data, so random inputs are used, different ones for the search and for the figures. "output": ||Y' -
Y|| / ||Y|| of an output for all inputs together; the worst output counts. "accuracy": change in
points.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from prune2onnx import export
from prune2onnx.callables import load_callable
from prune2onnx.commands.pack import pack_file
from prune2onnx.graph.file import load
from prune2onnx.runs.defaults import InputOptions, PackOptions
from prune2onnx.runtime.compare import output_error, outputs_of
from prune2onnx.runtime.inputs import random_inputs

DATA = Path(os.environ.get("PRUNE2ONNX_DATA", "data"))
MODELS = Path(__file__).parent.parent / "models"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WITHOUT = (
    *(PackOptions(bits=bits) for bits in (3, 4, 5, 6)),
    PackOptions(prune=0.3, bits=5),
    PackOptions(prune=0.5),
    PackOptions(max_rel_error=0.07),
)
ALONE = tuple(PackOptions(max_rel_error=error) for error in (0.01, 0.03, 0.05, 0.12, 0.2))
LIMITS = ({"max_error": error} for error in (0.01, 0.03, 0.05, 0.12, 0.19))
OTHERS = ({"bits": 3.0}, {"bits": 4.0}, {"prune": 0.5}, {"prune": 0.7}, {"prune": 0.5, "bits": 4.0})
CHANNELS = (
    {"channels": 0.05},
    {"channels": 0.1},
    {"channels": 0.2},
    {"channels": 0.1, "bits": 4.0},
)
CALIBRATED = tuple(PackOptions(**given, examples=1024) for given in (*LIMITS, *OTHERS, *CHANNELS))


def images(part: str, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images of the CIFAR-10 copy, evenly from all classes: [n, 3, 32, 32] normalized, labels."""
    with tarfile.open(DATA / "cifar10-jpeg.tar.gz") as archive:
        names = sorted(n for n in archive.getnames() if n.startswith(f"{part}/") and "." in n)
        classes = sorted({name.split("/")[1] for name in names})
        chosen = set(names[:: max(1, len(names) // count)][:count])
        arrays, labels = [], []
        for member in archive:  # in the archive's order: it is compressed
            if member.name in chosen:
                picture = archive.extractfile(member)
                assert picture is not None
                arrays.append(np.asarray(Image.open(io.BytesIO(picture.read())).convert("RGB")))
                labels.append(classes.index(member.name.split("/")[1]))
    x = (np.stack(arrays).astype(np.float32) / 255 - MEAN) / STD
    return x.transpose(0, 3, 1, 2).astype(np.float32), np.array(labels)


def resnet(name: str) -> onnx.ModelProto:
    """A trained ResNet as a dense file."""
    model = load_callable(f"{MODELS / 'resnet_cifar.py'}:{name}")()
    model.load_state_dict(load_file(DATA / "weights" / f"{name}_cifar10.safetensors"), strict=False)
    return export(model.eval(), (3, 32, 32))  # folds BatchNorm


def described(options: PackOptions) -> str:
    """The options as on the command line."""
    values = {
        "--bits": options.bits,
        "--prune": options.prune,
        "--prune channels": options.channels,
        "--max-rel-error": options.max_rel_error,
        "--max-error": options.max_error,
    }
    text = " ".join(f"{name} {value:g}" for name, value in values.items() if value is not None)
    text = text.replace("channels ", "channels:")
    return text + (" --data ..." if options.inputs.data else "")


def table(name: str, folder: Path, only: str) -> None:
    """Prints one network's rows, or those in whose description a text occurs."""
    source = folder / f"{name}.onnx"
    labels = None
    if name == "slim320":
        source = DATA / "onnx" / "slim320.onnx"
        searched = random_inputs(load(source), range(8))
        tested = random_inputs(load(source), range(100, 116))
    else:
        onnx.save(resnet(name), source)
        training = images("train", 1280)[0]
        searched = [{"input": training[:256]}]
        np.savez(folder / "training.npz", input=training)
        x, labels = images("test", 10_000)
        tested = [{"input": part} for part in np.array_split(x, 40)]
    dense = load(source)
    reference = outputs_of(dense, tested)
    error = output_error(dense, tested)
    size = source.stat().st_size

    def accuracy(outputs: list[Any]) -> float:
        return 100 * float(np.mean(np.concatenate(outputs).argmax(1) == labels))

    base = f", accuracy {accuracy(reference):.2f} %" if labels is not None else ""
    print(f"\n{name}: dense {size:,} bytes{base}\n")
    print(f"| options | bytes | smaller | output | accuracy | CPU s |\n{'| --- ' * 6}|")
    data = InputOptions(f"npz:{folder / 'training.npz'}")
    with_data = [replace(options, inputs=data) for options in CALIBRATED]
    every = [*WITHOUT, *ALONE, *(with_data if labels is not None else ())]
    for options in every:
        if only not in described(options):
            continue
        target = folder / "packed.onnx"
        evaluate = output_error(dense, searched) if options in ALONE else None
        began = time.process_time()
        pack_file(source, target, options, evaluate=evaluate)
        spent = time.process_time() - began
        packed = load(target)
        change = ""
        if labels is not None:
            change = f"{accuracy(outputs_of(packed, tested)) - accuracy(reference):+.2f}"
        small = target.stat().st_size
        cells = [
            f"`{described(options)}`" + (", each alone" if options in ALONE else ""),
            f"{small:,}",
            f"{size / small:.2f}x",
            f"{error(packed):.2%}",
        ]
        print(f"| {' | '.join([*cells, change, f'{spent:.0f}'])} |", flush=True)


@click.command()
@click.argument("networks", nargs=-1)
@click.option("--only", default="", help="rows in whose options this text occurs")
def main(networks: tuple[str, ...], only: str) -> None:
    """Print the tables of the networks, by default of all three."""
    with tempfile.TemporaryDirectory() as folder:
        for name in networks or ("resnet20", "resnet32", "slim320"):
            table(name, Path(folder), only)


if __name__ == "__main__":
    main()
