"""Builds the user's network by their function, and loads their weights if they name any.

How such a function is found and called: see `callables`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree

from prune2onnx.callables import call_with, load_callable, names_of, takes_any
from prune2onnx.data import Data
from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.pruning import checked_weights, deep_copy, unwrapped
from prune2onnx.runs.recipe import Recipe
from prune2onnx.tasks.structure import arguments, mapped

# what DistributedDataParallel and torch.compile put before every name
_WRAPPERS = ("module.", "_orig_mod.", "module.")

Network: TypeAlias = nn.Module
"""A network, for modules that do not import torch."""


def copied(model: Network) -> Network:
    """A copy of a network that shares nothing with it."""
    return deep_copy(model)


def outputs_of(model: nn.Module, inputs: Any) -> Any:
    """What a model returns: its tensor, or a tuple of its tensors where there are several.

    Args:
        model: any.
        inputs: a tensor, its argument; a tuple, its arguments; a dict, its keyword arguments.
    """
    positional, named = arguments(inputs)
    outputs = model(*positional, **named)
    if isinstance(outputs, Tensor):
        return outputs
    tensors = tuple(leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
    return tensors[0] if len(tensors) == 1 else tensors


def on_device(value: Any, device: torch.device) -> Any:
    """The tensors of a batch on a device."""
    return mapped(lambda tensor: tensor.to(device, non_blocking=True), value)


def check_parameters(model: Network, recipe: Recipe, *, prunes: bool = True) -> None:
    """Checks, before anything is trained, that there is something to train and to prune.

    Args:
        model: a network that was not pruned yet.
        recipe: says what to prune.
        prunes: whether it will be pruned at all.

    Raises:
        RecipeError: a pattern matches no weight, or none is left.
        Prune2OnnxError: the network has no parameter, or a weight that cannot be pruned.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        has = "only frozen parameters" if any(True for _ in model.parameters()) else "no parameters"
        raise Prune2OnnxError(
            f"{type(model).__name__}: has {has}, expected at least one to train; check that its "
            "layers are attributes of the module, or in an nn.ModuleList"
        )
    if prunes:
        checked_weights(model, recipe.prune.include, recipe.prune.exclude)


def make_model(recipe: Recipe, data: Data) -> nn.Module:
    """Calls the recipe's model function, seeded, and loads the weights if there are any.

    In place of a function, `timm:NAME` and `hf:FOLDER` name networks of these libraries. The
    function gets `input_shape` and `classes` (or `num_classes`), `in_channels`, and for tokens
    `vocab_size`, if its signature names them, and the recipe's `model_args`.

    Raises:
        Prune2OnnxError: the function cannot be found or raises, returns no nn.Module, or the
            weights do not fit.
    """
    torch.manual_seed(recipe.seed)
    head, _, name = recipe.model.partition(":")
    model = _LIBRARIES[head](name, recipe, data) if head in _LIBRARIES else _own(recipe, data)
    if recipe.weights is not None:
        _load_weights(model, Path(recipe.weights))
    return model


def _own(recipe: Recipe, data: Data) -> nn.Module:
    """What the user's function returns."""
    function = load_callable(recipe.model)
    available = {"input_shape": data.input_shape, "classes": data.classes}
    named = {"num_classes": data.classes}
    if data.tokens:
        named["vocab_size"] = data.tokens
    if isinstance(data.input_shape, tuple) and len(data.input_shape) > 1:
        named["in_channels"] = data.input_shape[0]
    names = names_of(function)
    available |= {name: value for name, value in named.items() if name in names}
    unknown = recipe.model_args.keys() - names
    if unknown and not takes_any(function):
        raise RecipeError(
            f"{recipe.model} takes no argument {min(unknown)!r}, as --model-args give; it takes "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    available |= recipe.model_args
    model = call_with(function, recipe.model, **available)
    if not isinstance(model, nn.Module):
        raise Prune2OnnxError(
            f"{recipe.model}: returned a {type(model).__name__}, expected a torch.nn.Module"
        )
    return deep_copy(unwrapped(model))  # a function may return the same object every time


def _from_timm(name: str, recipe: Recipe, data: Data) -> nn.Module:
    """`timm:NAME`, for images; without weights, which may be given as a file."""
    timm = _library("timm")
    arguments: dict[str, Any] = {"num_classes": data.classes}
    if isinstance(data.input_shape, tuple) and len(data.input_shape) == 3:
        arguments["in_chans"] = data.input_shape[0]
    return _made(recipe, lambda: timm.create_model(name, **(arguments | recipe.model_args)))


def _from_transformers(name: str, recipe: Recipe, data: Data) -> nn.Module:
    """`hf:FOLDER`: the architecture that its config.json names, with its weights if it has any.

    Nothing is downloaded, and no code of the folder runs.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise Prune2OnnxError(
            f"{recipe.model}: no config.json in {folder}, expected the folder of a transformers "
            "model: config.json, and weights as model.safetensors"
        )
    transformers = _library("transformers")

    def make() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, **recipe.model_args
        )
        if hasattr(config, "use_cache"):
            config.use_cache = False  # else a graph would return all keys and values
        names = config.architectures or ()
        if not names or not hasattr(transformers, names[0]):
            raise ValueError(f"config.json names the architectures {list(names)}, none is known")
        kind = getattr(transformers, names[0])
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            return kind(config)  # type: ignore[no-any-return]
        return kind.from_pretrained(folder, config=config, local_files_only=True)  # type: ignore[no-any-return]

    return _made(recipe, make)


_LIBRARIES: Mapping[str, Callable[[str, Recipe, Data], nn.Module]] = {
    "timm": _from_timm,
    "hf": _from_transformers,
}
"""Head of a model's name -> what makes it."""


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Prune2OnnxError(
            f"{name} is not installed ({one_line(error)}); install it, as by "
            f"pip install 'prune2onnx[{name}]'"
        ) from error


def _made(recipe: Recipe, make: Callable[[], nn.Module]) -> nn.Module:
    """A library's network, or one error that says why there is none."""
    try:
        return make().float()
    except Exception as error:  # libraries raise many kinds
        raise Prune2OnnxError(
            f"{recipe.model}: {type(error).__name__}: {one_line(error)[:400]}"
        ) from error


def _load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state_dict from safetensors or a .pt / .pth file, without unpickling objects."""
    if not path.is_file():
        raise Prune2OnnxError(f"{path}: no such file; expected weights: .safetensors, .pt or .pth")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise Prune2OnnxError(
            f"{path}: not readable as weights: {one_line(error)[:400]}"
        ) from error
    except Exception as error:  # pickle.UnpicklingError: objects that weights_only refuses
        raise Prune2OnnxError(
            f"{path}: damaged, or it holds more than tensors, which is not loaded for safety; "
            "save model.state_dict() instead"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise Prune2OnnxError(
            f"{path}: holds a {type(state).__name__}, expected a state_dict: names and tensors"
        )
    for prefix in _WRAPPERS:
        if state and all(str(name).startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Prune2OnnxError(f"{path}: does not fit the model: {one_line(error)[:400]}") from error
