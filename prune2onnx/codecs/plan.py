"""Chooses how each weight is written, by the fewest bytes in the file.

What a method takes is estimated for each weight from entropies; what a group and the decoder add is
known about; the result is then written and weighed in truth.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.codecs.bundle import Bundle, encode, grouped
from prune2onnx.codecs.groups import FILLED_GAPS, family_key, gaps_of, masks_of
from prune2onnx.codecs.huffman import about_bits, coded_bits
from prune2onnx.codecs.methods import METHODS, Method
from prune2onnx.codecs.planes import planes_of
from prune2onnx.codecs.rice import Run, code_of
from prune2onnx.codecs.streams import SEGMENT_NBYTES, Coder
from prune2onnx.codecs.values import level_codes
from prune2onnx.codecs.weight import (
    MAX_LEVELS,
    WORKING,
    Weight,
    bits_of,
    entropy_bits,
    numpy_type,
    shared,
)

MAX_NBYTES = 1 << 30
"""Largest dense weight that is coded: onnxruntime from 1.27 on folds no larger output (PR 28055),
so it would be decoded at every inference."""

GROUP_NBYTES: Mapping[Coder, int] = {"huffman": 150, "rice": 250, "none": 150}
"""What a group adds, about: its nodes, and with a Rice code those of its sequences."""

FAMILY_NBYTES = 60
"""What another shape in a group adds, about."""

CODER_NBYTES: Mapping[Coder, int] = {"huffman": 2300, "rice": 200, "none": 60}
"""What the nodes of an entropy coder add, about."""

RUN_NBYTES = 150
"""What one more sequence with a Rice code adds, about: its nodes."""

SMALL_NBYTES = 65536
"""What coded weights take where other codes than Huffman's are tried."""

RICE_SIZE = 1 << 21
"""Most elements for which a Rice code is tried: where there are more, others are smaller."""

_THIN = Method("gap", "levels")
_MOST_APART = 64
"""Most weights for which it is tried how many of them are too dense for steps."""

_WEIGHT_NBYTES = 12
"""What a weight adds besides its streams and its name: places in Split, Concat and the call."""


@dataclass(frozen=True)
class Plan:
    """What is coded and what is not.

    Attributes:
        bundle: the coded weights; None where nothing pays.
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
    if weight.kind not in WORKING:
        return f"{weight.array.dtype} has no codec"
    if weight.array.nbytes > MAX_NBYTES:
        return f"{weight.array.nbytes:,} bytes are more than onnxruntime folds ({MAX_NBYTES:,})"
    if weight.kind == TensorProto.BFLOAT16 and np.isnan(weight.values).any():
        return "a bfloat16 NaN may lose its payload when it is converted"
    return ""


def estimates(weight: Weight, coder: Coder = "huffman") -> dict[Method, float]:
    """Bytes that each method which fits takes for a weight, about.

    Args:
        weight: one that can be coded.
        coder: the entropy code; without one, whole nibbles and bytes.
    """

    def size(counts: NDArray[np.integer[Any]]) -> float:
        if coder == "huffman":
            return about_bits(counts) / 8 + SEGMENT_NBYTES
        if coder == "rice":
            return code_of(-np.sort(-counts))[1] / 8
        return float(counts.sum()) * (0.5 if np.flatnonzero(counts).max(initial=0) < 16 else 1)

    nonzero = weight.nonzero
    positions: dict[str, float] = {"all": 0.0}
    fillers = 0
    if coder == "rice" or nonzero.size < 0.9 * weight.array.size:
        if coder == "rice":
            positions["gap"] = Run("", nonzero, rising=True).bits / 8 if nonzero.size else 0.0
        else:
            ((steps,), _) = gaps_of([nonzero], FILLED_GAPS[0])
            fillers = steps.size - nonzero.size
            positions["gap"] = size(np.bincount(steps, minlength=1))
        masks = np.sort(np.bincount(masks_of(weight.values), minlength=256))[::-1]
        positions["mask"] = size(masks) + int(np.count_nonzero(masks))
    item = numpy_type(weight.storage).itemsize
    found: dict[Method, float] = {}
    for method in METHODS:
        if method.positions not in positions:
            continue
        every = method.positions == "all"
        values = weight.values if every else weight.values[nonzero]
        filled = fillers if method.positions == "gap" else 0
        shared = weight.shared if every else weight.shared_nonzero
        value = float("inf")
        if method.values == "raw":
            value = float(item * (values.size + filled))
        elif (
            method.values == "planes" and coder != "none" and shared is None and _has_planes(weight)
        ):
            symbols, _ = planes_of(values, weight.storage)
            rest = 3 if weight.storage == TensorProto.FLOAT else 1
            counts = np.append(np.bincount(symbols, minlength=1), filled)
            value = size(counts) + rest * counts.sum() + 4 * np.count_nonzero(counts)
        elif method.values == "codebook" and shared is not None and values.size:
            counts = np.append(np.bincount(shared[0]), filled)
            if shared[1].size < MAX_LEVELS:
                value = size(counts) + item * np.count_nonzero(counts)
                value += RUN_NBYTES * (coder == "rice")
        elif method.values == "levels" and shared is not None and values.size:
            codes = None if weight.working == TensorProto.UINT8 else level_codes(values, not every)
            if codes is not None:
                counts = np.append(np.bincount(codes), filled)
                # Its symbols stand in an order of their own: near integers first.
                if coder == "huffman":
                    value = coded_bits(counts) / 8 + SEGMENT_NBYTES
                elif coder == "rice":
                    value = code_of(counts)[1] / 8
                else:
                    value = size(counts)
                value += 0.1 * int(codes.max())
        if value < float("inf"):
            found[method] = positions[method.positions] + value + _WEIGHT_NBYTES + len(weight.name)
    return found


def _has_planes(weight: Weight) -> bool:
    if weight.storage not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return False
    if weight.working != TensorProto.FLOAT and weight.kind != TensorProto.FLOAT16:
        return False
    return bool(np.isfinite(weight.values).all())


def plan(
    weights: Sequence[Weight], dense: Mapping[str, int], opset: int, *, load: str = "small"
) -> Plan:
    """Chooses a method for each weight, or none.

    Args:
        weights: all that may be coded.
        dense: name -> bytes it takes, for all initializers of the model, in their order.
        opset: of the model.
        load: "small", the fewest bytes; "fast", no entropy code, so that loading is quick.
    """
    if load == "fast":
        return _planned(weights, dense, opset, "none")
    best = _planned(weights, dense, opset, "huffman")
    if best.bundle is None or best.bundle.nbytes < SMALL_NBYTES:
        # In a small file a coder may cost more than it saves.
        few = sum(weight.array.size for weight in weights) <= RICE_SIZE
        others = [_planned(weights, dense, opset, "rice")] if few else []
        others.append(_planned(weights, dense, opset, "none"))
        best = min([best, *others], key=lambda made: _total(made, dense))
    return best


def _planned(weights: Sequence[Weight], dense: Mapping[str, int], opset: int, coder: Coder) -> Plan:
    """What `plan` chooses if this is the entropy code."""
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
    bundle = encode(chosen, best, opset, coder=coder, skips=skips) if chosen else None
    if coder == "rice" and len(chosen) <= _MOST_APART:
        thin = {n: _THIN if _THIN in costs[n] else method for n, method in best.items()}
        for methods in (thin, *_densest_apart(chosen, best), *_densest_apart(chosen, thin)):
            other = encode(chosen, methods, opset, coder=coder, skips=skips)
            if bundle is None or other.nbytes < bundle.nbytes:
                bundle, best = other, methods
    saved = sum(dense[name] for name in best)
    if bundle is None or bundle.nbytes >= saved:
        for name in best:
            reasons[name] = "the decode functions take more than all weights together save"
        bundle, best = None, {}
    for weight in weights:
        if weight.name not in best:
            reasons.setdefault(weight.name, "too few like it to pay for its nodes")
    return Plan(bundle, best, reasons)


def _densest_apart(
    weights: Sequence[Weight], methods: Mapping[str, Method]
) -> Iterator[dict[str, Method]]:
    """The same methods, but for more and more of the densest weights, all elements' levels.

    One Rice code tells the positions of a whole group, and does so badly where some of its members
    are much denser than others.
    """
    apart = dict(methods)
    sparse = [weight for weight in weights if methods[weight.name] == _THIN]
    for weight in sorted(sparse, key=lambda one: -one.nonzero.size / one.array.size):
        apart = apart | {weight.name: Method("all", "levels")}
        yield apart


def _total(result: Plan, dense: Mapping[str, int]) -> int:
    rest = sum(nbytes for name, nbytes in dense.items() if name not in result.methods)
    return rest + (0 if result.bundle is None else result.bundle.nbytes)


def _assigned(
    weights: Sequence[Weight],
    costs: Mapping[str, Mapping[Method, float]],
    dense: Mapping[str, int],
    coder: Coder,
) -> dict[str, Method]:
    """The cheapest method of each weight, groups that do not pay for their nodes left out."""
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

    # A small file is often smallest with one group, whatever each weight by itself would take.
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
    """What a weight takes at its entropy, a bound for codes of its kind.

    Positions by the entropy of a coin with its density; values that are not +0 by their zero-order
    entropy, or, where more than 256 of them are floats, by that of their exponents, the other bits
    as they are. Codebooks and tables are not counted.
    """
    bits = bits_of(array.reshape(-1))
    size, nnz = bits.size, int(np.count_nonzero(bits))
    if not nnz:
        return 0.0
    total = entropy_bits(np.array([nnz, size - nnz]))
    values = bits[bits != 0]
    found = shared(values)
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
