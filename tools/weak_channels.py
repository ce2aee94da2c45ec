"""Pruning channels by norm, in a file: what `prune2onnx shrink` can then take away.

    python tools/weak_channels.py IN.onnx OUT.onnx --share 0.3

In each Conv and Gemm but the last the outputs whose weights have the smallest sum of absolute
values become zero, with their biases: the share that is asked for, rounded down. Shapes stay as
they are, and nothing is trained.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from onnx import ModelProto, numpy_helper

from prune2onnx.intake import plain
from prune2onnx.onnxfile import load, save


def silence(model: ModelProto, share: float) -> int:
    """Makes the weakest output channels zero, in place; returns how many."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    ends = {output.name for output in model.graph.output}
    silent = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or ends & set(node.output):
            continue
        weight = numpy_helper.to_array(tensors[node.input[1]])
        norms = np.abs(weight).reshape(len(weight), -1).sum(axis=1)
        weak = np.argsort(norms)[: int(share * len(weight))]
        silent += len(weak)
        for name in node.input[1:]:
            array = numpy_helper.to_array(tensors[name]).copy()
            array[weak] = 0
            tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    return silent


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--share", default=0.3, show_default=True, help="of the channels of a layer")
def main(source: Path, target: Path, share: float) -> None:
    """Write SOURCE to TARGET, its weakest channels zero."""
    model = plain(load(source)).model
    click.echo(f"{silence(model, share)} channels are zero")
    save(model, target)


if __name__ == "__main__":
    main()
