"""OpenVINO, where it is installed: what it computes, and what it is left with to compute."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

OPENVINO = importlib.util.find_spec("openvino") is not None


def in_openvino(model: ModelProto, folder: Path) -> tuple[list[np.ndarray], Counter[str]]:
    """Outputs on ones, and the operators of the compiled model."""
    import openvino

    path = folder / "model.onnx"
    onnx.save(model, path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = {
        one.get_any_name(): np.ones(
            [extent.get_length() if extent.is_static else 1 for extent in one.get_partial_shape()],
            one.get_element_type().to_dtype(),
        )
        for one in compiled.inputs
    }
    outputs = [np.array(one) for one in compiled(inputs).values()]
    operators = (node.get_rt_info()["layerType"] for node in compiled.get_runtime_model().get_ops())
    return outputs, Counter(one if isinstance(one, str) else one.astype(str) for one in operators)
