"""Random graphs with dead channels: every operator that a constant or a dead channel may meet.

`graph(seed)` returns a model and inputs for it. Shapes are known here while a graph is built, so
nodes always fit; what the graph states of them is open in part, or left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

UNARY = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Neg", "Abs", "Erf", "Softplus", "HardSwish")
BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum")
TYPES = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


class Graph:
    """A graph that grows by one block at a time; `x` is the value that the next block reads."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.kind = TYPES[self.rng.integers(len(TYPES))]
        self.dtype = helper.tensor_dtype_to_np_dtype(self.kind)
        self.nodes: list[Any] = []
        self.stored: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        channels = int(self.rng.integers(2, 5))
        rank = int(self.rng.integers(2, 5))
        sizes = self.rng.integers(5, 8, rank - 2).tolist()
        shape = (2, channels, *sizes) if rank == 4 else (2, *sizes, channels)
        self.given = shape
        self.x = "x"
        self.shapes["x"] = shape

    # -- pieces ---------------------------------------------------------------------------------

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def weight(self, *shape: int, scale: float | None = None) -> np.ndarray:
        fan = math.prod(shape[1:]) or 1
        return self.rng.normal(size=shape) * (scale or 1 / math.sqrt(fan))

    def store(self, value: Any, integer: bool = False) -> str:
        name = f"w{len(self.stored)}"
        self.stored[name] = np.asarray(value, np.int64 if integer else self.dtype)
        return name

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.shapes[name] = shape
        return name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[self.x]

    @property
    def axis(self) -> int:
        """Where channels lie."""
        return 1 if len(self.shape) == 4 else len(self.shape) - 1

    def dead(self, weight: np.ndarray, outputs: int, inputs: int | None) -> np.ndarray:
        """Zeroes some rows, and some columns, of a weight."""
        for axis, share in ((outputs, 0.4), (inputs, 0.3)):
            if axis is not None and self.chance(0.8):
                gone = self.rng.random(weight.shape[axis]) < share
                np.moveaxis(weight, axis, 0)[gone] = 0
        return weight

    # -- blocks ---------------------------------------------------------------------------------

    def layer(self) -> None:
        """A layer that fits the rank."""
        if len(self.shape) == 4:
            self.pick(self.conv, self.conv, self.deconv)()
        else:
            self.pick(self.matmul, self.gemm if len(self.shape) == 2 else self.matmul)()

    def conv(self) -> None:
        batch, channels, height, width = self.shape
        style = self.pick("plain", "plain", "depthwise", "groups")
        groups = channels if style == "depthwise" else 1
        if style == "groups" and channels % 2 == 0:
            groups = 2
        out = groups * int(self.rng.integers(1, 3)) if groups > 1 else int(self.rng.integers(3, 9))
        size = self.pick(1, 3) if min(height, width) >= 3 else 1
        pad = self.pick(0, size // 2)
        weight = self.dead(self.weight(out, channels // groups, size, size), 0, 1)
        inputs = [self.x, self.store(weight)]
        if self.chance(0.8):
            inputs.append(self.store(self.weight(out, scale=1)))
        shape = (batch, out, height + 2 * pad - size + 1, width + 2 * pad - size + 1)
        self.x = self.node("Conv", inputs, shape, group=groups, pads=[pad] * 4)

    def deconv(self) -> None:
        batch, channels, height, width = self.shape
        if height > 20:
            return
        out = int(self.rng.integers(2, 6))
        weight = self.dead(self.weight(channels, out, 3, 3), 1, 0)
        inputs = [self.x, self.store(weight)]
        if self.chance(0.7):
            inputs.append(self.store(self.weight(out, scale=1)))
        extra = self.pick(0, 1)
        shape = (batch, out, 2 * height + 1 + extra, 2 * width + 1 + extra)
        self.x = self.node(
            "ConvTranspose", inputs, shape, strides=[2, 2], output_padding=[extra] * 2
        )

    def matmul(self) -> None:
        *rest, channels = self.shape
        out = int(self.rng.integers(3, 9))
        weight = self.dead(self.weight(channels, out), 1, 0)
        self.x = self.node("MatMul", [self.x, self.store(weight)], (*rest, out))
        if self.chance(0.8):
            self.with_constant(self.pick("Add", "Add", "Add", "Sub", "Mul", "Max", "Div"))

    def gemm(self) -> None:
        batch, channels = self.shape
        out = int(self.rng.integers(3, 9))
        turned = self.chance(0.5)
        weight = self.weight(out, channels) if turned else self.weight(channels, out)
        weight = self.dead(weight, *((0, 1) if turned else (1, 0)))
        inputs = [self.x, self.store(weight)]
        if self.chance(0.8):
            shape = self.pick((out,), (1, out), (1,), (batch, out))
            inputs.append(self.store(self.weight(*shape, scale=1)))
        numbers = {"alpha": self.pick(1.0, 0.5), "beta": self.pick(1.0, 2.0)}
        self.x = self.node("Gemm", inputs, (batch, out), transB=int(turned), **numbers)

    def with_constant(self, op: str | None = None) -> None:
        """An elementwise operator with a constant on either side."""
        op = op or self.pick(*BINARY, "Pow", "PRelu", "Where", "Concat")
        shape = self.pick(
            (), tuple(n if a == self.axis else 1 for a, n in enumerate(self.shape)), self.shape
        )
        value = np.asarray(self.weight(*shape, scale=1) if shape else self.rng.normal())
        value = np.where(self.rng.random(shape) < 0.3, 0, value)
        first = self.chance(0.4)
        if op in ("Div", "Pow"):
            value = np.abs(value) + 0.5
        if op == "Div" and first:  # by a value that is far from zero
            bounded = self.node("Sigmoid", [self.x], self.shape)
            self.x = self.node("Add", [bounded, self.store(1.0)], self.shape)
        if op == "Pow":
            self.x = self.node("Sigmoid", [self.x], self.shape)
        if op == "Concat":
            shape = (*self.shape[: self.axis], 2, *self.shape[self.axis + 1 :])
            names = [self.x, self.store(self.weight(*shape, scale=1))]
            joined = list(self.shape)
            joined[self.axis] += 2
            axis = self.pick(self.axis, self.axis - len(shape))
            order = names[::-1] if first else names
            self.x = self.node("Concat", order, tuple(joined), axis=axis)
            return
        names = [self.x, self.store(value)]
        if op == "PRelu":
            self.x = self.node("PRelu", names, self.shape)
            return
        if op == "Where":
            flags = self.node("Greater", names, self.shape)
            self.x = self.node("Where", [flags, *names[:: self.pick(1, -1)]], self.shape)
            return
        self.x = self.node(op, names[::-1] if first else names, self.shape)

    def unary(self) -> None:
        op = self.pick(*UNARY, "Clip", "Dropout", "Identity", "Cast")
        if op == "Clip":
            limits = [self.store(-1.0), self.store(self.pick(1.0, 6.0))]
            self.x = self.node("Clip", [self.x, *limits], self.shape)
        elif op == "Cast":
            there = self.node("Cast", [self.x], self.shape, to=TensorProto.FLOAT)
            self.x = self.node("Cast", [there], self.shape, to=self.kind)
        else:
            self.x = self.node(op, [self.x], self.shape)

    def residual(self) -> None:
        """A block beside an identity or a layer, summed, multiplied or joined."""
        start = self.x
        self.layer()
        self.unary()
        if self.shapes[start] != self.shape:
            other = self.shapes[start]
            if len(other) == 4 == len(self.shape) and other[2:] == self.shape[2:]:
                weight = self.dead(self.weight(self.shape[1], other[1], 1, 1), 0, 1)
                start = self.node("Conv", [start, self.store(weight)], self.shape)
            elif len(other) == len(self.shape) < 4:
                weight = self.dead(self.weight(other[-1], self.shape[-1]), 1, 0)
                start = self.node("MatMul", [start, self.store(weight)], self.shape)
            else:
                return
        names = [start, self.x][:: self.pick(1, -1)]
        self.x = self.node(self.pick("Add", "Add", "Mul", "Sub", "Max", "Sum"), names, self.shape)

    def tied(self) -> None:
        """Two layers with one weight; the second time possibly along the other axis."""
        *rest, channels = self.shape
        if len(self.shape) == 4:
            return
        name = self.store(self.dead(self.weight(channels, channels), 1, 0))
        self.x = self.node("MatMul", [self.x, name], self.shape)
        self.with_constant("Add")
        self.unary()
        if len(rest) == 1 and self.chance(0.5):
            self.x = self.node("Gemm", [self.x, name], self.shape, transB=1)
        else:
            self.x = self.node("MatMul", [self.x, name], self.shape)

    def constant_first(self) -> None:
        """A constant matrix times the value."""
        if len(self.shape) < 3:
            return
        rows = self.shape[-2]
        matrix = self.store(self.dead(self.weight(rows, rows), 0, 1))
        self.x = self.node("MatMul", [matrix, self.x], self.shape)

    def attention(self) -> None:
        """Softmax(q k') v, of one head, with a residual sum."""
        if len(self.shape) != 3:
            return
        batch, length, channels = self.shape
        start = self.x
        made = []
        for _ in range(3):
            self.x = start
            weight = self.store(self.dead(self.weight(channels, channels), 1, 0))
            self.x = self.node("MatMul", [self.x, weight], self.shape)
            self.with_constant("Add")
            made.append(self.x)
        query, key, value = made
        turned = self.node("Transpose", [key], (batch, channels, length), perm=[0, 2, 1])
        scores = self.node("MatMul", [query, turned], (batch, length, length))
        shares = self.node("Softmax", [scores], (batch, length, length), axis=-1)
        mixed = self.node("MatMul", [shares, value], self.shapes[start])
        self.x = self.node("Add", [start, mixed], self.shapes[start])

    def norm(self) -> None:
        channels = self.shape[self.axis]
        scale, bias = (self.dead(self.weight(channels, scale=1), 0, None) for _ in range(2))
        names = [self.x, self.store(scale), self.store(bias)]
        if len(self.shape) != 4:
            self.x = self.node(
                "LayerNormalization", names, self.shape, axis=self.pick(-1, len(self.shape) - 1)
            )
            return
        op = self.pick("BatchNormalization", "InstanceNormalization", "GroupNormalization")
        if op == "BatchNormalization":
            names += [self.store(self.weight(channels, scale=1))]
            names += [self.store(np.abs(self.weight(channels, scale=1)) + 0.3)]
        if op == "GroupNormalization":
            groups = self.pick(*[g for g in range(1, channels + 1) if channels % g == 0])
            self.x = self.node(op, names, self.shape, num_groups=groups)
            return
        self.x = self.node(op, names, self.shape)

    def move(self) -> None:
        """An operator that moves channels."""
        self.pick(self.split, self.shuffle, self.resize, self.reduce, self.turn, self.softmax)()

    def split(self) -> None:
        count = self.shape[self.axis]
        if count < 3:
            return
        at = int(self.rng.integers(1, count))
        parts = []
        for size in (at, count - at):
            shape = list(self.shape)
            shape[self.axis] = size
            parts.append(tuple(shape))
        names = [f"s{len(self.nodes)}_{i}" for i in range(2)]
        sizes = self.store([at, count - at], integer=True)
        axis = self.pick(self.axis, self.axis - len(self.shape))
        self.nodes.append(helper.make_node("Split", [self.x, sizes], names, axis=axis))
        self.shapes.update(zip(names, parts, strict=True))
        order = self.pick(1, -1)
        self.x = self.node("Concat", names[::order], self.shape, axis=axis)

    def shuffle(self) -> None:
        """Channel shuffle, pixel shuffle, or blocks of channels behind one another."""
        if len(self.shape) != 4:
            return
        batch, channels, height, width = self.shape
        if channels % 4 == 0 and height < 12 and self.chance(0.5):
            shape = (batch, channels // 4, 2 * height, 2 * width)
            mode = self.pick("DCR", "CRD")
            self.x = self.node("DepthToSpace", [self.x], shape, blocksize=2, mode=mode)
        elif channels % 2 == 0:
            half = channels // 2
            into = self.store([batch, 2, half, height, width], integer=True)
            apart = self.node("Reshape", [self.x, into], (batch, 2, half, height, width))
            turned = self.node(
                "Transpose", [apart], (batch, half, 2, height, width), perm=[0, 2, 1, 3, 4]
            )
            back = self.store([self.pick(batch, 0), channels, height, width], integer=True)
            self.x = self.node("Reshape", [turned, back], self.shape)

    def resize(self) -> None:
        if len(self.shape) != 4 or self.shape[2] > 10:
            return
        batch, channels, height, width = self.shape
        scales = f"r{len(self.stored)}"
        self.stored[scales] = np.array([1, 1, 2, 2], np.float32)
        shape = (batch, channels, 2 * height, 2 * width)
        if self.kind == TensorProto.DOUBLE:
            return  # onnxruntime has no kernel
        self.x = self.node(
            "Resize", [self.x, "", scales], shape, mode=self.pick("nearest", "linear")
        )

    def reduce(self) -> None:
        """Over another axis than that of the channels, counted from either end."""
        others = [a for a in range(1, len(self.shape)) if a != self.axis]
        if not others:
            return
        axis = int(self.pick(*others))
        shape = tuple(1 if a == axis else n for a, n in enumerate(self.shape))
        op = self.pick("ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin")
        axes = self.pick(axis, axis - len(shape))
        if op == "ReduceSum" or self.version >= 18:
            made = self.node(op, [self.x, self.store([axes], integer=True)], shape, keepdims=1)
        else:
            made = self.node(op, [self.x], shape, axes=[axes], keepdims=1)
        self.x = self.node("Add", [self.x, made], self.shape)

    version = 21

    def turn(self) -> None:
        """There and back, or an Einsum that does it."""
        rank = len(self.shape)
        order = [0, *(1 + self.rng.permutation(rank - 1)).tolist()]
        shape = tuple(self.shape[a] for a in order)
        turned = self.node("Transpose", [self.x], shape, perm=order)
        if self.chance(0.5):
            turned = self.node("Relu", [turned], shape)
        self.x = self.node("Transpose", [turned], self.shape, perm=np.argsort(order).tolist())
        if rank == 3 and self.chance(0.5) and self.kind != TensorProto.FLOAT16:
            weight = self.store(self.dead(self.weight(self.shape[-1], 4), 1, 0))
            self.x = self.node(
                "Einsum", [self.x, weight], (*self.shape[:2], 4), equation="btc,cd->btd"
            )

    def softmax(self) -> None:
        self.x = self.node("Softmax", [self.x], self.shape, axis=self.pick(-1, 1))

    def pool(self) -> None:
        if len(self.shape) != 4 or min(self.shape[2:]) < 4:
            return
        batch, channels, height, width = self.shape
        pad = self.pick(0, 1)
        shape = (batch, channels, (height + 2 * pad - 3) // 2 + 1, (width + 2 * pad - 3) // 2 + 1)
        facts = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [pad] * 4}
        if self.chance(0.5):
            facts["count_include_pad"] = 1
            self.x = self.node("AveragePool", [self.x], shape, **facts)
        elif self.kind != TensorProto.FLOAT16:
            self.x = self.node("MaxPool", [self.x], shape, **facts)

    def flatten(self) -> None:
        """To [batch, features], by an axis counted from either end."""
        if len(self.shape) == 2:
            return
        rest = math.prod(self.shape[1:])
        axis = self.pick(1, 1 - len(self.shape))
        if rest < 600:
            self.x = self.node("Flatten", [self.x], (self.shape[0], rest), axis=axis)

    # -- the whole ------------------------------------------------------------------------------

    def build(self) -> ModelProto:
        """Blocks, a last layer, and what the graph states of its values."""
        blocks: list[Callable[[], None]] = [self.layer, self.unary, self.with_constant]
        more = [self.residual, self.tied, self.constant_first, self.attention, self.norm]
        self.layer()
        for _ in range(int(self.rng.integers(2, 7))):
            self.pick(*blocks, *blocks, *more, self.move, self.move, self.pool)()
        if self.chance(0.5):
            self.flatten()
        self.layer()
        open_axes = [self.chance(0.5) for _ in self.given]
        stated: list[Any] = [
            f"d{axis}" if free else extent
            for axis, (extent, free) in enumerate(zip(self.given, open_axes, strict=True))
        ]
        fixed = any(isinstance(v, np.ndarray) and v.dtype == np.int64 for v in self.stored.values())
        if fixed:
            stated[0] = self.given[0] if self.chance(0.7) else "d0"
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", self.kind, stated)],
            [helper.make_tensor_value_info(self.x, self.kind, None)],
            [numpy_helper.from_array(value, name) for name, value in self.stored.items()],
        )
        for node in self.nodes:
            if self.chance(0.2):
                shape = list(self.shapes[node.output[0]]) if self.chance(0.3) else None
                if not any(open_axes) or shape is None:
                    value = helper.make_tensor_value_info(node.output[0], self.kind, shape)
                    if node.op_type != "Greater" and node.op_type != "Cast":
                        if self.chance(0.3):
                            value.ClearField("type")
                        graph.value_info.append(value)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.version)], ir_version=10
        )

    def inputs(self) -> dict[str, np.ndarray]:
        """Inputs of the sizes that the graph was built for."""
        return {"x": self.rng.normal(size=self.given).astype(self.dtype)}


def graph(seed: int) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """A random model, and inputs for it."""
    made = Graph(seed)
    return made.build(), made.inputs()
