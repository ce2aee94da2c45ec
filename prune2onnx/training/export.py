"""torch -> ONNX: the dense graph, with the parameters' names and without the exporter's notes.

The exporter (torch.onnx, dynamo) writes stack traces and class hierarchies into every node. In a
small network they take more than the coded weights, so the file keeps only what onnxruntime needs.
Coding weights: see `packing`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from prune2onnx.errors import Prune2OnnxError, first_line, one_line
from prune2onnx.graph.strip import strip

# The first with model-local functions; onnxruntime 1.17 reads up to 9.
_IR_VERSION = 8


def export(model: nn.Module, input_shape: Sequence[int], *, opset: int = 18) -> onnx.ModelProto:
    """Exports a model in evaluation mode with a dynamic batch.

    Args:
        model: takes one [n, *input_shape] float32 tensor, returns one tensor; not modified.
        input_shape: of one example.
        opset: ONNX operator set, 18 or newer.

    Returns:
        A checked graph with input "input" and output "output". A parameter's initializer carries
        its state_dict name and its values bit for bit, transposed where the exporter stored it
        so; BatchNorm that the exporter folds into a layer changes that layer's values.

    Raises:
        Prune2OnnxError: torch cannot trace or translate the model; the cause is in the message.
    """
    example = torch.zeros(2, *input_shape)
    try:
        model = copy.deepcopy(model).cpu().eval()
        with _silenced():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:
        raise Prune2OnnxError(
            f"{type(model).__name__}: torch.onnx cannot export the model: "
            f"{type(error).__name__}: {first_line(error)}; "
            "see torch.export's guide for what a forward may do"
        ) from error
    assert program is not None  # dynamo=True always returns one
    proto = program.model_proto
    _restore_names(proto, model)
    proto = strip(proto).model
    proto.ir_version = _IR_VERSION
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = one_line(error)[:300]
        raise Prune2OnnxError(
            f"{type(model).__name__}: the exported graph is not valid ONNX: {reason}"
        ) from error
    return proto


class Template:
    """The exported graph of a network, filled with other values: exporting again takes seconds.

    Args:
        model: as for `export`; exported once.
        input_shape: of one example.
        opset: ONNX operator set, 18 or newer.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int], *, opset: int = 18) -> None:
        self._shape, self._opset = tuple(input_shape), opset
        model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # random values identify an initializer, and whether it is transposed
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self._graph = export(model, input_shape, opset=opset)
        self._transposed: dict[str, bool] = {}
        state, changed = _arrays(model), set()
        for tensor in self._graph.graph.initializer:
            if tensor.name not in state:
                continue
            array, own = numpy_helper.to_array(tensor), state[tensor.name]
            if np.array_equal(array, own) or np.array_equal(array, own.T):
                self._transposed[tensor.name] = not np.array_equal(array, own)
            else:
                changed.add(tensor.name)
        # A parameter that the exporter folded or merged with another cannot be filled in.
        parameters = {name for name, _ in model.named_parameters()}
        self.exact = not changed and self._transposed.keys() >= parameters

    def filled(self, model: nn.Module) -> onnx.ModelProto:
        """The graph with the values of a model of the same structure."""
        if not self.exact:
            return export(model, self._shape, opset=self._opset)
        graph = onnx.ModelProto()
        graph.CopyFrom(self._graph)
        state = _arrays(model)
        for tensor in graph.graph.initializer:
            if tensor.name in self._transposed:
                array = _transposed_if(state[tensor.name], self._transposed[tensor.name])
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return graph

    def assign(self, model: nn.Module, values: Mapping[str, NDArray[Any]]) -> None:
        """Writes values of initializers into a model's parameters, in place.

        Writes nothing if one of them is not a parameter: some of a change would change outputs.
        """
        if not self.exact or not values.keys() <= self._transposed.keys():
            return
        with torch.no_grad():
            for name, array in values.items():
                own = _transposed_if(array, self._transposed[name])
                model.state_dict()[name].copy_(torch.from_numpy(own.copy()))


def _arrays(model: nn.Module) -> dict[str, NDArray[Any]]:
    return {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}


def _transposed_if(array: NDArray[Any], transposed: bool) -> NDArray[Any]:
    return np.ascontiguousarray(array.T if transposed else array)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keeps the exporter's progress, notices and deprecation warnings off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _restore_names(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Restores the names of parameters that the exporter transposed and renamed."""
    graph = proto.graph
    present = {tensor.name for tensor in graph.initializer}
    state = {name: value for name, value in model.state_dict().items() if name not in present}
    transposed = {
        (value.T.shape, value.T.contiguous().numpy().tobytes()): name
        for name, value in state.items()
        if value.ndim == 2
    }
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name in model.state_dict():
            continue
        array = numpy_helper.to_array(tensor)
        key = (torch.Size(array.shape), np.ascontiguousarray(array).tobytes())
        if key in transposed:
            renamed[tensor.name] = transposed.pop(key)
            tensor.name = renamed[tensor.name]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
