"""What layers compute in while a session runs: as asked for, or what is fastest on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from onnx import ModelProto

from prune2onnx.packing.approximation.subject import Approximation
from prune2onnx.packing.compute.narrow import Compute, Narrowed, narrowed, weights_of
from prune2onnx.packing.quantized import Quantized
from prune2onnx.runs.defaults import MAX_REL_ERROR, InputOptions, PackOptions
from prune2onnx.runtime.calibration import CalibrationData, calibration_data, random_error
from prune2onnx.runtime.int8_choice import fastest


@dataclass
class Computing:
    """How the layers of a model are to compute.

    Attributes:
        model: normalized, in float32.
        options: of the file.
        notes: what was measured, in words.
    """

    model: ModelProto
    options: PackOptions
    notes: list[str] = field(default_factory=list, init=False)

    @cached_property
    def compute(self) -> Compute:
        """What layers compute in; measured where that is left to this machine."""
        asked = self.options.compute
        if asked != "auto":
            return asked
        limit = self.options.max_error or MAX_REL_ERROR
        shapes = InputOptions(shapes=self.options.inputs.shapes)
        found, notes = fastest(self.model, self.error, limit, shapes)
        self.notes += notes
        return found

    @cached_property
    def on_grids(self) -> frozenset[str]:
        """Weights whose values are to be whole multiples of a scale for each output."""
        return frozenset(weights_of(self.model, self.compute))

    @property
    def in_blocks(self) -> frozenset[str]:
        """Weights that are to be codes of 4 bits."""
        return self.on_grids if self.compute == "int4" else frozenset()

    @property
    def calibrates(self) -> bool:
        """Whether weights change with examples, though nothing else asks for that."""
        return bool(self.in_blocks) and self.options.inputs.has_examples

    def of(self, model: ModelProto, quantized: Mapping[str, Quantized]) -> Narrowed:
        """A model with other weights, as it is to compute."""
        return narrowed(model, self.compute, quantized)

    def model_of(self, made: Approximation) -> ModelProto:
        """The model of `of`."""
        return self.of(made.model, made.quantized).model

    def plain(self) -> Narrowed:
        """The model itself, as it is to compute; how much that changes is noted."""
        made = self.of(self.model, {})
        if self.compute != "float32" and any(not layer.reason for layer in made.layers):
            self.notes.append(f"relative error of the outputs {self.error(made.model):.3%}")
        return made

    @cached_property
    def error(self) -> Callable[[ModelProto], float]:
        """A model -> the relative error of its outputs, on held-out examples or random inputs."""
        inputs = self.options.inputs
        return self.data.error if inputs.has_examples else random_error(self.model, inputs)

    @cached_property
    def data(self) -> CalibrationData:
        """The examples, which are read once."""
        return calibration_data(self.model, self.options.inputs, self.options.examples)
