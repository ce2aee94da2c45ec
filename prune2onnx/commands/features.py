"""`features`: the output of a layer of an ONNX file for each example of a data set.

By default the features that the last layer reads, which transfer to other tasks (Manessi et al.,
arXiv 1712.01721, section on transfer; Razavian et al., arXiv 1403.6382). They are written as arrays
that `npz:FILE` reads, so that any model can be trained on them.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from prune2onnx.commands.source import read
from prune2onnx.data import batches, load_data
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.files import keep_inputs, write_whole
from prune2onnx.graph.file import files_of
from prune2onnx.packing.unpack import unpack
from prune2onnx.runtime.compare import Batches, answers
from prune2onnx.runtime.session import session

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NAMED = 6  # values that an error lists


def layer_value(model: ModelProto, layer: str | None = None) -> str:
    """The value of the graph that a layer's name refers to.

    Args:
        model: not packed.
        layer: a value of the graph; or a node or a weight, for the output of that layer, before its
            activation. Default: the input of the last layer with a weight.

    Raises:
        RecipeError: nothing has this name.
        Prune2OnnxError: there is no layer with a weight.
    """
    variable = _variable(model)
    nodes = [node for node in model.graph.node if set(node.output) & variable]
    if layer is None:
        layers = [n for n in nodes if n.op_type in _LAYERS and n.input[1] not in variable]
        if not layers:
            raise Prune2OnnxError(
                f"no layer with a weight ({', '.join(_LAYERS)}) in the graph; name a value "
                f"with --layer: {_listed(nodes)}"
            )
        return layers[-1].input[0]
    if layer in variable:
        return layer
    for node in nodes:
        if node.name == layer:
            return node.output[0]
    if (reader := _reader(model, layer, variable)) is not None:
        return reader.output[0]
    weights = [tensor.name for tensor in model.graph.initializer]
    known = [*variable, *(node.name for node in nodes), *weights]
    near = difflib.get_close_matches(layer, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {_listed(nodes)}"
    raise RecipeError(f"layer {layer!r}: no value, node or weight of that name{hint}")


def _variable(model: ModelProto) -> set[str]:
    """Values that depend on the graph's inputs."""
    stored = {tensor.name for tensor in model.graph.initializer}
    variable = {value.name for value in model.graph.input if value.name not in stored}
    for node in model.graph.node:
        if variable & set(node.input):
            variable.update(filter(None, node.output))
    return variable


def _reader(model: ModelProto, weight: str, variable: set[str]) -> NodeProto | None:
    """The layer that reads a weight, directly or through nodes that depend on it alone."""
    names = {weight}
    for node in model.graph.node:
        if names & set(node.input):
            if set(node.output) & variable:
                return node
            names.update(node.output)
    return None


def _listed(nodes: Iterable[NodeProto]) -> str:
    """The last values that nodes compute."""
    values = [name for node in nodes for name in node.output if name]
    more = f" and {len(values) - _NAMED} before" if len(values) > _NAMED else ""
    return ", ".join(values[-_NAMED:]) + more


def features(
    model: ModelProto, batches: Batches, layer: str | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The output of a layer for each example, by onnxruntime.

    Args:
        model: packed or not, with one input; not modified.
        batches: examples and labels.
        layer: as for `layer_value`.

    Returns:
        ([n, ...] float32, labels [n] int64).

    Raises:
        RecipeError: nothing has this name.
        Prune2OnnxError: onnxruntime cannot run the model on the data, or the value is not a tensor
            of numbers with one row per example.
    """
    dense = unpack(model)
    return _features(dense, batches, layer_value(dense, layer))


def _features(
    model: ModelProto, batches: Batches, name: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The value of the graph with this name, for each example."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    result.graph.output.append(onnx.ValueInfoProto(name=name))
    x, y = answers(session(result), batches)
    if x.dtype.kind not in "fiub":
        raise Prune2OnnxError(f"{name}: has type {x.dtype}, expected numbers; give another --layer")
    return x.astype(np.float32), y


def features_file(
    source: Path, target: Path, data: str, *, layer: str | None = None, batch_size: int = 128
) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Writes the features of a data set: x_train, y_train, x_test, y_test.

    The training arrays hold everything but the test set; the validation split is included.

    Args:
        source: the ONNX file, packed or not.
        target: the archive to write (numpy's .npz).
        data: where examples come from (`load_data`).
        layer: as for `layer_value`.
        batch_size: examples at a time.

    Returns:
        The value's name, and the shape of each array.

    Raises:
        RecipeError: nothing has this name, or the source of the data is unknown.
        Prune2OnnxError: a file cannot be read or written, or the model does not take the data.
    """
    model = read(source).unpacked
    name = layer_value(model, layer)
    archive = Path(data.partition(":")[2]).expanduser()
    keep_inputs([*files_of(source), *([archive] if archive.is_file() else [])], [target])
    found = load_data(data)
    arrays: dict[str, Any] = {}
    for part, splits in (("train", (found.train, found.validation)), ("test", (found.test,))):
        every = (batch for split in splits for batch in batches(split, batch_size))
        arrays[f"x_{part}"], arrays[f"y_{part}"] = _features(model, every, name)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(target, content.getvalue())
    return name, {key: array.shape for key, array in arrays.items()}
