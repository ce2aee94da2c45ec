"""Codebooks and grids: what clustered and rounded values are, and what they cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.cluster.vq import kmeans2

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.packing.approximation.rounding import (
    Metric,
    Sorted,
    code_bits,
    grid_codes,
    k_means,
    to_half,
)
from prune2onnx.packing.codecs.weight import entropy_bits
from prune2onnx.packing.quantized import MOST_STEPS, Quantized, step_of


def test_zeros_stay_zero_and_take_no_level():
    w = np.float32([[0, 1, 1.1], [-2, 0, -2.2]])
    clustered = k_means(w, 2)
    assert (clustered.dense() == 0).tolist() == (w == 0).tolist()
    np.testing.assert_allclose(clustered.codebook, [-2.1, 1.05], rtol=1e-6)
    assert clustered.codes.tolist() == [[0, 2, 2], [1, 0, 1]]
    assert clustered.dense().dtype == np.float32


def test_zero_is_a_value_like_any_other_where_nothing_was_pruned():
    w = np.float32([0, 0, 4, 4])
    np.testing.assert_array_equal(k_means(w, 2, zero_is_pruned=False).dense(), w)


def test_few_distinct_values_are_kept_exactly():
    w = np.random.default_rng(0).choice(np.float32([-1.5, 0.25, 3]), 100)
    np.testing.assert_array_equal(k_means(w, 3).dense(), w)


def test_k_means_starts_from_evenly_spread_levels():
    w = np.random.default_rng(1).standard_normal(3000)
    w = w[w != 0]
    start = np.linspace(w.min(), w.max(), 16)
    oracle, label = kmeans2(w[:, None], start[:, None], iter=100, minit="matrix")
    clustered = k_means(w, 16)
    np.testing.assert_allclose(clustered.codebook, np.sort(oracle[:, 0]), rtol=1e-3)
    error = np.square(clustered.dense() - w).sum()
    assert error == pytest.approx(np.square(oracle[label, 0] - w).sum(), rel=1e-3)


@given(
    arrays(np.float32, st.integers(0, 60), elements=st.floats(-100, 100, width=32)),
    st.integers(1, 256),
)
def test_every_value_goes_to_the_nearest_of_at_most_that_many_levels(w, levels):
    clustered = k_means(w, levels)
    assert len(clustered.codebook) <= levels
    assert (clustered.dense()[w == 0] == 0).all()
    nonzero = w[w != 0]
    if clustered.codebook.size:
        assert clustered.dense()[w != 0].all()
        distance = np.abs(nonzero[:, None].astype(np.float64) - clustered.codebook)
        chosen = np.abs(nonzero.astype(np.float64) - clustered.dense()[w != 0])
        assert (chosen <= distance.min(1) * (1 + 1e-6) + 1e-12).all()


def test_values_whose_only_mean_is_zero_become_zero():
    clustered = k_means(np.float32([1, 0, -1]), 1)
    assert clustered.dense().tolist() == [0, 0, 0] and not clustered.codebook.size


def test_bad_arguments_are_named():
    with pytest.raises(Prune2OnnxError, match="0 levels, expected 1 to 256"):
        k_means(np.ones(3), 0)
    with pytest.raises(Prune2OnnxError, match="NaN"):
        k_means(np.array([1, np.nan]), 2)


def test_half_precision_rounds_or_says_it_overflows():
    w = np.float32([1 / 3, -2.0])
    half = to_half(w)
    assert half is not None and half.dtype == np.float32
    np.testing.assert_array_equal(half, w.astype(np.float16).astype(np.float32))
    assert to_half(np.float32([1e6])) is None


# Codes, codebook and scale


def test_dense_is_one_float32_multiplication_and_code_0_is_plus_zero():
    codes = np.array([[0, 1, 2], [2, 0, 1]])
    scale = np.float32([[0.1], [3e-5]])
    dense = Quantized(codes, np.float32([-7, 3]), scale).dense()
    assert dense.dtype == np.float32
    want = np.float32([[0, -7, 3], [3, 0, -7]]) * scale
    assert dense.tobytes() == np.where(codes == 0, np.float32(0), want).tobytes()
    assert not np.signbit(dense[codes == 0]).any()


def test_without_a_scale_the_values_are_the_codebooks():
    half = Quantized(np.array([1, 0]), np.float16([0.5])).dense()
    assert half.dtype == np.float16 and half.tolist() == [0.5, 0]


# Integer grids

CUBES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9))


@given(arrays(np.float32, CUBES, elements=st.floats(-300, 300, width=32)))
def test_codes_are_a_neighbour_or_zero_and_zeros_stay(u):
    codes = grid_codes(u)
    assert codes.shape == u.shape
    assert (np.abs(codes) <= 127).all() and (codes[u == 0] == 0).all()
    inside = np.abs(u) <= 127
    near = (codes == np.floor(u)) | (codes == np.ceil(u)) | (codes == 0)
    assert near[inside].all()


@given(arrays(np.float32, CUBES, elements=st.floats(-300, 300, width=32)), st.integers(0, 9))
def test_codes_stay_within_their_bounds_also_when_errors_cancel(u, seed):
    rng = np.random.default_rng(seed)
    low, high = -rng.integers(0, 129, u.shape), rng.integers(0, 128, u.shape)
    codes = grid_codes(u, low, high, metric=Metric.of((u.shape[2],), 0.6, 0.1))
    assert (low <= codes).all() and (codes <= high).all() and (codes[u == 0] == 0).all()


def test_errors_cancel_in_the_sums_they_enter():
    u = (9 * np.random.default_rng(0).standard_normal((16, 8, 9))).astype(np.float32)
    metric = Metric.of((3, 3), 0.6, 0.1)

    def cost(codes):
        e = (u - codes).astype(np.float64)
        places = np.einsum("rip,pq,riq->", e, metric.kernel, e)
        return places + metric.mean * np.square(e.sum((1, 2))).sum()

    plain, diffused = grid_codes(u), grid_codes(u, metric=metric)
    assert cost(diffused) < 0.6 * cost(plain)
    assert np.square(u - diffused).mean() < 2 * np.square(u - plain).mean()
    assert cost(grid_codes(u, metric=metric, rounds=3)) <= 1.02 * cost(diffused)


def test_the_metric_is_the_correlation_of_neighbouring_inputs():
    metric = Metric.of((2, 2), 0.5, 0.2)
    want = 0.8 * np.array(
        [[1, 0.5, 0.5, 0.25], [0.5, 1, 0.25, 0.5], [0.5, 0.25, 1, 0.5], [0.25, 0.5, 0.5, 1]]
    )
    np.testing.assert_allclose(metric.kernel, want, rtol=1e-6)
    assert Metric.of((), 0.5, 0.2).kernel.tolist() == [[np.float32(0.8)]]
    # diagonal of the Cholesky factor of [[1, r], [r, 1]]: 1 and sqrt(1 - r^2)
    assert Metric.of((2,), 0.6, 0.0).gain == pytest.approx((1 + (1 - 0.36)) / 2)


def test_rare_codes_give_way_to_cheap_ones():
    u = np.concatenate([np.zeros(5000), np.full(40, 0.6)]).astype(np.float32).reshape(-1, 1, 1)
    u[:5000] = 0.01
    assert not grid_codes(u).any()  # an error of 0.36 is less than 7 bits are worth
    assert np.rint(u).any()


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=60))
def test_entropy_is_what_the_codes_bits_add_up_to(codes):
    codes = np.array(codes)
    assert code_bits(codes)[codes + 127].sum() == pytest.approx(
        entropy_bits(np.bincount(codes + 127)), abs=1e-3
    )


def test_entropy_of_known_sequences():
    assert entropy_bits(np.array([3])) == 0
    assert entropy_bits(np.ones(8, np.int64)) == 24
    assert entropy_bits(np.zeros(0, np.int64)) == 0


@given(
    step=st.floats(2.0**-60, 2.0**100, width=32),
    levels=st.sets(st.integers(-127, 127).filter(bool), min_size=1, max_size=30),
)
def test_a_step_is_found_of_which_all_values_are_multiples(step, levels):
    values = np.array(sorted(levels), np.float32) * np.float32(step)
    found = step_of(values)
    assert found is not None and found >= np.float32(step) * np.float32(1 - 1e-6)
    multiples = np.rint(values / found)
    assert np.abs(multiples).max() <= 127
    assert (multiples * found).tobytes() == values.tobytes()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -0.0, 1e-40, 3.4e38, 0.1234567])
def test_no_step_is_no_error(odd):
    assert step_of(np.float32([0.3, 0.7, odd])) is None
    assert step_of(np.zeros(0, np.float32)) is None


@pytest.mark.parametrize("step", [0.004, 0.03, 0.2, 1.0])
@pytest.mark.parametrize("kind", ["normal", "sparse", "few", "positive"])
def test_sorted_values_are_counted_as_they_are_rounded(kind, step):
    rng = np.random.default_rng(0)
    values = rng.laplace(size=40 if kind == "few" else 5000).astype(np.float32)
    if kind == "sparse":
        values[rng.random(values.size) < 0.9] = 0
    if kind == "positive":
        values = np.abs(values)
    codes = grid_codes((values / np.float32(step)).reshape(-1, 1, 1)).reshape(-1)
    weights = rng.random(values.size)
    counts, error = Sorted(values, weights).on_grid(step)
    assert np.array_equal(counts, np.bincount(codes + MOST_STEPS, minlength=2 * MOST_STEPS + 1))
    off = values.astype(np.float64) - step * codes
    assert error == pytest.approx(float(weights @ np.square(off)), rel=1e-4)
