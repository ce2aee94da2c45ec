"""torch -> ONNX: the dense graph, with the parameters' names and without the exporter's notes.

The exporter (torch.onnx, dynamo) writes stack traces and class hierarchies into every node. In a
small network they take more than the coded weights, so the file keeps only what onnxruntime needs.
Coding weights: see `packing`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.strip import strip
from prune2onnx.pruning import deep_copy, unwrapped, with_plain_parameters
from prune2onnx.tasks.structure import arguments, leaves, mapped
from prune2onnx.training.exporting.arrangement import (
    Arrangement,
    covered,
    mark,
    rearranged,
    same_or_transposed,
)
from prune2onnx.training.exporting.refusals import cannot_export, invalid_graph

# The first with model-local functions; onnxruntime 1.17 reads up to 9.
_IR_VERSION = 8

_BATCH = "batch"


DynamicShapes: TypeAlias = Mapping[str, Mapping[int, str] | Sequence[int]]
"""Input -> its open axes: {"tokens": {0: "batch", 1: "length"}}, or {"tokens": (0, 1)}."""


def export(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    input_shape: Sequence[int] | None = None,
    opset: int = 18,
    dynamic_shapes: DynamicShapes | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """Exports a model in evaluation mode with a dynamic batch.

    Args:
        model: any module that `torch.export` can trace; not modified. Weights that a layer computes
            (under a parametrization, an older weight_norm or spectral_norm, a mask of
            torch.nn.utils.prune) are stored as they are, under the layer's own name.
        example_inputs: a batch of inputs: a tensor, a tuple of tensors (positional arguments) or a
            dict (keyword arguments), of any types. A sequence of integers is taken as
            `input_shape`.
        input_shape: in their place, the shape of one float32 example, without the batch.
        opset: ONNX operator set, 18 or newer.
        dynamic_shapes: open axes, by the name of the input; an axis of the same name has the same
            size everywhere. Default: the first axis of each input, "batch". Inputs that are not
            named here keep that default.
        input_names: of the graph; default: the keys of a dict, "input" for one tensor, else the
            names of forward's arguments.
        output_names: of the graph; default: "output" for one tensor, else the keys of a dict that
            forward returns, or output_0, output_1, ...

    Returns:
        A checked graph. A parameter's initializer carries its state_dict name and its values bit
        for bit, transposed where the exporter stored it so; the matrices of LSTM and GRU in the
        order of ONNX, both directions in one under the name of the first. BatchNorm that the
        exporter folds into a layer changes that layer's values.

    Raises:
        Prune2OnnxError: torch cannot trace or translate the model, names do not fit, or the graph
            takes one batch size alone; the cause is in the message.
    """
    model = unwrapped(model)
    _check_model(model)
    if (example_inputs is None) == (input_shape is None):
        raise Prune2OnnxError("give export either example_inputs or input_shape")
    model = with_plain_parameters(deep_copy(model).cpu().eval())
    inputs = input_shape if example_inputs is None else example_inputs
    options = ExportOptions(opset, dynamic_shapes, input_names, output_names)
    graph = _exported(model, inputs, options)
    if _without_matrices(graph, model):
        template = Template(model, inputs, options=options)
        if template.exact:
            return template.filled(model)
    return graph


def _without_matrices(graph: onnx.ModelProto, model: nn.Module) -> bool:
    """Whether a matrix of the model is in the graph under another name, or not at all."""
    present = {tensor.name for tensor in graph.graph.initializer}
    return any(
        model.get_parameter(names[0]).ndim > 1 and present.isdisjoint(names)
        for names in _names_of(model)
    )


def _names_of(model: nn.Module) -> list[list[str]]:
    """The names of each parameter: several where layers share it."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


@dataclass(frozen=True)
class ExportOptions:
    """The arguments of `export` that say what the graph is to be."""

    opset: int = 18
    dynamic_shapes: DynamicShapes | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None


def _exported(model: nn.Module, inputs: Any, options: ExportOptions) -> onnx.ModelProto:
    """The graph of a model with plain parameters, on the CPU, in evaluation mode."""
    given = _batch_of(inputs)
    names = _input_names(model, given, options.input_names)
    axes = _open_axes(names, leaves(given), options.dynamic_shapes or {})
    example = _repeated(given, axes)
    positional, named = arguments(example)
    shapes: Any = [{axis: _dim(symbol) for axis, symbol in each.items()} for each in axes]
    try:
        with _silenced():
            program = torch.onnx.export(
                model,
                positional,
                kwargs=named or None,
                dynamo=True,
                opset_version=options.opset,
                input_names=names,
                output_names=options.output_names or _output_names(model, example),
                dynamic_shapes=dict(zip(named, shapes, strict=True)) if named else tuple(shapes),
                verbose=False,
            )
    except Exception as error:  # whatever the user's code raises, and more
        raise cannot_export(model, example, error) from error
    assert program is not None  # dynamo=True always returns one
    proto = program.model_proto
    if not proto.graph.output:
        raise cannot_export(model, example, ValueError("the graph has no output"))
    _restore_names(proto, model)
    proto = strip(proto).model
    proto.ir_version = _IR_VERSION
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise invalid_graph(model, example, error) from error
    _check_open(proto, model, dict(zip(names, axes, strict=True)))
    return proto


def _batch_of(inputs: Any) -> Any:
    """Example inputs on the CPU; of a shape, zeros."""
    is_shape = not isinstance(inputs, dict | Tensor) and all(isinstance(n, int) for n in inputs)
    if is_shape:
        return torch.zeros(2, *inputs)
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    if not all(isinstance(each, Tensor) for each in leaves(inputs)):
        kinds = sorted({type(each).__name__ for each in leaves(inputs)})
        raise Prune2OnnxError(
            f"example inputs are of type {', '.join(kinds)}, expected a tensor, a tuple or a dict "
            "of tensors, or the shape of one example"
        )
    return mapped(lambda tensor: tensor.detach().cpu(), inputs)


def _input_names(model: nn.Module, inputs: Any, given: Sequence[str] | None) -> list[str]:
    count = len(leaves(inputs))
    if given is not None:
        if len(given) != count or len(set(given)) != count:
            raise Prune2OnnxError(
                f"input_names are {', '.join(given) or 'none'}, expected {count} different ones"
            )
        return list(given)
    if isinstance(inputs, dict):
        return list(inputs)
    if count == 1:
        return ["input"]
    own = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind < 2]
    return own[:count] if len(own) >= count else [f"input_{number}" for number in range(count)]


def _output_names(model: nn.Module, example: Any) -> list[str] | None:
    """Names of the outputs; None where forward fails, which the exporter reports."""
    positional, named = arguments(example)
    try:
        with torch.no_grad():
            outputs = model(*positional, **named)
    except Exception:
        return None
    found = [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if len(found) == 1:
        return ["output"]
    if isinstance(outputs, dict) and len(outputs) == len(found):
        return [str(name) for name in outputs]
    return [f"output_{number}" for number in range(len(found))]


def _open_axes(
    names: Sequence[str], tensors: Sequence[Tensor], given: DynamicShapes
) -> list[dict[int, str]]:
    """The open axes of each input, and their symbols."""
    if unknown := [name for name in given if name not in names]:
        raise Prune2OnnxError(
            f"dynamic_shapes name {unknown[0]!r}, the inputs are {', '.join(names)}"
        )
    found = []
    for name, tensor in zip(names, tensors, strict=True):
        axes = given.get(name, {0: _BATCH})
        if not isinstance(axes, Mapping):
            axes = {axis: f"{name}_{axis}" if axis else _BATCH for axis in axes}
        if wrong := [axis for axis in axes if not -tensor.ndim <= axis < tensor.ndim]:
            if name in given:
                raise Prune2OnnxError(
                    f"dynamic_shapes: input {name} has {tensor.ndim} axes, and no axis {wrong[0]}"
                )
            axes = {}  # a scalar has no batch
        found.append({axis % max(tensor.ndim, 1): symbol for axis, symbol in axes.items()})
    return found


def _dim(symbol: Any) -> Any:
    return torch.export.Dim(symbol) if isinstance(symbol, str) else symbol


def _repeated(inputs: Any, axes: Sequence[dict[int, str]]) -> Any:
    """Inputs with two of what there is one of along an open axis: torch takes one as fixed."""
    left = iter(axes)

    def repeat(tensor: Tensor) -> Tensor:
        for axis in next(left):
            if tensor.shape[axis] == 1:
                tensor = tensor.repeat_interleave(2, axis)
        return tensor

    return mapped(repeat, inputs)


def _check_model(model: nn.Module) -> None:
    """Checks that a model can be traced at all."""
    if isinstance(model, torch.jit.ScriptModule):
        raise Prune2OnnxError(
            f"{type(model).__name__}: torch.onnx cannot export a compiled torch.jit module; give "
            "the module that it was made from"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise Prune2OnnxError(
                f"{name}: not initialised yet (a lazy layer); run one batch through the model first"
            )


def _check_open(
    proto: onnx.ModelProto, model: nn.Module, axes: Mapping[str, Mapping[int, str]]
) -> None:
    """Checks that the graph takes any size: torch fixes one where forward depends on it."""
    for value in proto.graph.input:
        for axis, symbol in axes.get(value.name, {}).items():
            size = value.type.tensor_type.shape.dim[axis]
            if size.dim_param:
                continue
            if symbol == _BATCH:
                raise Prune2OnnxError(
                    f"{type(model).__name__}: forward fixes the batch size: the exported graph "
                    f"takes {size.dim_value} examples and no other number; replace loops over "
                    "examples, choices by len(x), and sizes written as numbers (x.shape[0] or -1 "
                    "instead)"
                )
            raise Prune2OnnxError(
                f"{type(model).__name__}: forward fixes axis {axis} of input {value.name}: the "
                f"exported graph takes {size.dim_value} and no other size; leave it out of "
                "dynamic_shapes, or replace sizes written as numbers"
            )


class Template:
    """The exported graph of a network, filled with other values: exporting again takes seconds.

    Args:
        model: as for `export`; exported once.
        example_inputs: a batch, or the shape of one example, as for `export`.
        opset: ONNX operator set, 18 or newer.
        options: in its place, all options of the graph.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        opset: int = 18,
        options: ExportOptions | None = None,
    ) -> None:
        self._inputs, self._options = example_inputs, options or ExportOptions(opset)
        model = with_plain_parameters(deep_copy(unwrapped(model)).cpu().eval())
        mark(model)  # different values identify an initializer, and its order
        self._graph = _exported(model, self._inputs, self._options)
        self._arranged: dict[str, Arrangement] = {}
        state = _arrays(model)
        unknown: dict[str, NDArray[Any]] = {}
        for tensor in self._graph.graph.initializer:
            array = numpy_helper.to_array(tensor)
            own = state.get(tensor.name)
            one = None if own is None else same_or_transposed(tensor.name, array, own)
            if one is not None:
                self._arranged[tensor.name] = one
            else:
                unknown[tensor.name] = array
        parameters = _names_of(model)
        missing = [names[0] for names in parameters if self._arranged.keys().isdisjoint(names)]
        found = rearranged(unknown, state, missing)
        # A parameter that the exporter folded or merged with another cannot be filled in.
        changed = unknown.keys() - found.keys() & state.keys()
        known = covered([*self._arranged.values(), *found.values()], state)
        absent = any(known.isdisjoint(names) for names in parameters)
        fixed = {name: value for name, value in unknown.items() if name not in found}
        self.exact = not changed and not (absent and self._depends(fixed, model))
        self._arranged |= self._named_by_sources(found)

    def _depends(self, fixed: Mapping[str, NDArray[Any]], model: nn.Module) -> bool:
        """Whether initializers that hold no parameter are computed of one.

        One that is in no initializer may be unused, as is a row of a table that is never looked up.
        """
        mark(model, seed=1)
        other = _exported(model, self._inputs, self._options)
        now = {t.name: numpy_helper.to_array(t) for t in other.graph.initializer}
        return any(
            name not in now or now[name].tobytes() != value.tobytes()
            for name, value in fixed.items()
        )

    def _named_by_sources(self, found: Mapping[str, Arrangement]) -> dict[str, Arrangement]:
        """Gives rearranged initializers the names of their first parameters, in the graph, too."""
        taken = {tensor.name for tensor in self._graph.graph.initializer} - found.keys()
        renamed: dict[str, str] = {}
        for old, one in found.items():
            name = one.sources[0]
            for number in itertools.count(1):
                if name not in taken:
                    break
                name = f"{one.sources[0]}.{number}"  # a further part of the parameter
            renamed[old] = name
            taken.add(name)
        _rename(self._graph, renamed)
        return {renamed[old]: one for old, one in found.items()}

    def sources(self, initializer: str) -> tuple[str, ...]:
        """The parameters of which an initializer is made; none where it is of none."""
        return self._arranged[initializer].sources if initializer in self._arranged else ()

    def filled(self, model: nn.Module) -> onnx.ModelProto:
        """The graph with the values of a model of the same structure."""
        if not self.exact:
            model = with_plain_parameters(deep_copy(unwrapped(model)).cpu().eval())
            return _exported(model, self._inputs, self._options)
        graph = onnx.ModelProto()
        graph.CopyFrom(self._graph)
        state = _arrays(with_plain_parameters(unwrapped(model)))
        for tensor in graph.graph.initializer:
            if tensor.name in self._arranged:
                array = self._arranged[tensor.name].gathered(state)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return graph

    def assign(self, model: nn.Module, values: Mapping[str, NDArray[Any]]) -> None:
        """Writes values of initializers into a model's parameters, in place.

        Writes nothing if one of them is not a parameter: some of a change would change outputs.
        """
        own = model.state_dict()
        if not self.exact or not values.keys() <= self._arranged.keys():
            return
        sources = {name for key in values for name in self._arranged[key].sources}
        if not sources <= own.keys():
            return
        with torch.no_grad():
            for key, array in values.items():
                one = self._arranged[key]
                state = {name: own[name].detach().cpu().numpy() for name in one.sources}
                for name, value in one.scattered(array, state).items():
                    own[name].copy_(torch.from_numpy(value.copy()))


def _arrays(model: nn.Module) -> dict[str, NDArray[Any]]:
    return {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keeps the exporter's progress, notices and deprecation warnings off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch's parts have loggers, and streams, of their own
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


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
    _rename(proto, renamed)


def _rename(proto: onnx.ModelProto, renamed: Mapping[str, str]) -> None:
    """Renames initializers, and what nodes read."""
    for tensor in proto.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
