"""From a network and its data to a small ONNX file with proof: the whole way of `compress`.

One folder holds a run: recipe.yaml (written first, so that a killed run can be continued),
checkpoints/, dense.onnx, model.onnx, history.json (what each epoch came to), report.json and
report.html. The steps themselves live in their own rooms.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from prune2onnx.budget import Search, Trial, goals
from prune2onnx.callables import call_with, load_callable
from prune2onnx.data import Data, batches, load_data
from prune2onnx.deployment import Deployment
from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line
from prune2onnx.exporter import export
from prune2onnx.files import write_whole
from prune2onnx.int8 import MAX_DROP, quantize_int8
from prune2onnx.pack import Packed, pack
from prune2onnx.page import write_page
from prune2onnx.recipe import MACS, Recipe, read_recipe, resolve
from prune2onnx.report import Report
from prune2onnx.runfolder import DENSE, HISTORY, MODEL, PAGE, RECIPE, REPORT
from prune2onnx.running import session
from prune2onnx.shrink import multiply_adds
from prune2onnx.strip import strip
from prune2onnx.training import (
    Epoch,
    Fitted,
    Step,
    check_images,
    check_output,
    fit,
    make_accelerator,
    with_epochs,
)
from prune2onnx.validate import check_outputs, scores, validate

_FEW = 8  # examples for ranges where only bytes are measured
_PRICES = "prices.json"  # measured once: a continued run shall end as an uninterrupted one


def compress(
    recipe: Recipe,
    directory: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    cpu: bool = False,
    on_step: Callable[[Step], None] = lambda _: None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> Report | None:
    """Trains, prunes, shares, exports, packs and proves, into one folder.

    Args:
        recipe: the settings; for a run to be continued see `recipe_of`.
        directory: the run's folder, made if missing.
        overwrite: start again in a folder that holds a run.
        resume: continue the run in `directory` from its last checkpoint; on the same machine's CPU
            the result is the same, byte for byte, as that of an uninterrupted run.
        cpu: do not use a GPU.
        on_step: told every few steps.
        on_epoch: told after each epoch.

    Returns:
        The report, also written to report.json and, to be read, to report.html; None in all but the
        main process.

    Raises:
        RecipeError: the recipe does not fit the folder or the processes.
        Prune2OnnxError: a step failed; the message names what and why.
        MismatchError: onnxruntime disagrees with torch or with the numpy decoder.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: a file, expected a folder for the run")
    there = [name for name in (RECIPE, DENSE, MODEL, REPORT) if (directory / name).exists()]
    if there and not (overwrite or resume):
        raise RecipeError(
            f"{directory}: holds a run already ({', '.join(there)}); continue it with "
            f"--resume {directory}, start again with --overwrite, or choose another folder with -o"
        )
    model, data = prepared(recipe)
    recipe = with_epochs(recipe, len(data.train))  # type: ignore[arg-type]
    accelerator = make_accelerator(recipe, cpu=cpu)
    checkpoints = directory / "checkpoints"
    if accelerator.is_main_process:
        outdated = [directory / name for name in (DENSE, MODEL, HISTORY, REPORT, PAGE)]
        if not resume:
            # the recipe first: a kill must leave no old checkpoint beside a new recipe
            old = checkpoints.rglob("*.safetensors")
            outdated = [directory / RECIPE, checkpoints / _PRICES, *old, *outdated]
        for path in outdated:
            path.unlink(missing_ok=True)
        write_whole(directory / RECIPE, recipe.to_yaml())
    accelerator.wait_for_everyone()
    rewrite = None
    if recipe.tries_int8:  # the first examples will do where only bytes are measured
        rewrite = partial(_roughly_int8, data=data)
    deployment = Deployment(
        data.input_shape,
        recipe.opset,
        anonymize=recipe.anonymize,
        rewrite=rewrite,
        prices=_prices(model, data, recipe, checkpoints, accelerator),
        multiple=recipe.multiple,
    )
    teacher = None
    if recipe.teacher is not None:
        teacher = make_model(recipe.model_copy(update={"weights": recipe.teacher}), data)

    def run(model: nn.Module, recipe: Recipe, folder: Path, start: str, stop: str) -> Fitted:
        return fit(
            model,
            data,
            recipe,
            accelerator=accelerator,
            checkpoints=folder,
            resume=resume,
            start=start,
            stop=stop,
            teacher=teacher,
            deployment=deployment,
            on_step=on_step,
            on_epoch=on_epoch,
        )

    if recipe.searches and recipe.first_phase != "tune":
        fitted = _search(model, recipe, data, checkpoints, run, deployment)
    else:
        fitted = run(model, recipe, checkpoints, recipe.first_phase, "share")
    if not accelerator.is_main_process:
        return None

    dense = teacher or make_model(recipe, data)
    if teacher is None:
        dense.load_state_dict(fitted.dense)
    dense_graph = export(dense, data.input_shape, opset=recipe.opset)
    write_whole(directory / DENSE, dense_graph.SerializeToString())
    expected = _scores(fitted.model, data.test, recipe.batch_size)
    made = _made(fitted, deployment, recipe, data, expected)
    packed = made.packed
    write_whole(directory / MODEL, packed.model.SerializeToString())
    report = validate(
        directory / MODEL,
        directory / DENSE,
        batches=batches(data.test, recipe.batch_size),
        rows=packed.rows,
        expected=expected if made.is_float else None,
        density=fitted.density,
        seed=recipe.seed,
    )
    before, after = multiply_adds(dense_graph), multiply_adds(deployment.shrunk(fitted.model))
    report = replace(
        report,
        dense=replace(report.dense, macs=before),
        compressed=replace(report.compressed, macs=after),
        budget=goals(
            recipe,
            nbytes=packed.model.ByteSize(),
            density=fitted.density,
            macs=after / before,
            drop=made.error - fitted.dense_error,
        ),
        validation={"dense_error": fitted.dense_error, "error": made.error},
        notes=(*made.notes, *_on_zeros(report, after / before, made.is_float, recipe)),
    )
    epochs = [asdict(epoch) for epoch in fitted.history]
    write_whole(directory / HISTORY, json.dumps(epochs, indent=1, allow_nan=False) + "\n")
    write_whole(directory / REPORT, report.to_json())
    write_page(directory)
    return report


def _prices(
    model: nn.Module, data: Data, recipe: Recipe, checkpoints: Path, accelerator: Accelerator
) -> dict[str, float] | None:
    """Milliseconds of each layer, where they count; measured by the main process, kept for all."""
    if not (recipe.narrow.epochs and recipe.goal != "size" and recipe.narrow.price == "time"):
        return None
    path = checkpoints / _PRICES
    if accelerator.is_main_process and not path.exists():
        from prune2onnx.layertimes import layer_times

        graph = export(model, data.input_shape, opset=recipe.opset)
        times = layer_times(graph, batch=recipe.narrow.batch, int8=recipe.tries_int8)
        write_whole(path, json.dumps(times, indent=1) + "\n")
    accelerator.wait_for_everyone()
    found: dict[str, float] = json.loads(path.read_text())
    return found


@dataclass(frozen=True)
class _Made:
    packed: Packed
    error: float  # percent of the validation split
    is_float: bool = True
    notes: tuple[str, ...] = ()


def _made(
    fitted: Fitted,
    deployment: Deployment,
    recipe: Recipe,
    data: Data,
    expected: NDArray[np.float32],
) -> _Made:
    """The file: in int8 where that was asked for, pays, and keeps the budgets."""
    as_float = partial(deployment.pack, fitted.model, lambda graph: graph)
    if not recipe.tries_int8:
        return _Made(as_float(), fitted.error)
    from prune2onnx.quantizing import choose

    graph = deployment.shrunk(fitted.model)
    got, _ = scores(session(graph), batches(data.test, recipe.batch_size))
    check_outputs(MODEL, got, expected)  # torch's; what int8 gives differs from it
    allowed = MAX_DROP
    if recipe.max_drop is not None:
        allowed = max(0.0, recipe.max_drop - (fitted.error - fitted.dense_error))
    choice = choose(graph, data, max_drop=allowed)
    packed = pack(strip(choice.made.model), anonymize=recipe.anonymize)
    nbytes = packed.model.ByteSize()
    why = ""
    if not choice.is_faster:
        why = choice.notes[0]
    elif recipe.target_size is not None and nbytes > recipe.target_size:
        why = f"in int8 it would take {nbytes:,} bytes"
    if why:
        return _Made(as_float(), fitted.error, notes=(f"computes in float32: {why}",))
    left = [layer.weight for layer in choice.made.layers if not layer.is_int8]
    told = f"computes in int8, in {choice.timing.ratio:.2f} of the time"
    told += f"; float32 stays {', '.join(left)}" if left else ""
    assert choice.made.error is not None  # it was measured
    return _Made(packed, choice.made.error, is_float=False, notes=(told,))


def _roughly_int8(graph: onnx.ModelProto, data: Data) -> onnx.ModelProto:
    """What takes as many bytes as the int8 model."""
    from prune2onnx.quantizing import calibration_of

    return strip(quantize_int8(graph, calibration_of(graph, data, _FEW)).model)


def _on_zeros(report: Report, macs: float, is_float: bool, recipe: Recipe) -> tuple[str, ...]:
    """Why zeros alone save no time, with what was measured here."""
    was, now = report.dense.latency_ms, report.compressed.latency_ms
    if was is None or now is None or report.density == 1:
        return ()
    ratio = now["p50"] / was["p50"]
    number = "float32" if is_float else "int8"
    hint = " (--goal latency)" if recipe.goal == "size" else ""
    return (
        f"takes {ratio:.2f} of dense's time, with {100 * macs:.0f} % of its multiply-adds, in "
        f"{number}: zeros alone save none, for onnxruntime multiplies with them as with any "
        f"number; fewer channels and int8 do{hint}",
    )


def _search(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    checkpoints: Path,
    run: Callable[[nn.Module, Recipe, Path, str, str], Fitted],
    deployment: Deployment,
) -> Fitted:
    """The smallest, or fastest, network within the allowed drop: prunings of the same dense one."""
    assert recipe.max_drop is not None
    past: tuple[Epoch, ...] = ()
    if recipe.first_phase == "dense":
        dense = run(model, recipe, checkpoints, "dense", "dense")
        model, past = dense.model, dense.history
    aim, first = "target_macs", MACS
    if recipe.goal == "size":
        aim, first = "target_density", recipe.wanted_density
    search = Search(recipe.max_drop, first, recipe.trials)
    best: Fitted | None = None
    while (asked := search.next()) is not None:
        wish = recipe.model_copy(update={aim: asked})
        folder = checkpoints / f"trial-{1 + len(search.trials)}"
        fitted = run(copy.deepcopy(model), wish, folder, "prune", "share")
        if recipe.goal == "size":
            cost = deployment.nbytes(fitted.model)
        else:
            cost = multiply_adds(deployment.shrunk(fitted.model))
        error = fitted.error
        if recipe.tries_int8:  # what int8 adds is part of the drop
            from prune2onnx.quantizing import int8_error

            error = max(error, int8_error(deployment.shrunk(fitted.model), data))
        search.trials.append(Trial(asked, error - fitted.dense_error, cost))
        if search.best == len(search.trials) - 1:
            best = replace(fitted, history=(*past, *fitted.history))
    assert best is not None  # there is at least one trial
    return best


def prepared(recipe: Recipe) -> tuple[nn.Module, Data]:
    """The network and its data, looked at for what would fail after hours of training.

    Raises:
        RecipeError: the data cannot be augmented so.
        Prune2OnnxError: one cannot be had, they do not fit each other, or torch cannot export it.
    """
    data = load_data(recipe.data, validation=recipe.validation, seed=recipe.seed)
    model = make_model(recipe, data)
    check_images(recipe.augment, data.input_shape)
    check_output(model, data)
    export(model, data.input_shape, opset=recipe.opset)
    return model, data


def train_dense(
    recipe: Recipe,
    directory: str | Path,
    *,
    cpu: bool = False,
    on_step: Callable[[Step], None] = lambda _: None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> Path:
    """The dense phase alone, or what is left of it: where several prunings can start.

    Args:
        recipe: the settings.
        directory: checkpoints are kept there, and looked for.
        cpu: do not use a GPU.
        on_step: told every few steps.
        on_epoch: told after each epoch.

    Returns:
        The file of weights, a `Recipe.weights`.
    """
    directory = Path(directory)
    data = load_data(recipe.data, validation=recipe.validation, seed=recipe.seed)
    fit(
        make_model(recipe, data),
        data,
        recipe,
        accelerator=make_accelerator(recipe, cpu=cpu),
        checkpoints=directory,
        resume=True,
        stop="dense",
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return directory / "dense.safetensors"


def recipe_of(directory: str | Path) -> Recipe:
    """The resolved recipe of a run's folder.

    Raises:
        RecipeError: the folder holds no run, or its recipe was damaged.
    """
    path = Path(directory) / RECIPE
    if not path.exists():
        raise RecipeError(f"{directory}: no {RECIPE} there, so no run to continue")
    return resolve(read_recipe(path), source=str(path))


def make_model(recipe: Recipe, data: Data) -> nn.Module:
    """Calls the recipe's model function, seeded, and loads the weights if there are any.

    The function is given `input_shape` and `classes` where its signature takes them.

    Raises:
        Prune2OnnxError: the function cannot be found or raises, returns no nn.Module, or the
            weights do not fit.
    """
    torch.manual_seed(recipe.seed)
    function = load_callable(recipe.model)
    model = call_with(function, recipe.model, input_shape=data.input_shape, classes=data.classes)
    if not isinstance(model, nn.Module):
        raise Prune2OnnxError(
            f"{recipe.model}: returned a {type(model).__name__}, expected a torch.nn.Module"
        )
    model = copy.deepcopy(model)  # a function may return the same object each time
    if recipe.weights is not None:
        _load_weights(model, Path(recipe.weights))
    return model


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
        raise Prune2OnnxError(f"{path}: not readable as weights: {_first_line(error)}") from error
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
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Prune2OnnxError(f"{path}: does not fit the model: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return one_line(error)[:400] or type(error).__name__


def _scores(model: nn.Module, data: Dataset[Any], size: int) -> NDArray[np.float32]:
    with torch.no_grad():
        parts = [model(torch.from_numpy(x)).float().numpy() for x, _ in batches(data, size)]
    return np.concatenate(parts)
