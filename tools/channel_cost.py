"""The cost of channels in onnxruntime: time of 3x3 convolutions by their number, float32 and int8.

    python tools/channel_cost.py --batch 1,16

Multiply-adds fall with the square of the number of channels; time does not. Six convolutions in a
row, one thread, the shortest of fifteen runs, since other processes affect medians.
"""

from __future__ import annotations

import time

import click
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from prune2onnx import quantize_int8
from prune2onnx.runtime.session import session

SIDES = {32: (6, 8, 10, 12, 14, 16), 16: (12, 16, 20, 24, 28, 32), 8: (24, 32, 40, 48, 56, 64)}
"""Pixels per side -> channels: those of ResNet-20's stages, and fewer."""
LAYERS, RUNS = 6, 15


def network(channels: int, side: int) -> ModelProto:
    """Convolutions with ReLU and this number of channels each, then the mean of each channel."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index in range(LAYERS):
        inputs = channels if index else 3
        scale = np.float32((9 * inputs) ** -0.5)
        w = rng.normal(size=(channels, inputs, 3, 3)).astype(np.float32) * scale
        weights.append(numpy_helper.from_array(w, f"w{index}"))
        weights.append(numpy_helper.from_array(np.zeros(channels, np.float32), f"b{index}"))
        inputs_of = [value, f"w{index}", f"b{index}"]
        value = f"r{index}"
        nodes.append(helper.make_node("Conv", inputs_of, [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [value]))
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["y"]))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", 1, ["N", 3, side, side])],
        [helper.make_tensor_value_info("y", 1, ["N", channels, 1, 1])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def milliseconds(model: ModelProto, x: NDArray[np.float32]) -> float:
    """The time of the shortest inference."""
    opened: ort.InferenceSession = session(model, threads=1)
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        opened.run(None, {"x": x})
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


@click.command()
@click.option("--batch", default="1,16", help="examples, comma-separated")
def main(batch: str) -> None:
    """Print a table for each number of examples."""
    for examples in map(int, batch.split(",")):
        click.echo(f"\nbatch {examples}, ms\n\n| pixels | channels | float32 | int8 |")
        click.echo("| --- | --- | --- | --- |")
        for side, counts in SIDES.items():
            x = np.random.default_rng(1).random((examples, 3, side, side), np.float32)
            for channels in counts:
                dense = network(channels, side)
                int8 = quantize_int8(dense, [{"x": x}]).model
                cells = (f"{milliseconds(model, x):.3f}" for model in (dense, int8))
                click.echo(f"| {side}x{side} | {channels} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
