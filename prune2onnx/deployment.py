"""The file that a network would become: what training asks of it, and the file itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx
from torch import nn

from prune2onnx.exporter import Template
from prune2onnx.pack import Packed, pack
from prune2onnx.shrink import settle, shrink, structure
from prune2onnx.structure import Structure

Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]


class Deployment:
    """Export, shrink and pack, for training to measure with (`training.Deployment`).

    Args:
        input_shape: of one example.
        opset: ONNX operator set, 18 or newer.
        anonymize: as of `pack`.
        rewrite: what becomes of the graph between shrinking and packing, for training to measure.
        prices: of layers, by their weights' names, where not their multiply-adds count.
        multiple: of which convolutions keep their channels (`shrink`).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        opset: int,
        *,
        anonymize: bool = False,
        rewrite: Rewrite | None = None,
        prices: Mapping[str, float] | None = None,
        multiple: int = 1,
    ) -> None:
        self._prices, self._multiple = prices, multiple
        self._shape, self._opset, self._anonymize = tuple(input_shape), opset, anonymize
        self._rewrite = rewrite
        self._template: Template | None = None

    def _filled(self, model: nn.Module) -> onnx.ModelProto:
        if self._template is None:
            self._template = Template(model, self._shape, opset=self._opset)
        return self._template.filled(model)

    def nbytes(self, model: nn.Module) -> int:
        """Bytes of the file of a model with plain parameters, BatchNorm folded."""
        return self.pack(model).model.ByteSize()

    def settle(self, model: nn.Module) -> None:
        """Zeroes what no output depends on, and carries constants into the next layer's bias."""
        values = settle(self._filled(model))
        assert self._template is not None
        self._template.take(model, values)

    def structure(self, model: nn.Module) -> Structure:
        """Which channels are one, and what each layer costs; BatchNorm folded."""
        found = structure(self._filled(model))
        return found if self._prices is None else found.priced(self._prices)

    def shrunk(self, model: nn.Module, *, gather_inputs: bool = False) -> onnx.ModelProto:
        """The graph without what is dead, not packed."""
        graph = self._filled(model)
        return shrink(graph, gather_inputs=gather_inputs, multiple=self._multiple).model

    def pack(self, model: nn.Module, rewrite: Rewrite | None = None) -> Packed:
        """The smallest file of a model with plain parameters, BatchNorm folded.

        Inputs that the first layer does not use are left out by a Gather where that is smaller.

        Args:
            model: the network.
            rewrite: in place of that for training.
        """
        rewrite = rewrite or self._rewrite or (lambda graph: graph)
        ways = [
            pack(rewrite(self.shrunk(model, gather_inputs=gather)), anonymize=self._anonymize)
            for gather in (False, True)
        ]
        return min(ways, key=lambda packed: packed.model.ByteSize())
