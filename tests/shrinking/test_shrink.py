"""Shrinking: networks without their dead channels have the same outputs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
import torch
import weak_channels
from networks import MODELS, model, session
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper
from places import MODEL_FILES
from safetensors.torch import load_file

from prune2onnx.callables import call_with, load_callable
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.normalize import normalize
from prune2onnx.shrinking.liveness import FULL
from prune2onnx.shrinking.shrink import propagate_constants, shrink
from prune2onnx.training.export import export


@dataclass
class Net:
    """Writes a random network of float32 images [2, c, h, w], some of its channels dead."""

    seed: int
    opset: int
    dead: float = 0.4
    nodes: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)
    shapes: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def chance(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def node(self, op: str, inputs: list[str], shape, **attributes) -> str:
        name = f"v{len(self.shapes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.shapes[name] = list(shape)
        return name

    def store(self, array, dtype=np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(array, dtype)
        return name

    def integers(self, *values) -> str:
        return self.constant(values, np.int64)

    def constant(self, array, dtype=np.float32) -> str:
        """Stores an array in a Constant node or in an initializer."""
        if self.chance():
            return self.store(array, dtype)
        value = numpy_helper.from_array(np.asarray(array, dtype))
        return self.node("Constant", [], value.dims, value=value)

    def listed(self, op, x, shape, lists: dict[str, list[int]], at: int, **attributes) -> str:
        """A node whose lists are attributes before opset `at`, inputs from it on."""
        if self.opset < at:
            return self.node(op, [x], shape, **lists, **attributes)
        stored = [self.integers(*values) for values in lists.values()]
        return self.node(op, [x, *stored], shape, **attributes)

    def mask(self, count: int) -> np.ndarray:
        return self.rng.random(count) >= self.dead

    def normal(self, *shape) -> np.ndarray:
        return self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1)

    def bias(self, alive: np.ndarray, zero: float = 0.5) -> np.ndarray:
        bias = self.rng.normal(size=len(alive))
        return np.where(alive | (self.rng.random(len(alive)) > zero), bias, 0)

    def factors(self, rows: int, columns: int, *kernel: int):
        """[rows, columns, *kernel] with dead rows and unread columns, and its bias."""
        alive = self.mask(rows)
        weight = self.normal(rows, columns, *kernel) * alive.reshape(-1, 1, *[1] * len(kernel))
        if self.chance():
            unread = self.rng.random(columns) < self.dead
            weight[:, unread] = 0
        return weight, self.bias(alive)

    # images

    def conv(self, x: str, outputs: int | None = None) -> str:
        n, c, h, w = self.shapes[x]
        groups = self.pick(1, 1, 1, 2, c)
        if c % groups or outputs:
            groups = 1
        outputs = outputs or (groups * self.pick(1, 2) if groups == c else groups * self.pick(2, 3))
        k = self.pick(1, 3) if min(h, w) > 3 else 1
        pad, stride = self.pick(0, 1) if k > 1 else 0, self.pick(1, 1, 2) if min(h, w) > 4 else 1
        weight, bias = self.factors(outputs, c // groups, k, k)
        inputs = [x, self.store(weight)] + ([self.store(bias)] if self.chance(0.7) else [])
        shape = [n, outputs, *((s + 2 * pad - k) // stride + 1 for s in (h, w))]
        return self.node("Conv", inputs, shape, group=groups, pads=[pad] * 4, strides=[stride] * 2)

    def conv_transpose(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        groups = self.pick(1, 2, c)
        groups = groups if c % groups == 0 else 1
        each = self.pick(1, 2, 3)
        weight, bias = self.factors(groups * each, c // groups, 2, 2)
        weight = weight.reshape(groups, each, c // groups, 2, 2).swapaxes(1, 2)
        inputs = [x, self.store(weight.reshape(c, each, 2, 2)), self.store(bias)]
        stride = self.pick(1, 2) if h < 9 else 1
        shape = [n, groups * each, *((s - 1) * stride + 2 for s in (h, w))]
        return self.node("ConvTranspose", inputs, shape, group=groups, strides=[stride] * 2)

    def batch_normalization(self, x: str) -> str:
        c = self.shapes[x][1]
        alive = self.mask(c) | self.chance()
        names = [
            self.store(self.rng.normal(size=c) * alive),
            self.store(self.bias(alive)),
            self.store(self.rng.normal(size=c)),
            self.store(self.rng.random(c) + 0.5),
        ]
        return self.node("BatchNormalization", [x, *names], self.shapes[x])

    def instance_normalization(self, x: str) -> str:
        alive = self.mask(self.shapes[x][1])
        names = [self.store(self.normal(len(alive)) * alive), self.store(self.bias(alive))]
        return self.node("InstanceNormalization", [x, *names], self.shapes[x])

    ACTIVATIONS = (
        *("Relu", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "HardSigmoid", "Softplus"),
        *("Neg", "Identity", "PRelu", "Clip", "Dropout", "Abs"),
    )

    def activation(self, x: str) -> str:
        shape = self.shapes[x]
        op = self.pick(*self.ACTIVATIONS)
        if op == "PRelu":
            slope = self.rng.normal(size=(shape[1], *[1] * (len(shape) - 2)))
            return self.node(op, [x, self.store(slope)], shape)
        if op == "Clip" and self.opset < 11:
            return self.node(op, [x], shape, min=0.1, max=1.5)
        if op == "Clip":
            return self.node(op, [x, self.store(0.1), self.store(1.5)], shape)
        return self.node(op, [x], shape)

    def pool(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        if min(h, w) < 3:
            return self.node("GlobalAveragePool", [x], [n, c, 1, 1])
        pad = self.pick(0, 1)
        attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [pad] * 4}
        shape = [n, c, *((s + 2 * pad - 2) // 2 + 1 for s in (h, w))]
        if self.chance():
            return self.node("MaxPool", [x], shape, **attributes)
        return self.node("AveragePool", [x], shape, count_include_pad=self.pick(0, 1), **attributes)

    def parameter(self, x: str) -> str:
        """Arithmetic with numbers, one for each channel or place or for all."""
        _, c, h, w = self.shapes[x]
        shape = self.pick((c, 1, 1), (1, c, 1, 1), (1,), (h, w), (c, h, w))
        array = self.rng.normal(size=shape)
        op = self.pick("Add", "Sub", "Mul", "Div", "Max")
        if op == "Mul" and len(shape) > 2 and shape[-1] == 1:
            array *= self.mask(array.size).reshape(shape)
        if op == "Div":
            array = np.abs(array) + 0.5
        names = [x, self.store(array)]
        if op in ("Add", "Mul", "Max") and self.chance():
            names.reverse()
        return self.node(op, names, self.shapes[x])

    def residual(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        y = self.node("Relu", [x], self.shapes[x]) if self.chance() else x
        weight, bias = self.factors(c, c, 3, 3)
        y = self.node("Conv", [y, self.store(weight), self.store(bias)], [n, c, h, w],
                      pads=[1] * 4)  # fmt: skip
        y = self.activation(y) if self.chance() else y
        return self.node(self.pick("Add", "Add", "Mul"), [x, y], [n, c, h, w])

    def gate(self, x: str) -> str:
        n, c, *_ = self.shapes[x]
        y = self.node("GlobalAveragePool", [x], [n, c, 1, 1])
        weight, bias = self.factors(c, c, 1, 1)
        y = self.node("Conv", [y, self.store(weight), self.store(bias)], [n, c, 1, 1])
        return self.node("Mul", [self.node("Sigmoid", [y], [n, c, 1, 1]), x], self.shapes[x])

    def concat(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        weight, bias = self.factors(3, c, 1, 1)
        y = self.node("Conv", [x, self.store(weight), self.store(bias)], [n, 3, h, w])
        return self.node("Concat", [y, x] if self.chance() else [x, y], [n, c + 3, h, w], axis=1)

    def twice(self, x: str) -> str:
        """Two convolutions with the same weights."""
        n, c, h, w = self.shapes[x]
        weight, bias = self.factors(c, c, 1, 1)
        names = [self.store(weight), self.store(bias)][: self.pick(1, 2)]
        one = self.node("Conv", [x, *names], [n, c, h, w])
        two = self.node("Conv", [self.activation(x), *names], [n, c, h, w])
        if self.chance():
            return self.node("Add", [one, self.activation(two)], [n, c, h, w])
        return self.conv(self.node("Concat", [one, two], [n, 2 * c, h, w], axis=1))

    def stack(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        y = self.activation(x)
        return self.node("Concat", [x, y], [n, c, h, 2 * w], axis=3)

    def split(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        first = int(self.rng.integers(1, c)) if c > 1 else 0
        if not first:
            return x
        names = [f"v{len(self.shapes)}a", f"v{len(self.shapes)}b"]
        sizes = [first, c - first]
        if c % 2 == 0 and self.chance():
            sizes = [c // 2] * 2
            extra = {"num_outputs": 2} if self.opset >= 18 else {}
            self.nodes.append(helper.make_node("Split", [x], names, axis=1, **extra))
        elif self.opset < 13:
            self.nodes.append(helper.make_node("Split", [x], names, axis=1, split=sizes))
        else:
            stored = self.integers(*sizes)
            self.nodes.append(helper.make_node("Split", [x, stored], names, axis=1))
        self.shapes.update({name: [n, s, h, w] for name, s in zip(names, sizes, strict=True)})
        if self.chance():
            names[0] = self.activation(names[0])
        if self.chance():
            return names[1]
        return self.node("Concat", names[::-1], [n, c, h, w], axis=1)

    def pad(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        front, back, side = self.pick(0, 1, 2), self.pick(0, 2), self.pick(0, 1)
        pads = [0, front, side, 0, 0, back, 0, side]
        shape = [n, c + front + back, h + side, w + side]
        value = self.pick(0.0, 0.5)
        if self.opset < 11:
            return self.node("Pad", [x], shape, pads=pads, value=value)
        inputs = [x, self.integers(*pads)] + ([self.store(value)] if value else [])
        return self.node("Pad", inputs, shape)

    def cut(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        start, stop = sorted(self.rng.choice(c + 1, 2, replace=False).tolist())
        lists = {"starts": [start], "ends": [stop if stop < c else 2**62], "axes": [1]}
        if self.chance() and h > 3:
            stop, start = c, 0
            lists = {"starts": [1], "ends": [-1], "axes": [2]}
            h -= 2
        return self.listed("Slice", x, [n, stop - start, h, w], lists, 10)

    def shuffle(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        order = self.rng.permutation(c)[: max(1, c - self.pick(0, 0, 1))]
        return self.node("Gather", [x, self.integers(*order)], [n, len(order), h, w], axis=1)

    def resize(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        if h > 6:
            return x
        shape = [n, c, 2 * h, 2 * w]
        scales = self.store([1, 1, 2, 2])
        if self.opset < 11:
            return self.node("Resize", [x, scales], shape)
        mode = {"mode": self.pick("nearest", "linear")}
        if self.chance():
            inputs = [x, self.store([]), scales]
        else:
            inputs = [x, self.store([]), self.store([]), self.integers(*shape)]
        return self.node("Resize", inputs, shape, **mode)

    def there_and_back(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        y = self.node("Transpose", [x], [n, h, w, c], perm=[0, 2, 3, 1])
        if self.chance():
            y = self.node("Add", [y, self.store(self.normal(c))], [n, h, w, c])
        return self.node("Transpose", [y], [n, c, h, w], perm=[0, 3, 1, 2])

    def blocks(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        if c % 4 == 0 and h < 7:
            mode = {"mode": self.pick("DCR", "CRD")} if self.opset > 10 else {}
            return self.node("DepthToSpace", [x], [n, c // 4, 2 * h, 2 * w], blocksize=2, **mode)
        if h % 2 == 0 and w % 2 == 0 and c < 5:
            return self.node("SpaceToDepth", [x], [n, 4 * c, h // 2, w // 2], blocksize=2)
        return x

    def softmax(self, x: str) -> str:
        """One that reads all channels."""
        return self.node("Softmax", [x], self.shapes[x], axis=1)

    IMAGES = (
        *(conv, conv, conv, conv, activation, activation, activation, batch_normalization, pool),
        *(conv_transpose, instance_normalization, parameter, residual, gate, concat, stack, split),
        *(twice, pad, cut, shuffle, resize, there_and_back, blocks),
    )

    # rows of features

    def flat(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        way = self.pick(
            "Flatten", "Reshape", "ReduceMean", "Squeeze", "NHWC", "computed", "sequence"
        )
        if way == "Flatten":
            return self.node(way, [x], [n, c * h * w])
        if way == "Reshape":
            shape = self.pick([0, -1], [-1, c * h * w], [0, c * h * w])
            return self.node(way, [x, self.integers(*shape)], [n, c * h * w])
        if way == "ReduceMean":
            return self.listed(way, x, [n, c], {"axes": [2, 3]}, 18, keepdims=0)
        if way == "sequence":
            return self.sequence(x)
        if way == "Squeeze":
            y = self.node("GlobalMaxPool", [x], [n, c, 1, 1])
            return self.listed(way, y, [n, c], {"axes": [2, 3]}, 13)
        if way == "NHWC":
            y = self.node("Transpose", [x], [n, h, w, c], perm=[0, 2, 3, 1])
            return self.node("Reshape", [y, self.integers(0, h * w * c)], [n, c * h * w])
        y = self.node("Shape", [x], [4])
        y = self.node("Gather", [y, self.store(0, np.int64)], [], axis=0)
        y = self.listed("Unsqueeze", y, [1], {"axes": [0]}, 13)
        y = self.node("Concat", [y, self.integers(self.pick(-1, c * h * w))], [2], axis=0)
        return self.node("Reshape", [x, y], [n, c * h * w])

    def sequence(self, x: str) -> str:
        """Places of the image in a row, each with its features, as transformers have them."""
        n, c, h, w = self.shapes[x]
        x = self.node("Reshape", [x, self.integers(0, c, -1)], [n, c, h * w])
        x = self.node("Transpose", [x], [n, h * w, c], perm=[0, 2, 1])
        for _ in range(self.pick(1, 2)):
            y = x
            for outputs in (self.pick(2, 5), c):
                weight, bias = self.factors(outputs, self.shapes[y][2])
                y = self.node("MatMul", [y, self.store(weight.T)], [n, h * w, outputs])
                y = self.node("Add", [self.store(bias), y], [n, h * w, outputs])
                y = self.activation(y) if outputs != c else y
            x = self.node("Add", [x, y], [n, h * w, c])
        return self.listed("ReduceMax", x, [n, c], {"axes": [1]}, 18, keepdims=0)

    def gemm(self, x: str, outputs: int | None = None) -> str:
        n, c = self.shapes[x]
        outputs = outputs or int(self.rng.integers(1, 9))
        weight, bias = self.factors(outputs, c)
        turned = self.pick(0, 1)
        names = [x, self.store(weight if turned else weight.T)]
        if self.opset < 11 or self.chance(0.7):
            names.append(self.store(self.pick(bias, bias[None], bias[:1])))
        attributes = {"alpha": self.pick(1.0, 0.5), "beta": self.pick(1.0, 2.0)}
        return self.node("Gemm", names, [n, outputs], transB=turned, **attributes)

    def matmul(self, x: str) -> str:
        n, c = self.shapes[x]
        outputs = int(self.rng.integers(1, 9))
        weight, bias = self.factors(outputs, c)
        y = self.node("MatMul", [x, self.store(weight.T)], [n, outputs])
        if self.chance(0.7):
            names = [y, self.store(bias)]
            y = self.node("Add", names if self.chance() else names[::-1], [n, outputs])
        return y

    def sum_(self, x: str) -> str:
        return self.node(self.pick("Add", "Mul", "Sub"), [self.matmul_same(x), x], self.shapes[x])

    def matmul_same(self, x: str) -> str:
        n, c = self.shapes[x]
        weight, _ = self.factors(c, c)
        return self.node("MatMul", [x, self.store(weight.T)], [n, c])

    def layer_normalization(self, x: str) -> str:
        if self.opset < 17:
            return self.node("Softmax", [x], self.shapes[x], axis=1)
        names = [self.store(self.normal(self.shapes[x][1])) for _ in range(2)]
        return self.node("LayerNormalization", [x, *names], self.shapes[x])

    def unflat(self, x: str) -> str:
        """To images of one row and back: a reshape that cuts channels into blocks."""
        n, c = self.shapes[x]
        if c % 2:
            return x
        shape = [n, c // 2, 1, 2]
        y = self.node(
            "Reshape", [x, self.integers(*self.pick([0, -1, 1, 2], [-1, c // 2, 1, 2]))], shape
        )
        return self.node("Flatten", [self.conv(y, self.pick(1, 4))], [n, -1])

    ROWS = (gemm, gemm, matmul, matmul, activation, activation, sum_, layer_normalization)

    def build(self) -> ModelProto:
        x = self.node("Identity", ["x"], [2, 3, 8, 8])
        for _ in range(int(self.rng.integers(2, 9))):
            x = self.pick(*self.IMAGES)(self, x)
        if self.chance(0.8):
            x = self.flat(x)
            for _ in range(int(self.rng.integers(0, 6))):
                x = self.pick(*self.ROWS)(self, x)
            if self.chance(0.7):
                x = self.gemm(x, 3)
        self.nodes.append(helper.make_node("Identity", [x], ["y"]))
        batch = self.pick(2, "N")
        shape = [batch, *self.shapes[x][1:]]
        return model(self.nodes, self.weights, {"x": [batch, 3, 8, 8]}, {"y": shape}, self.opset)


def answers(m: ModelProto, seed: int = 0) -> list[np.ndarray]:
    """All outputs for random inputs, where a dynamic extent is 2, without optimisations."""
    running = session(m, "ORT_DISABLE_ALL")
    rng = np.random.default_rng(seed)
    types = {"tensor(float)": np.float32, "tensor(double)": np.float64}
    given = {
        one.name: rng.normal(size=[e if isinstance(e, int) else 2 for e in one.shape]).astype(
            types.get(one.type, np.float16)
        )
        for one in running.get_inputs()
    }
    return running.run(None, given)


def assert_same_answers(one: ModelProto, other: ModelProto, tolerance: float = 1e-5) -> None:
    assert list(one.graph.input) == list(other.graph.input)
    assert list(one.graph.output) == list(other.graph.output)
    for want, got in zip(answers(one), answers(other), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


def with_values(m: ModelProto, values: dict[str, np.ndarray]) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(m)
    for tensor in result.graph.initializer:
        if tensor.name in values:
            array = values[tensor.name]
            assert array.shape == tuple(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return result


def shapes(m: ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in m.graph.initializer}


@pytest.mark.parametrize("opset", [10, 12, 13, 18, 21])
@pytest.mark.parametrize("seed", range(50))
def test_random_networks_keep_their_outputs(seed, opset):
    m = Net(1000 * opset + seed, opset).build()
    before = m.SerializeToString()
    small = shrink(m)
    assert m.SerializeToString() == before
    onnx.checker.check_model(small.model, full_check=True)
    assert_same_answers(m, small.model)
    assert shrink(small.model).model == small.model
    steady = with_values(m, propagate_constants(m))
    assert_same_answers(m, steady)
    assert propagate_constants(steady) == {}
    again = shrink(steady)
    assert shapes(again.model) == shapes(small.model)
    assert again.removed == small.removed


def node(op: str, inputs: list[str], outputs: list[str], **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, **attributes)


def dense(*shape: int, dead=(), unread=(), seed: int = 0) -> np.ndarray:
    """[out, in, ...] without a zero but in dead rows and unread columns."""
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    array[list(dead)] = 0
    if unread:
        array[:, list(unread)] = 0
    return array


def bias(count: int, **values: float) -> np.ndarray:
    """Ones, but for some: bias(3, at1=0.5)."""
    array = np.ones(count, np.float32)
    for place, number in values.items():
        array[int(place[2:])] = number
    return array


def floats(*values) -> np.ndarray:
    return np.array(values, np.float32)


def whole(*values) -> np.ndarray:
    return np.array(values, np.int64)


def assert_shrunk(m: ModelProto, tolerance: float = 1e-5, **wanted: tuple[int, ...]) -> ModelProto:
    """Checks the outputs and the shapes of weights; `propagate_constants` leads to the same."""
    onnx.checker.check_model(m, full_check=True)
    small = shrink(m).model
    onnx.checker.check_model(small, full_check=True)
    assert_same_answers(m, small, tolerance)
    found = shapes(small)
    assert {name: found[name] for name in wanted} == wanted
    steady = with_values(m, propagate_constants(m))
    assert_same_answers(m, steady, tolerance)
    assert shapes(shrink(steady).model) == found
    assert shrink(small).model == small
    return small


def assert_kept(m: ModelProto, *words: str) -> None:
    """Checks that a model is unchanged, byte for byte, for a reason with these words."""
    small = shrink(m)
    assert small.model.SerializeToString() == m.SerializeToString()
    assert not small.rows and not small.removed
    reasons = " / ".join(f"{what}: {reason}" for what, reason in small.reasons.items())
    for word in words:
        assert word in reasons, reasons


# One operator, or a few, between two convolutions: channels 1 and 4 of eight are dead.

CHANNELS = 8


def between(nodes, weights=None, wide: int = CHANNELS, opset: int = 18, **second) -> ModelProto:
    """x -> Conv -> a, these nodes, b -> Conv -> y."""
    first = dense(CHANNELS, 3, 3, 3, dead=(1, 4))
    shift = bias(CHANNELS, at1=0, at4=0)
    last = dense(5, wide // second.get("group", 1), 1, 1, seed=1)
    return model(
        [
            node("Conv", ["x", "first", "shift"], ["a"]),
            *nodes,
            node("Conv", ["b", "last", "bias"], ["y"], **second),
        ],
        {"first": first, "shift": shift, "last": last, "bias": bias(5), **(weights or {})},
        {"x": ["N", 3, 10, 10]},
        {"y": [None] * 4},
        opset,
    )


def channels(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32).reshape(-1, 1, 1)


ONE_BY_ONE = {
    "Relu": [node("Relu", ["a"], ["b"])],
    "Sigmoid, whose zero is a half": [node("Sigmoid", ["a"], ["b"])],
    "Clip": [node("Clip", ["a", "low", "high"], ["b"])],
    "PRelu": [node("PRelu", ["a", "slope"], ["b"])],
    "Gelu, as exporters write it": [
        node("Div", ["a", "root"], ["g"]),
        node("Erf", ["g"], ["h"]),
        node("Add", ["h", "one"], ["i"]),
        node("Mul", ["a", "i"], ["b"]),
    ],
    "Add of one number for each": [node("Add", ["slope", "a"], ["b"])],
    "Mul by one number for all": [node("Mul", ["a", "root"], ["b"])],
    "a value with itself": [node("Add", ["a", "a"], ["b"])],
    "BatchNormalization": [node("BatchNormalization", ["a", "v", "v", "v", "v2"], ["b"])],
    "InstanceNormalization": [node("InstanceNormalization", ["a", "v", "v"], ["b"])],
    "MaxPool": [node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], pads=[1, 1, 0, 0])],
    "AveragePool": [node("AveragePool", ["a"], ["b"], kernel_shape=[2, 2], pads=[1, 1, 0, 0])],
    "GlobalAveragePool": [node("GlobalAveragePool", ["a"], ["b"])],
    "ReduceMean": [node("ReduceMean", ["a", "places"], ["b"], keepdims=1)],
    "ReduceSum": [node("ReduceSum", ["a", "places"], ["b"], keepdims=1)],
    "Dropout": [node("Dropout", ["a"], ["b"])],
    "Pad at the sides": [node("Pad", ["a", "sides"], ["b"])],
    "Resize by scales": [node("Resize", ["a", "", "scales"], ["b"], mode="linear")],
    "Resize by sizes": [node("Resize", ["a", "", "", "sizes"], ["b"])],
    "Resize of other axes": [node("Resize", ["a", "", "two"], ["b"], axes=[2, 3])],
    "Slice at the sides": [node("Slice", ["a", "from", "to", "places"], ["b"])],
    "Transpose": [
        node("Transpose", ["a"], ["g"], perm=[0, 2, 3, 1]),
        node("Transpose", ["g"], ["b"], perm=[0, 3, 1, 2]),
    ],
    "Squeeze and Unsqueeze": [
        node("GlobalMaxPool", ["a"], ["g"]),
        node("Squeeze", ["g", "places"], ["h"]),
        node("Unsqueeze", ["h", "places"], ["b"]),
    ],
    "Reshape of places": [node("Reshape", ["a", "flat"], ["b"])],
    "Reshape to a computed shape": [
        node("Shape", ["a"], ["g"]),
        node("Slice", ["g", "zero", "two_"], ["h"]),
        node("Concat", ["h", "sixteen", "four"], ["i"], axis=0),
        node("Reshape", ["a", "i"], ["b"]),
    ],
    "Split of places": [
        node("Split", ["a"], ["g", "h"], axis=2, num_outputs=2),
        node("Concat", ["h", "g"], ["b"], axis=3),
    ],
    "depthwise Conv": [node("Conv", ["a", "each"], ["b"], group=CHANNELS)],
    "depthwise ConvTranspose": [node("ConvTranspose", ["a", "each"], ["b"], group=CHANNELS)],
}
STORED = {
    "low": floats(0.1).reshape(()),
    "high": floats(2).reshape(()),
    "slope": channels(*range(CHANNELS)),
    "root": floats(1.41421356),
    "one": floats(1),
    "v": np.arange(1, CHANNELS + 1, dtype=np.float32),
    "v2": np.arange(1, CHANNELS + 1, dtype=np.float32),
    "places": whole(2, 3),
    "sides": whole(0, 0, 1, 1, 0, 0, 0, 0),
    "scales": floats(1, 1, 2, 2),
    "two": floats(2, 2),
    "two_": whole(2),
    "sizes": whole(2, CHANNELS, 16, 16),
    "from": whole(1, 1),
    "to": whole(-1, 2**62),
    "flat": whole(0, CHANNELS, 16, 4),
    "zero": whole(0),
    "sixteen": whole(16),
    "four": whole(4),
    "each": dense(CHANNELS, 1, 2, 2, seed=5),
}


def stored_for(nodes) -> dict[str, np.ndarray]:
    return {name: STORED[name] for one in nodes for name in one.input if name in STORED}


@pytest.mark.parametrize("nodes", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_channels_go_through_operators_that_keep_them_apart(nodes):
    m = between(nodes, stored_for(nodes))
    if any(one.input[-1] == "sizes" for one in nodes):
        m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    small = assert_shrunk(m, first=(6, 3, 3, 3), shift=(6,), last=(5, 6, 1, 1))
    found = shapes(small)
    assert all(found[name][0] == 6 for name in ("slope", "v", "v2", "each") if name in found)


MOVED = {
    "Concat": ([node("Concat", ["a", "x8"], ["b"], axis=1)], 11, 9),
    "Concat with itself": ([node("Concat", ["a", "a"], ["b"], axis=1)], 16, 12),
    "Gather": ([node("Gather", ["a", "order"], ["b"], axis=1)], 4, 3),
    "Slice": ([node("Slice", ["a", "one", "seven", "one"], ["b"])], 6, 4),
    "Split": ([node("Split", ["a", "parts"], ["g", "h"], axis=1),
               node("Concat", ["h", "g"], ["b"], axis=1)], 8, 6),
    "Split into equal parts": ([node("Split", ["a"], ["g", "h"], axis=1, num_outputs=2),
               node("Concat", ["h", "g"], ["b"], axis=1)], 8, 6),
    "Pad": ([node("Pad", ["a", "around"], ["b"])], 11, 6),
    "SpaceToDepth": ([node("SpaceToDepth", ["a"], ["b"], blocksize=2)], 32, 24),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "wide", "left"), MOVED.values(), ids=MOVED)
def test_channels_are_found_where_they_move(nodes, wide, left):
    stored = {
        "order": whole(7, 1, 0, 3),
        "one": whole(1),
        "seven": whole(7),
        "parts": whole(3, 5),
        "around": whole(0, 1, 0, 0, 0, 2, 0, 0),
    }
    if nodes[0].input[-1] == "x8":
        nodes = [node("Slice", ["x", "zero", "eight", "places"], ["x8"]), *nodes]
        stored |= {"zero": whole(0, 0), "eight": whole(8, 8), "places": whole(2, 3)}
    names = {name for one in nodes for name in one.input}
    m = between(nodes, {k: v for k, v in stored.items() if k in names}, wide)
    first = {"Gather": 3, "Slice": 4}.get(nodes[0].op_type, 6)
    if nodes[0].output[0] == "x8":
        first = 6
    assert_shrunk(m, first=(first, 3, 3, 3), last=(5, left, 1, 1))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_blocks_of_channels_are_removed_together(mode):
    alone = [node("DepthToSpace", ["a"], ["b"], blocksize=2, mode=mode)]
    m = between(alone, wide=2)
    assert_kept(m, "alive elsewhere")  # 1 and 4 are of different blocks, or not all of one
    dead = (1, 3, 5, 7) if mode == "DCR" else (4, 5, 6, 7)
    weight = dense(CHANNELS, 3, 3, 3, dead=dead)
    m = with_values(m, {"first": weight, "shift": (weight != 0).any(axis=(1, 2, 3)).astype("f4")})
    assert_shrunk(m, first=(4, 3, 3, 3), last=(5, 1, 1, 1))


@pytest.mark.parametrize(
    "way",
    [
        [node("Flatten", ["a"], ["b"])],
        [node("Reshape", ["a", "shape"], ["b"])],
        [node("Reshape", ["a", "zero"], ["b"])],
        [node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]), node("Flatten", ["t"], ["b"])],
        [node("ReduceMean", ["a", "places"], ["b"], keepdims=0)],
    ],
)
def test_neurons_behind_images(way):
    mean = way[0].op_type == "ReduceMean"
    columns = 4 if mean else 64
    weights = {
        "first": dense(4, 3, 3, 3, dead=[2]),
        "shift": bias(4, at2=0.5),
        "w": dense(6, columns, dead=[3]),
        "c": bias(6, at3=-2),
        "v": dense(6, 2, unread=[], seed=3),
        "shape": whole(-1, 64),
        "zero": whole(0, -1),
        "places": whole(2, 3),
    }
    names = {name for one in way for name in one.input}
    for name in ("shape", "zero", "places"):
        if name not in names:
            del weights[name]
    m = model(
        [
            node("Conv", ["x", "first", "shift"], ["a"]),
            *way,
            node("Gemm", ["b", "w", "c"], ["g"], transB=1),
            node("Relu", ["g"], ["r"]),
            node("MatMul", ["r", "v"], ["y"]),
        ],
        weights,
        {"x": ["N", 3, 6, 6]},
        {"y": ["N", 2]},
    )
    small = assert_shrunk(m, first=(3, 3, 3, 3), w=(5, columns * 3 // 4), c=(5,), v=(5, 2))
    if "shape" in weights:
        assert numpy_helper.to_array(small.graph.initializer[-1]).tolist() == [-1, 48]


def test_channels_of_reshaped_rows_are_removed_in_blocks():
    """As in a generator: a layer's neurons become images."""
    m = model(
        [
            node("Gemm", ["x", "w", "c"], ["g"]),
            node("Relu", ["g"], ["h"]),
            node("Reshape", ["h", "shape"], ["i"]),
            node("ConvTranspose", ["i", "v"], ["y"], strides=[2, 2]),
        ],
        {
            "w": dense(12, 3, dead=[4, 5, 6, 7, 9]).T.copy(),
            "c": np.where(np.isin(np.arange(12), [4, 5, 6, 7, 9]), 0, 1).astype(np.float32),
            "shape": whole(-1, 3, 2, 2),
            "v": dense(3, 2, 3, 3),
        },
        {"x": ["N", 3]},
        {"y": ["N", 2, 5, 5]},
    )
    assert_shrunk(m, w=(3, 8), c=(8,), v=(2, 2, 3, 3))


# Constants


def two_convs(constant: float, **second) -> ModelProto:
    """The second of four channels holds a constant before a Relu and a second convolution."""
    return model(
        [
            node("Conv", ["x", "first", "shift"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "last", "bias"], ["y"], **second),
        ],
        {
            "first": dense(4, 3, 3, 3, dead=[1]),
            "shift": bias(4, at1=constant),
            "last": dense(2, 4, 3, 3),
            "bias": floats(0.25, -0.5),
        },
        {"x": ["N", 3, 9, 9]},
        {"y": [None] * 4},
    )


def test_a_constant_goes_into_the_next_bias():
    m = two_convs(0.5)
    small = assert_shrunk(m, first=(3, 3, 3, 3), shift=(3,), last=(2, 3, 3, 3), bias=(2,))
    want = floats(0.25, -0.5) + 0.5 * dense(2, 4, 3, 3)[:, 1].sum(axis=(1, 2))
    (got,) = (t for t in small.graph.initializer if t.name == "bias")
    np.testing.assert_allclose(numpy_helper.to_array(got), want, rtol=1e-6)
    values = propagate_constants(m)
    assert values.keys() == {"shift", "last", "bias"}
    np.testing.assert_allclose(values["bias"], want, rtol=1e-6)
    assert values["shift"].tolist() == [1, 0, 1, 1] and not values["last"][:, 1].any()
    assert (values["last"][:, [0, 2, 3]] == dense(2, 4, 3, 3)[:, [0, 2, 3]]).all()


@pytest.mark.parametrize(
    "padding", [{"pads": [1, 1, 1, 1]}, {"pads": [0, 0, 0, 1]}, {"auto_pad": "SAME_UPPER"}]
)
def test_a_padded_constant_is_not_constant_unless_it_is_zero(padding):
    assert_kept(two_convs(0.5, **padding), "first[1]: its constant goes to Conv 'y'", "pads")
    assert propagate_constants(two_convs(0.5, **padding)) == {}
    assert_shrunk(two_convs(-0.5, **padding), first=(3, 3, 3, 3), last=(2, 3, 3, 3))
    assert_shrunk(two_convs(0.5, auto_pad="VALID"), first=(3, 3, 3, 3))


def test_a_constant_before_a_pad_operator():
    def padded(value: float) -> ModelProto:
        pad = [node("Pad", ["a", "sides", "value"], ["b"])]
        m = between(pad, {"sides": STORED["sides"], "value": floats(value).reshape(())})
        return with_values(m, {"shift": bias(CHANNELS, at1=0.5, at4=0.5)})

    assert_shrunk(padded(0.5), first=(6, 3, 3, 3))
    assert_kept(padded(0.25), "first[1, 4]")


def test_a_bias_is_added_where_there_is_none():
    m = two_convs(0.5)
    del m.graph.node[2].input[2], m.graph.initializer[3]
    small = shrink(m)
    assert_same_answers(m, small.model)
    assert shapes(small.model)["last.bias"] == (2,)
    assert ("last.bias", (), (2,)) in [(r.name, r.before, r.after) for r in small.rows]
    assert propagate_constants(m) == {}  # training has no such bias


def test_the_rows_of_the_report():
    small = shrink(two_convs(0.5))
    assert [(row.name, row.before, row.after) for row in small.rows] == [
        ("first", (4, 3, 3, 3), (3, 3, 3, 3)),
        ("shift", (4,), (3,)),
        ("last", (2, 4, 3, 3), (2, 3, 3, 3)),
        ("bias", (2,), (2,)),
    ]
    assert small.removed == 1 and small.reasons == {}


@pytest.mark.parametrize("added", [True, False])
def test_a_matmul_propagates_constants_only_into_an_add_that_follows(added):
    nodes = [
        node("Gemm", ["x", "w", "c"], ["a"]),
        node("MatMul", ["a", "v"], ["y" if not added else "m"]),
    ]
    weights = {"w": dense(4, 3, dead=[2]).T.copy(), "c": bias(4, at2=2), "v": dense(4, 2)}
    if added:
        nodes.append(node("Add", ["b", "m"], ["y"]))
        weights["b"] = bias(2)
    m = model(nodes, weights, {"x": ["N", 3]}, {"y": ["N", 2]})
    if added:
        assert_shrunk(m, w=(3, 3), c=(3,), v=(3, 2), b=(2,))
    else:
        assert_kept(m, "w[2]", "no bias")
        assert_shrunk(with_values(m, {"c": bias(4, at2=0)}), w=(3, 3), v=(3, 2))


@pytest.mark.parametrize("c", [(4,), (1, 4), (1,), (2, 4), (2, 1), None])
@pytest.mark.parametrize("turned", [False, True])
def test_gemm_with_all_its_attributes(c, turned):
    first = dense(5, 3, dead=[0])
    second = dense(4, 5, dead=[3], seed=1)
    m = model(
        [
            node("Gemm", ["x", "first", "shift"], ["a"], transA=1, transB=1, alpha=0.5),
            node(
                "Gemm",
                ["a", "second", "c"][: 2 if c is None else 3],
                ["b"],
                alpha=2.0,
                beta=0.5,
                transB=int(turned),
            ),
            node("MatMul", ["b", "third"], ["d"]),
            node("Add", ["d", "last"], ["y"]),
        ],
        {
            "first": first,
            "shift": bias(5, at0=3),
            "second": second if turned else second.T.copy(),
            **({} if c is None else {"c": dense(*c, seed=4)}),
            "third": dense(4, 2, seed=2),
            "last": bias(2),
        },
        {"x": [3, 2]},
        {"y": [2, 2]},
    )
    small = shrink(m).model
    assert_same_answers(m, small)
    assert shrink(small).model == small
    alive = 4 if c in ((2, 4), (2, 1)) else 3  # their last is not a constant but one per example
    want = {"first": (4, 3), "second": (alive, 4) if turned else (4, alive), "third": (alive, 2)}
    assert {name: shapes(small)[name] for name in want} == want
    steady = with_values(m, propagate_constants(m))
    assert_same_answers(m, steady)
    assert shapes(shrink(steady).model)["second"] == want["second"]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_types_stay(kind):
    number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    weights = {"w": dense(4, 3, dead=[2]), "b": bias(4, at2=0.5), "v": dense(2, 4), "c": bias(2)}
    m = model(
        [
            node("Gemm", ["x", "w", "b"], ["a"], transB=1),
            node("Tanh", ["a"], ["t"]),
            node("Gemm", ["t", "v", "c"], ["y"], transB=1),
        ],
        {name: array.astype(kind) for name, array in weights.items()},
        {"x": ["N", 3]},
        {"y": ["N", 2]},
    )
    for each in (*m.graph.input, *m.graph.output):
        each.type.tensor_type.elem_type = number
    small = assert_shrunk(m, 2e-3 if kind == np.float16 else 1e-5, w=(3, 3), b=(3,), v=(2, 3))
    assert {tensor.data_type for tensor in small.graph.initializer} == {number}


# Several readers


def residual(first: tuple[int, ...], second: tuple[int, ...]) -> ModelProto:
    """Two convolutions added up, of whose four channels these are dead."""
    return model(
        [
            node("Conv", ["x", "one"], ["a"]),
            node("Conv", ["x", "two"], ["b"]),
            node("Add", ["a", "b"], ["c"]),
            node("Conv", ["c", "last", "bias"], ["y"]),
        ],
        {
            "one": dense(4, 3, 3, 3, dead=first),
            "two": dense(4, 3, 3, 3, dead=second, seed=1),
            "last": dense(2, 4, 1, 1),
            "bias": bias(2),
        },
        {"x": ["N", 3, 6, 6]},
        {"y": [None] * 4},
    )


def test_a_channel_of_a_sum_is_removed_if_dead_in_every_branch():
    assert_kept(residual((1, 2), (0, 3)), "one[1, 2]", "two[0, 3]", "alive elsewhere")
    assert_shrunk(residual((1, 2), (2, 3)), one=(3, 3, 3, 3), two=(3, 3, 3, 3), last=(2, 3, 1, 1))


def test_a_channel_that_only_feeds_itself_is_dead():
    """Channel 1 of the sum, and the hidden one between, are read only by each other."""
    inner, outer = dense(3, 4, 1, 1), dense(4, 3, 1, 1, seed=1)
    inner[:2, 1] = 0
    outer[[0, 2, 3], 2] = 0
    m = model(
        [
            node("Conv", ["x", "one"], ["a"]),
            node("Conv", ["a", "inner"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("Conv", ["r", "outer"], ["b"]),
            node("Add", ["a", "b"], ["c"]),
            node("Conv", ["c", "last"], ["y"]),
        ],
        {"one": dense(4, 3, 3, 3), "inner": inner, "outer": outer,
         "last": dense(2, 4, 1, 1, unread=[1])},
        {"x": ["N", 3, 6, 6]},
        {"y": [None] * 4},
    )  # fmt: skip
    assert_shrunk(m, one=(3, 3, 3, 3), inner=(2, 3, 1, 1), outer=(3, 2, 1, 1), last=(2, 3, 1, 1))


def test_a_layer_whose_neurons_are_not_read():
    m = two_convs(1.0)
    m = with_values(m, {"first": dense(4, 3, 3, 3), "last": dense(2, 4, 3, 3, unread=[0, 3])})
    assert_shrunk(m, first=(2, 3, 3, 3), last=(2, 2, 3, 3))


def test_a_dead_layer_keeps_one_channel_of_zeros():
    m = with_values(two_convs(0.5), {"first": dense(4, 3, 3, 3, dead=range(4))})
    small = assert_shrunk(m, first=(1, 3, 3, 3), last=(2, 1, 3, 3))
    assert not numpy_helper.to_array(small.graph.initializer[2]).any()
    assert ("first[0]", "a layer keeps at least one channel") in shrink(small).reasons.items()


def block(zeros: tuple[str, ...]) -> ModelProto:
    """Two residual blocks behind a convolution, of which some weights and biases are zero."""
    tensors = {"stem": dense(4, 3, 3, 3)}
    nodes = [node("Conv", ["x", "stem"], ["s0"])]
    for n in (1, 2):
        tensors |= {
            f"in{n}": dense(5, 4, 3, 3, seed=2 * n),
            f"out{n}": dense(4, 5, 3, 3, seed=2 * n + 1),
            f"bias{n}": bias(4),
        }
        nodes += [
            node("Conv", [f"s{n - 1}", f"in{n}"], [f"h{n}"], pads=[1, 1, 1, 1]),
            node("Relu", [f"h{n}"], [f"r{n}"]),
            node("Conv", [f"r{n}", f"out{n}", f"bias{n}"], [f"b{n}"], pads=[1, 1, 1, 1]),
            node("Add", [f"s{n - 1}", f"b{n}"], [f"s{n}"]),
        ]
    tensors |= {name: np.zeros_like(tensors[name]) for name in zeros}
    nodes.append(node("Conv", ["s2", "last"], ["y"]))
    return model(
        nodes, tensors | {"last": dense(2, 4, 1, 1)}, {"x": ["N", 3, 8, 8]}, {"y": [None] * 4}
    )


def test_a_branch_that_adds_nothing_is_removed_whole():
    small = assert_shrunk(
        block(("out1", "bias1")),
        stem=(4, 3, 3, 3), in2=(5, 4, 3, 3), out2=(4, 5, 3, 3), bias2=(4,), last=(2, 4, 1, 1),
    )  # fmt: skip
    assert [n.op_type for n in small.graph.node] == ["Conv", "Conv", "Relu", "Conv", "Add", "Conv"]
    assert shrink(block(("out1", "bias1"))).bypassed == 1
    rows = {row.name: (row.before, row.after) for row in shrink(block(("out1", "bias1"))).rows}
    assert rows["in1"] == ((5, 4, 3, 3), ())


def test_one_branch_after_the_other_is_removed():
    small = assert_shrunk(
        block(("out1", "bias1", "out2", "bias2")), stem=(4, 3, 3, 3), last=(2, 4, 1, 1)
    )
    assert [n.op_type for n in small.graph.node] == ["Conv", "Conv"]
    assert [n.input[0] for n in small.graph.node] == ["x", "s0"]


def test_a_branch_that_adds_a_constant_stays():
    assert not shrink(block(("out1",))).bypassed


def test_a_sum_that_broadcasts_stays():
    m = model(
        [
            node("Conv", ["x", "w"], ["a"]),
            node("Add", ["z", "a"], ["s"]),
            node("Relu", ["s"], ["y"]),
        ],
        {"w": np.zeros((4, 3, 1, 1), np.float32)},
        {"x": ["N", 3, 6, 6], "z": ["M", 4, 6, 6]},
        {"y": [None] * 4},
    )
    assert not shrink(m).bypassed
    (entry,) = [v for v in m.graph.input if v.name == "z"]
    entry.type.tensor_type.shape.dim[0].dim_param = "N"
    assert shrink(m).bypassed == 1


@pytest.mark.parametrize(("multiple", "left"), [(1, 5), (2, 6), (4, 8), (16, 10)])
def test_layers_keep_a_multiple_of_channels_where_asked(multiple, left):
    m = model(
        [node("Conv", ["x", "first"], ["h"]), node("Conv", ["h", "last"], ["y"])],
        {"first": dense(10, 3, 3, 3, dead=(0, 3, 4, 7, 9)), "last": dense(2, 10, 1, 1)},
        {"x": ["N", 3, 6, 6]},
        {"y": [None] * 4},
    )
    small = shrink(m, multiple=multiple)
    shapes = {t.name: tuple(t.dims) for t in small.model.graph.initializer}
    assert shapes == {"first": (left, 3, 3, 3), "last": (2, left, 1, 1)}
    assert_same_answers(m, small.model)
    assert shrink(small.model, multiple=multiple).model == small.model
    if multiple == 4:
        assert ("first[0, 3, 4]", FULL) in small.reasons.items()


def test_a_shared_weight_is_cut_for_both_layers():
    def twice(unread) -> ModelProto:
        return model(
            [
                node("Conv", ["x", "w", "b"], ["a"]),
                node("Neg", ["x"], ["n"]),
                node("Conv", ["n", "w", "b"], ["c"]),
                node("Concat", ["a", "c"], ["d"], axis=1),
                node("Conv", ["d", "last"], ["y"]),
            ],
            {"w": dense(4, 3, 3, 3), "b": bias(4), "last": dense(2, 8, 1, 1, unread=unread)},
            {"x": ["N", 3, 6, 6]},
            {"y": [None] * 4},
        )

    assert_kept(twice((1, 6)))
    assert_shrunk(twice((1, 5, 6)), w=(3, 3, 3, 3), b=(3,), last=(2, 6, 1, 1))


def test_a_shared_bias_is_copied_before_it_absorbs_a_constant():
    m = two_convs(0.5)
    m.graph.node.append(node("Conv", ["x", "other", "bias"], ["z"]))
    m.graph.initializer.append(numpy_helper.from_array(dense(2, 3, 1, 1), "other"))
    m.graph.output.append(helper.make_tensor_value_info("z", 1, [None] * 4))
    small = shrink(m)
    assert_same_answers(m, small.model)
    assert shapes(small.model)["first"] == (3, 3, 3, 3)
    assert shapes(small.model)["bias_1"] == shapes(small.model)["bias"] == (2,)
    assert propagate_constants(m) == {}


@pytest.mark.parametrize("handed", [False, True])
def test_a_shared_vector_does_not_couple_layers(handed):
    """Four layers with one vector for all; of two the same channel is dead, of one another."""
    names = ["b"] * 4
    nodes = []
    if handed:
        names = ["b", "b1", "b2", "b3"]
        nodes = [node("Identity", ["b"], [name]) for name in names[1:]]
    values, weights = ["x"], {"b": np.zeros(4, np.float32)}
    for layer, dead in enumerate([(1,), (1,), (2, 3), ()]):
        weights[f"w{layer}"] = dense(4, 3 if layer == 0 else 4, dead=dead, seed=layer).T.copy()
        nodes.append(node("Gemm", [values[-1], f"w{layer}", names[layer]], [f"g{layer}"]))
        nodes.append(node("Relu", [f"g{layer}"], [f"r{layer}"]))
        values.append(f"r{layer}")
    nodes[-1].output[0] = "y"
    m = model(nodes, weights, {"x": ["N", 3]}, {"y": ["N", 4]})
    small = shrink(m).model
    onnx.checker.check_model(small, full_check=True)
    assert_same_answers(m, small)
    found = shapes(small)
    assert [found[f"w{n}"] for n in range(4)] == [(3, 3), (3, 3), (3, 2), (2, 4)]
    assert sorted(found[name] for name in found if name[0] == "b") == [(2,), (3,), (4,)]
    steady = with_values(m, propagate_constants(m))
    assert_same_answers(m, steady)
    assert shapes(shrink(steady).model) == found
    alive = with_values(m, {f"w{n}": dense(*weights[f"w{n}"].shape) for n in range(4)})
    assert_kept(alive)


# Groups


def test_groups_keep_one_size():
    first = dense(CHANNELS, 3, 3, 3, dead=(0, 1, 5))
    grouped = [node("Conv", ["a", "g"], ["b"], group=2)]
    m = with_values(between(grouped, {"g": dense(6, 4, 1, 1)}, 6), {"first": first})
    m = with_values(m, {"shift": first.any(axis=(1, 2, 3)).astype(np.float32)})
    assert_shrunk(m, first=(6, 3, 3, 3), g=(6, 3, 1, 1), last=(5, 6, 1, 1))
    assert any("groups" in reason for _, reason in shrink(m).reasons.items())


def test_a_dead_group_is_removed_whole():
    first = dense(CHANNELS, 3, 3, 3, dead=(4, 5, 6, 7))
    grouped = [node("Conv", ["a", "g"], ["b"], group=2)]
    m = between(grouped, {"g": dense(6, 4, 1, 1)}, 6)
    m = with_values(m, {"first": first, "shift": first.any(axis=(1, 2, 3)).astype(np.float32)})
    small = assert_shrunk(m, first=(4, 3, 3, 3), g=(3, 4, 1, 1), last=(5, 3, 1, 1))
    assert onnx.helper.get_node_attr_value(small.graph.node[1], "group") == 1


def test_transposed_groups():
    first = dense(CHANNELS, 3, 3, 3, dead=(0, 5))
    grouped = [node("ConvTranspose", ["a", "g"], ["b"], group=2)]
    last = dense(5, 6, 1, 1, unread=[1, 3])
    m = between(grouped, {"g": dense(CHANNELS, 3, 2, 2, seed=1)}, 6)
    m = with_values(m, {"first": first, "last": last})
    m = with_values(m, {"shift": first.any(axis=(1, 2, 3)).astype(np.float32)})
    assert_shrunk(m, first=(6, 3, 3, 3), g=(6, 2, 2, 2), last=(5, 4, 1, 1))


# What keeps everything


OPAQUE = {
    "LayerNormalization": [
        node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
        node("LayerNormalization", ["t", "v"], ["l"]),
        node("Transpose", ["l"], ["b"], perm=[0, 3, 1, 2]),
    ],
    "Softmax": [node("Softmax", ["a"], ["b"], axis=1)],
    "ReduceMean": [node("ReduceMean", ["a", "one"], ["c"]), node("Add", ["a", "c"], ["b"])],
    "Shape": [
        node("Shape", ["a"], ["s"]),
        node("Cast", ["s"], ["f"], to=1),
        node("ReduceSum", ["f"], ["r"], keepdims=0),
        node("Mul", ["a", "r"], ["b"]),
    ],
    "Gather": [node("Shape", ["a"], ["s"], start=1, end=2), node("Sub", ["s", "one"], ["p"]),
               node("Gather", ["a", "p"], ["c"], axis=1), node("Add", ["c", "a"], ["b"])],
    "Slice": [node("Slice", ["a", "one", "end", "one", "minus"], ["b"])],
    "MaxPool": [node("MaxPool", ["a"], ["b", "places"], kernel_shape=[2, 2])],
    "Greater": [node("Greater", ["a", "v2"], ["g"]), node("Where", ["g", "a", "v2"], ["b"])],
}  # fmt: skip


@pytest.mark.parametrize("nodes", OPAQUE.values(), ids=OPAQUE)
def test_operators_that_mix_channels_keep_them_all(nodes):
    stored = {
        "v": STORED["v"],
        "v2": floats(0.5),
        "one": whole(1),
        "end": whole(-(2**62)),
        "minus": whole(-1),
    }
    names = {name for one in nodes for name in one.input}
    wide = 2 if nodes[-1].op_type == "Slice" else CHANNELS
    m = between(nodes, {k: v for k, v in stored.items() if k in names}, wide)
    if nodes[-1].op_type == "MaxPool":
        m.graph.output.append(helper.make_tensor_value_info("places", 7, [None] * 4))
    assert_kept(m, "first[1, 4]")


def test_outputs_of_the_graph_keep_their_channels():
    m = two_convs(0.5)
    m.graph.output.append(helper.make_tensor_value_info("b", 1, [None] * 4))
    assert_kept(m, "first[1]: an output of the graph")


def test_weights_that_may_be_fed_stay():
    m = two_convs(0.5)
    m.graph.input.append(helper.make_tensor_value_info("first", 1, [4, 3, 3, 3]))
    assert_kept(m)
    assert propagate_constants(m) == {}


@pytest.mark.parametrize("read", ["b", "last"])
def test_what_a_subgraph_reads_is_kept_whole(read):
    m = two_convs(0.5)
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(op, [read], [name])], name, [], [helper.make_tensor_value_info(name, 1, None)]
        )
        for name, op in (("then", "Neg"), ("else", "Abs"))
    }
    m.graph.input.append(helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    m.graph.node.append(node("If", ["flag"], ["z"], **branches))
    m.graph.output.append(helper.make_tensor_value_info("z", 1, [None] * 4))
    onnx.checker.check_model(m, full_check=True)
    assert_kept(m, "first[1]")


def test_functions_and_other_domains_are_opaque():
    m = two_convs(0.5)
    m.graph.node[1].domain = "com.example"
    m.opset_import.add(domain="com.example", version=1)
    assert_kept(m, "read by Relu 'b'")
    m = two_convs(0.5)
    m.functions.append(
        helper.make_function(
            "", "Relu", ["u"], ["v"], [node("Neg", ["u"], ["v"])], list(m.opset_import)
        )
    )
    assert_kept(m, "read by Relu 'b'")


def test_a_model_with_training_information_is_unchanged():
    m = two_convs(0.5)
    m.training_info.add().algorithm.name = "step"
    assert_kept(m)


def test_damaged_models_are_refused_or_left():
    m = two_convs(0.5)
    m.graph.initializer[0].raw_data = b"short"
    with pytest.raises(Prune2OnnxError, match="first"):
        shrink(m)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_models_with_nothing_dead_come_back_byte_for_byte(build):
    m = build()
    if build in (MODELS["mlp"], MODELS["branches"]):
        assert_same_answers(m, shrink(m).model)  # pruned so far that neurons died
        return
    assert_kept(m)
    assert propagate_constants(m) == {}


def test_declared_shapes_follow():
    m = onnx.shape_inference.infer_shapes(two_convs(0.5))
    small = shrink(m).model
    declared = {
        value.name: value.type.tensor_type.shape.dim[1].dim_value
        for value in small.graph.value_info
    }
    assert declared == {"a": 3, "b": 3}
    onnx.checker.check_model(small, full_check=True)


# Inputs


def test_unused_inputs_are_left_out_on_request():
    m = model(
        [
            node("Flatten", ["x"], ["f"]),
            node("Gemm", ["f", "w", "c"], ["a"], transB=1),
            node("Relu", ["a"], ["y"]),
        ],
        {"w": dense(4, 12, unread=range(2, 9)), "c": bias(4)},
        {"x": ["N", 3, 2, 2]},
        {"y": ["N", 4]},
    )
    assert shrink(m).model == m
    small = shrink(m, gather_inputs=True)
    assert_same_answers(m, small.model, 0)
    assert shapes(small.model)["w"] == (4, 5)
    assert [row.name for row in small.rows] == ["w"]
    assert shrink(small.model, gather_inputs=True).model == small.model


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_a_first_layer_without_a_flatten_has_its_inputs_gathered_too(op):
    weight = dense(4, 6, 1, 1, unread=[1, 2])
    stored = weight if op == "Conv" else weight[:, :, 0, 0].T.copy()
    shape = ["N", 6, 3, 3] if op == "Conv" else ["N", 3, 6]
    out = ["N", 4, 3, 3] if op == "Conv" else ["N", 3, 4]
    m = model([node(op, ["x", "w"], ["y"])], {"w": stored}, {"x": shape}, {"y": out})
    small = shrink(m, gather_inputs=True).model
    assert_same_answers(m, small)
    assert shapes(small)["w"] == ((4, 4, 1, 1) if op == "Conv" else (4, 4))


# Whole networks


def by_norm(m: ModelProto, fraction: float) -> ModelProto:
    """The weakest outputs of every layer zero, with their biases where they have any."""
    result = ModelProto()
    result.CopyFrom(m)
    assert weak_channels.zero_weakest(result, fraction)
    return result


def network(name: str, function: str) -> torch.nn.Module:
    spec = f"{MODEL_FILES / name}:{function}"
    torch.manual_seed(0)
    return call_with(load_callable(spec), spec).eval()


def test_lenet5():
    m = export(network("lenet.py", "lenet5"), (1, 28, 28))
    assert_kept(m)
    want = {
        "conv1.weight": (14, 1, 5, 5),
        "conv2.weight": (35, 14, 5, 5),
        "fc1.weight": (350, 560),
        "fc2.weight": (10, 350),
    }
    small = assert_shrunk(by_norm(m, 0.3), **want)
    assert small.ByteSize() < m.ByteSize() / 1.9


def test_resnet20_with_its_published_weights(real_data):
    file = real_data / "weights" / "resnet20_cifar10.safetensors"
    if not file.exists():
        pytest.skip(f"no {file}")
    net = network("resnet_cifar.py", "resnet20")
    net.load_state_dict(load_file(file), strict=False)
    m = export(net, (3, 32, 32))
    assert_kept(m)
    # Inside of a block every channel may go; of the sums around it only those that all branches
    # leave out: here the first three of the first stage, which the shortcuts carry on.
    values = {}
    for one in m.graph.node:
        if one.op_type != "Conv":
            continue
        weight, shift = (numpy_helper.to_array(t).copy() for name in one.input[1:]
                         for t in m.graph.initializer if t.name == name)  # fmt: skip
        stage = one.input[1].split(".")[0]
        if ".conv1." in one.input[1]:
            weak = np.argsort(np.abs(weight).sum(axis=(1, 2, 3)))[: int(0.3 * len(weight))]
        else:
            weak = {"layer2": np.arange(8, 11), "layer3": np.arange(24, 27)}.get(
                stage, np.arange(3)
            )
        weight[weak], shift[weak] = 0, 0
        values[one.input[1]], values[one.input[2]] = weight, shift
    small = assert_shrunk(with_values(m, values), 1e-4)
    found = shapes(small)
    assert found["conv1.weight"] == (13, 3, 3, 3)
    assert found["layer1.0.conv1.weight"] == (12, 13, 3, 3)
    assert found["layer2.0.conv2.weight"] == (29, 23, 3, 3)
    assert found["linear.weight"] == (10, 61)


def test_a_published_detector(real_data):
    file = real_data / "onnx" / "slim320.onnx"
    if not file.exists():
        pytest.skip(f"no {file}")
    given = onnx.load(file)
    assert_kept(given)  # its weights may be fed
    m = normalize(given).model
    assert_kept(m)
    small = assert_shrunk(by_norm(m, 0.3))
    assert small.ByteSize() < 0.7 * m.ByteSize()


@pytest.mark.parametrize("op", ["Sub", "Mul", "Div", "Max", "Min", "MatMul"])
def test_only_add_takes_a_constant_into_what_it_adds(op):
    """A reader whose first input is a constant is no bias, whatever the operator."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(5, 4)).astype(np.float32)
    first[:, :2] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Add", ["h", "bias"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["m"]),
        helper.make_node(op, ["c", "m"], ["y"]),
    ]
    weights = {
        "a": first,
        "bias": np.float32([1, 2, 0.5, 0.1]),
        "b": rng.normal(size=(4, 3)).astype(np.float32),
        "c": rng.uniform(1, 2, (3, 3)).astype(np.float32),
    }
    m = model(nodes, weights, {"x": [3, 5]}, {"y": [3, 3]})
    small = shrink(m)
    assert_same_answers(m, small.model)
    assert any("no bias" in why for why in small.reasons.values())


@pytest.mark.parametrize("axis", [1, -1, -3])
def test_a_flatten_counts_its_axis_from_the_end_too(axis):
    weight = np.random.default_rng(0).normal(size=(4, 2, 1, 1)).astype(np.float32)
    weight[1] = 0
    columns = 4 * 9 if axis != -1 else 3
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"], axis=axis),
        helper.make_node("MatMul", ["f", "v"], ["y"]),
    ]
    weights = {"w": weight, "v": np.ones((columns, 2), np.float32)}
    m = model(nodes, weights, {"x": [1, 2, 3, 3]}, {"y": ["rows", 2]})
    small = shrink(m)
    assert_same_answers(m, small.model)
    assert (small.removed > 0) == (axis != -1)


@pytest.mark.parametrize("stated", ["no type", "no shape", "no extents"])
def test_values_whose_shapes_are_not_stated(stated):
    m = a_dead_neuron()
    value = m.graph.value_info.add(name="r")
    if stated != "no type":
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    if stated == "no extents":
        value.type.tensor_type.shape.SetInParent()
    small = shrink(m)
    assert_same_answers(m, small.model)
    assert small.model.graph.value_info[-1] == value
    assert small.removed or stated == "no extents"  # that is a scalar, which it cannot be


def a_dead_neuron() -> ModelProto:
    """x [N, 5] -> 4 neurons, one of them dead -> y [N, 3]; `r` lies between."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(5, 4)).astype(np.float32)
    first[:, 2] = 0
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b"], ["y"]),
    ]
    weights = {"a": first, "b": rng.normal(size=(4, 3)).astype(np.float32)}
    return model(nodes, weights, {"x": ["N", 5]}, {"y": ["N", 3]})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.graph.initializer[1].dims.__setitem__(0, 3),
        lambda m: m.graph.initializer[1].dims.insert(0, 1),
        lambda m: m.graph.node[2].attribute.add(name="transB", type=AttributeProto.INT, i=1),
        lambda m: m.graph.node[2].input.pop(),
        lambda m: m.graph.node.insert(1, helper.make_node("Gemm", ["h", "a"], ["k"])),
        lambda m: m.graph.node.insert(1, helper.make_node("Add", ["h", "x"], ["k"])),
        lambda m: m.graph.node.insert(1, helper.make_node("Split", ["h"], ["k"], axis=7)),
        lambda m: m.graph.node.insert(1, helper.make_node("Concat", ["h", "a"], ["k"], axis=1)),
    ],
)
def test_a_model_that_contradicts_itself_is_left_or_refused(change):
    m = a_dead_neuron()
    change(m)
    with contextlib.suppress(Prune2OnnxError):
        assert shrink(m).model.graph.node[0].op_type == "Gemm"
