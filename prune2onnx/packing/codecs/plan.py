"""Chooses the method of each weight, by the fewest bytes in the file.

The bytes of each method are estimated for each weight from entropies, with a fixed estimate of what
a group and the decoder add. The few best plans are then written, and their real bytes compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.packing.codecs import rice
from prune2onnx.packing.codecs.bundle import Bundle, encode, grouped
from prune2onnx.packing.codecs.groups import FILLED_GAPS, family_key, masks_of
from prune2onnx.packing.codecs.methods import GAP_LEVELS, METHODS, Method
from prune2onnx.packing.codecs.streams import Coder, coded_nbytes
from prune2onnx.packing.codecs.values.kind import Entries
from prune2onnx.packing.codecs.weight import (
    WORKING,
    Weight,
    bits_of,
    entropy_bits,
    gaps_of,
    indexed,
)

MAX_NBYTES = 1 << 30
"""Largest dense weight that is coded: from 1.27 on onnxruntime folds no larger output (PR 28055),
so it would be decoded at every inference."""

GROUP_NBYTES: Mapping[Coder, int] = {"huffman": 150, "rice": 150, "none": 150}
"""About how many bytes a group adds: its nodes, and with a Rice code those of its sequences."""

FAMILY_NBYTES = 60
"""About how many bytes each family adds to a group."""

CODER_NBYTES: Mapping[Coder, int] = {"huffman": 2300, "rice": 600, "none": 60}
"""About how many bytes the nodes of an entropy coder add."""

SMALL_NBYTES = 65536
"""Below this size of the coded weights, other codes than Huffman's are tried, too."""

RICE_SIZE = 1 << 21
"""Most elements for which a Rice code is tried: with more of them, other codes are smaller."""

_WEIGHT_NBYTES = 12
"""Bytes of a weight besides its streams and its name: entries in Split, Concat and the call."""


@dataclass(frozen=True)
class Plan:
    """What is coded and what is not.

    Attributes:
        bundle: the coded weights; None where coding saves nothing.
        methods: weight name -> its method.
        reasons: weight name -> why it stays dense.
    """

    bundle: Bundle | None
    methods: Mapping[str, Method]
    reasons: Mapping[str, str]


def refusal(weight: Weight) -> str:
    """Why a weight cannot be coded at all; "" where it can."""
    if not weight.array.size:
        return "empty"
    if not weight.array.ndim:
        return "a scalar"
    if weight.element_type not in WORKING:
        return f"{weight.array.dtype} has no codec"
    if weight.array.nbytes > MAX_NBYTES:
        return f"{weight.array.nbytes:,} bytes are more than onnxruntime folds ({MAX_NBYTES:,})"
    if weight.element_type == TensorProto.BFLOAT16 and np.isnan(weight.values).any():
        return "a bfloat16 NaN may lose its payload when it is converted"
    return ""


def estimates(weight: Weight, coder: Coder = "huffman") -> dict[Method, float]:
    """About how many bytes a weight takes, by each method that fits it.

    Args:
        weight: one that can be coded.
        coder: the entropy code; "none" stores symbols in half a byte or a byte.
    """
    nonzero = weight.nonzero
    positions: dict[str, float] = {"all": 0.0}
    fillers = 0
    if coder == "rice" or nonzero.size < 0.9 * weight.array.size:
        if coder == "rice":
            positions["gap"] = rice.rising_bits(nonzero) / 8 if nonzero.size else 0.0
        else:
            ((gaps,), _) = gaps_of([nonzero], FILLED_GAPS[0])
            fillers = gaps.size - nonzero.size
            positions["gap"] = coded_nbytes(np.bincount(gaps, minlength=1), coder)
        masks = np.sort(np.bincount(masks_of(weight.values), minlength=256))[::-1]
        positions["mask"] = coded_nbytes(masks, coder) + int(np.count_nonzero(masks))
    found: dict[Method, float] = {}
    for method in METHODS:
        if method.positions not in positions:
            continue
        filled = fillers if method.positions == "gap" else 0
        rising = method.positions == "gap" and coder == "rice"
        entries = Entries(weight, coder, method.positions == "all", filled, rising)
        value = method.values.estimate(entries)
        if value is not None:
            found[method] = positions[method.positions] + value + _WEIGHT_NBYTES + len(weight.name)
    return found


def plan(
    weights: Sequence[Weight],
    dense: Mapping[str, int],
    opset: int,
    *,
    load: str = "small",
    absolute: bool = False,
) -> Plan:
    """Chooses a method for each weight, or none.

    Args:
        weights: all that may be coded.
        dense: name -> bytes it takes, for all initializers of the model, in their order.
        opset: of the model.
        load: "small", the fewest bytes; "fast", no entropy code, so that loading is quick.
        absolute: whether the call keeps each weight's place among all initializers, or how many
            stand between it and the coded one before it.
    """
    if load == "fast":
        return _planned(weights, dense, opset, "none", absolute)
    best = _planned(weights, dense, opset, "huffman", absolute)
    if best.bundle is None or best.bundle.nbytes < SMALL_NBYTES:
        # In a small file the nodes of a coder may take more than it saves.
        few = sum(weight.array.size for weight in weights) <= RICE_SIZE
        others = [_planned(weights, dense, opset, "rice", absolute)] if few else []
        others.append(_planned(weights, dense, opset, "none", absolute))
        best = min([best, *others], key=lambda made: _total(made, dense))
    return best


def _planned(
    weights: Sequence[Weight],
    dense: Mapping[str, int],
    opset: int,
    coder: Coder,
    absolute: bool,
) -> Plan:
    """The plan with this entropy code."""
    reasons: dict[str, str] = {}
    costs: dict[str, dict[Method, float]] = {}
    for weight in weights:
        if reason := refusal(weight):
            reasons[weight.name] = reason
            continue
        found = estimates(weight, coder)
        least = min(found, key=lambda method: found[method])
        useful = {m: cost for m, cost in found.items() if cost < dense[weight.name]}
        if useful:
            costs[weight.name] = useful
        else:
            reasons[weight.name] = (
                f"{least.name} takes about {found[least]:,.0f} bytes, dense {dense[weight.name]:,}"
            )
    best = _assigned(weights, costs, dense, coder)
    chosen = [weight for weight in weights if weight.name in best]
    places = [place for place, name in enumerate(dense) if name in best]
    skips = [at - before - 1 for before, at in itertools.pairwise([-1, *places])]
    if absolute:
        skips = places
    bundle = encode(chosen, best, opset, coder=coder, skips=skips) if chosen else None
    thin = {n: GAP_LEVELS if GAP_LEVELS in costs[n] else method for n, method in best.items()}
    if coder == "rice" and thin != best:
        other = encode(chosen, thin, opset, coder=coder, skips=skips)
        if bundle is None or other.nbytes < bundle.nbytes:
            bundle, best = other, thin
    saved = sum(dense[name] for name in best)
    if bundle is None or bundle.nbytes >= saved:
        for name in best:
            reasons[name] = "the decode functions take more bytes than all weights together save"
        bundle, best = None, {}
    for weight in weights:
        if weight.name not in best:
            why = "the nodes for weights like it take more bytes than they save"
            reasons.setdefault(weight.name, why)
    return Plan(bundle, best, reasons)


def _total(result: Plan, dense: Mapping[str, int]) -> int:
    rest = sum(nbytes for name, nbytes in dense.items() if name not in result.methods)
    return rest + (0 if result.bundle is None else result.bundle.nbytes)


def _assigned(
    weights: Sequence[Weight],
    costs: Mapping[str, Mapping[Method, float]],
    dense: Mapping[str, int],
    coder: Coder,
) -> dict[str, Method]:
    """The cheapest method of each weight, without groups whose nodes take more than they save."""
    allowed = set(METHODS)
    by_name = {weight.name: weight for weight in weights}

    def assignment(methods: set[Method]) -> dict[str, Method]:
        best = {}
        for name, found in costs.items():
            usable = {method: cost for method, cost in found.items() if method in methods}
            if usable:
                best[name] = min(usable, key=lambda method: usable[method])
        return best

    def total(methods: set[Method]) -> float:
        best = assignment(methods)
        groups = grouped([by_name[name] for name in best], best)
        rest = sum(dense[name] for name in costs if name not in best)
        own = sum(costs[name][method] for name, method in best.items())
        own += CODER_NBYTES[coder] * bool(best) + GROUP_NBYTES[coder] * len(groups)
        families = [len(set(map(family_key, group.weights))) for group in groups]
        return rest + own + FAMILY_NBYTES * sum(families)

    # A small file is often smallest with a single group, even if other methods suit its weights.
    starts = [allowed, *({method} for method in METHODS)]
    least, _, allowed = min((total(start), number, start) for number, start in enumerate(starts))
    while True:
        used = set(assignment(allowed).values())
        tries = [(total(allowed - {method}), method) for method in used]
        if not tries or min(cost for cost, _ in tries) >= least:
            return assignment(allowed)
        least, worst = min(tries, key=lambda pair: (pair[0], METHODS.index(pair[1])))
        allowed = allowed - {worst}


def entropy_nbytes(array: NDArray[Any]) -> float:
    """The zero-order entropy of a weight in bytes, a bound for the codes used here.

    Positions count as draws of a coin with the weight's density. Values that are not +0 count by
    their zero-order entropy; if floats have more than 256 distinct values, their exponents do, and
    the other bits count as they are. Codebooks and tables are not counted.
    """
    bits = bits_of(array.reshape(-1))
    size, nnz = bits.size, int(np.count_nonzero(bits))
    if not nnz:
        return 0.0
    total = entropy_bits(np.array([nnz, size - nnz]))
    values = bits[bits != 0]
    found = indexed(values)
    exponent = {"float32": (23, 8), "float16": (10, 5), "bfloat16": (7, 8), "float64": (52, 11)}
    if found is not None:
        total += entropy_bits(np.bincount(found[0]))
    elif array.dtype.name in exponent:
        low, width = exponent[array.dtype.name]
        exponents = (values >> np.array(low, values.dtype)) & np.array(
            (1 << width) - 1, values.dtype
        )
        total += entropy_bits(np.bincount(exponents.astype(np.int64)))
        total += nnz * (8 * array.itemsize - width)
    else:
        total += 8 * array.itemsize * nnz
    return total / 8
