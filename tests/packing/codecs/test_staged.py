"""Large weights, decoded in stages: words, every kind of weight, and whole files."""

import itertools

import ml_dtypes
import networks
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutation import known
from onnx import TensorProto, helper, numpy_helper

from prune2onnx.commands import pack as commands
from prune2onnx.commands.pack import pack_file
from prune2onnx.graph.domain import DOMAIN, DOMAIN_VERSION
from prune2onnx.graph.file import load, save
from prune2onnx.packing.codecs.evaluator import evaluate
from prune2onnx.packing.codecs.limits import Budget
from prune2onnx.packing.codecs.methods import Method
from prune2onnx.packing.codecs.staged import Known, Large, encode, pieces, words
from prune2onnx.packing.codecs.staged.choice import estimate, fitting
from prune2onnx.packing.codecs.staged.pieces import LEAST_PIECE, pieces_of
from prune2onnx.packing.codecs.weight import Weight
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.folding import folds
from prune2onnx.runtime.validate import check_weights

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


# --- words ---


def unpacked(stored: np.ndarray, width: int) -> np.ndarray:
    """The values of a field, as docs/FORMAT.md describes it."""
    if width == 8:
        return stored
    if width == 1:
        return np.concatenate([stored >> (7 - place) & 1 for place in range(8)])
    halves = np.concatenate([stored >> 4, stored & 15])
    return halves if width == 4 else np.concatenate([halves >> 2, halves & 3])


def read(coded: list[words.Coded], symbols: int) -> np.ndarray:
    """The words of a level without escapes."""
    here, *rest = coded
    level = here.level
    found = np.zeros(here.size, np.uint8)
    below = 0
    for width, field in zip(words.FIELDS[level.bits], here.fields, strict=True):
        found |= unpacked(field, width) << np.uint8(below)
        below += width
    if level.is_last:
        return found
    escapes = np.flatnonzero(found >> level.low == 0)
    assert escapes.size == here.escapes > 0
    left = max(1, ((symbols - 1) >> level.low) + 1 - level.digits)
    table = words.escape_table(level, rest[0].level, symbols)
    found[escapes] |= table[read(rest, left)[: escapes.size]]
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 256), st.integers(1, 3000), st.sampled_from([0.05, 0.3, 1, 10]), st.data())
def test_words_keep_every_symbol(kinds, size, spread, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    drawn = rng.choice(kinds, size, p=rng.dirichlet(np.full(kinds, spread)))
    counts = np.bincount(drawn)
    order = np.argsort(-counts, kind="stable")
    rank = np.argsort(order)
    symbols, counts = rank[drawn].astype(np.uint8), counts[order][counts[order] > 0]
    for simple in (True, False):
        levels = words.plan(counts, simple=simple)
        coded = words.encode(symbols, levels)
        found = read(coded, counts.size)[:size] - np.uint8(levels[0].origin)
        assert np.array_equal(found, symbols)
        assert not simple or all(one.level.low in (0, one.level.bits) for one in coded)


def test_words_take_few_bits_more_than_the_entropy():
    for deviation, most in ((1.5, 1.06), (4, 1.06), (16, 1.04)):
        drawn = np.rint(RNG.normal(0, deviation, 200_000)).astype(int)
        counts = np.sort(np.bincount(drawn - drawn.min()))[::-1]
        counts = counts[counts > 0]
        share = counts / counts.sum()
        entropy = -(share * np.log2(share)).sum() * counts.sum()
        assert entropy < words.bits_of(counts) < most * entropy
        symbols = np.repeat(np.arange(counts.size), counts).astype(np.uint8)
        stored = sum(one.nbytes for one in words.encode(symbols, words.plan(counts)))
        assert stored < 1.02 * words.bits_of(counts) / 8 + 100


# --- weights ---


def special() -> np.ndarray:
    array = normal(300, 300)
    array[3, :8] = np.inf, -np.inf, np.nan, 1e-42, -1e-40, 0.0, -0.0, 3e38
    return array


def far_apart() -> np.ndarray:
    """Few entries, long gaps, and rows without any."""
    array = np.zeros((500, 400), np.float32)
    array[np.arange(0, 500, 60), 7] = 1.5
    array[499, 399] = -2.0
    return array


LEVELS = np.rint(3 * normal(350, 300)) + np.float32(0)
SPARSE = np.rint(2 * normal(900, 400)) * (RNG.random((900, 400)) < 0.1) + np.float32(0)
BYTES = np.clip(np.rint(30 * normal(400, 300)), -128, 127).astype(np.int8)
WEIGHTS = {
    "floats": normal(900, 400),
    "special": special(),
    "short": (normal(300, 300).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
    "bfloat16": normal(300, 300).astype(ml_dtypes.bfloat16),
    "half": normal(300, 300).astype(np.float16),
    "convolution": normal(64, 128, 3, 3),
    "vector": np.rint(4 * normal(100_000)),
    "sparse": SPARSE,
    "sparse bytes": SPARSE.astype(np.int8),
    "far apart": far_apart(),
    "bytes": BYTES,
    "unsigned": RNG.integers(0, 256, (300, 300)).astype(np.uint8),
    "int4": np.clip(BYTES // 16, -8, 7).astype(ml_dtypes.int4),
}
SCALED = {"one": np.full(1, 0.037), "rows": normal(350, 1), "columns": normal(1, 300)}


def given_weights() -> list[Weight]:
    found = [
        Weight(name, array, helper.np_dtype_to_tensor_dtype(array.dtype))
        for name, array in WEIGHTS.items()
    ]
    for name, factors in SCALED.items():
        scale = factors.astype(np.float32)
        found.append(Weight(name, LEVELS * scale, TensorProto.FLOAT, scale, LEVELS))
    return found


def methods_of(weights: list[Known], opset: int) -> dict[str, Method]:
    return {
        one.weight.name: min(fitting(one), key=lambda how: estimate(one, how, opset))
        for one in weights
    }


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_every_kind_of_weight_is_decoded_bit_for_bit(opset):
    weights = [one for one in given_weights() if opset >= 21 or one.name != "int4"]
    every = [known(weight) for weight in weights]
    methods = methods_of(every, opset)
    assert {how.name for how in methods.values()} >= {"planes", "levels", "gap-codebook"}
    names = map(str, itertools.count())
    places = {weight.name: place for place, weight in enumerate(weights)}
    made = encode(every, methods, places, opset, lambda: next(names))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.streams}
    budget = Budget(1 << 30, made.nbytes)
    for node in made.nodes:
        inputs = [values[name] for name in node.input]
        arrays = evaluate(node, inputs, made.functions, budget)
        values.update(zip(node.output, arrays, strict=True))
    outputs = [networks.value(w.name, w.shape, w.element_type) for w in weights]
    graph = helper.make_graph(made.nodes, "g", [], outputs, made.streams, value_info=made.places)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        functions=list(made.functions.values()),
        ir_version=10,
    )
    onnx.checker.check_model(model)
    opened = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for weight in weights:
        array = values[weight.name]
        assert array.dtype == weight.array.dtype and array.shape == weight.shape, weight.name
        assert array.tobytes() == weight.array.tobytes(), weight.name
        if weight.array.dtype.name not in ("bfloat16", "int4"):  # which numpy cannot be given
            (found,) = opened.run([weight.name], {})
            assert found.tobytes() == weight.array.tobytes(), weight.name
    assert not networks.optimised(model).node


def test_pieces_cover_every_row_in_stages_of_equal_peaks():
    sizes = [(3000, 700), (40, 2000), (5, 100_000), (900_000,), (70_000, 3)]
    weights = [
        Large(str(at), shape, TensorProto.FLOAT, lambda begin, end: np.zeros(0))
        for at, shape in enumerate(sizes)
    ]
    made = [20.0, 40.0, 60.0, 20.0, 30.0]  # bytes for each element
    sizes = np.array([weight.size for weight in weights])
    pieces = pieces_of(weights, made * sizes, 4 * sizes)
    for weight in weights:
        own = [piece for piece in pieces if piece.weight is weight]
        assert own[0].begin == 0 and own[-1].end == weight.shape[0]
        assert all(a.end == b.begin for a, b in itertools.pairwise(own))
        assert [piece.stage for piece in own] == sorted(piece.stage for piece in own)
    stage = [piece.stage for piece in pieces]
    held = np.bincount(stage, [made[int(p.weight.name)] * p.size for p in pieces])
    kept = np.cumsum(np.bincount(stage, [p.nbytes for p in pieces]))
    peaks = held + np.append(0, kept[:-1])
    assert held.size == 7 and np.ptp(peaks) < 60 * LEAST_PIECE
    assert held[0] > 1.2 * held[-1]


# --- files ---


def large(**weights: np.ndarray) -> onnx.ModelProto:
    """x [N, k] times one weight after the other; each is followed by a Relu."""
    nodes, at, width = [], "x", None
    for number, (name, array) in enumerate(weights.items()):
        width = width or array.shape[0]
        nodes.append(helper.make_node("MatMul", [at, name], [f"h{number}"]))
        nodes.append(helper.make_node("Relu", [f"h{number}"], [f"r{number}"]))
        at = f"r{number}"
    nodes.append(helper.make_node("Add", [at, "bias"], ["y"]))
    bias = {"bias": np.float32([0.25])}
    return networks.model(nodes, {**weights, **bias}, {"x": ["N", width]}, {"y": ["N", None]})


def levels(*shape: int) -> np.ndarray:
    return np.rint(3 * normal(*shape)) * np.float32(0.01) + np.float32(0)


def test_a_large_model_comes_back_bit_for_bit_and_folds():
    dense = large(a=normal(700, 900), b=levels(900, 800), c=normal(800, 900), d=normal(900, 20))
    packed = pack(dense)
    onnx.checker.check_model(packed.model)
    back = unpack(packed.model)
    assert back.graph == dense.graph and not back.functions
    assert {row.name: row.codec for row in packed.rows} == {
        "a": "planes", "b": "levels", "c": "planes", "d": "planes", "bias": "dense",
    }  # fmt: skip
    assert check_weights(packed.model) == 4 and folds(packed.model)
    small = pack(dense, load="small").model
    assert packed.model.ByteSize() < 1.02 * small.ByteSize()
    assert "z" in {node.op_type for node in packed.model.graph.node}
    assert "z" not in {node.op_type for node in small.graph.node}


def test_a_packed_file_is_packed_again_for_another_load():
    dense = large(a=levels(1100, 1000))
    balanced = pack(dense).model
    assert pack(pack(balanced, load="small").model).model == balanced


def test_small_models_are_the_same_as_for_the_fewest_bytes():
    dense = large(a=normal(300, 300), b=levels(300, 300))
    assert pack(dense).model == pack(dense, load="small").model


def test_what_costs_more_time_than_it_saves_stays_dense():
    noise = np.clip(np.rint(31 * normal(1100, 1000)), -128, 127).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    weights = {"w": noise, "s": np.float32(0.01)}
    dense = networks.model(nodes, weights, {"x": ["N", 1100]}, {"y": ["N", 1000]})
    row = next(row for row in pack(dense).rows if row.name == "w")
    assert row.codec == "dense" and "--load small" in row.reason
    row = next(row for row in pack(dense, load="small").rows if row.name == "w")
    assert row.codec != "dense"


def test_equal_large_weights_are_stored_once():
    array = normal(700, 800)
    others = {"a": normal(700, 700), "b": array, "c": normal(800, 700)}
    dense = large(**others, d=array)
    packed = pack(dense)
    assert packed.model.ByteSize() < pack(large(**others)).model.ByteSize() + 1000
    assert unpack(packed.model).graph == dense.graph and folds(packed.model)
    row = next(row for row in packed.rows if row.name == "d")
    assert (row.codec, row.nbytes) == ("planes", 0)


def test_a_bfloat16_nan_keeps_its_payload():
    """A conversion may lose it, so such a weight is not coded."""
    array = normal(1100, 1000).astype(ml_dtypes.bfloat16)
    array.view(np.uint16)[0, 0] = 0x7FA5
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    dense = networks.model(nodes, {"w": array}, {"x": ["N", 1100]}, {"y": ["N", 1000]})
    assert pack(dense).rows[0].codec == "dense"
    array.view(np.uint16)[0, 0] = 0x3F80
    dense.graph.initializer[0].raw_data = array.tobytes()
    assert pack(dense).rows[0].codec == "planes"
    assert unpack(pack(dense).model) == dense


def test_memory_holds_some_pieces_and_not_the_model(monkeypatch, tmp_path):
    """Streams are spilled, weights read from the file: what is written is the same."""
    dense = large(a=normal(900, 1000), b=levels(1000, 900), c=normal(900, 900))
    save(dense, tmp_path / "dense.onnx")
    monkeypatch.setattr(pieces, "PIECE_SIZE", 200_000)
    told = []
    source, first = tmp_path / "dense.onnx", tmp_path / "a.onnx"
    pack_file(source, first, progress=lambda *made: told.append(made))
    monkeypatch.setattr(commands, "_SPILLED_NBYTES", 1)
    pack_file(source, tmp_path / "b.onnx")
    assert first.read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"dense.onnx", "a.onnx", "b.onnx"}
    packed = load(tmp_path / "b.onnx")
    assert unpack(packed).graph == dense.graph and folds(packed)
    lower = [t.dims[0] for t in packed.graph.initializer if t.data_type == TensorProto.UINT16]
    assert sum(lower) == 1_710_000 and max(lower) <= 200_000
    amounts = [done for _, done, _ in told]
    assert {name for name, _, _ in told} == {"a", "b", "c"} and amounts == sorted(amounts)
    assert {total for _, _, total in told} == {amounts[-1]}


@pytest.mark.parametrize("opset", [13, 18])
def test_without_an_entropy_code_large_weights_are_looked_up_or_cast(opset):
    short = (normal(800, 900).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    many = np.rint(20 * normal(1000, 800)) * np.float32(0.01) + np.float32(0)
    dense = large(a=levels(900, 1000), b=many, c=short, d=normal(900, 800))
    dense.opset_import[0].version = opset
    packed = pack(dense, load="fast")
    assert {row.name: row.codec for row in packed.rows} == {
        "a": "levels", "b": "levels", "c": "raw", "d": "dense", "bias": "dense",
    }  # fmt: skip
    sizes = {row.name: row.nbytes / row.size for row in packed.rows}
    assert sizes["a"] == pytest.approx(1, abs=0.01) and sizes["c"] == pytest.approx(2, abs=0.01)
    assert unpack(packed.model).graph == dense.graph and folds(packed.model)
    assert check_weights(packed.model) == 3
    assert "NonZero" not in {node.op_type for f in packed.model.functions for node in f.node}


def test_rows_of_large_matrices_have_tables_with_their_scale():
    """A factor of each row, or one of all, is in the tables; one of each column is not."""
    whole = np.rint(3 * normal(700, 900)) + np.float32(0)
    for factors, names in ((normal(700, 1), {"t"}), (normal(1), {"t"}), (normal(1, 900), {"k"})):
        scale = np.abs(factors).astype(np.float32)
        one = known(Weight("w", whole * scale, TensorProto.FLOAT, scale, whole))
        methods = methods_of([one], 18)
        names_of = map(str, itertools.count())
        made = encode([one], methods, {"w": 0}, 18, lambda given=names_of: next(given))
        found = {name[0] for name in made.functions}
        assert names <= found and not found & ({"t", "k"} - names)
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.streams}
        for node in made.nodes:
            inputs = [values[name] for name in node.input]
            arrays = evaluate(node, inputs, made.functions, Budget(1 << 30, made.nbytes))
            values.update(zip(node.output, arrays, strict=True))
        assert values["w"].tobytes() == (whole * scale).tobytes()
