"""Writes large weights in stages: what is alike in a stage is one vector, which is split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prune2onnx.packing.codecs.methods import Method
from prune2onnx.packing.codecs.staged.pieces import STAGE_SIZE, pieces_of
from prune2onnx.packing.codecs.staged.storages import Kind, Storage, storage_of
from prune2onnx.packing.codecs.staged.writer import Staged, Writer
from prune2onnx.packing.codecs.weight import Weight


def encode(
    weights: Sequence[Weight],
    methods: Mapping[str, Method],
    places: Mapping[str, int],
    opset: int,
    fresh: Callable[[], str],
    stage_size: int = STAGE_SIZE,
) -> Staged:
    """Writes weights in stages.

    Args:
        weights: all of `methods`, in the order of the file.
        methods: weight name -> its method, one that `choice.fitting` gave.
        places: weight name -> its index among all initializers of the dense model.
        opset: of the model.
        fresh: gives names that are not in the model.
        stage_size: least elements of a stage.
    """
    writer = Writer(places, opset, fresh)
    pieces = pieces_of(weights, stage_size)
    gates = writer.gates(max(piece.stage for piece in pieces) + 1)
    kinds = {weight.name: Kind.of(weight, methods[weight.name]) for weight in weights}
    storages: dict[Kind, Storage] = {}
    for kind in dict.fromkeys(kinds.values()):
        alike = [weight for weight in weights if kinds[weight.name] == kind]
        storages[kind] = storage_of(writer, kind, alike)
    for stage, gated in enumerate(gates):
        for kind, storage in storages.items():
            inside = [
                piece
                for piece in pieces
                if piece.stage == stage and kinds[piece.weight.name] == kind
            ]
            if not inside:
                continue
            inside.sort(key=lambda piece: piece.weight.shape[1:])  # families together
            before = writer.nbytes
            flat = storage.write(inside, gated)
            writer.split(inside, kind.how, kind.number, flat, writer.nbytes - before)
    return writer.made
