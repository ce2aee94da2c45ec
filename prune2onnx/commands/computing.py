"""What layers compute in while a session runs: as asked for, or what is fastest on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from onnx import ModelProto

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.packing.approximation.subject import Approximation
from prune2onnx.packing.compute.narrow import Compute, Narrowed, narrowed
from prune2onnx.packing.compute.uses import narrowable
from prune2onnx.runs.defaults import MAX_REL_ERROR, InputOptions, PackOptions
from prune2onnx.runtime.calibration import CalibrationData, calibration_data
from prune2onnx.runtime.compare import output_error
from prune2onnx.runtime.inputs import Inputs, random_inputs
from prune2onnx.runtime.int8_choice import timed

_TRIED: tuple[Compute, ...] = ("int8", "int8-weights", "int4")
_RANDOM = 4  # sets of random inputs


@dataclass
class Computing:
    """How the layers of a model are to compute.

    Attributes:
        model: normalized, in float32.
        options: of the file.
    """

    model: ModelProto
    options: PackOptions

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    @cached_property
    def compute(self) -> Compute:
        """What layers compute in; measured where that is left to this machine."""
        asked = self.options.compute
        return self._fastest() if asked == "auto" else asked

    @property
    def on_grids(self) -> frozenset[str]:
        """Weights whose values are to be whole multiples of a scale for each output."""
        if self.compute == "float32":
            return frozenset()
        return frozenset(one.tensor.name for one in narrowable(self.model)[0])

    @property
    def in_blocks(self) -> frozenset[str]:
        """Weights that are to be codes of 4 bits."""
        return self.on_grids if self.compute == "int4" else frozenset()

    @property
    def calibrates(self) -> bool:
        """Whether weights change with examples, though nothing else asks for that."""
        return bool(self.in_blocks) and self.options.inputs.data not in (None, "random")

    def of(self, made: Approximation) -> Narrowed:
        """A model with other weights, as it is to compute."""
        return narrowed(made.model, self.compute, made.quantized)

    def model_of(self, made: Approximation) -> ModelProto:
        """The model of `of`."""
        return self.of(made).model

    def plain(self) -> Narrowed:
        """The model itself, as it is to compute; how much that changes is noted."""
        made = narrowed(self.model, self.compute)
        if self.compute != "float32" and any(not layer.reason for layer in made.layers):
            self.notes.append(f"relative error of the outputs {self.error(made.model):.3%}")
        return made

    def error(self, model: ModelProto) -> float:
        """The relative error of a model's outputs, on held-out examples or on random inputs."""
        data = self.options.inputs.data
        if data not in (None, "random"):
            return self._data.error(model)
        return output_error(self.model, self._random)(model)

    @cached_property
    def _data(self) -> CalibrationData:
        return calibration_data(self.model, self.options.inputs, self.options.examples)

    @cached_property
    def _random(self) -> list[Inputs]:
        return random_inputs(self.model, range(_RANDOM), shapes=self.options.inputs.shapes)

    def _fastest(self) -> Compute:
        """What takes the least time within the error that is allowed; never more than float32."""
        limit = self.options.max_error or MAX_REL_ERROR
        best: Compute = "float32"
        least = 1.0
        for compute in _TRIED:
            made = narrowed(self.model, compute)
            if all(layer.reason for layer in made.layers):
                self.notes.append("no matrix can compute in a narrower type")
                break
            try:
                error = self.error(made.model)
            except Prune2OnnxError as failed:
                self.notes.append(f"{compute}: this onnxruntime does not run it: {failed}")
                continue
            if error > limit:
                self.notes.append(
                    f"{compute}: the outputs' error would be {error:.2%}, more than {limit:.2%}"
                )
                continue
            timing = timed(self.model, made.model, InputOptions(shapes=self.options.inputs.shapes))
            ratio = timing.ratio or 1.0
            self.notes.append(
                f"{compute}: {ratio:.2f} of the time of float32, error of the outputs {error:.2%}"
            )
            if ratio < least and not timing.is_noise:
                best, least = compute, ratio
        return best
