"""An LSTM in int8 beside float32: error and time, by units, tokens and sequences at a time.

    python tools/recurrent.py

Weights and inputs are random, normal, of a variance that keeps values near 1. Medians of one
thread, in microseconds, interleaved.
"""

from __future__ import annotations

import time

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.packing.compute.narrow import narrowed

SIZES = ((64, 2), (128, 1), (256, 1), (512, 1))  # units, directions
RUNS = ((1, 1), (20, 1), (20, 8))  # tokens, sequences


def network(units: int, directions: int) -> ModelProto:
    """One LSTM, as wide as its inputs."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(0, units**-0.5, (directions, 4 * units, units)),
        "r": rng.normal(0, units**-0.5, (directions, 4 * units, units)),
        "b": rng.normal(0, 0.1, (directions, 8 * units)),
    }
    node = helper.make_node(
        "LSTM",
        ["x", "w", "r", "b"],
        ["y"],
        hidden_size=units,
        direction="bidirectional" if directions == 2 else "forward",
    )
    graph = helper.make_graph(
        [node],
        "lstm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s", "b", units])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", directions, "b", units])],
        [
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in weights.items()
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def main() -> None:
    """Prints a line for each size and run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    print("| units | directions | tokens | sequences | error | float32 | int8 | of the time |")
    print("| --- " * 8 + "|")
    for units, directions in SIZES:
        dense = network(units, directions)
        opened = [
            onnxruntime.InferenceSession(model.SerializeToString(), options)
            for model in (dense, narrowed(dense, "int8").model)
        ]
        for tokens, sequences in RUNS:
            x = np.random.default_rng(1).normal(size=(tokens, sequences, units)).astype(np.float32)
            want, got = (session.run(None, {"x": x})[0] for session in opened)
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            times: list[list[float]] = [[], []]
            while sum(map(sum, times)) < 0.5 or len(times[0]) < 20:
                for session, spent in zip(opened, times, strict=True):
                    began = time.perf_counter()
                    session.run(None, {"x": x})
                    spent.append(time.perf_counter() - began)
            first, second = (1e6 * np.median(spent) for spent in times)
            print(
                f"| {units} | {directions} | {tokens} | {sequences} | {error:.2%} | {first:,.0f} | "
                f"{second:,.0f} | {second / first:.2f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
