"""Rounding one input after the other: the factor, prices, zeros and the refit."""

import numpy as np
import pytest

from prune2onnx.packing.calibration.rounding import (
    Factor,
    looked_up,
    pruned,
    refit,
    rounded,
    step_for,
)
from prune2onnx.packing.calibration.zeros import _most_of_neighbours

RNG = np.random.default_rng(0)


def hessian(size: int, correlation: float = 0.8) -> np.ndarray:
    x = RNG.normal(size=(20 * size, size)) * RNG.uniform(0.3, 2, size)
    x = correlation * x.mean(1, keepdims=True) * size**0.5 + (1 - correlation) * x
    return x.T @ x / len(x) + 1e-3 * np.eye(size)


def even(step: float, outputs: int) -> np.ndarray:
    return np.full(outputs, step, np.float32)


def error(weights, target, moments) -> float:
    off = np.asarray(weights, np.float64) - target
    return float(np.einsum("io,ij,jo->", off, moments, off))


def test_the_factor_is_that_of_the_inverse():
    moments = hessian(40)
    factor = Factor.of(moments)
    own = moments[np.ix_(factor.order, factor.order)]
    assert np.array_equal(factor.upper, np.triu(factor.upper))
    np.testing.assert_allclose(factor.upper.T @ factor.upper @ own, np.eye(40), atol=1e-7)
    assert (np.diff(np.diag(own)) <= 0).all()
    assert np.array_equal(Factor.of(moments, in_order=True).order, np.arange(40))


def test_later_inputs_compensate_for_errors():
    moments, target = hessian(150), RNG.normal(size=(150, 30))
    factor, nothing = Factor.of(moments), np.zeros((150, 30), np.int16)
    codes = rounded(target, factor, even(0.5, 30), 0.0, nothing)
    nearest = np.rint(target / 0.5)
    assert error(codes * 0.5, target, moments) < 0.5 * error(nearest * 0.5, target, moments)


def test_without_correlation_weights_are_rounded_to_nearest():
    target = RNG.normal(size=(70, 5))
    codes = rounded(target, Factor.of(np.eye(70)), even(0.25, 5), 0.0, np.zeros((70, 5), np.int16))
    assert np.array_equal(codes, np.rint(target.astype(np.float32) / np.float32(0.25)))


def test_a_price_saves_bits():
    moments, target = hessian(100), RNG.normal(size=(100, 40))
    factor = Factor.of(moments)
    step = step_for(factor.spread, 0.01)
    first = np.rint(target / step).astype(np.int16)
    free, dear = (rounded(target, factor, even(step, 40), price, first) for price in (0.0, 0.01))
    assert np.count_nonzero(dear) < np.count_nonzero(free)
    assert error(free * step, target, moments) < error(dear * step, target, moments)


def test_weights_that_may_not_stay_are_zero():
    moments, target = hessian(30), RNG.normal(size=(30, 6))
    stay = RNG.random((30, 6)) < 0.5
    codes = rounded(
        target, Factor.of(moments), even(0.1, 6), 0.0, np.zeros((30, 6), np.int16), stay
    )
    assert not codes[~stay].any() and codes[stay].any()


def test_rows_that_are_looked_up_often_are_precise():
    table = RNG.normal(size=(200, 20))
    often = np.where(np.arange(200) % 2, 1.0, 0.001) / 100
    codes = looked_up(table, often, even(0.2, 200), 1e-5, np.rint(table / 0.2).astype(np.int16))
    off = np.square(table - codes * 0.2).mean(1)
    assert off[1::2].mean() < 0.3 * off[::2].mean()


def test_zeros_where_they_matter_least():
    moments, target = hessian(64), RNG.normal(size=(64, 12))
    half = np.abs(target) >= np.median(np.abs(target))
    factor = Factor.of(moments)

    def chosen(inside, effect):
        return effect > np.median(effect)

    found, stay = pruned(target, factor, chosen, 128)
    assert stay.mean() == pytest.approx(0.5) and np.array_equal(found != 0, stay)
    assert error(found, target, moments) < 0.5 * error(target * half, target, moments)


def test_n_of_m_neighbours_stay():
    stay = _most_of_neighbours(RNG.random((10, 5)).astype(np.float32), 2, 4)
    assert (stay[:8].reshape(2, 4, 5).sum(1) == 2).all() and stay[8:].all()


def test_a_refit_is_the_least_squares_solution():
    moments, target = hessian(25), RNG.normal(size=(25, 4))
    stay = RNG.random((25, 4)) < 0.6
    found = refit(target, moments, (target * stay).astype(np.float32), stay, rounds=200)
    for output in range(4):
        own = stay[:, output]
        exact = np.linalg.solve(moments[np.ix_(own, own)], (moments @ target)[own, output])
        np.testing.assert_allclose(found[own, output], exact, atol=1e-3)
    assert not found[~stay].any()
