"""What a run starts from: the network, its data, its task and its graph, which fit each other.

`compress` and `sweep` begin with it; nothing is trained here but a dense network that several
prunings start from.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from prune2onnx.data import Data, Images, load_data, with_integers
from prune2onnx.data.text import is_text, tokenizer_beside
from prune2onnx.errors import DataWarning, Prune2OnnxError, RecipeError
from prune2onnx.runs.history import Callbacks
from prune2onnx.runs.recipe import Recipe
from prune2onnx.tasks.structure import leaves
from prune2onnx.tasks.task import Task, load_task
from prune2onnx.training.augment import check_images
from prune2onnx.training.export import ExportOptions, Template
from prune2onnx.training.fit import fit, make_accelerator
from prune2onnx.training.model import Network, check_parameters, make_model
from prune2onnx.training.scoring import check_output, example_inputs


def prepared(recipe: Recipe) -> tuple[Network, Data, Task, Template]:
    """The network, its data, task and graph, checked for what would fail after hours of training.

    Raises:
        RecipeError: the data do not fit the augmentation, or the task needs trained weights.
        Prune2OnnxError: the network or the data cannot be loaded, they do not fit each other, or
            torch cannot export the network.
    """
    task = load_task(recipe.task)
    if task.targets == "outputs" and recipe.first_phase == "dense":
        raise RecipeError(
            f"task {task.name} learns the outputs of a trained network, and none is given; give "
            "its weights with --weights, or a task with targets"
        )
    model, data = loaded(recipe, task)
    check_images(recipe.augment, data)
    check_parameters(model, recipe)
    return model, data, task, _template(recipe, model, data)


def _template(recipe: Recipe, model: Network, data: Data) -> Template:
    """The graph; that of a network which reads text takes texts of any length, if it can."""
    inputs = export_inputs(data)
    if not is_text(recipe.data):
        return Template(model, inputs, opset=recipe.opset)
    names = list(inputs) if isinstance(inputs, dict) else ["input"]
    axes = {name: {0: "batch", 1: "length"} for name in names}
    try:
        return Template(model, inputs, options=ExportOptions(recipe.opset, axes))
    except Prune2OnnxError as error:
        template = Template(model, inputs, opset=recipe.opset)
        length = leaves(inputs)[0].shape[1]
        warnings.warn(
            f"the file will take texts of {length} tokens and no other length: {error}",
            DataWarning,
            stacklevel=3,
        )
        return template


def loaded(recipe: Recipe, task: Task) -> tuple[Network, Data]:
    """The network and its data, which fit each other.

    Examples that are one array of integers are float32, as in a table of numbers, where the network
    takes that, else int64, such as tokens.
    """
    tokenizer = Path(recipe.tokenizer) if recipe.tokenizer else None
    if (tokenizer or recipe.length) and not is_text(recipe.data):
        raise RecipeError("tokenizer and length are for data text:FILE; leave them out")
    if tokenizer is None and is_text(recipe.data) and recipe.model.startswith("hf:"):
        tokenizer = tokenizer_beside(Path(recipe.model.removeprefix("hf:")).expanduser())
    data = load_data(
        recipe.data,
        validation=recipe.validation,
        seed=recipe.seed,
        task=task,
        images=Images(recipe.resize or None, recipe.crop or None, recipe.mean, recipe.std),
        tokenizer=tokenizer,
        length=recipe.length,
    )
    integers = with_integers(data)
    if integers is None:
        model = make_model(recipe, data)
        check_output(model, data, task)
        return model, data
    try:
        model = make_model(recipe, data)
        check_output(model, data, task)
    except Prune2OnnxError as error:
        model = make_model(recipe, integers)
        try:
            check_output(model, integers, task)
        except Prune2OnnxError:
            raise error from None
        return model, integers
    return model, data


def export_inputs(data: Data) -> Any:
    """What a graph is exported with: the shape of images and the like, else a batch."""
    if isinstance(data.input_shape, tuple) and data.input_dtype == "float32":
        return data.input_shape
    return example_inputs(data)


def train_dense(
    recipe: Recipe,
    directory: str | Path,
    *,
    cpu: bool = False,
    callbacks: Callbacks | None = None,
) -> Path:
    """Runs the dense phase alone, or the rest of it, so that several prunings can start from it.

    Args:
        recipe: the settings.
        directory: checkpoints are kept there; training continues from the last one.
        cpu: do not use a GPU.
        callbacks: called with the progress of training.

    Returns:
        The file of weights, for `Recipe.weights`.
    """
    directory = Path(directory)
    task = load_task(recipe.task)
    model, data = loaded(recipe, task)
    fit(
        model,
        data,
        recipe,
        task=task,
        accelerator=make_accelerator(recipe, cpu=cpu),
        checkpoints=directory,
        resume=True,
        stop="dense",
        callbacks=callbacks,
    )
    return directory / "dense.safetensors"
