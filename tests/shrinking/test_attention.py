"""Attention: dead heads and neurons are removed exactly, in the forms that exporters write."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.graph.tensors import array_of, replace
from prune2onnx.shrinking.shrink import shrink
from prune2onnx.shrinking.units import units

HEADS, SIZE, WIDE, INNER = 4, 4, 16, 24


@dataclass
class Block:
    """Writes a transformer block, of inputs [batch, tokens, 16]."""

    nodes: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def node(self, op: str, *inputs: str, **attributes) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def store(self, array, dtype=np.float32, name: str = "") -> str:
        name = name or f"c{len(self.weights)}"
        self.weights[name] = np.asarray(array, dtype)
        return name

    def numbers(self, *values: int) -> str:
        return self.store(values, np.int64)

    def linear(self, x: str, rows: int, columns: int, name: str) -> str:
        weight = self.store(self.rng.normal(size=(columns, rows)) / 3, name=name)
        bias = self.store(self.rng.normal(size=rows), name=f"{name}_bias")
        return self.node("Add", self.node("MatMul", x, weight), bias)

    def shape(self, *extents: int | str) -> str:
        """[batch, tokens, ...] as exporters compute it: "b", "s", or numbers."""
        whole = self.node("Shape", "x")
        parts = []
        for one in extents:
            at = {"b": 0, "s": 1}.get(one)
            if at is None:
                parts.append(self.numbers(one))
            else:
                parts.append(self.node("Slice", whole, self.numbers(at), self.numbers(at + 1)))
        return self.node("Concat", *parts, axis=0)

    def split_heads(self, x: str, *extents: int | str, perm=(0, 2, 1, 3)) -> str:
        split = self.node("Reshape", x, self.shape("b", "s", *extents))
        return self.node("Transpose", split, perm=perm)

    def scores(self, q: str, k: str) -> str:
        scaled = self.node("Mul", self.node("MatMul", q, k), self.store(0.5))
        return self.node("Softmax", self.node("Add", scaled, "mask"), axis=-1)

    def out(self, attended: str) -> str:
        joined = self.node("Transpose", attended, perm=(0, 2, 1, 3))
        joined = self.node("Reshape", joined, self.shape("b", "s", -1))
        return self.node("Add", "x", self.linear(joined, WIDE, WIDE, "o"))

    def feed_forward(self, x: str) -> str:
        gate = self.linear(x, INNER, WIDE, "gate")
        gate = self.node("Mul", gate, self.node("Sigmoid", gate))
        gated = self.node("Mul", gate, self.linear(x, INNER, WIDE, "up"))
        return self.node("Add", x, self.linear(gated, WIDE, INNER, "down"))

    def build(self, y: str, opset: int = 18) -> ModelProto:
        y = self.node("Identity", self.feed_forward(y))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", WIDE])
        mask = helper.make_tensor_value_info(
            "mask", TensorProto.FLOAT, ["batch", 1, "tokens", "tokens"]
        )
        end = helper.make_tensor_value_info(y, TensorProto.FLOAT, ["batch", "tokens", WIDE])
        stored = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "block", [x, mask], [end], stored)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def apart(heads: int | str = HEADS) -> ModelProto:
    """Three projections; the number of heads a constant, or -1."""
    block = Block()
    q, k, v = (block.linear("x", WIDE, WIDE, name) for name in "qkv")
    q, v = (block.split_heads(one, heads, SIZE) for one in (q, v))
    k = block.split_heads(k, heads, SIZE, perm=(0, 2, 3, 1))
    return block.build(block.out(block.node("MatMul", block.scores(q, k), v)))


def in_three_axes() -> ModelProto:
    """Keys transposed as [batch * heads, tokens, size], NaN masked, as torch's exporter does."""
    block = Block()
    q, k, v = (block.linear("x", WIDE, WIDE, name) for name in "qkv")
    q, k, v = (block.split_heads(one, HEADS, SIZE) for one in (q, k, v))
    k = block.node("Reshape", k, block.shape(-1, "s", SIZE))
    k = block.node("Transpose", k, perm=(0, 2, 1))
    k = block.node("Reshape", k, block.shape("b", HEADS, SIZE, "s"))
    scores = block.scores(q, k)
    scores = block.node("Where", block.node("IsNaN", scores), block.store(0.0), scores)
    return block.build(block.out(block.node("MatMul", scores, v)))


def tokens_first() -> ModelProto:
    """[tokens, batch * heads, size], as torch's MultiheadAttention."""
    block = Block()
    x = block.node("Transpose", "x", perm=(1, 0, 2))
    heads = []
    for name in "qkv":
        one = block.linear(x, WIDE, WIDE, name)
        one = block.node("Reshape", one, block.shape("s", -1, SIZE))
        one = block.node("Transpose", one, perm=(1, 0, 2))
        heads.append(block.node("Reshape", one, block.shape("b", HEADS, "s", SIZE)))
    q, k, v = heads
    k = block.node("Transpose", k, perm=(0, 1, 3, 2))
    return block.build(block.out(block.node("MatMul", block.scores(q, k), v)))


def fused(selects: str) -> ModelProto:
    """One projection for query, key and value, as [3, heads, size] or split before."""
    block = Block()
    whole = block.linear("x", 3 * WIDE, WIDE, "qkv")
    names = ["q", "k", "v"]
    if selects == "before":
        block.nodes.append(helper.make_node("Split", [whole], names, axis=-1, num_outputs=3))
        q, k, v = (block.split_heads(one, HEADS, SIZE) for one in names)
    else:
        whole = block.split_heads(whole, 3, HEADS, SIZE, perm=(2, 0, 3, 1, 4))
        if selects == "Split":
            block.nodes.append(helper.make_node("Split", [whole], names, axis=0, num_outputs=3))
            q, k, v = (block.node("Squeeze", name, block.numbers(0)) for name in names)
        else:
            chosen = (block.store(at, np.int64) for at in range(3))
            q, k, v = (block.node("Gather", whole, at, axis=0) for at in chosen)
    k = block.node("Transpose", k, perm=(0, 1, 3, 2))
    return block.build(block.out(block.node("MatMul", block.scores(q, k), v)))


def shared_keys() -> ModelProto:
    """Two heads share a key and a value; positions are rotated."""
    block = Block()
    q = block.split_heads(block.linear("x", WIDE, WIDE, "q"), HEADS, SIZE)
    ends = block.numbers(0), block.numbers(SIZE // 2), block.numbers(SIZE)
    kv = []
    for name in "kv":
        one = block.split_heads(block.linear("x", WIDE // 2, WIDE, name), HEADS // 2, SIZE)
        if name == "k":
            low, high = (
                block.node("Slice", one, *pair, block.numbers(3)) for pair in (ends[:2], ends[1:])
            )
            turned = block.node("Concat", block.node("Neg", high), low, axis=-1)
            one = block.node("Add", one, block.node("Mul", turned, block.store(0.3)))
        one = block.node("Unsqueeze", one, block.numbers(2))
        one = block.node("Expand", one, block.shape("b", HEADS // 2, 2, "s", SIZE))
        kv.append(block.node("Reshape", one, block.shape("b", HEADS, "s", SIZE)))
    k = block.node("Transpose", kv[0], perm=(0, 1, 3, 2))
    return block.build(block.out(block.node("MatMul", block.scores(q, k), kv[1])))


def in_one_node(op: str) -> ModelProto:
    """Attention as one node, with its mask; neurons behind a Gelu of com.microsoft."""
    block = Block()
    contrib = {"domain": "com.microsoft"}
    if op == "Attention":
        weight = block.store(block.rng.normal(size=(WIDE, 3 * WIDE)) / 3, name="qkv")
        bias = block.store(block.rng.normal(size=3 * WIDE), name="qkv_bias")
        inputs = ["x", weight, bias, "", "", "mask"]
        attended = block.node(op, *inputs, num_heads=HEADS, **contrib)
    else:
        q, k, v = (block.linear("x", WIDE, WIDE, name) for name in "qkv")
        bias = block.store(block.rng.normal(size=3 * WIDE), name="more")
        inputs = [q, k, v, bias, "", "mask"]
        attended = block.node(op, *inputs, num_heads=HEADS, **contrib)
    return block.build(block.node("Add", "x", block.linear(attended, WIDE, WIDE, "o")))


def standard(shared: bool, axes: int) -> ModelProto:
    """ONNX's own operator, of three axes or of four."""
    block = Block()
    keys = HEADS // 2 if shared else HEADS
    q, k, v = (
        block.linear("x", SIZE * count, WIDE, name)
        for name, count in zip("qkv", (HEADS, keys, keys), strict=True)
    )
    if axes == 3:
        y = block.node("Attention", q, k, v, "mask", q_num_heads=HEADS, kv_num_heads=keys)
        return block.build(block.node("Add", "x", block.linear(y, WIDE, WIDE, "o")), 23)
    q, k, v = (block.split_heads(*one, SIZE) for one in ((q, HEADS), (k, keys), (v, keys)))
    return block.build(block.out(block.node("Attention", q, k, v, "mask")), 23)


FORMS = {
    "apart": apart(),
    "apart, number open": apart(-1),
    "three axes": in_three_axes(),
    "tokens first": tokens_first(),
    "fused, split before": fused("before"),
    "fused, Split": fused("Split"),
    "fused, Gather": fused("Gather"),
    "shared keys": shared_keys(),
    "MultiHeadAttention": in_one_node("MultiHeadAttention"),
    "fused, Attention": in_one_node("Attention"),
    "Attention of ONNX": standard(False, 3),
    "Attention of ONNX, four axes": standard(False, 4),
    "shared keys, one node": standard(True, 3),
    "shared keys, one node, four axes": standard(True, 4),
}


def answers(model: ModelProto, batch: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    feed = {"x": rng.normal(size=(batch, tokens, WIDE)).astype(np.float32)}
    masked = np.triu(np.full((tokens, tokens), -1e9, np.float32), 1)
    feed["mask"] = np.broadcast_to(masked, (batch, 1, tokens, tokens)).copy()
    opened = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return opened.run(None, feed)[0]


def without(model: ModelProto, kind: str, *numbers: int, side: str = "read") -> ModelProto:
    """The model with what reads some units, or what makes them, set to zero."""
    result = ModelProto()
    result.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    found = [unit for unit in units(model) if unit.kind == kind]
    for number in numbers:
        for part in getattr(found[number], side):
            array = array_of(stored[part.weight]).copy()
            array[part.of(array.shape)] = 0
            replace(stored[part.weight], array)
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["read", "made"])
def test_dead_heads_and_neurons_are_removed_and_outputs_stay(form, side):
    shared = 2 if "shared keys" in form else 1
    given = FORMS[form]
    assert Counter(unit.kind for unit in units(given)) == {
        "head": HEADS // shared,
        "neuron": INNER,
    }
    dead = without(without(given, "head", 1, side=side), "neuron", 0, 3, 5, side=side)
    made = shrink(dead).model
    shapes = {tensor.name: tuple(tensor.dims) for tensor in made.graph.initializer}
    left = SIZE * (HEADS - shared)
    assert shapes["o"] == (left, WIDE)
    assert shapes["down"] == (INNER - 3, WIDE)
    assert shapes["gate"] == shapes["up"] == (WIDE, INNER - 3)
    if "fused" in form:
        assert shapes["qkv"] == (WIDE, 3 * left)
    else:
        assert shapes["q"] == (WIDE, left)
        assert shapes["k"] == shapes["v"] == (WIDE, left // shared)
    onnx.checker.check_model(made, full_check=True)
    for batch, tokens in ((1, 3), (2, 5), (3, 1)):
        before, after = answers(dead, batch, tokens), answers(made, batch, tokens)
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert shrink(made).model == made
    assert Counter(unit.kind for unit in units(made))["neuron"] == INNER - 3


def test_a_living_network_stays_the_same():
    given = apart()
    assert shrink(given).model == given


def test_heads_that_an_output_shows_stay():
    given = apart()
    scores = next(node.output[0] for node in given.graph.node if node.op_type == "Softmax")
    shown = helper.make_tensor_value_info(scores, TensorProto.FLOAT, None)
    dead = without(given, "head", 1)
    dead.graph.output.append(shown)
    assert all(unit.kind == "neuron" for unit in units(dead))
    assert shrink(dead).model == dead


def test_a_unit_names_what_makes_it_and_what_reads_it():
    head = units(apart())[1]
    places = list(range(SIZE, 2 * SIZE))
    assert [(part.weight, part.axis) for part in head.made] == [
        ("q", 1), ("q_bias", 0), ("k", 1), ("k_bias", 0), ("v", 1), ("v_bias", 0)
    ]  # fmt: skip
    assert [(part.weight, part.axis) for part in head.read] == [("o", 0)]
    assert all(list(part.places) == places for part in (*head.made, *head.read))
    assert head.read[0].of((WIDE, WIDE))[1] == slice(None)
