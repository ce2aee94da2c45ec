"""Why torch could not export or trace a network, in words, and what to do."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from prune2onnx.errors import Prune2OnnxError, first_line, one_line
from prune2onnx.tasks.structure import arguments, described

# to find in what torch prints what matters to a user
_TORCH = str(Path(torch.__file__).parent)
_PLACE = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<code>\S[^\n]*)')
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_INTEGERS = re.compile(r"scalar types?: .*Long|expected scalar type Long|must be long", re.I)
_GUIDE = "torch.export's guide says what a forward may do"


def cannot_export(model: nn.Module, example: Any, error: Exception) -> Prune2OnnxError:
    """The error that says why a model cannot be exported, and what to do.

    Args:
        model: in evaluation mode, on the CPU.
        example: the input with which torch tried.
        error: what torch raised.
    """
    cause = _cause(model, example, error)
    return Prune2OnnxError(f"{type(model).__name__}: torch.onnx cannot export the model: {cause}")


def cannot_trace(model: nn.Module, example: Any, error: Exception) -> Prune2OnnxError:
    """The error that says why BatchNorm cannot be folded; arguments as above."""
    cause = _cause(model, example, error)
    return Prune2OnnxError(
        f"{type(model).__name__}: torch.export cannot trace the model, which folding BatchNorm "
        f"needs: {cause}"
    )


def invalid_graph(model: nn.Module, example: Any, error: Exception) -> Prune2OnnxError:
    """The error for a graph that torch made and the checker refuses; arguments as above."""
    cause = _fails_itself(model, example) or one_line(error)[:300]
    return Prune2OnnxError(f"{type(model).__name__}: the exported graph is not valid ONNX: {cause}")


def _cause(model: nn.Module, example: Any, error: Exception) -> str:
    known = _fails_itself(model, example) or _dynamic(error) or _unknown_operator(error)
    if known is not None:
        return known
    root = _chain(error)[-1]
    return f"{type(root).__name__}: {first_line(root)}{_at(root)}; {_GUIDE}"


def _fails_itself(model: nn.Module, example: Any) -> str | None:
    """The failure of the model's own forward, which torch.export reports at length."""
    given = f"the inputs {described(example)}"
    if isinstance(example, Tensor):
        given = f"a {str(example.dtype).removeprefix('torch.')} input {list(example.shape)}"
    positional, named = arguments(example)
    try:
        with torch.no_grad():
            outputs = model(*positional, **named)
    except Exception as error:  # whatever the user's code raises
        text = first_line(error)
        advice = f"it was given {given}"
        if isinstance(error, TypeError) and "positional argument" in text:
            advice = "it is given one tensor; wrap the model in a module that takes one"
            if not isinstance(example, Tensor):
                advice = f"it is given {given}; wrap the model in a module that takes them"
        elif _INTEGERS.search(text):
            advice += "; convert it inside forward, as by x.long()"
        elif "dtype" in text:
            advice += "; convert the model by model.float()"
        return f"its forward fails: {type(error).__name__}: {text}{_at(error)}; {advice}"
    if not any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(outputs)):
        return f"its forward returns a {type(outputs).__name__}, expected a tensor"
    return None


def _dynamic(error: Exception) -> str | None:
    """Control flow that depends on values, which are not known while the graph is made."""
    for one in _chain(error):
        if "DataDependent" in type(one).__name__ or "data-dependent" in first_line(one):
            place = _PLACE.search(str(one))
            where = ""
            if place is not None:
                where = f" ({Path(place['path']).name}:{place['line']}: {place['code']})"
            return (
                f"its forward decides by values of its input{where}, and a graph has one path for "
                "all; use torch.where, or torch.cond"
            )
    return None


def _unknown_operator(error: Exception) -> str | None:
    for one in _chain(error):
        if found := _OPERATOR.search(str(one)):
            return f"ONNX has no operator for {found[1]}; compute it otherwise in forward"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes, the innermost last."""
    return list(_causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _at(error: BaseException) -> str:
    """The last line outside of torch that led to an error: ' (net.py:12)'; '' if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_TORCH, str(Path(__file__).parents[1])))]
    if not own:
        return ""
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})"
