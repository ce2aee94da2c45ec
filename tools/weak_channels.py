"""Prunes channels by L1 norm in a file, so that `prune2onnx shrink` can remove them.

    python tools/weak_channels.py IN.onnx OUT.onnx --fraction 0.3

In each Conv and Gemm except the last, the output channels whose weights have the smallest L1 norm
become zero, with their biases: the given fraction of them, rounded down. Shapes stay as they are,
and nothing is trained.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from onnx import ModelProto, numpy_helper

from prune2onnx.graph.file import load, save
from prune2onnx.graph.normalize import normalize


def zero_weakest(model: ModelProto, fraction: float) -> int:
    """Makes the weakest output channels zero, in place; returns how many."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    ends = {output.name for output in model.graph.output}
    count = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or ends & set(node.output):
            continue
        weight = numpy_helper.to_array(tensors[node.input[1]])
        norms = np.abs(weight).reshape(len(weight), -1).sum(axis=1)
        weak = np.argsort(norms)[: int(fraction * len(weight))]
        count += len(weak)
        for name in node.input[1:]:
            array = numpy_helper.to_array(tensors[name]).copy()
            array[weak] = 0
            tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    return count


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--fraction",
    "--share",
    "fraction",
    default=0.3,
    show_default=True,
    help="fraction of each layer's channels to prune, 0-1",
)
def main(source: Path, target: Path, fraction: float) -> None:
    """Write SOURCE to TARGET, with its weakest channels zero."""
    model = normalize(load(source)).model
    click.echo(f"{zero_weakest(model, fraction)} channels are zero")
    save(model, target)


if __name__ == "__main__":
    main()
