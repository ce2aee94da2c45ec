"""Tables with much that occurs again: dictionaries, and how small they make what is regular."""

import lzma

import networks
import numpy as np
import pytest
from onnx import helper

from prune2onnx.packing.codecs.values.dictionary import _Numbers
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.folding import folds
from prune2onnx.runtime.validate import check_weights

RNG = np.random.default_rng(0)


def basis(length: int) -> np.ndarray:
    """Of a windowed Fourier transform: cosines, then sines."""
    angle = 2 * np.pi * np.arange(length // 2 + 1)[:, None] * np.arange(length) / length
    window = np.hanning(length + 1)[:-1]
    return np.concatenate([np.cos(angle) * window, -np.sin(angle) * window]).astype(np.float32)


def anchors() -> np.ndarray:
    """Centers and strides of a detector's cells."""
    every = []
    for stride in (8, 16, 32):
        y, x = (np.mgrid[: 640 // stride, : 640 // stride].reshape(2, -1) + 0.5) * stride
        every.append(np.stack([x, y, np.full(x.size, stride), np.full(x.size, stride)], 1))
    return np.concatenate(every).astype(np.float32)


def distances(size: int) -> np.ndarray:
    return np.arange(size)[:, None] - np.arange(size) + size - 1


BLOCKS = RNG.normal(size=(64, 512)).astype(np.float32)
WITH_NAN = np.repeat(RNG.normal(size=600).astype(np.float32), 30)
WITH_NAN[:60] = np.nan
TABLES = {
    "basis": (basis(256), 1.3),
    "anchors": (anchors(), 1.3),
    "repeated rows": (BLOCKS[RNG.integers(0, 64, 512)], 1.0),
    "Toeplitz": (RNG.normal(size=1023).astype(np.float32)[distances(512)], 4),
    "distances": (distances(512).astype(np.float32), 7),
    "mask": (np.where(np.tril(np.ones((600, 600))) > 0, 0, -np.inf).astype(np.float32), 8),
    "mask of bytes": (np.tril(np.ones((600, 600))).astype(np.uint8), 11),
    "many values": (np.tile(RNG.normal(size=(1, 40_000)).astype(np.float32), (3, 1)), 1.0),
    "NaN": (WITH_NAN, 3),
    "double": (np.tile(RNG.normal(size=(20, 50)), (30, 1)), 1.6),
}


def holding(array: np.ndarray):
    if array.dtype == np.float32:
        node = helper.make_node("Identity", ["w"], ["y"])
    else:
        node = helper.make_node("Cast", ["w"], ["y"], to=1)
    return networks.model([node], {"w": array}, {"x": [1]}, {"y": list(array.shape)})


@pytest.mark.parametrize("name", TABLES)
def test_regular_tables_come_back_and_take_about_what_xz_does(name):
    """The decoder takes 2 to 7 kB, so that of tables of a few kB it is the larger part."""
    array, most = TABLES[name]
    dense = holding(array)
    packed = pack(dense)
    assert packed.rows[0].codec == "dictionary"
    assert unpack(packed.model).graph == dense.graph
    assert check_weights(packed.model) == 1 and folds(packed.model)
    zipped = len(lzma.compress(dense.SerializeToString(), preset=9))
    assert packed.model.ByteSize() < most * zipped


def test_a_large_mask_among_large_weights_is_no_stage():
    mask = np.where(np.tril(np.ones((1024, 1024))) > 0, 0, -np.inf).astype(np.float32)
    weight = RNG.normal(size=(1024, 1024)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "m"], ["y"]),
    ]
    dense = networks.model(
        nodes, {"w": weight, "m": mask}, {"x": [1024, 1024]}, {"y": [1024, 1024]}
    )
    packed = pack(dense)
    assert {row.name: row.codec for row in packed.rows} == {"w": "planes", "m": "dictionary"}
    assert packed.rows[1].nbytes < 10_000
    assert unpack(packed.model).graph == dense.graph and folds(packed.model)


@pytest.mark.parametrize("kinds", [1, 2, 255, 256, 300, 5000])
def test_numbers_of_any_size_have_symbols_or_stand_in_a_list(kinds):
    numbers = RNG.integers(-(10**6), 10**6, kinds)[RNG.integers(0, kinds, 20_000)]
    made = _Numbers.of(numbers)
    assert made.symbols.max() < made.table.size <= 256
    found = made.table[made.symbols]
    escaped = made.symbols == made.escape
    if made.others.size:
        found[escaped] = made.others
    assert np.array_equal(found, numbers)
    counts = np.bincount(made.symbols)
    assert (np.diff(counts) <= 0).all()


def test_what_is_not_regular_has_no_dictionary():
    for array in (RNG.normal(size=(300, 300)).astype(np.float32), np.zeros((40, 40), np.float32)):
        assert "dictionary" not in {row.codec for row in pack(holding(array)).rows}
