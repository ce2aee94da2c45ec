"""Runs a network piece by piece, with weights that change on the way, on examples.

Each node runs once. Values that later nodes read are held, beyond some bytes in files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.protobuf import copy_but
from prune2onnx.graph.walk import used_in
from prune2onnx.packing.calibration.capture import capturing, repeats
from prune2onnx.packing.calibration.layers import Use
from prune2onnx.packing.calibration.rows import with_states

Values = dict[str, NDArray[Any]]

Run = Callable[[ModelProto, Sequence[Values]], Sequence[Sequence[Any]]]
"""A model and its inputs, for some batches -> its outputs for each of them."""

HELD_NBYTES = 1 << 30
"""Bytes of values that stay in memory."""


class Walk:
    """A network on its way from its inputs to its outputs.

    Args:
        model: its nodes are sorted.
        weights: its initializers by name; those of later nodes may be replaced meanwhile.
        batches: of inputs.
        run: runs a model.
    """

    def __init__(
        self,
        model: ModelProto,
        weights: Mapping[str, TensorProto],
        batches: Sequence[Values],
        run: Run,
    ) -> None:
        self._model, self._weights, self._run = model, weights, run
        self._nodes = list(model.graph.node)
        self._last = {
            name: at for at, node in enumerate(self._nodes) for name in used_in([node]) if name
        }
        self._folder = tempfile.TemporaryDirectory()
        self._files = self._held = self._at = 0
        self._values: list[Values] = [{} for _ in batches]
        for held, batch in zip(self._values, batches, strict=True):
            held.update(batch)

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._values.clear()
        self._folder.cleanup()

    @property
    def makers(self) -> dict[str, int]:
        """The place of the node that makes each value; inputs are not in it."""
        return {name: at for at, node in enumerate(self._nodes) for name in node.output if name}

    def has(self, name: str) -> bool:
        """Whether a value is there already."""
        return all(name in held for held in self._values)

    def value(self, name: str) -> list[NDArray[Any]]:
        """A value that is there, or the states of the node that is next, for each batch."""
        if self.has(name):
            return [held[name] for held in self._values]
        made = self._outcome([self._nodes[self._at]], [name])
        return [values[name] for values in made]

    def seen(self, use: Use) -> list[list[NDArray[Any]]]:
        """What a reader multiplies its weight with: the value that is there, or made next.

        Returns:
            For each batch one; of a body of If one or none, of a loop one for each step.

        Raises:
            Prune2OnnxError: steps of a loop have values of different shapes.
        """
        if not use.path:
            return [[value] for value in self.value(use.source)]
        kind = TensorProto.INT64 if use.rows is None else TensorProto.FLOAT
        node = capturing(self._nodes[use.at], use.path, use.source, kind)
        steps = repeats(node, use.path)
        found = []
        for values in self._outcome([node], [node.output[-1]]):
            whole = values[node.output[-1]]
            if steps and whole.size:
                found.append(list(whole.reshape(-1, *whole.shape[steps:])))
            else:
                found.append([whole] if whole.size else [])
        return found

    def advance(self, to: int) -> None:
        """Runs all nodes before a place."""
        if to > self._at:
            wanted = [
                name
                for node in self._nodes[self._at : to]
                for name in node.output
                if self._last.get(name, -1) >= to
            ]
            if wanted:
                made = self._outcome(self._nodes[self._at : to], wanted)
                for held, values in zip(self._values, made, strict=True):
                    held.update({name: self._kept(value) for name, value in values.items()})
            self._at = to
        for held in self._values:
            for name in [name for name in held if self._last.get(name, -1) < to]:
                self._drop(held.pop(name))

    def _outcome(self, nodes: Sequence[NodeProto], wanted: Collection[str]) -> list[Values]:
        """What some nodes give, of all that they give, for each batch."""
        piece = self._piece(nodes, wanted)
        names = [value.name for value in piece.graph.input]
        given = [{name: held[name] for name in names} for held in self._values]
        found = []
        for outputs in self._run(piece, given):
            for name, output in zip(wanted, outputs, strict=True):
                if not isinstance(output, np.ndarray):
                    raise Prune2OnnxError(
                        f"{name}: a sequence or a map; such a network cannot be calibrated"
                    )
            found.append(dict(zip(wanted, outputs, strict=True)))
        return found

    def _piece(self, nodes: Sequence[NodeProto], wanted: Collection[str]) -> ModelProto:
        nodes = [with_states(node) for node in nodes]
        used = used_in(nodes) - {name for node in nodes for name in node.output}
        piece = ModelProto()
        copy_but(piece, self._model, "graph")
        piece.graph.name = "piece"
        piece.graph.node.extend(nodes)
        for name in sorted(used):
            if name in self._weights:
                piece.graph.initializer.append(self._weights[name])
            elif name in self._values[0]:
                number = helper.np_dtype_to_tensor_dtype(self._values[0][name].dtype)
                piece.graph.input.append(helper.make_tensor_value_info(name, number, None))
        piece.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
        return piece

    def _kept(self, value: NDArray[Any]) -> NDArray[Any]:
        """A value, in memory or in a file."""
        if self._held + value.nbytes <= HELD_NBYTES or not value.nbytes:
            self._held += value.nbytes
            return value
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}.npy"
        np.save(path, value)
        stored: NDArray[Any] = np.load(path, mmap_mode="r")
        return stored

    def _drop(self, value: NDArray[Any]) -> None:
        if isinstance(value, np.memmap):
            assert value.filename is not None
            Path(value.filename).unlink(missing_ok=True)
        else:
            self._held -= value.nbytes
