"""Writes large weights in stages: what is alike in a stage is one vector, which is split."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from prune2onnx.graph.protobuf import tensor
from prune2onnx.packing.codecs.methods import Method
from prune2onnx.packing.codecs.staged.alike import parted
from prune2onnx.packing.codecs.staged.choice import Known, decoding_nbytes, estimate
from prune2onnx.packing.codecs.staged.large import Large
from prune2onnx.packing.codecs.staged.pieces import STAGE_SIZE, Piece, pieces_of, together
from prune2onnx.packing.codecs.staged.storages import Kind, Ready, Storage, storage_of
from prune2onnx.packing.codecs.staged.writer import Gated, Staged, Writer

Done = Callable[[str, int], None]
"""Is told the name of a weight, and how many bytes of it have been read or written."""

_MOST_THREADS = 4  # each holds a few times a piece

_T = TypeVar("_T")
_R = TypeVar("_R")


def encode(
    weights: Sequence[Known],
    methods: Mapping[str, Method],
    places: Mapping[str, int],
    opset: int,
    fresh: Callable[[], str],
    *,
    stage_size: int = STAGE_SIZE,
    matrices: bool = True,
    fast: bool = False,
    store: Callable[[str, NDArray[Any], int], TensorProto] = tensor,
    done: Done = lambda name, nbytes: None,
) -> Staged:
    """Writes weights in stages.

    Args:
        weights: all of `methods`, in the order of the file.
        methods: weight name -> its method, one that `choice.fitting` gave.
        places: weight name -> its index among all initializers of the dense model.
        opset: of the model.
        fresh: gives names that are not in the model.
        stage_size: least elements of a stage.
        matrices: whether large matrices are made in their shape at once.
        fast: whether there is no entropy code; as for `choice.chosen`.
        store: makes an initializer of a name, an array and ONNX's number of its type.
        done: is told what has been written.
    """
    writer = Writer(places, opset, fresh, store, matrices=matrices, fast=fast)
    first, repeated = _without_repetition(weights)
    pieces = _pieces(first, methods, opset, fast, stage_size)
    gates = writer.gates(max(piece.stage for piece in pieces) + 1)
    kinds = _kinds(first, methods)
    alike: dict[Kind, list[Known]] = {}
    for one in first:
        alike.setdefault(kinds[one.weight.name], []).append(one)
    storages = {kind: storage_of(writer, kind, own) for kind, own in alike.items()}

    def code(vector: tuple[Gated, Kind, list[Piece]]) -> Ready:
        _, kind, inside = vector
        return storages[kind].code(inside)

    vectors = list(_vectors(pieces, gates, kinds, storages, matrices))
    for (gated, kind, inside), ready in zip(vectors, in_order(code, vectors), strict=True):
        before = writer.nbytes
        made = ready(gated)
        nbytes = writer.nbytes - before
        if isinstance(made, str):
            writer.split(inside, kind.how, kind.number, made, nbytes)
        else:
            writer.whole(inside[0], kind.how, kind.number, *made, nbytes)
        for piece in inside:
            done(piece.weight.name, piece.nbytes)
    for weight, original in repeated:
        writer.same(weight, original, methods[weight.name])
        done(weight.name, weight.nbytes)
    return writer.made


def _kinds(weights: Sequence[Known], methods: Mapping[str, Method]) -> dict[str, Kind]:
    """How each weight is stored; those on levels have a code with others that are alike."""
    kinds = {one.weight.name: Kind.of(one, methods[one.weight.name]) for one in weights}
    for kind in set(kinds.values()):
        if kind.how.positions != "all" or kind.how.values.name != "levels":
            continue
        books = {
            one.weight.name: one.survey.book
            for one in weights
            if kinds[one.weight.name] == kind and one.survey.book is not None
        }
        codes = parted(list(books.values()))
        kinds |= {
            name: replace(kind, own=str(code)) for name, code in zip(books, codes, strict=True)
        }
    return kinds


def _pieces(
    weights: Sequence[Known],
    methods: Mapping[str, Method],
    opset: int,
    fast: bool,
    stage_size: int,
) -> list[Piece]:
    made, left = [], []
    for one in weights:
        how = methods[one.weight.name]
        made.append(decoding_nbytes(one, how, fast=fast))
        left.append(max(0.0, one.weight.nbytes - estimate(one, how, opset, fast=fast)))
    return pieces_of([one.weight for one in weights], made, left, stage_size)


def _vectors(
    pieces: Sequence[Piece],
    gates: Sequence[Gated],
    kinds: Mapping[str, Kind],
    storages: Mapping[Kind, Storage],
    matrices: bool,
) -> Iterator[tuple[Gated, Kind, list[Piece]]]:
    """What is decoded together: stage after stage, kind after kind, families together."""
    for stage, gated in enumerate(gates):
        for kind in storages:
            inside = [p for p in pieces if p.stage == stage and kinds[p.weight.name] == kind]
            inside.sort(key=lambda piece: piece.weight.shape[1:])
            alone = matrices and kind.may_be_matrix
            yield from ((gated, kind, run) for run in together(inside, matrices=alone))


def _without_repetition(
    weights: Sequence[Known],
) -> tuple[list[Known], list[tuple[Large, Large]]]:
    """The distinct weights; and those that are equal to one of them, with it."""
    known: dict[tuple[object, ...], Known] = {}
    first, repeated = [], []
    for one in weights:
        weight = one.weight
        # Types that are made by a last Cast have no operator that copies them.
        own = "" if weight.element_type == weight.working else weight.name
        key = (one.survey.digest, weight.shape, weight.element_type, weight.scale is None, own)
        other = known.setdefault(key, one)
        if other is not one and _equal(weight, other.weight):
            repeated.append((weight, other.weight))
        else:
            first.append(one)
    return first, repeated


def _equal(one: Large, other: Large) -> bool:
    return all(
        np.array_equal(one.rows(*span).view(np.uint8), other.rows(*span).view(np.uint8))
        for span in one.blocks()
    )


def in_order(work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """`map` in threads, a few items ahead of whoever takes the results.

    Args:
        work: what takes long, and mostly in numpy, which lets other threads run meanwhile.
        items: what it is done with.
    """
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    threads = min(_MOST_THREADS, len(usable))
    waiting = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(work, item) for item in islice(waiting, threads))
        while ahead:
            result = ahead.popleft().result()
            for item in waiting:
                ahead.append(pool.submit(work, item))
                break
            yield result
