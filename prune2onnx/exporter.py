"""torch -> ONNX: the dense graph, with the parameters' own names and none of the exporter's notes.

The exporter (torch.onnx, dynamo) writes stack traces and class hierarchies into every node; in a
small network they outweigh the coded weights, so the file keeps what onnxruntime needs and no
more. Coding the weights is `pack`'s business.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from prune2onnx.errors import Prune2OnnxError, first_line, one_line
from prune2onnx.strip import strip

# The lowest that knows model-local functions; onnxruntime 1.17 reads up to 9.
_IR_VERSION = 8


def export(model: nn.Module, input_shape: Sequence[int], *, opset: int = 18) -> onnx.ModelProto:
    """Exports a model in evaluation mode with a dynamic batch.

    Args:
        model: takes one [n, *input_shape] float32 tensor, returns one tensor; it is not changed.
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
        with _silence():
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
    proto = strip(proto)
    proto.ir_version = _IR_VERSION
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = one_line(error)[:300]
        raise Prune2OnnxError(
            f"{type(model).__name__}: the exported graph is not valid ONNX: {reason}"
        ) from error
    return proto


@contextlib.contextmanager
def _silence() -> Iterator[None]:
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
    """Gives parameters that the exporter transposed, and renamed, their own names back."""
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
