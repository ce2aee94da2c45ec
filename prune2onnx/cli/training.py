"""The verbs that train: compress, sweep and search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from prune2onnx.cli.options import (
    FIRST,
    OUTPUT,
    PATH,
    GroupedCommand,
    option,
    overrides_of,
    recipe_options,
)
from prune2onnx.cli.output import console, must_fold, must_meet, progress, say
from prune2onnx.cli.tables import front_table, report_table, tried_table, weights_table
from prune2onnx.errors import BudgetError, Prune2OnnxError, RecipeError
from prune2onnx.runs.history import Callbacks
from prune2onnx.runs.recipe import read_recipe, resolve
from prune2onnx.tasks.quantity import Quantity

_recipe = option(
    "--recipe", type=PATH, help="YAML file with settings; options override it", group=FIRST
)
_cpu = option("--cpu", is_flag=True, help="do not use a GPU", group=OUTPUT)
_storage = option(
    "--storage",
    metavar="URL",
    envvar="PRUNE2ONNX_STORAGE",
    help="database, as an optuna URL, for workers on several machines  [default: sweep.db in the "
    "folder]",
    group=OUTPUT,
)
_trust = option(
    "--trust",
    is_flag=True,
    help="continue what another user began: its recipe names code that will run",
    group=OUTPUT,
)


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@option("-o", "--output", type=PATH, help="folder for the run", group=FIRST)
@_recipe
@option("--resume", type=PATH, help="continue the run in this folder", group=FIRST)
@option("--overwrite", is_flag=True, help="start again in a folder that holds a run", group=OUTPUT)
@_trust
@option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout", group=OUTPUT)
@_cpu
@recipe_options
def compress(
    model: str | None,
    output: Path | None,
    recipe: Path | None,
    resume: Path | None,
    overwrite: bool,
    trust: bool,
    cpu: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train, prune, quantize, export, pack and validate MODEL.

    MODEL is path/to/file.py:callable or package.module:callable, a function that returns an
    nn.Module; it is called with input_shape and classes if it takes them.

    \b
    prune2onnx compress models/lenet.py:lenet_300_100 --data digits -o runs/digits
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.commands.compress import compress as run
    from prune2onnx.runs.folder import check_owner, recipe_of
    from prune2onnx.tasks.task import load_task
    from prune2onnx.training.fit import end_processes

    overrides = overrides_of(options)
    if resume is not None:
        if model or output or recipe or overwrite or overrides:
            raise RecipeError(
                "--resume takes every setting from the run's own recipe.yaml; "
                "give it alone, with --cpu or --json at most"
            )
        check_owner(resume / "recipe.yaml", trust)
        resolved, directory = recipe_of(resume), resume
    else:
        content, directory = _started(model, recipe, output, overrides, "run")
        resolved = resolve(content, overrides, source=str(recipe or "options"))
    metric = load_task(resolved.task).metric
    try:
        with progress(metric) as callbacks:
            report = run(
                resolved,
                directory,
                overwrite=overwrite,
                resume=resume is not None,
                cpu=cpu,
                callbacks=callbacks,
            )
    except KeyboardInterrupt:
        if not (directory / "recipe.yaml").exists():
            raise
        say(f"continue with: prune2onnx compress --resume {directory}")
        raise
    end_processes()
    if report is None:
        return
    console.print(weights_table(report.weights, report.compressed.nbytes))
    console.print(report_table(report))
    for name in ("model.onnx", "report.html"):
        say(f"{directory / name}")
    if as_json:
        click.echo(report.to_json(), nl=False)
    must_fold(report, directory / "model.onnx")
    must_meet(
        report.missed,
        directory / "model.onnx",
        "prune longer (--prune-epochs), train the last phases longer (--tune-epochs, "
        "--quantize-epochs), or set a larger budget",
    )


def _started(
    model: str | None,
    recipe: Path | None,
    output: Path | None,
    overrides: dict[str, Any],
    what: str,
) -> tuple[dict[str, Any], Path]:
    """The recipe's content and the folder of a new run; the model is added to the overrides."""
    content = {} if recipe is None else read_recipe(recipe)
    if model is not None:
        overrides["model"] = model
    if "model" not in content and model is None:
        raise click.UsageError("Missing argument 'MODEL', and no recipe names one")
    if output is None:
        raise click.UsageError(f"Missing option '-o': the folder for the {what}")
    return content, output


@contextmanager
def _bars(metric: Quantity) -> Iterator[tuple[Callable[[str], None], Callbacks]]:
    """What says that a run begins, with progress bars of its own; what moves those."""
    shown: list[Callbacks] = []
    with ExitStack() as bars:

        def on_note(text: str) -> None:
            bars.close()
            say(text)
            shown[:] = [bars.enter_context(progress(metric))]

        yield (
            on_note,
            Callbacks(
                lambda step: shown[0].on_step(step),
                lambda epoch: shown[0].on_epoch(epoch),
                lambda trial: shown[0].on_trial(trial),
            ),
        )


_SWEPT = ("target_size", "target_density", "max_drop", "seed")
"""Settings that a sweep chooses for each run."""


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@option("-o", "--output", type=PATH, help="folder for the sweep", group=FIRST)
@option("--sizes", metavar="6KB,10KB", help="budgets: bytes of the whole file", group=FIRST)
@option(
    "--densities",
    metavar="0.01,0.03",
    help="budgets: surviving fraction of the pruned weights, 0-1",
    group=FIRST,
)
@option(
    "--drops",
    metavar="0.1,0.3",
    help="budgets: points of validation error added (accuracy loss)",
    group=FIRST,
)
@option(
    "--seeds",
    metavar="0,1,2",
    help="random seeds; each budget is run with each of them  [default: the recipe's]",
    group=FIRST,
)
@_storage
@option("--study", help="name of the sweep in that database  [default: prune2onnx]", group=OUTPUT)
@_recipe
@option("--resume", type=PATH, help="continue the sweep in this folder, or join it", group=FIRST)
@_trust
@_cpu
@option(
    "--json",
    "as_json",
    is_flag=True,
    help="print the Pareto front as JSON on stdout",
    group=OUTPUT,
)
@partial(recipe_options, without=("model", *_SWEPT))
def sweep(
    model: str | None,
    output: Path | None,
    sizes: str | None,
    densities: str | None,
    drops: str | None,
    seeds: str | None,
    storage: str | None,
    study: str | None,
    recipe: Path | None,
    resume: Path | None,
    trust: bool,
    cpu: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compress MODEL to each of a list of budgets, to see error against size.

    MODEL and the options are those of compress. --resume continues a sweep, also in several
    processes at the same time.

    \b
    prune2onnx sweep models/lenet.py:lenet_300_100 -o runs/front --sizes 6KB,10KB --seeds 0,1
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.commands.sweep import sweep as run
    from prune2onnx.commands.sweep import sweep_of
    from prune2onnx.runs.folder import check_owner
    from prune2onnx.tasks.task import load_task

    overrides = overrides_of(options)
    lists = {"sizes": sizes, "densities": densities, "drops": drops, "seeds": seeds}
    given: dict[str, Any] = {k: v for k, v in lists.items() if v is not None}
    if resume is not None:
        if model or output or recipe or study or given or overrides:
            raise RecipeError(
                "--resume takes every setting from the sweep's own sweep.yaml; "
                "give it alone, with --storage, --cpu or --json at most"
            )
        check_owner(resume / "sweep.yaml", trust)
        given, directory = sweep_of(resume, storage), resume
    else:
        content, directory = _started(model, recipe, output, overrides, "sweep")
        if left := [name for name in _SWEPT[:3] if content.pop(name, None) is not None]:
            say(f"{recipe}: {', '.join(left)} is ignored, since each run has a budget of its own")
        given["recipe"] = resolve(content, overrides, source=str(recipe or "options"))
        given |= {"storage": storage, "study": study or "prune2onnx"}
    metric = load_task(given["recipe"].task).metric
    try:
        with _bars(metric) as (on_note, callbacks):
            front = run(
                **given,
                directory=directory,
                resume=resume is not None,
                cpu=cpu,
                on_note=on_note,
                callbacks=callbacks,
            )
    except KeyboardInterrupt:
        if (directory / "sweep.yaml").exists():
            say(f"continue with: prune2onnx sweep --resume {directory}")
        raise
    console.print(front_table(front))
    for name in ("front.json", "front.svg", "report.html"):
        say(f"{directory / name}")
    if as_json:
        click.echo(front.to_json(), nl=False)
    if front.failed:
        failures = "; ".join(f"{point.name}: {point.message}" for point in front.failed)
        raise Prune2OnnxError(
            f"{directory}: {len(front.failed)} of {len(front.points)} runs failed: {failures}; "
            f"try them again with --resume {directory}"
        )
    if front.missed:
        names = ", ".join(point.name for point in front.missed)
        raise BudgetError(
            f"{directory}: {len(front.missed)} of {len(front.points)} runs missed their budget: "
            f"{names}; prune longer (--prune-epochs), or set larger budgets"
        )


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@option("-o", "--output", type=PATH, help="folder for the search", group=FIRST)
@option(
    "--vary",
    metavar="SETTING=LOW..HIGH",
    multiple=True,
    help="what to search, again for each: a range, or SETTING=A,B,C  [default: learning rates of "
    "prune, tune and quantize, and quantize.levels]",
    group=FIRST,
)
@option(
    "--runs",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="runs of the whole search; more continue a finished one",
    group=FIRST,
)
@_storage
@option(
    "--study",
    default="search",
    show_default=True,
    help="name of the search in that database",
    group=OUTPUT,
)
@_recipe
@_cpu
@option("--json", "as_json", is_flag=True, help="print all runs as JSON on stdout", group=OUTPUT)
@recipe_options
def search(
    model: str | None,
    output: Path | None,
    vary: tuple[str, ...],
    runs: int,
    storage: str | None,
    study: str,
    recipe: Path | None,
    cpu: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Search for settings of compress: the best validation metric within a budget.

    MODEL and the options are those of compress. The same command continues a search, also in
    several processes at the same time. best.yaml in the folder is a recipe for compress.

    \b
    prune2onnx search models/lenet.py:lenet_300_100 --data digits --target-size 6KB -o runs/best
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.commands.search import search as run
    from prune2onnx.runs.tuning import DEFAULT_RANGES
    from prune2onnx.tasks.task import load_task

    overrides = overrides_of(options)
    content, directory = _started(model, recipe, output, overrides, "search")
    given = resolve(content, overrides, source=str(recipe or "options"))
    metric = load_task(given.task).metric
    with _bars(metric) as (on_note, callbacks):
        found = run(
            given,
            directory,
            vary=vary or DEFAULT_RANGES,
            runs=runs,
            storage=storage,
            study=study,
            cpu=cpu,
            on_note=on_note,
            callbacks=callbacks,
        )
    console.print(tried_table(found))
    if as_json:
        click.echo(found.to_json(), nl=False)
    if found.best is None:
        messages = "; ".join(one.message for one in found.tried if one.message)
        raise Prune2OnnxError(f"{directory}: no run is done: {messages or 'all ended early'}")
    say(f"{found.recipe}: the settings of run {found.best.number}; prune2onnx compress --recipe")
    if not found.best.met:
        raise BudgetError(
            f"{directory}: no run met its budget; the best one: {found.best.message}; search "
            "other settings (--vary), train longer, or set a larger budget"
        )
