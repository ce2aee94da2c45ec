"""`compress`: from a network and its data to a small ONNX file that is validated and measured.

One folder holds a run: recipe.yaml (written first, so that a killed run can be continued),
checkpoints/, dense.onnx, model.onnx, history.json (a line per epoch), report.json and report.html.

This module has the order of the steps; each step lives in a module of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import onnx
from filelock import FileLock, Timeout

from prune2onnx.commands.compute.deployed import computes_in, deployed, error_of, sized
from prune2onnx.commands.prepare import export_inputs, prepared
from prune2onnx.data import Data, batches
from prune2onnx.errors import RecipeError
from prune2onnx.files import unwritten, write_whole
from prune2onnx.runs.budget import Search, Trial, goals
from prune2onnx.runs.folder import DENSE, HISTORY, MODEL, PAGE, RECIPE, REPORT
from prune2onnx.runs.history import Callbacks, Epoch, TrialStart
from prune2onnx.runs.pages.page import write_page
from prune2onnx.runs.recipe import MACS, Recipe
from prune2onnx.runs.report import Report
from prune2onnx.runtime.layer_times import layer_times
from prune2onnx.runtime.validate import validate
from prune2onnx.shrinking.costs import multiply_adds
from prune2onnx.tasks.task import CLASSIFICATION, Task
from prune2onnx.training.deployment import Deployment
from prune2onnx.training.export import Template
from prune2onnx.training.fit import (
    THREADS,
    Accelerator,
    Fitted,
    fit,
    made_by_main,
    make_accelerator,
    with_epochs,
)
from prune2onnx.training.fold import has_batch_norm
from prune2onnx.training.model import Network, copied, make_model
from prune2onnx.training.scoring import outputs_on

_CHECKPOINTS = "checkpoints"
_PRICES, _COMPUTE = "prices.json", "compute.json"
"""Measured once, so that a continued run ends as an uninterrupted one."""


def compress(
    recipe: Recipe,
    directory: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    cpu: bool = False,
    callbacks: Callbacks | None = None,
) -> Report | None:
    """Trains, prunes, quantizes, exports, packs and validates, into one folder.

    Args:
        recipe: the settings; for a run to be continued see `runs.folder.recipe_of`.
        directory: the run's folder, made if missing.
        overwrite: start again in a folder that holds a run.
        resume: continue the run in `directory` from its last checkpoint; on the same machine's CPU
            the result is the same, byte for byte, as that of an uninterrupted run.
        cpu: do not use a GPU.
        callbacks: called with the progress of training.

    Returns:
        The report, also written to report.json and, for people, to report.html; None in all but the
        main process.

    Raises:
        RecipeError: the recipe does not fit the folder or the processes, or another process is
            running in the folder.
        Prune2OnnxError: a step failed; the message names what and why.
        MismatchError: onnxruntime disagrees with torch or with the numpy decoder.
    """
    directory = Path(directory)
    _check_folder(directory, overwrite or resume)
    model, data, task, template = prepared(recipe)
    recipe = with_epochs(recipe, len(data.train))
    accelerator = make_accelerator(recipe, cpu=cpu)
    with _alone(directory) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process:
            _clear(directory, everything=not resume)
            write_whole(directory / RECIPE, recipe.to_yaml())
        accelerator.wait_for_everyone()
        return _run(recipe, model, data, task, template, accelerator, directory, resume, callbacks)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the lock of a run's folder; the system releases it when the process ends.

    Raises:
        RecipeError: another process holds it.
    """
    path = directory / _CHECKPOINTS / "lock"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RecipeError(
            f"{directory}: another process is running it; wait until it ends, or choose another "
            "folder with -o"
        ) from error
    except OSError as error:
        raise unwritten(path, 0, error) from error
    try:
        yield
    finally:
        lock.release()


def _run(
    recipe: Recipe,
    model: Network,
    data: Data,
    task: Task,
    template: Template,
    accelerator: Accelerator,
    directory: Path,
    resume: bool,
    callbacks: Callbacks | None,
) -> Report | None:
    """Everything that takes time, in a folder that is this process's own."""
    checkpoints = directory / _CHECKPOINTS
    by_main = partial(made_by_main, accelerator)
    graph = partial(template.filled, model)
    compute, notes = computes_in(recipe, graph, checkpoints / _COMPUTE, by_main)
    deployment = Deployment(
        export_inputs(data),
        replace(recipe.file, compute=compute),
        # training folds BatchNorm before it exports the network, which changes the graph
        template=None if has_batch_norm(model) else template,
        rewrite=partial(sized, recipe=recipe, data=data, compute=compute),
        prices=_prices(graph, recipe, checkpoints / _PRICES, by_main),
    )
    teacher = None
    if recipe.teacher is not None:
        teacher = make_model(recipe.model_copy(update={"weights": recipe.teacher}), data)

    def run(model: Network, recipe: Recipe, folder: Path, start: str, stop: str) -> Fitted:
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
            task=task,
            deployment=deployment,
            callbacks=callbacks,
        )

    if recipe.searches and recipe.first_phase != "tune":
        watching = callbacks if callbacks and accelerator.is_main_process else Callbacks()
        fitted = _search(model, recipe, data, task, checkpoints, run, deployment, watching.on_trial)
    else:
        fitted = run(model, recipe, checkpoints, recipe.first_phase, "quantize")
    if not accelerator.is_main_process:
        return None
    dense = teacher or make_model(recipe, data)
    if teacher is None:
        dense.load_state_dict(fitted.dense)
    report = _deploy(fitted, template.filled(dense), deployment, recipe, data, task, directory)
    report = replace(report, notes=(*notes, *report.notes))
    epochs = [asdict(epoch) for epoch in fitted.history]
    write_whole(directory / HISTORY, json.dumps(epochs, indent=1, allow_nan=False) + "\n")
    write_whole(directory / REPORT, report.to_json())
    write_page(directory)
    return report


def _check_folder(directory: Path, may_hold_a_run: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: a file, expected a folder for the run")
    there = [name for name in (RECIPE, DENSE, MODEL, REPORT) if (directory / name).exists()]
    if there and not may_hold_a_run:
        raise RecipeError(
            f"{directory}: holds a run already ({', '.join(there)}); continue it with "
            f"--resume {directory}, start again with --overwrite, or choose another folder with -o"
        )


def _clear(directory: Path, *, everything: bool) -> None:
    """Removes what an earlier run left: its results, or all of it."""
    outdated = [directory / name for name in (DENSE, MODEL, HISTORY, REPORT, PAGE)]
    if everything:
        checkpoints = directory / _CHECKPOINTS
        # the recipe first: a kill must leave no old checkpoint beside a new recipe
        old = checkpoints.rglob("*.safetensors")
        measured = [checkpoints / _PRICES, checkpoints / _COMPUTE, *checkpoints.rglob(THREADS)]
        outdated = [directory / RECIPE, *measured, *old, *outdated]
    for path in outdated:
        path.unlink(missing_ok=True)


def _prices(
    graph: Callable[[], onnx.ModelProto],
    recipe: Recipe,
    path: Path,
    by_main: Callable[[Path, Callable[[], str]], str],
) -> dict[str, float] | None:
    """Milliseconds of each layer, if channels are pruned by time.

    The main process measures them, and all processes read the file at `path`.
    """
    settings = recipe.channels
    if not (settings.epochs and recipe.goal != "size" and settings.price == "time"):
        return None

    def measured() -> str:
        times = layer_times(graph(), batch=settings.batch, int8=recipe.tries_int8)
        return json.dumps(times, indent=1) + "\n"

    found: dict[str, float] = json.loads(by_main(path, measured))
    return found


def _deploy(
    fitted: Fitted,
    dense: onnx.ModelProto,
    deployment: Deployment,
    recipe: Recipe,
    data: Data,
    task: Task,
    directory: Path,
) -> Report:
    """Writes dense.onnx and model.onnx, and validates and measures the second against the first."""
    write_whole(directory / DENSE, dense.SerializeToString())
    outputs = outputs_on(fitted.model, data.test, recipe.batch_size)
    expected = list(outputs) if isinstance(outputs, tuple) else [outputs]
    shrunk = deployment.shrunk(fitted.model)
    chosen = deployed(fitted, deployment, recipe, data, task, expected)
    packed = chosen.packed
    write_whole(directory / MODEL, packed.model.SerializeToString())
    report = validate(
        directory / MODEL,
        directory / DENSE,
        batches=batches(data.test, recipe.batch_size),
        rows=packed.rows,
        expected=expected if chosen.is_float else None,
        density=fitted.density,
        seed=recipe.seed,
        task=task,
    )
    before, after = multiply_adds(dense), multiply_adds(shrunk)
    return replace(
        report,
        dense=replace(report.dense, macs=before),
        compressed=replace(report.compressed, macs=after),
        budget=goals(
            recipe,
            nbytes=packed.model.ByteSize(),
            density=fitted.density,
            macs=after / before if before else 1.0,
            dense=fitted.dense_error,
            value=chosen.error,
            metric=task.metric,
        ),
        parameters={"pruned": fitted.size, "others": fitted.others},
        validation=_on_validation(task, fitted.dense_error, chosen.error),
        notes=(
            *report.notes,
            *chosen.notes,
            *_on_zeros(report, after / before if before else 1.0, chosen.is_float, recipe),
        ),
        layers=chosen.layers,
    )


def _on_validation(task: Task, dense: float, compressed: float) -> dict[str, float]:
    """The metric on the validation split, as it stands in report.json."""
    if task is CLASSIFICATION:
        return {"dense_error": dense, "error": compressed}
    return {"dense": dense, "compressed": compressed}


def _on_zeros(report: Report, macs: float, is_float: bool, recipe: Recipe) -> tuple[str, ...]:
    """A note on why zeros alone save no time, with the measured times."""
    was, now = report.dense.latency_ms, report.compressed.latency_ms
    if was is None or now is None or report.density == 1:
        return ()
    ratio = now["p50"] / was["p50"]
    number = "float32" if is_float else "int8"
    hint = " (--goal latency)" if recipe.goal == "size" else ""
    return (
        f"takes {ratio:.2f} of the dense network's time, with {100 * macs:.0f} % of its "
        f"multiply-adds, in {number}: zeros alone save no time, because onnxruntime multiplies "
        f"with them, too; fewer channels and int8 do{hint}",
    )


def _search(
    model: Network,
    recipe: Recipe,
    data: Data,
    task: Task,
    checkpoints: Path,
    run: Callable[[Network, Recipe, Path, str, str], Fitted],
    deployment: Deployment,
    on_trial: Callable[[TrialStart], None],
) -> Fitted:
    """The smallest, or fastest, network within the allowed accuracy loss.

    Each trial prunes the same dense network.
    """
    assert recipe.max_drop is not None
    past: tuple[Epoch, ...] = ()
    if recipe.first_phase == "dense":
        dense = run(model, recipe, checkpoints, "dense", "dense")
        model, past = dense.model, dense.history
    aim, first = "target_macs", MACS
    if recipe.goal == "size":
        aim, first = "target_density", recipe.wanted_density
    search = Search(0.0, first, recipe.trials)  # the limit follows from the first trial
    best: Fitted | None = None
    while (fraction := search.next()) is not None:
        tried = recipe.model_copy(update={aim: fraction})
        number = 1 + len(search.trials)
        what = aim.removeprefix("target_").replace("macs", "multiply-adds")
        on_trial(TrialStart(number, recipe.trials, what, fraction))
        folder = checkpoints / f"trial-{number}"
        fitted = run(copied(model), tried, folder, "prune", "quantize")
        search.limit = recipe.allowed_drop(fitted.dense_error) or 0.0
        drop = task.metric.drop(fitted.dense_error, fitted.error)
        if recipe.goal == "size":
            cost = deployment.nbytes(fitted.model, fitted.steps)
        else:
            cost = multiply_adds(deployment.shrunk(fitted.model))
        if recipe.tries_int8 or deployment.compute != "float32":  # the error of that counts, too
            shrunk = deployment.shrunk(fitted.model)
            error = error_of(shrunk, fitted.steps, deployment, recipe, data, task)
            drop = max(drop, error - task.metric.badness(fitted.dense_error))
        search.trials.append(Trial(fraction, drop, cost))
        if search.best == len(search.trials) - 1:
            best = replace(fitted, history=(*past, *fitted.history))
    assert best is not None  # there is at least one trial
    return best
