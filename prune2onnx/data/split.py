"""Stratified splits: the same examples for the same seed, the same fraction of every class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prune2onnx.data.examples import Examples, Indices
from prune2onnx.errors import Prune2OnnxError


def hold_out(
    examples: Examples, fraction: float, seed: int, what: str, where: str
) -> tuple[Examples, Examples]:
    """Splits `examples` into those that stay and those held out as the `what` set.

    The same fraction of every class, or simply of all examples where they have no class.

    Raises:
        Prune2OnnxError: one of the two would be empty.
    """
    keep, held = stratified(examples.labels, fraction, seed)
    if len(held) == 0:
        raise Prune2OnnxError(
            f"{where}: {len(examples)} examples are too few to hold {fraction:.0%} out for "
            f"{what} with every class left in training: zero examples there; add more"
        )
    return examples.subset(keep), examples.subset(held)


def stratified(y: NDArray[np.int64], fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Holds out round(fraction * n) examples, the same fraction of each class.

    Numbers are rounded by the largest remainder method; a class keeps at least one example, so a
    small set may give fewer. Both results are in ascending order.

    Returns:
        Indices of those kept, and of those held out.

    >>> y = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    >>> keep, held = stratified(y, 0.25, seed=0)
    >>> y[keep].tolist(), y[held].tolist()
    ([0, 0, 0, 1, 1, 1], [0, 1])
    """
    # numpy guarantees RandomState's stream (NEP 19), but not default_rng's: the seed of a recipe
    # must always give the same split.
    order = np.random.RandomState(seed % 2**32).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    counts = np.unique(y, return_counts=True)[1]
    exact = counts * fraction
    give = np.minimum(np.floor(exact).astype(np.int64), counts - 1)
    short = max(round(len(y) * fraction) - int(give.sum()), 0)
    by_remainder = np.argsort(give - exact, kind="stable")
    give[by_remainder[(give < counts - 1)[by_remainder]][:short]] += 1
    groups = np.split(order, np.cumsum(counts)[:-1])
    held = np.sort(np.concatenate([g[:n] for g, n in zip(groups, give, strict=True)]))
    keep = np.setdiff1d(np.arange(len(y)), held, assume_unique=True)
    return keep.astype(np.int64), held.astype(np.int64)
