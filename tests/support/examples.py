"""A small convolutional network, and examples for it."""

import networks
import numpy as np
from onnx import helper


def convnet(seed: int = 0):
    """Convolutions, with a residual and a grouped one, and a layer at the end."""
    rng = np.random.default_rng(seed)

    def conv(name, shape, source, **attributes):
        weights[f"{name}.w"] = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype(np.float32)
        weights[f"{name}.b"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
        nodes.append(
            helper.make_node("Conv", [source, f"{name}.w", f"{name}.b"], [name], **attributes)
        )
        nodes.append(helper.make_node("Relu", [name], [f"{name}.r"]))
        return f"{name}.r"

    nodes, weights = [], {}
    at = conv("a", (16, 3, 3, 3), "x", pads=[1] * 4)
    b = conv("b", (16, 4, 3, 3), at, pads=[1] * 4, group=4)
    nodes.append(helper.make_node("Add", [at, b], ["s"]))
    at = conv("c", (32, 16, 3, 3), "s", strides=[2, 2])
    nodes.append(helper.make_node("GlobalAveragePool", [at], ["p"]))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"]))
    weights["d.w"] = rng.normal(0, 0.2, (32, 10)).astype(np.float32)
    weights["d.b"] = np.zeros(10, np.float32)
    nodes.append(helper.make_node("MatMul", ["f", "d.w"], ["m"]))
    nodes.append(helper.make_node("Add", ["m", "d.b"], ["y"]))
    return networks.model(nodes, weights, {"x": ["N", 3, 12, 12]}, {"y": ["N", 10]})


def images(count: int, seed: int) -> np.ndarray:
    """Smooth ones, as pictures are."""
    made = np.random.default_rng(seed).normal(size=(count, 3, 12, 12))
    for axis in (2, 3):
        made = made + np.roll(made, 1, axis) + np.roll(made, 2, axis)
    return made.astype(np.float32)


BATCHES = [{"x": part} for part in np.split(images(96, 0), 3)]
HELD = [{"x": images(64, 1)}]
