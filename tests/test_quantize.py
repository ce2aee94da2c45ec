"""Codebooks: what shared values are, and what they cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.cluster.vq import kmeans2

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.quantize import share_values, to_half


def test_zeros_stay_zero_and_take_no_level():
    w = np.float32([[0, 1, 1.1], [-2, 0, -2.2]])
    shared = share_values(w, 2)
    assert (shared.dense() == 0).tolist() == (w == 0).tolist()
    np.testing.assert_allclose(shared.codebook, [-2.1, 1.05], rtol=1e-6)
    assert shared.codes.tolist() == [[0, 2, 2], [1, 0, 1]]
    assert shared.dense().dtype == np.float32


def test_zero_is_a_value_like_any_other_where_nothing_was_pruned():
    w = np.float32([0, 0, 4, 4])
    np.testing.assert_array_equal(share_values(w, 2, zero_is_pruned=False).dense(), w)


def test_few_distinct_values_are_kept_exactly():
    w = np.random.default_rng(0).choice(np.float32([-1.5, 0.25, 3]), 100)
    np.testing.assert_array_equal(share_values(w, 3).dense(), w)


def test_it_is_k_means_from_evenly_spread_levels():
    w = np.random.default_rng(1).standard_normal(3000)
    w = w[w != 0]
    start = np.linspace(w.min(), w.max(), 16)
    oracle, label = kmeans2(w[:, None], start[:, None], iter=100, minit="matrix")
    shared = share_values(w, 16)
    np.testing.assert_allclose(shared.codebook, np.sort(oracle[:, 0]), rtol=1e-3)
    error = np.square(shared.dense() - w).sum()
    assert error == pytest.approx(np.square(oracle[label, 0] - w).sum(), rel=1e-3)


@given(
    arrays(np.float32, st.integers(0, 60), elements=st.floats(-100, 100, width=32)),
    st.integers(1, 256),
)
def test_every_value_goes_to_the_nearest_of_at_most_that_many_levels(w, levels):
    shared = share_values(w, levels)
    assert len(shared.codebook) <= levels
    assert ((shared.dense() == 0) == (w == 0)).all()
    nonzero = w[w != 0]
    if nonzero.size:
        distance = np.abs(nonzero[:, None].astype(np.float64) - shared.codebook)
        chosen = np.abs(nonzero.astype(np.float64) - shared.dense()[w != 0])
        assert (chosen <= distance.min(1) * (1 + 1e-6) + 1e-12).all()


def test_bad_arguments_are_named():
    with pytest.raises(Prune2OnnxError, match="0 levels, expected 1 to 256"):
        share_values(np.ones(3), 0)
    with pytest.raises(Prune2OnnxError, match="NaN"):
        share_values(np.array([1, np.nan]), 2)


def test_half_precision_rounds_or_says_it_overflows():
    w = np.float32([1 / 3, -2.0])
    half = to_half(w)
    assert half is not None and half.dtype == np.float32
    np.testing.assert_array_equal(half, w.astype(np.float16).astype(np.float32))
    assert to_half(np.float32([1e6])) is None
