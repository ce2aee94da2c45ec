"""One suite for every codec: what is written comes back, bit for bit, in numpy and onnxruntime."""

import itertools
from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from prune2onnx.codecs import CODECS, DOMAIN, DOMAIN_VERSION, Payload, Weight, huffman
from prune2onnx.codecs.weight import data_type
from prune2onnx.errors import Prune2OnnxError

BY_NAME = {codec.name: codec for codec in CODECS}
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def floats(patterns: object, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
    return np.array(patterns, np.uint32).view(np.float32).reshape(shape)


def sparse(size: int, at: dict[int, float]) -> np.ndarray:
    array = np.zeros(size, np.float32)
    array[list(at)] = list(at.values())
    return array


def levels(count: int, size: int, density: float, seed: int = 0) -> np.ndarray:
    """`count` distinct values, all of them present, in a `density` part of `size` elements."""
    rng = np.random.default_rng(seed)
    table = ((np.arange(count) - count // 2) * 0.25 + 0.125).astype(np.float32)
    array = table[np.abs(rng.normal(0, count / 4, size)).astype(int) % count]
    array[rng.random(size) >= density] = 0
    array[rng.choice(size, count, replace=False)] = table
    return array


def model_of(payload: Payload, opset: int = 18) -> onnx.ModelProto:
    """A graph of one decode call; its output is the weight."""
    names = [f"s{index}" for index in range(len(payload.streams))]
    value = helper.make_tensor_value_info(payload.name, data_type(payload.dtype), payload.shape)
    graph = helper.make_graph([payload.node(names)], "decode", [], [value], payload.tensors(names))
    return helper.make_model(
        graph,
        functions=list(payload.codec.functions(payload.dtype, opset)),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=8,
    )


def folded_by_onnxruntime(model: onnx.ModelProto, path: object) -> np.ndarray:
    """The one output as a constant of the optimised graph; fails where a node is left."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node] == []
    (constant,) = (t for t in graph.initializer if t.name == model.graph.output[0].name)
    return numpy_helper.to_array(constant)


SPECIAL = [0x80000000, 0x7FC01234, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 1, 0x807FFFFF]

CASES = {
    "all zero": np.zeros((30, 40), np.float32),
    "one element": np.full((1,), 0.5, np.float32),
    "one zero": np.zeros((1, 1), np.float32),
    "two elements": np.array([1, -2], np.float32),
    "all equal": np.full((20, 3, 5, 5), -1.5, np.float32),
    "only the first": sparse(700, {0: 2.0}),
    "only the last": sparse(1000, {999: 3.0}).reshape(10, 100),
    "gap 255": sparse(600, {255: 1.0, 510: 2.0}),
    "gap 256": sparse(600, {256: 1.0, 512: 2.0}),
    "gap 510, 511": sparse(1100, {510: 1.0, 1021: 2.0}),
    "long gaps": sparse(70_000, {3: 1.0, 1_023: 2.0, 66_000: 1.0}).reshape(700, 100),
    "signs of zero": np.tile(floats([0, 0x80000000, 0, 0, 0x80000000, 0]), 20).reshape(4, 30),
    "special patterns": np.tile(floats([0, *SPECIAL, 0]), 30).reshape(2, 3, 50),
    "one level": levels(1, 3000, 0.1),
    "15 levels": levels(15, 3000, 0.1).reshape(30, 10, 10),
    "16 levels": levels(16, 3000, 1.0).reshape(60, 50),
    "17 levels": levels(17, 3000, 0.3),
    "255 levels": levels(255, 9000, 0.2).reshape(90, 100),
    "256 levels": levels(256, 9000, 0.5).reshape(90, 100),
    "512 entries": levels(4, 512, 1.0)[:512],
    "513 entries": levels(4, 513, 1.0)[:513],
    "more than 256 * 256": levels(9, 90_000, 0.9).reshape(300, 300),
}


@each_codec
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_comes_back(codec, case, tmp_path):
    weight = Weight("fc.weight", CASES[case])
    if reason := codec.refusal(weight):
        with pytest.raises(Prune2OnnxError, match=r"^fc\.weight: "):
            codec.encode(weight)
        assert reason
        return
    payload = codec.encode(weight)
    decoded = codec.decode(payload)
    assert decoded.shape == weight.array.shape and decoded.dtype == weight.array.dtype
    np.testing.assert_array_equal(bits(decoded), bits(weight.array))
    model = model_of(payload)
    onnx.checker.check_model(model, full_check=True)
    folded = folded_by_onnxruntime(model, tmp_path / "optimised.onnx")
    assert folded.shape == weight.array.shape
    np.testing.assert_array_equal(bits(folded), bits(weight.array))


def test_which_codec_takes_which_case():
    taken = {
        codec.name: {case for case in CASES if not codec.refusal(Weight("w", CASES[case]))}
        for codec in CODECS
    }
    with_nan = {"special patterns"}
    assert taken["half"] == set(CASES) - with_nan
    # Zero comes on top of 256 levels, which fills more than a codebook.
    assert taken["codebook"] == taken["codebook-huffman"] == set(CASES) - {"256 levels"}
    assert taken["gap-codebook"] == taken["gap-codebook-huffman"] == set(CASES)
    # Nibbles come in pairs, and there are 16 of them, zero included.
    assert {"15 levels", "16 levels", "special patterns", "all equal"} <= taken["codebook-nibble"]
    assert not {"17 levels", "one element", "513 entries"} & taken["codebook-nibble"]


@each_codec
@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((0, 3), np.float32), "empty"),
        (np.float32(1).reshape(()), "scalar"),
        (np.zeros((3, 3), np.int64), "int64"),
        (np.arange(300, dtype=np.float32) / 7, "float16|256 distinct"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_weight(codec, array, reason):
    with pytest.raises(Prune2OnnxError, match=rf"^conv\.bias: .*({reason}).*{codec.name}"):
        codec.encode(Weight("conv.bias", array))


DTYPES = [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE,
          onnx.TensorProto.INT8, onnx.TensorProto.UINT8]  # fmt: skip


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("codec", [c for c in CODECS if c.name != "half"], ids=lambda c: c.name)
def test_codebooks_hold_any_element_type(codec, kind, tmp_path):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    if data_type(dtype) != kind:
        pytest.skip(f"onnx {onnx.__version__} has no numpy type for it")
    rng = np.random.default_rng(3)
    values = rng.integers(1, 15, (40, 70)).astype(np.uint64)
    values[rng.random(values.shape) < 0.8] = 0
    array = (values * 0x11).astype(f"u{dtype.itemsize}").view(dtype)
    if kind == onnx.TensorProto.BFLOAT16 and codec.gaps:
        assert "bfloat16" in codec.refusal(Weight("w", array))
        return
    payload = codec.encode(Weight("w", array))
    decoded = codec.decode(payload)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(bits(decoded), bits(array))
    folded = folded_by_onnxruntime(model_of(payload), tmp_path / "optimised.onnx")
    np.testing.assert_array_equal(bits(folded), bits(array))


@pytest.mark.parametrize("opset", [13, 14, 16, 18, 21])
@each_codec
def test_the_functions_mean_the_same_in_every_opset(codec, opset, tmp_path):
    array = levels(12, 2000, 0.2).reshape(20, 100)
    model = model_of(codec.encode(Weight("w", array)), opset)
    onnx.checker.check_model(model, full_check=True)
    folded = folded_by_onnxruntime(model, tmp_path / "optimised.onnx")
    np.testing.assert_array_equal(bits(folded), bits(array))


def test_all_functions_together_stay_small():
    functions = {
        function.name: function.ByteSize()
        for codec in CODECS
        for function in codec.functions(np.dtype(np.float32), 18)
    }
    assert sum(functions.values()) < 3000
    assert functions["d"] + functions["h"] + functions["e"] < 2048


# --- properties ------------------------------------------------------------------------------


@st.composite
def arrays(draw):
    """Few levels of any bit pattern, in runs, so that zeros come in long gaps too."""
    table = draw(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from(SPECIAL), min_size=1))
    runs = draw(st.lists(st.tuples(st.integers(0, 600), st.sampled_from(table)), max_size=25))
    parts = [np.zeros(1, np.uint32)]
    for zeros, pattern in runs:
        parts += [np.zeros(zeros, np.uint32), np.array([pattern], np.uint32)]
    flat = np.concatenate(parts)
    columns = draw(st.integers(1, 7))
    return (
        flat[: max(1, flat.size // columns) * columns].view(np.float32).reshape(-1, 1)
        if (flat.size < columns)
        else flat[: flat.size // columns * columns].view(np.float32).reshape(-1, columns)
    )


@each_codec
@given(array=arrays())
@settings(deadline=None, max_examples=60)
def test_any_array_survives_numpy(codec, array):
    weight = Weight("w", array)
    if not codec.refusal(weight):
        np.testing.assert_array_equal(bits(codec.decode(codec.encode(weight))), bits(array))


@given(array=arrays())
@settings(deadline=None, max_examples=12)
def test_any_array_survives_onnxruntime(tmp_path_factory, array):
    codec = BY_NAME["gap-codebook-huffman"]
    path = tmp_path_factory.mktemp("any") / "optimised.onnx"
    folded = folded_by_onnxruntime(model_of(codec.encode(Weight("w", array))), path)
    np.testing.assert_array_equal(bits(folded), bits(array))


@given(st.binary(min_size=1, max_size=3000))
@settings(deadline=None, max_examples=60)
def test_any_bytes_survive_huffman(text):
    symbols = np.frombuffer(text, np.uint8)
    code, data, starts = huffman.encode(symbols)
    internal, alphabet = np.array(code.internal, np.uint8), np.array(code.order, np.uint8)
    decoded = huffman.decode(data, internal, starts, alphabet, symbols.size)
    np.testing.assert_array_equal(decoded, symbols)


# --- Huffman codes ---------------------------------------------------------------------------


def entropy(counts: np.ndarray) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def test_codewords_by_hand():
    # Depths 2, 2, 2, 3, 3: the two long codewords come first, 000 and 001; then 01, 10, 11.
    code = huffman.canonical([2, 3, 2, 3, 2])
    assert code.order == (1, 3, 0, 2, 4)
    assert code.codewords == (0b000, 0b001, 0b01, 0b10, 0b11)
    assert code.lengths == (3, 3, 2, 2, 2)
    assert code.internal == (1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_a_stream_by_hand():
    # a: 1 bit '1', b: '01', c: '000', d: '001' as in canonical()'s example.
    symbols = np.array([7, 7, 7, 7, 5, 5, 9, 11], np.uint8)
    code, data, starts = huffman.encode(symbols)
    assert code.order == (9, 11, 5, 7)
    # 1 1 1 1 01 01 000 001 -> 1111 0101 0000 01(00)
    assert data.tolist() == [0b1111010100000100]
    assert starts.tolist() == [0]


def test_one_symbol_needs_no_bits():
    code, data, starts = huffman.encode(np.full(2000, 42, np.uint8))
    assert code.lengths == (0,) and set(code.internal) == {0}
    assert data.tolist() == [0] and starts.tolist() == [0, 0, 0, 0]


def test_lanes_take_turns():
    symbols = np.arange(1025, dtype=np.int64) % 2
    code, data, starts = huffman.encode(symbols.astype(np.uint8))
    assert code.lengths == (1, 1)
    # 1025 symbols in 3 lanes: 342, 342 and 341 of them, one bit each.
    assert starts.tolist() == [0, 342, 342]
    stream = np.unpackbits(data.astype(">u2").view(np.uint8))
    np.testing.assert_array_equal(stream[:342], symbols[0::3])
    np.testing.assert_array_equal(stream[342:684], symbols[1::3])
    np.testing.assert_array_equal(stream[684:1025], symbols[2::3])


@pytest.mark.parametrize("limit", [3, 4])
@pytest.mark.parametrize(
    "counts", [(1,), (1, 1), (1, 100), (1, 2, 4, 8), (5, 5, 5), (1, 1, 3, 9, 27), (3, 1, 4, 1, 5)]
)
def test_no_limited_code_is_shorter(counts, limit):
    def cost(lengths):
        return sum(count * length for count, length in zip(counts, lengths, strict=True))

    lengths = huffman.code_lengths(counts, limit)
    best = min(
        cost(trial)
        for trial in itertools.product(range(limit + 1), repeat=len(counts))
        if sum(Fraction(1, 1 << length) for length in trial) <= 1
    )
    assert cost(lengths) == best and max(lengths) <= limit


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=256))
@settings(deadline=None, max_examples=60)
def test_codes_are_complete_and_within_a_bit_of_the_entropy(counts):
    lengths = huffman.code_lengths(counts)
    assert sum(Fraction(1, 1 << length) for length in lengths) == 1
    assert max(lengths) <= huffman.LENGTH_LIMIT
    array = np.array(counts)
    assert (array * lengths).sum() / array.sum() <= entropy(array) + 1
    code = huffman.canonical(lengths)
    words = [f"{w:0{n}b}" for w, n in zip(code.codewords, code.lengths, strict=True)]
    padded = [word.ljust(12, "0") for word in words]
    assert padded == sorted(set(padded))


def test_more_symbols_than_codewords_is_an_error():
    with pytest.raises(Prune2OnnxError, match="5 symbols do not fit codewords of 2 bits"):
        huffman.code_lengths([1] * 5, limit=2)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2])
def test_gap_streams_come_close_to_their_entropy(density):
    rng = np.random.default_rng(1)
    gaps = np.minimum(rng.geometric(density, 100_000), 255).astype(np.uint8)
    counts = np.unique(gaps, return_counts=True)[1]
    _, data, starts = huffman.encode(gaps)
    spent = 8 * (data.nbytes + starts.nbytes) / gaps.size
    assert entropy(counts) <= spent <= entropy(counts) + 0.12
    assert 8 * starts.nbytes / gaps.size <= 0.06


def test_payload_counts_all_its_bytes():
    payload = BY_NAME["gap-codebook-huffman"].encode(Weight("fc.weight", CASES["long gaps"]))
    names = ["xx"] * 8
    graph = onnx.GraphProto(node=[payload.node(names)], initializer=payload.tensors(names))
    assert payload.nbytes == graph.ByteSize()


# --- damage ----------------------------------------------------------------------------------


def damaged(codec: str, **changed: object) -> Payload:
    payload = BY_NAME[codec].encode(Weight("fc.weight", CASES["15 levels"]))
    streams = {**payload.streams, **{k: v for k, v in changed.items() if k in payload.streams}}
    attributes = {**payload.attributes, **{k: v for k, v in changed.items() if k not in streams}}
    return Payload(payload.name, payload.codec, streams, attributes)


def u8(*values):
    return np.array(values, np.uint8)


@pytest.mark.parametrize(
    ("codec", "changed", "message"),
    [
        ("gap-codebook", {"k": (2**20, 2**20, 2**20)}, "declared shape"),
        ("gap-codebook", {"k": (30, -10, 10)}, "declared shape"),
        ("gap-codebook", {"k": (29, 10, 10)}, "lies at element 29.. of 2900"),
        ("gap-codebook", {"j": (1, 1, 1)}, "strides"),
        ("gap-codebook", {"alphabet": np.ones(3, np.float32)}, "codebook of 3"),
        ("gap-codebook", {"codes": u8(0, 1)}, "2 codes"),
        ("codebook", {"codes": u8([[250, 0], [1, 2]])}, "code 250"),
        ("codebook-nibble", {"pairs": u8(0, 1)}, "4 codes, 3000 expected"),
        ("codebook-huffman", {"internal": u8(*[255] * 12)}, "impossible code lengths"),
        ("codebook-huffman", {"internal": u8(1, 1)}, "12 expected"),
        ("codebook-huffman", {"starts": np.zeros(1, np.uint16)}, "lane starts"),
        ("codebook-huffman", {"starts": np.full(6, 9, np.uint16)}, "damaged"),
        ("codebook-huffman", {"starts": np.full(6, 65535, np.uint16)}, "damaged"),
        ("codebook-huffman", {"n": (2999,)}, "3000 expected"),
        ("codebook-huffman", {"alphabet": np.ones(200, np.float32)}, "alphabet of 200"),
        ("codebook-huffman", {"data": np.zeros(1, np.uint16)}, "damaged"),
        ("gap-codebook-huffman", {"n": (2**40,)}, "entries in a weight of 3000"),
        ("gap-codebook-huffman", {"n": (0,)}, "entries in a weight of 3000"),
        ("gap-codebook-huffman", {"gap_internal": u8(*[0] * 12)}, "alphabet"),
    ],
)
def test_damage_is_an_error_that_names_the_weight(codec, changed, message):
    broken = damaged(codec, **changed)
    with pytest.raises(Prune2OnnxError, match=rf"^fc\.weight: .*{message}"):
        broken.codec.decode(broken)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_flipped_bits_end_in_an_error_or_an_array(data):
    payload = damaged("gap-codebook-huffman")
    stream = data.draw(st.sampled_from(list(payload.streams)))
    raw = bytearray(payload.streams[stream].tobytes())
    at = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[at // 8] ^= 1 << at % 8
    original = payload.streams[stream]
    flipped = np.frombuffer(bytes(raw), original.dtype).reshape(original.shape)
    broken = damaged("gap-codebook-huffman", **{stream: flipped})
    try:
        assert broken.codec.decode(broken).shape == (30, 10, 10)
    except Prune2OnnxError as error:
        assert str(error).startswith("fc.weight: ")
