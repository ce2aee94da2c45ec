"""One suite for every method: what is written comes back, bit for bit, in numpy and onnxruntime."""

import functools
import itertools
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import optimised
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.domain import DOMAIN, DOMAIN_VERSION
from prune2onnx.graph.protobuf import framed
from prune2onnx.graph.tensors import WEIGHT_NBYTES
from prune2onnx.packing.codecs import (
    METHODS,
    WORKING,
    Bundle,
    Method,
    Weight,
    bundle,
    decode,
    described,
    encode,
    entropy_nbytes,
    huffman,
    huffman_graph,
    plan,
    streams,
)
from prune2onnx.packing.codecs import evaluator as evaluate
from prune2onnx.packing.codecs.book import MAX_VALUES
from prune2onnx.packing.codecs.groups import FILLED_GAPS, masks_of
from prune2onnx.packing.codecs.limits import Budget
from prune2onnx.packing.codecs.plan import CODER_NBYTES, estimates, refusal
from prune2onnx.packing.codecs.streams import SEGMENT_NBYTES, partition
from prune2onnx.packing.codecs.values.levels import BOOK, level_codes
from prune2onnx.packing.codecs.values.planes import planes_of
from prune2onnx.packing.codecs.weight import bits_of, entropy_bits, gaps_of, indexed, narrowest

TYPES = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "float64": (TensorProto.DOUBLE, np.float64),
    "int8": (TensorProto.INT8, np.int8),
    "uint8": (TensorProto.UINT8, np.uint8),
    "int4": (TensorProto.INT4, ml_dtypes.int4),
    "uint4": (TensorProto.UINT4, ml_dtypes.uint4),
}
BY_NAME = {method.name: method for method in METHODS}

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
each_type = pytest.mark.parametrize("type_name", TYPES)
CODERS = ("huffman", "rice", "none")
each_coder = pytest.mark.parametrize("coder", CODERS)


each_op = pytest.mark.parametrize("op", huffman.LANES)


# --- weights ---------------------------------------------------------------------------------


def sparse(size: int, at: dict[int, float]) -> np.ndarray:
    array = np.zeros(size)
    array[list(at)] = list(at.values())
    return array


def levels(count: int, size: int, density: float) -> np.ndarray:
    """`count` values of a byte, all of them present, in a fraction `density` of `size` elements."""
    rng = np.random.default_rng(count + size)
    table = np.arange(count) - count // 2 + (count < 256)  # with 256 values, zero is one of them
    array = table[np.abs(rng.normal(0, count / 4, size)).astype(int) % count]
    array[rng.random(size) >= density] = 0
    array[rng.choice(size, count, replace=False)] = table
    return array


def two_of_four(rows: int, columns: int) -> np.ndarray:
    """Of four neighbours two are not zero."""
    rng = np.random.default_rng(24)
    order = rng.random((rows * columns // 4, 4)).argsort(axis=1)
    return ((rng.integers(1, 7, order.shape)) * (order < 2)).reshape(rows, columns)


PLAIN = {
    "all zero": np.zeros((30, 40)),
    "one element": np.full((1,), 5.0),
    "one zero": np.zeros((1, 1)),
    "two elements": np.array([1, 7]),
    "all equal": np.full((20, 3, 5, 5), 3.0),
    "only the first": sparse(700, {0: 2.0}),
    "only the last": sparse(1000, {999: 3.0}).reshape(10, 100),
    "gap 255": sparse(600, {254: 1.0, 509: 2.0}),
    "gap 256": sparse(600, {255: 1.0, 511: 2.0}),
    "gap 257": sparse(600, {256: 1.0, 513: 2.0}),
    "gaps of 511, 512, 513": sparse(2000, {5: 1.0, 516: 2.0, 1028: 1.0, 1541: 3.0}),
    "long gaps": sparse(70_000, {3: 1.0, 1_023: 2.0, 66_000: 1.0}).reshape(700, 100),
    "1 level": levels(1, 3000, 0.1),
    "15 levels": levels(15, 3000, 0.1).reshape(30, 10, 10),
    "16 levels": levels(16, 3000, 1.0).reshape(60, 50),
    "17 levels": levels(17, 3000, 0.3),
    "255 levels": levels(255, 9000, 0.2).reshape(90, 100),
    "256 levels": levels(256, 9000, 0.5).reshape(90, 100),
    "511 symbols": levels(4, 511, 1.0),
    "512 symbols": levels(4, 512, 1.0).reshape(8, 64),
    "513 symbols": levels(4, 513, 1.0).reshape(27, 19),
    "more than 256 * 256": levels(9, 90_000, 0.9).reshape(300, 300),
    "2:4": two_of_four(40, 64),
    "same rows, other shape": levels(7, 1200, 0.3).reshape(12, 10, 10),
}


def mantissa_bits(dtype: np.dtype) -> int:
    return int(ml_dtypes.finfo(dtype).nmant)


def patterns(dtype: np.dtype) -> np.ndarray:
    """Bit patterns of a float type that arithmetic easily loses."""
    mantissa = mantissa_bits(dtype)
    sign = 1 << 8 * dtype.itemsize - 1
    infinity = sign - (1 << mantissa)
    quiet = 1 << mantissa - 1
    finite = [0, sign, 1, sign | quiet, sign | 1]
    nan = [infinity | quiet | 3, infinity | 1, 2 * sign - 1]
    return np.array([*finite, infinity, sign | infinity, *nan], f"u{dtype.itemsize}")


def special(dtype: np.dtype) -> dict[str, np.ndarray]:
    every = patterns(dtype)
    with np.errstate(invalid="ignore"):
        nan, finite = np.isnan(every.view(dtype)), np.isfinite(every.view(dtype))
    rng = np.random.default_rng(1)
    random = rng.normal(size=(40, 30)).astype(dtype)
    steps = rng.integers(1, 2 ** min(20, mantissa_bits(dtype)), 900)
    tiny = steps.astype(every.dtype).reshape(30, 30).view(dtype)
    half_zero = random.copy()
    half_zero[rng.random(random.shape) < 0.5] = 0
    strange = half_zero.copy()
    strange.reshape(-1)[: 40 * finite.sum()] = np.tile(every[finite], 40).view(dtype)
    strange.reshape(-1)[400::3] = 0
    return {
        "signs of zero": np.tile(every[[0, 1, 0, 0, 1, 0]], 20).reshape(4, 30).view(dtype),
        "infinities": np.tile(every[~nan], 40).reshape(2, 5, -1).view(dtype),
        "NaN": np.tile(np.concatenate([every, every[:2]]), 30).reshape(40, 9).view(dtype),
        "full precision": random,
        "full precision, half zero": half_zero,
        "full precision and strange bits": strange,
        "denormals": tiny,
        "all bits finite": np.tile(every[finite], 30).reshape(3, -1).view(dtype),
    }


@functools.cache
def cases(type_name: str) -> dict[str, Weight]:
    number, dtype = TYPES[type_name]
    dtype = np.dtype(dtype)
    least, most = (
        (0, 15) if type_name == "uint4" else (-8, 7) if type_name == "int4" else (-128, 255)
    )
    found = {}
    for name, array in PLAIN.items():
        if array.size > 10_000 and type_name not in ("float32", "int8"):
            continue  # for time
        if type_name in ("uint8", "uint4"):
            array = np.where(array < 0, 128 - array, array)
        if type_name == "int8":
            array = np.clip(array, -128, 127)
        found[name] = np.clip(array, least, most).astype(np.int16).astype(dtype)
    if type_name in ("float32", "float16", "bfloat16", "float64"):
        found |= special(dtype)
    return {name: Weight(name, array, number) for name, array in found.items()}


@functools.cache
def fitting(type_name: str, coder: str) -> dict[str, dict[Method, float]]:
    """Case -> the methods that fit it, and the bytes that they are estimated to take."""
    return {
        name: {} if refusal(weight) else estimates(weight, coder=coder)
        for name, weight in cases(type_name).items()
    }


def taken(type_name: str, method: Method, coder: str) -> list[Weight]:
    return [
        cases(type_name)[name] for name, fit in fitting(type_name, coder).items() if method in fit
    ]


SCALES = {
    "rows": np.float32([[0.5], [0.3], [7e-3], [1.1]] * 5),
    "scalar": np.array(0.017, np.float32),
    "one": np.full((1, 1), 0.3, np.float32),
    "columns": np.float32([[0.1, 0.7] * 15]),
    "columns without rows": np.float32([0.1, 0.9] * 15),
    "halves": np.float32([[0.5], [0.25]] * 10),
}


def scaled(name: str, scale: np.ndarray, steps: np.ndarray) -> Weight:
    steps = steps.astype(np.float32)
    return Weight(name, steps * scale, TensorProto.FLOAT, scale, steps)


# --- round trips -----------------------------------------------------------------------------


def model_of(made: Bundle, weights: list[Weight], opset: int = 21) -> ModelProto:
    """A graph of one decode call; its outputs are the weights."""
    node, streams = call_of(made)
    outputs = [helper.make_tensor_value_info(w.name, w.element_type, w.shape) for w in weights]
    return helper.make_model(
        helper.make_graph([node], "decode", [], outputs, streams),
        functions=list(made.functions),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=10 if opset > 18 else 8,
    )


def call_of(made: Bundle) -> tuple[onnx.NodeProto, list[TensorProto]]:
    node = onnx.NodeProto()
    node.CopyFrom(made.node)
    streams = []
    for index, stream in enumerate(made.streams):
        streams.append(TensorProto())
        streams[-1].CopyFrom(stream)
        streams[-1].name = chr(ord("a") + index % 26) + chr(ord("a") + index // 26)
        node.input.append(streams[-1].name)
    return node, streams


def in_numpy(made: Bundle) -> dict[str, np.ndarray]:
    node, streams = call_of(made)
    functions = {function.name: function for function in made.functions}
    arrays = [numpy_helper.to_array(stream) for stream in streams]
    return decode(node, arrays, functions, Budget(1 << 30, 1 << 30))


def folded(made: Bundle, weights: list[Weight], opset: int = 21) -> dict[str, np.ndarray]:
    """The weights as constants of onnxruntime's optimised graph; fails where a node is left."""
    graph = optimised(model_of(made, weights, opset))
    assert [node.op_type for node in graph.node] == []
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {weight.name: constants[weight.name] for weight in weights}


def assert_same(found: dict[str, np.ndarray], weights: list[Weight]) -> None:
    for weight in weights:
        got, want = found[weight.name], weight.array
        assert (got.dtype, got.shape) == (want.dtype, want.shape), weight.name
        assert got.tobytes() == want.tobytes(), weight.name


def written(weights: list[Weight], method, coder: str = "huffman", opset: int = 21) -> Bundle:
    return encode(weights, {w.name: method for w in weights}, opset, coder=coder)


@each_coder
@each_type
@each_method
def test_what_is_written_comes_back(method, type_name, coder):
    weights = taken(type_name, method, coder)
    for index, weight in enumerate(weights):  # each in a group of its own
        made = written([weight], method, coder)
        assert_same(in_numpy(made), [weight])
        if weight.array.size < 10_000 and (type_name == "float32" or index % 4 == 0):
            assert_same(folded(made, [weight]), [weight])
    if not weights:
        assert method.values.name in ("planes", "levels", "dictionary")
        return
    together = written(weights, method, coder)
    assert_same(in_numpy(together), weights)
    assert_same(folded(together, weights), weights)
    onnx.checker.check_model(model_of(together, weights), full_check=True)


def test_which_method_takes_which_weight():
    def fit(type_name: str, name: str, coder: str = "huffman") -> set[str]:
        return {method.name for method in estimates(cases(type_name)[name], coder=coder)}

    planes = {"planes", "gap-planes", "mask-planes"}
    assert fit("float32", "15 levels") == set(BY_NAME) - planes - {"dictionary"}
    # Positions of a weight without zeros save nothing.
    assert fit("float32", "16 levels") == {"raw", "codebook", "levels"}
    for name in ("signs of zero", "infinities", "NaN"):
        assert not {"levels", "gap-levels", "mask-levels"} & fit("float32", name)
    # More than 256 values have exponents, unless one is no number.
    assert fit("float32", "full precision") == {"raw", "planes"}
    half_zero = planes | {"raw", "gap-raw", "mask-raw", "dictionary"}
    assert fit("float32", "full precision, half zero") == half_zero
    assert fit("float32", "denormals") >= {"planes"} <= fit("float16", "full precision")
    assert not planes & (fit("float32", "infinities") | fit("float32", "NaN"))
    # Without an entropy code, separate exponents save nothing.
    assert not planes & fit("float32", "full precision", coder="none")
    assert not planes & fit("float64", "full precision")
    # A codebook of all 256 bytes saves nothing over the bytes themselves.
    assert fit("int8", "256 levels") >= {"gap-raw", "levels", "mask-levels"}
    assert "codebook" not in fit("float32", "256 levels") | fit("int8", "256 levels")
    for type_name, (number, _) in TYPES.items():
        assert cases(type_name)["15 levels"].working == WORKING[number]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (Weight("w", np.zeros((0, 3), np.float32), TensorProto.FLOAT), "empty"),
        (Weight("w", np.float32(1).reshape(()), TensorProto.FLOAT), "a scalar"),
        (Weight("w", np.zeros((3, 3), np.int64), TensorProto.INT64), "int64 has no codec"),
        (cases("bfloat16")["NaN"], "bfloat16 NaN may lose its payload"),
    ],
)
def test_what_no_method_takes_says_why(weight, reason):
    assert reason in refusal(weight)
    made = plan([weight], {weight.name: 10_000}, 18)
    assert made.bundle is None and reason in made.reasons[weight.name]


def test_a_weight_that_onnxruntime_would_not_fold_stays_dense(monkeypatch):
    monkeypatch.setattr(sys.modules["prune2onnx.packing.codecs.plan"], "MAX_NBYTES", 1000)
    weight = cases("float32")["15 levels"]
    assert "12,000 bytes are more than onnxruntime folds (1,000)" in refusal(weight)


@each_coder
@pytest.mark.parametrize("opset", [13, 14, 16, 18, 21, 23])
def test_the_functions_mean_the_same_in_every_opset(opset, coder):
    weights, methods = [], {}
    for type_name in [name for name in TYPES if opset >= 21 or "int4" not in name]:
        known = cases(type_name)
        for name, method in itertools.product(("15 levels", "full precision", "2:4"), METHODS):
            if name in known and method in estimates(known[name], coder=coder):
                moved = np.roll(known[name].array, len(weights))
                weights.append(
                    Weight(f"{type_name} {name} {method.name}", moved, known[name].element_type)
                )
                methods[weights[-1].name] = method
    weights += [scaled(name, scale, levels(9, 600, 0.4).reshape(20, 30))
                for name, scale in SCALES.items()]  # fmt: skip
    methods |= dict.fromkeys(SCALES, BY_NAME["gap-levels"])
    made = encode(weights, methods, opset, coder=coder)
    for function in made.functions:
        assert [e.version for e in function.opset_import if not e.domain] == [opset]
    onnx.checker.check_model(model_of(made, weights, opset), full_check=True)
    assert_same(in_numpy(made), weights)
    assert_same(folded(made, weights, opset), weights)


@each_coder
@pytest.mark.parametrize("method", ["levels", "gap-levels", "mask-levels", "codebook", "raw"])
def test_scales_multiply_the_levels(method, coder):
    dense = levels(9, 600, 0.4).reshape(20, 30)
    weights = [scaled(name, scale, dense) for name, scale in SCALES.items()]
    weights.append(scaled("channels", SCALES["rows"], levels(5, 20, 0.5).reshape(20, 1)))
    weights.append(scaled("vector", np.float32([0.1, 0.2] * 10), levels(5, 20, 0.5)))
    if method == "codebook":
        weights.append(scaled("deep", SCALES["rows"].reshape(20, 1, 1), dense.reshape(20, 6, 5)))
    every = written(weights, BY_NAME[method], coder)
    assert_same(in_numpy(every), weights)
    assert_same(folded(every, weights), weights)
    for weight in weights:
        alone = written([weight], BY_NAME[method], coder)
        assert_same(in_numpy(alone), [weight])
        assert_same(folded(alone, [weight]), [weight])


def test_weights_of_one_method_share_its_nodes():
    array = levels(9, 900, 0.3).astype(np.float32)

    def nodes(count: int) -> int:
        weights = [
            Weight(f"{i}", np.roll(array, i).reshape(-1, 3, 3), TensorProto.FLOAT)
            for i in range(count)
        ]
        made = written(weights, BY_NAME["gap-levels"])
        assert_same(in_numpy(made), weights)
        return sum(len(function.node) for function in made.functions)

    assert nodes(40) <= nodes(2) + 2  # a Concat of the runs' values, and one of their positions


@pytest.mark.parametrize("jump_bits", [huffman.JUMP_BITS, 1000], ids=["m", "l"])
def test_a_model_that_no_stream_or_group_can_hold_has_several(monkeypatch, jump_bits):
    monkeypatch.setattr(huffman, "JUMP_BITS", jump_bits)
    monkeypatch.setattr(streams, "STREAM_BITS", 20_000)
    monkeypatch.setattr(bundle, "GROUP_LIMIT", 50_000)
    weights = [
        Weight(f"w{n}", levels(9 + n, 4000 + 100 * n, 0.3).astype(np.float32), TensorProto.FLOAT)
        for n in range(6)
    ]
    for method in (BY_NAME["gap-codebook"], BY_NAME["codebook"]):
        made = written(weights, method)
        calls = [node for node in made.functions[-1].node if node.op_type in huffman.LANES]
        assert len(calls) > 1
        assert len({function.name for function in made.functions}) == len(made.functions)
        assert_same(in_numpy(made), weights)
        assert_same(folded(made, weights), weights)


def test_equal_weights_are_stored_once():
    known = cases("float32")
    one, other = known["15 levels"], known["17 levels"]
    weights = [one, other] + [Weight(f"copy {i}", one.array, one.element_type) for i in range(3)]
    # Equal bits in another shape or type are another weight.
    weights.append(Weight("flat", one.array.reshape(-1), one.element_type))
    weights.append(Weight("whole", one.array.astype(np.int8), TensorProto.INT8))
    method = BY_NAME["gap-codebook"]
    made, fewer = written(weights, method), written([one, other, *weights[5:]], method)
    assert [s.raw_data for s in made.streams] == [s.raw_data for s in fewer.streams]
    assert made.nbytes < fewer.nbytes + 3 * 60
    assert_same(in_numpy(made), weights)
    assert_same(folded(made, weights), weights)
    facts = described(made.node)
    assert [each.nbytes for each in facts[2:5]] == [0, 0, 0] and facts[0].nbytes > 0


def test_a_bundle_counts_all_its_bytes():
    for weights in (
        taken("float32", BY_NAME["gap-codebook"], "huffman"),
        taken("int8", BY_NAME["raw"], "huffman"),
        [cases("float16")["full precision"]],
    ):
        made = written(weights, BY_NAME["raw"])
        node, streams = call_of(made)
        graph = onnx.GraphProto(node=[node], initializer=streams)
        model = ModelProto(functions=made.functions)
        assert made.nbytes == graph.ByteSize() + model.ByteSize()


def test_the_call_says_how_each_weight_is_written():
    known = cases("float32")
    weights = [known["15 levels"], known["full precision"], known["2:4"]]
    numbers = (6, 1, 10)
    methods = {w.name: METHODS[n] for w, n in zip(weights, numbers, strict=True)}
    made = encode(weights, methods, 18, skips=[2, 0, 7])
    facts = described(made.node)
    assert [each.skip for each in facts] == [2, 0, 7]
    assert [each.method for each in facts] == list(methods.values())
    assert list(made.node.output) == [w.name for w in weights]
    streams = sum(len(stream.raw_data) for stream in made.streams)
    assert 0.9 * streams < sum(each.nbytes for each in facts) <= streams


def test_weights_that_changed_are_found_by_their_checksum():
    weights = [cases("float32")["15 levels"]]
    made = written(weights, BY_NAME["raw"])
    made.streams[0].raw_data = (
        bytes([made.streams[0].raw_data[0] ^ 1]) + (made.streams[0].raw_data[1:])
    )
    with pytest.raises(Prune2OnnxError, match=r"15 levels: .* checksum .* damaged"):
        in_numpy(made)
    renamed = written(weights, BY_NAME["raw"])
    renamed.node.output[0] = "another"
    with pytest.raises(Prune2OnnxError, match="checksum"):
        in_numpy(renamed)


def test_the_functions_stay_small():
    for opset in (13, 21):
        for limit in huffman.LIMITS:
            jumps, steps = (
                sum(framed(f.ByteSize(), tag=2) for f in huffman_graph.functions(op, opset, limit))
                for op in huffman.LANES
            )
            assert 0.9 * CODER_NBYTES["huffman"] < jumps < 1.1 * CODER_NBYTES["huffman"]
            assert steps < 2 * jumps  # and stands in files of 100 kB or more
    made = written([cases("float32")["15 levels"]], BY_NAME["gap-codebook"])
    assert made.functions[-1].ByteSize() < 1000


# --- properties ------------------------------------------------------------------------------


@st.composite
def any_weight(draw, types=tuple(TYPES), name="w"):
    """Few levels of any bit pattern, in runs, so that zeros come in long gaps too."""
    number, dtype = TYPES[draw(st.sampled_from(types))]
    dtype = np.dtype(dtype)
    bits = 4 if "4" in dtype.name and dtype.itemsize == 1 else 8 * dtype.itemsize
    pattern = st.integers(0, 2**bits - 1)
    if dtype.itemsize > 1:
        pattern |= st.sampled_from([int(each) for each in patterns(dtype)])
    table = draw(st.lists(pattern, min_size=1, max_size=20))
    runs = draw(st.lists(st.tuples(st.integers(0, 600), st.sampled_from(table)), max_size=25))
    parts = [np.zeros(1, np.uint64)]
    for zeros, one in runs:
        parts += [np.zeros(zeros, np.uint64), np.array([one], np.uint64)]
    flat = np.concatenate(parts).astype(f"u{dtype.itemsize}")
    if bits == 4:
        array = flat.astype(np.int8)
        array = (array - 16 * ((array > 7) & (dtype.name == "int4"))).astype(dtype)
    else:
        array = flat.view(dtype)
    columns = draw(st.integers(1, min(7, array.size)))
    return Weight(name, array[: array.size // columns * columns].reshape(-1, columns), number)


@given(weight=any_weight(), coder=st.sampled_from(CODERS))
@settings(deadline=None, max_examples=100)
def test_any_weight_survives_numpy_in_every_method_that_takes_it(weight, coder):
    if refusal(weight):
        return
    for method in estimates(weight, coder=coder):
        assert_same(in_numpy(written([weight], method, coder)), [weight])


@given(st.data())
@settings(deadline=None, max_examples=25)
def test_any_weights_survive_onnxruntime_together(data):
    weights, methods = [], {}
    coder = data.draw(st.sampled_from(CODERS))
    for index in range(data.draw(st.integers(1, 6))):
        weight = data.draw(any_weight(name=f"w{index}"))
        if not refusal(weight):
            weights.append(weight)
            fit = list(estimates(weight, coder=coder))
            methods[weight.name] = data.draw(st.sampled_from(fit))
    if weights:
        made = encode(weights, methods, 21, coder=coder)
        assert_same(in_numpy(made), weights)
        assert_same(folded(made, weights), weights)


@given(st.lists(st.binary(min_size=1, max_size=1500), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_any_segments_survive_huffman(texts):
    segments = [indexed(np.frombuffer(text, np.uint8))[0] for text in texts]
    assert_decodes(huffman.encode(segments), segments)


def assert_decodes(stream: huffman.Stream, segments: list[np.ndarray], decoded=None) -> None:
    decoded = huffman.decode(stream) if decoded is None else decoded
    at = 0
    for segment in segments:
        np.testing.assert_array_equal(decoded[at : at + segment.size], segment)
        at += -(-segment.size // stream.lane) * stream.lane
    assert decoded.size == at


# --- positions and values, by hand -----------------------------------------------------------


def test_gaps_by_hand():
    # Elements 1 and 12 of the first weight, 0 of the second, which starts at 20: gaps 2, 11 and 8.
    gaps, real = gaps_of([np.array([1, 12]), np.array([20])], 256)
    assert [part.tolist() for part in gaps] == [[2, 11], [8]]
    assert [part.tolist() for part in real] == [[0, 1], [0]]
    # A weight without a nonzero has no gap; the next weight's gap spans it.
    gaps, _ = gaps_of([np.array([2]), np.array([], int), np.array([300])], 256)
    assert [part.tolist() for part in gaps] == [[3], [], [256, 42]]
    for longest, gap in itertools.product(FILLED_GAPS, (1, 31, 32, 33, 255, 256, 257, 511, 512)):
        (part,), (places,) = gaps_of([np.array([gap - 1, 2 * gap - 1])], longest)
        assert (np.cumsum(part) - 1)[places].tolist() == [gap - 1, 2 * gap - 1]
        assert part.min() >= 1 and part.max() <= longest and part.size == 2 * -(-gap // longest)


def test_masks_by_hand():
    values = np.float32([0, 1, 0, 0, -0.0, 0, 0, 2, 3])
    assert masks_of(values).tolist() == [0b01001001, 0b10000000]
    # Of four neighbours two: six masks, so 36 of the 256 bytes.
    assert np.unique(masks_of(two_of_four(100, 64))).size == 36


def test_levels_by_hand():
    assert BOOK[:5].tolist() == [0, 1, -1, 2, -2] and BOOK[[253, 254, 255]].tolist() == [
        127, -127, -128]  # fmt: skip
    values = np.arange(-128, 128, dtype=np.int16)
    for dtype in (np.float32, np.float64, np.int8):
        codes = level_codes(values.astype(dtype), False)
        np.testing.assert_array_equal(BOOK[codes], values)
    # Where zero only fills gaps, it is the rarest: its code is the last.
    assert level_codes(np.float32([1, -1, 0, 2]), True).tolist() == [0, 1, 3, 2]
    for wrong in ([0.5], [-0.0], [128], [-129], [np.nan], [np.inf]):
        assert level_codes(np.float32(wrong), False) is None


@pytest.mark.parametrize("type_name", ["float32", "float16", "bfloat16"])
def test_planes_are_exponent_and_the_other_bits(type_name):
    number, dtype = TYPES[type_name]
    one, minus = np.array([1.5], dtype), np.array([-1.5], dtype)
    symbol, rest = planes_of(one, number)
    other, low = planes_of(minus, number)
    if type_name == "float16":  # 0 01111 1000000000: the sign is in the symbol
        assert (symbol[0], rest[0], other[0], low[0]) == (0x3E, 0, 0xBE, 0)
    else:
        mantissa = 23 if type_name == "float32" else 7
        assert (symbol[0], other[0]) == (127, 127)
        assert rest[0] == 1 << mantissa - 1 and low[0] == rest[0] | 1 << mantissa


def test_a_codebook_puts_the_most_frequent_value_first():
    codes, book = indexed(np.float32([7, 9, 9, -0.0, 9, 7]))
    assert codes.tolist() == [1, 0, 0, 2, 0, 1]
    assert book.tolist() == [9, 7, 0] and np.signbit(book[2])
    assert indexed(np.arange(MAX_VALUES)) is not None and indexed(np.arange(MAX_VALUES + 1)) is None
    assert indexed(np.concatenate([np.zeros(5000, int), np.arange(300)])) is None


def test_the_narrowest_exact_type():
    assert narrowest(np.float32([0.5, -0.0, np.inf])) == TensorProto.FLOAT16
    assert narrowest(np.float32([1e20 * 0 + 2.0**100])) == TensorProto.BFLOAT16
    assert narrowest(np.float32([0.1])) == TensorProto.FLOAT
    assert narrowest(np.float32([np.nan])) == TensorProto.FLOAT
    late = np.zeros(5000, np.float32)
    late[-1] = 0.1
    assert narrowest(late) == TensorProto.FLOAT


# --- Huffman codes ---------------------------------------------------------------------------


def test_codewords_by_hand():
    # Depths 2, 2, 2, 3, 3: the long codewords come first in numerical order, 000 and 001.
    code = huffman.canonical([2, 2, 2, 3, 3])
    assert code.codewords == (0b11, 0b10, 0b01, 0b001, 0b000)
    assert code.internal == (1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_a_stream_by_hand():
    # 0: '1', 1: '01', 2: '001', 3: '000'; then a segment of 0: '1', 1: '0', at the next word.
    first = np.array([0, 0, 0, 0, 1, 1, 3, 2], np.uint8)
    second = np.array([0, 1, 0], np.uint8)
    assert huffman.code_of(first).lengths == (1, 2, 3, 3)
    stream = huffman.encode([first, second])
    # 1 1 1 1 01 01 000 001 -> 1111 0101 0000 01(00), and 101
    assert [f"{word:016b}" for word in stream.data] == ["1111010100000100", "1010000000000000"]
    assert stream.starts.tolist() == [0, 16] and stream.tails.tolist() == [1, 2]
    assert stream.internal.tolist() == [[1] + [0] * 9, [1, 1, 1] + [0] * 7]  # at most 10 bits
    assert_decodes(stream, [first, second])


def test_one_symbol_needs_no_bits():
    code = huffman.code_of(np.zeros(2000, np.uint8))
    assert code.lengths == (0,) and set(code.internal) == {0}
    stream = huffman.encode([np.zeros(2000, np.uint8)])
    assert stream.data.tolist() == [0] and stream.starts.tolist() == [0, 0, 0, 0]


def test_lanes_follow_one_another():
    symbols = (np.arange(1025) % 2).astype(np.uint8)
    stream = huffman.encode([symbols])
    assert stream.starts.tolist() == [0, 512, 512]  # a bit a symbol
    bits = np.unpackbits(stream.data.astype(">u2").view(np.uint8))
    np.testing.assert_array_equal(bits[:1025], 1 - symbols)


def prefix_codes(size: int, limit: int):
    """Lengths of every complete or incomplete prefix code."""
    for trial in itertools.product(range(limit + 1), repeat=size):
        if sum(1 << limit - length for length in trial) <= 1 << limit:
            yield trial


def cost(counts, lengths) -> int:
    return sum(count * length for count, length in zip(counts, lengths, strict=True))


@pytest.mark.parametrize("limit", [3, 4])
@pytest.mark.parametrize(
    "counts", [(1,), (1, 1), (1, 100), (1, 2, 4, 8), (5, 5, 5), (1, 1, 3, 9, 27), (3, 1, 4, 1, 5)]
)
def test_no_limited_code_is_shorter(counts, limit):
    lengths = huffman.code_lengths(counts, limit)
    best = min(cost(counts, trial) for trial in prefix_codes(len(counts), limit))
    assert cost(counts, lengths) == best and max(lengths) <= limit


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5))
@settings(deadline=None, max_examples=80)
def test_rising_lengths_come_close_to_the_best_code_that_rises(counts):
    lengths = huffman.rising_lengths(np.array(counts))
    assert lengths == sorted(lengths) and sum(2.0**-length for length in lengths) == 1
    best = min(
        cost(counts, trial)
        for trial in prefix_codes(len(counts), 4)
        if list(trial) == sorted(trial)
    )
    assert best <= cost(counts, lengths) <= best + sum(counts)
    falling = sorted(counts, reverse=True)
    assert cost(falling, huffman.rising_lengths(np.array(falling))) == cost(
        falling, huffman.code_lengths(falling)
    )


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=256))
@settings(deadline=None, max_examples=60)
def test_codes_are_complete_and_within_a_bit_of_the_entropy(counts):
    lengths = huffman.code_lengths(counts)
    assert sum(1 << 12 - length for length in lengths) == 1 << 12
    assert max(lengths) <= huffman.LIMITS[-1]
    array = np.array(counts)
    assert entropy_bits(array) <= cost(counts, lengths) + 1e-6
    assert cost(counts, lengths) <= entropy_bits(array) + array.sum()
    assert huffman.about_bits(array) <= cost(counts, lengths)
    if max(lengths) < huffman.LIMITS[-1]:  # then the limit did not bind
        assert huffman.about_bits(array) == cost(counts, lengths)
    code = huffman.canonical(sorted(lengths))
    words = [f"{w:0{n}b}" for w, n in zip(code.codewords, code.lengths, strict=True)]
    padded = [word.ljust(12, "0") for word in words]
    assert padded == sorted(set(padded), reverse=True)


def test_more_symbols_than_codewords_is_an_error():
    with pytest.raises(Prune2OnnxError, match="5 symbols do not fit codewords of 2 bits"):
        huffman.code_lengths([1] * 5, limit=2)


def test_a_stream_that_is_longer_than_bit_positions_reach_is_an_error(monkeypatch):
    monkeypatch.setattr(huffman, "MAX_BITS", 1000)
    with pytest.raises(Prune2OnnxError, match="1,008 bits of codewords, at most 1,000 fit"):
        huffman.encode([np.tile(np.arange(2, dtype=np.uint8), 500)])


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_streams_come_close_to_their_entropy(density):
    rng = np.random.default_rng(1)
    symbols = np.minimum(rng.geometric(density, 100_000) - 1, 255).astype(np.uint8)
    stream = huffman.encode([symbols])
    spent = 8 * (stream.data.nbytes + stream.starts.nbytes) / symbols.size
    entropy = entropy_bits(np.bincount(symbols)) / symbols.size
    assert entropy <= spent <= entropy + 0.12
    assert 8 * stream.starts.nbytes / symbols.size <= 0.033


@pytest.mark.parametrize(
    ("density", "factor"), [(0.002, 1.75), (0.005, 1.3), (0.01, 1.12), (0.03, 1.08), (0.1, 1.08)]
)
def test_sparse_weights_come_close_to_their_entropy(density, factor):
    """Less closely where most gaps are longer than a symbol can be, so that fillers bridge them."""
    rng = np.random.default_rng(1)
    array = rng.normal(0, 4, (600, 600)).astype(int).astype(np.float32)
    array[rng.random(array.shape) >= density] = 0
    weight = Weight("w", array, TensorProto.FLOAT)
    (facts,) = described(written([weight], BY_NAME["gap-levels"]).node)
    assert facts.nbytes < factor * entropy_nbytes(array) + 60


def segments_of_many_codes() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [
        np.zeros(1300, np.uint8),
        rng.integers(0, 256, 2000).astype(np.uint8),
        np.array([0], np.uint8),
        np.minimum(rng.geometric(0.3, 1536) - 1, 255).astype(np.uint8),
        (rng.random(513) < 0.001).astype(np.uint8),
        np.arange(512, dtype=np.uint8) % 3,
        np.minimum(rng.geometric(0.02, 3000) - 1, 255).astype(np.uint8),
    ]


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("limit", huffman.LIMITS)
@each_op
def test_both_functions_decode_what_numpy_decodes(op, limit, opset, monkeypatch):
    """In onnxruntime, and in numpy node by node: the oracle's shortcut is only a shortcut."""
    monkeypatch.setattr(huffman, "_MOST_ADDED", 1e9 if limit == huffman.LIMITS[0] else 0)
    monkeypatch.setattr(huffman, "JUMP_BITS", 1 << 20 if op == "m" else 0)
    segments = segments_of_many_codes()
    stream = huffman.encode(segments)
    assert (stream.op, stream.internal.shape[1]) == (op, limit)
    assert stream.starts.size == sum(-(-s.size // stream.lane) for s in segments)
    base = np.arange(len(segments), dtype=np.int32)[::-1] * 1000
    inputs = {
        "data": stream.data.reshape(-1, 1),
        "internal": stream.internal[..., None],
        "starts": stream.starts,
        "tails": stream.tails.reshape(-1, 1),
        "base": base.reshape(-1, 1),
        **{f"lanes{index}": array for index, array in enumerate(stream.lanes)},
    }
    want = huffman.decode(stream) + base[stream.segments].repeat(stream.lane)
    plain = [part.astype(int) + 1000 * index for index, part in enumerate(segments)]
    assert_decodes(stream, plain, want)

    node = helper.make_node(op, list(inputs), ["symbols"], domain=DOMAIN)
    tensors = [numpy_helper.from_array(array, name) for name, array in inputs.items()]
    output = helper.make_tensor_value_info("symbols", TensorProto.INT32, [want.size])
    model = helper.make_model(
        helper.make_graph([node], "decode", [], [output], tensors),
        functions=list(huffman_graph.functions(op, opset, limit)),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    graph = optimised(model)
    assert not graph.node
    (constant,) = (t for t in graph.initializer if t.name == "symbols")
    assert_decodes(stream, plain, numpy_helper.to_array(constant))

    functions = {function.name: function for function in model.functions}
    short = Budget(1 << 30, 1 << 30)
    (shortcut,) = evaluate.evaluate(node, list(inputs.values()), functions, short)
    np.testing.assert_array_equal(shortcut, want)
    monkeypatch.setattr(evaluate, "_is_ours", lambda *_: False)
    long = Budget(1 << 30, 1 << 30)
    (interpreted,) = evaluate.evaluate(node, list(inputs.values()), functions, long)
    assert interpreted.dtype == shortcut.dtype
    assert_decodes(stream, plain, interpreted)
    # The shortcut counts what a runtime would spend: what loads take is predicted from it.
    counted, run = short.work, long.work
    assert counted.nodes == pytest.approx(run.nodes, rel=0.1)
    assert counted.made.total() == pytest.approx(run.made.total(), rel=0.1)
    assert counted.read.total() == pytest.approx(run.read.total(), rel=0.1)
    assert counted.held.keys() == run.held.keys()


@each_op
def test_whole_bundles_decode_alike_node_by_node(op, monkeypatch):
    monkeypatch.setattr(huffman, "JUMP_BITS", 1 << 20 if op == "m" else 0)
    weights, methods = [], {}
    for type_name, method in itertools.product(("float32", "int8"), METHODS):
        fit = taken(type_name, method, "huffman")
        for weight in [w for w in fit if w.array.size < 10_000][::4]:
            name = f"{type_name} {method.name} {weight.name}"
            weights.append(Weight(name, np.roll(weight.array, len(weights)), weight.element_type))
            methods[name] = method
    made = encode(weights, methods, 21)
    assert op in {function.name for function in made.functions}
    assert_same(folded(made, weights), weights)
    assert_same(in_numpy(made), weights)
    monkeypatch.setattr(evaluate, "_is_ours", lambda *_: False)
    assert_same(in_numpy(made), weights)


def test_long_streams_are_stepped_through_and_short_ones_jumped():
    assert huffman.encode([np.zeros(9, np.uint8)]).op == "m"
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 256, huffman.JUMP_BITS // 8 + 3).astype(np.uint8)
    long = huffman.encode([symbols])
    assert long.op == "l"
    assert_decodes(long, [symbols])


def test_the_shortcut_stands_for_our_functions_alone():
    functions = {function.name: function for function in huffman_graph.functions("m", 18, 12)}
    assert evaluate._is_ours(functions["m"], functions)
    for name, function in functions.items():
        changed = onnx.FunctionProto()
        changed.CopyFrom(function)
        changed.node[-1].op_type = "Gather"
        others = {**functions, name: changed}
        assert not evaluate._is_ours(others["m"], others)
    assert not evaluate._is_ours(functions["m"], {"m": functions["m"]})


# --- the planner -----------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 400), min_size=4, max_size=4), min_size=1, max_size=7))
@settings(deadline=None, max_examples=60)
def test_no_partition_takes_fewer_bytes(table):
    counts = [np.array(row) for row in table]

    def nbytes(runs) -> float:
        return sum(entropy_bits(sum(counts[a:b])) / 8 + SEGMENT_NBYTES for a, b in runs)

    found = partition(counts)
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])] and found[-1][1] == len(counts)
    trials = []
    for cuts in itertools.product([False, True], repeat=len(counts) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(counts)]
        trials.append(nbytes(itertools.pairwise(bounds)))
    assert nbytes(found) == pytest.approx(min(trials))


@each_coder
@each_type
def test_estimates_are_close_to_what_is_written(type_name, coder):
    """Estimates are for what a weight adds to a group and family that exist anyway."""

    def nbytes(weights: list[Weight], method) -> int:
        made = written(weights, method, coder)
        return made.nbytes - sum(framed(f.ByteSize(), tag=2) for f in made.functions[:-1])

    for weight in cases(type_name).values():
        if refusal(weight) or weight.nbytes < WEIGHT_NBYTES:
            continue
        alike = np.roll(weight.array, 1)
        if (bits_of(alike) == bits_of(weight.array)).all():
            alike = alike.copy()
            alike.reshape(-1)[-1] = 2
        there = Weight("there", alike, weight.element_type)
        also = estimates(there, coder=coder)
        for method, about in fitting(type_name, coder)[weight.name].items():
            if method in also:
                truth = nbytes([there, weight], method) - nbytes([there], method)
                case = (weight.name, method.name, truth, about)
                assert abs(truth - about) < 0.06 * about + 650, case


def test_the_plan_is_hardly_larger_than_any_other():
    """Others: one method for all that it takes, and for each weight its own cheapest."""
    known = cases("float32")
    names = ("15 levels", "255 levels", "2:4", "long gaps", "full precision", "17 levels")
    weights = [known[name] for name in names]
    dense = {weight.name: weight.nbytes + 20 for weight in weights}
    for load, coder in (("small", "huffman"), ("small", "rice"), ("fast", "none")):
        made = plan(weights, dense, 18, load=load)
        assert made.bundle is not None
        rest = sum(dense[name] for name in names if name not in made.methods)
        least = made.bundle.nbytes + rest
        for method in METHODS:
            fit = [w for w in taken("float32", method, coder) if w.name in names]
            others = sum(dense[w.name] for w in weights if w not in fit)
            if fit:
                assert least <= written(fit, method, coder, 18).nbytes + others + 300
        each = {w.name: min(e := estimates(w, coder=coder), key=lambda m: e[m]) for w in weights}
        assert least <= encode(weights, each, 18, coder=coder).nbytes + 300


def test_a_plan_names_every_weight_once():
    weights = [*cases("float32").values(), *taken("int8", BY_NAME["raw"], "huffman")]
    weights = [Weight(f"w{i}", w.array, w.element_type) for i, w in enumerate(weights)]
    dense = {"before": 30, **{w.name: w.nbytes + 20 for w in weights}, "after": 30}
    made = plan(weights, dense, 18)
    assert set(made.methods) ^ set(made.reasons) == {w.name for w in weights}
    assert not set(made.methods) & set(made.reasons)
    assert_same(in_numpy(made.bundle), [w for w in weights if w.name in made.methods])
    # Skips lead from one coded weight to the next among all initializers.
    at, order = -1, list(dense)
    for name, facts in zip(made.bundle.node.output, described(made.bundle.node), strict=True):
        at += facts.skip + 1
        assert order[at] == name
    assert plan(weights, dense, 18).bundle.node == made.bundle.node  # deterministic


def test_a_small_network_does_without_the_coder():
    weight = Weight("w", levels(15, 400, 0.3).astype(np.float32), TensorProto.FLOAT)
    made = plan([weight], {"w": 1620}, 18)
    assert made.bundle is not None and len(made.bundle.functions) == 1
    assert made.bundle.nbytes < 1000


# --- entropies -------------------------------------------------------------------------------


def test_entropies_by_hand():
    assert entropy_bits(np.array([2, 1, 1, 0])) == 6.0
    assert entropy_bits(np.array([0, 9])) == 0.0 == entropy_bits(np.array([], int))
    # Half of 8 elements at 1 bit each, and 4 values of which 2 are equal: 1.5 bits each.
    assert entropy_nbytes(np.float32([[0, 1, 0, 1], [2, 3, 0, 0]])) == pytest.approx((8 + 6) / 8)
    assert entropy_nbytes(np.zeros((3, 3), np.float32)) == 0.0
    # Above 256 values the exponents count, here one for all, and 24 other bits.
    array = np.linspace(1, 2, 400, endpoint=False, dtype=np.float32)
    assert entropy_nbytes(array) == pytest.approx(400 * 3)
    assert entropy_nbytes(np.arange(1, 401)) == 400 * 8


@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("type_name", ["float32", "float16", "bfloat16", "int8"])
def test_the_best_method_comes_close_to_the_entropy(type_name, density):
    number, dtype = TYPES[type_name]
    rng = np.random.default_rng(6)
    values = rng.normal(0, 1 if type_name != "int8" else 20, (300, 300))
    values[values == 0] = 1
    there = rng.random(values.shape) < density
    for array in (values, np.sign(values)):
        weight = Weight("w", np.where(there, array, 0.0).astype(dtype), number)
        least, method = min((about, m.name) for m, about in estimates(weight).items())
        (facts,) = described(written([weight], BY_NAME[method]).node)
        bound = entropy_nbytes(weight.array)
        # Masks and gaps see neighbours, which the bound does not; at random that saves nothing.
        assert 0.99 * bound - 1 <= facts.nbytes <= 1.1 * bound + 600, (
            method,
            bound,
            facts.nbytes,
            least,
        )


def test_bits_tell_zeros_apart():
    assert bits_of(np.float32([0.0, -0.0])).tolist() == [0, 0x80000000]
