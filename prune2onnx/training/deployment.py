"""Builds the file that a network would become, for training to measure and for the result.

When training measures it: see `size_budget`. Rewriting and coding: see `shrinking`, `packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import onnx
from torch import nn

from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.protobuf import tensor_nbytes
from prune2onnx.graph.rewritten import rewritten
from prune2onnx.graph.tensors import array_of
from prune2onnx.packing.compute.narrow import Compute, Narrowed, narrowed
from prune2onnx.packing.pack import Packed, pack_normalized
from prune2onnx.packing.quantized import on_steps
from prune2onnx.packing.rows import WeightRow
from prune2onnx.packing.sparse import to_sparse
from prune2onnx.runs.defaults import FileOptions
from prune2onnx.shrinking.costs import structure
from prune2onnx.shrinking.shrink import propagate_constants, shrink
from prune2onnx.shrinking.structure import Structure
from prune2onnx.shrinking.unused_inputs import gather_inputs
from prune2onnx.training.export import ExportOptions, Template

Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]

Steps = Mapping[str, float]
"""Name of a weight -> the step of which its values are multiples after training."""


class Deployment:
    """Export, shrink and pack, for training to measure with.

    Models are networks with plain parameters, BatchNorm folded.

    Args:
        example_inputs: a batch, or the shape of one example, as for `export`.
        file: options of the file.
        template: the exported graph of the networks; default: exported when first needed.
        rewrite: applied to the graph between shrinking and packing when training measures it.
        prices: of layers, by weight name; default: their multiply-adds.
        graph: further options of the exported graph, such as its open axes.
    """

    def __init__(
        self,
        example_inputs: Any,
        file: FileOptions | None = None,
        *,
        template: Template | None = None,
        rewrite: Rewrite | None = None,
        prices: Mapping[str, float] | None = None,
        graph: ExportOptions | None = None,
    ) -> None:
        self._inputs, self._file = example_inputs, file or FileOptions()
        self._template, self._rewrite, self._prices = template, rewrite, prices
        self._graph = graph or ExportOptions(self._file.opset)

    def _filled(self, model: nn.Module) -> onnx.ModelProto:
        if self._template is None:
            self._template = Template(model, self._inputs, options=self._graph)
        return self._template.filled(model)

    def propagate_constants(self, model: nn.Module) -> None:
        """Zeroes what no output depends on, and moves constants to the biases that follow."""
        values = propagate_constants(self._filled(model))
        assert self._template is not None
        self._template.assign(model, values)

    def structure(self, model: nn.Module) -> Structure:
        """The channel groups, and what each layer costs."""
        found = structure(self._filled(model))
        return found if self._prices is None else found.priced(self._prices)

    def shrunk(self, model: nn.Module) -> onnx.ModelProto:
        """The graph without dead channels and branches, not packed."""
        return shrink(self._filled(model), multiple=self._file.multiple).model

    @property
    def compute(self) -> Compute:
        """What matrices compute in."""
        return self._file.compute

    def narrowed(
        self, graph: onnx.ModelProto, steps: Steps, compute: Compute | None = None
    ) -> Narrowed:
        """A graph as it computes, and what is known of weights that are still float.

        Args:
            graph: not packed.
            steps: of its weights on levels, which stay on them.
            compute: of matrices; default: as the options of the file say.
        """
        normal = normalize(graph).model
        known = on_steps(normal, self._by_initializer(steps, normal))
        return narrowed(normal, compute or self.compute, known)

    def written(
        self,
        graph: onnx.ModelProto,
        steps: Steps,
        *,
        check: bool = True,
        compute: Compute | None = None,
    ) -> Packed:
        """A graph as it is written: packed, or in the form that the options of the file name.

        Args:
            graph: not packed.
            steps: of its weights on levels; others are searched for.
            check: whether its decoding is checked.
            compute: as for `narrowed`.
        """
        file = self._file
        if file.form == "dense" and (compute or self.compute) == "float32":
            return _dense(graph)
        normalized = normalize(graph)
        form = self.narrowed(normalized.model, steps, compute)
        if file.form == "dense":
            return _dense(form.model)
        if file.form == "sparse-initializer":
            return Packed(*to_sparse(form.model), normalized.notes)
        return pack_normalized(
            replace(normalized, model=form.model),
            quantized=form.quantized,
            few_bytes=form.narrow,
            anonymize=file.anonymize,
            portable=file.portable,
            short_names=True,
            check=check,
        )

    def nbytes(self, model: nn.Module, steps: Steps | None = None) -> int:
        """Bytes of the file; only `pack` checks that it decodes."""
        files = self._packed(model, steps or {}, self._rewrite, check=False)
        return min(packed.model.ByteSize() for _, packed in files)

    def smallest(self, model: nn.Module, steps: Steps | None = None) -> onnx.ModelProto:
        """The graph, not packed, whose file `nbytes` measures: with all inputs or without some."""
        files = self._packed(model, steps or {}, self._rewrite, check=False)
        return min(files, key=lambda pair: pair[1].model.ByteSize())[0]

    def pack(
        self,
        model: nn.Module,
        steps: Steps | None = None,
        rewrite: Rewrite | None = None,
        compute: Compute | None = None,
    ) -> Packed:
        """The smallest file.

        Inputs that the first layer does not use are left out by a Gather where that is smaller.

        Args:
            model: the network.
            steps: of its weights on levels; others are searched for.
            rewrite: in place of the one for measuring.
            compute: as for `narrowed`.
        """
        files = self._packed(model, steps or {}, rewrite or self._rewrite, compute, check=True)
        return min((packed for _, packed in files), key=lambda one: one.model.ByteSize())

    def _packed(
        self,
        model: nn.Module,
        steps: Steps,
        rewrite: Rewrite | None,
        compute: Compute | None = None,
        *,
        check: bool,
    ) -> Iterator[tuple[onnx.ModelProto, Packed]]:
        """The file with all inputs, and one without unused inputs, if any; after its graph."""
        shrunk = self.shrunk(model)
        gathered = rewritten(shrunk, gather_inputs).model
        for graph in (shrunk,) if gathered == shrunk else (shrunk, gathered):
            made = graph if rewrite is None else rewrite(graph)
            yield graph, self.written(made, steps, check=check, compute=compute)

    def _by_initializer(self, steps: Steps, graph: onnx.ModelProto) -> Steps:
        """The steps by the names of the graph, where a weight may hold several parameters."""
        assert self._template is not None  # the graph was made from it
        found = dict(steps)
        for tensor in graph.graph.initializer:
            sources = self._template.sources(tensor.name) or (tensor.name,)
            of_sources = {steps.get(name) for name in sources}
            step = of_sources.pop() if len(of_sources) == 1 else None
            if step is not None:
                found[tensor.name] = step
            else:  # one of several: each has its own, which are searched for
                found.pop(tensor.name, None)
        return found


def _dense(graph: onnx.ModelProto) -> Packed:
    rows = tuple(
        WeightRow.of(tensor.name, array_of(tensor), "dense", tensor_nbytes(tensor))
        for tensor in graph.graph.initializer
    )
    return Packed(graph, rows)
