"""The command line: a thin sentence per verb; what the verbs do lives in their own rooms.

Options of `compress` come from the recipe's fields (`prune.epochs` is `--prune-epochs`). People
read tables and progress on stderr; with --json the report goes, alone, to stdout. Exit status:
0 done, 1 failed, 2 wrong usage, 3 a budget was missed, 4 onnxruntime disagrees with the reference,
130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import prune2onnx
from prune2onnx.errors import BudgetError, MismatchError, Prune2OnnxError, RecipeError
from prune2onnx.inspection import inspect as inspect_model
from prune2onnx.onnxfile import load as load_model
from prune2onnx.onnxfile import save
from prune2onnx.pack import MAX_BYTES
from prune2onnx.pack import unpack as unpack_model
from prune2onnx.recipe import read_recipe, resolve, settings
from prune2onnx.report import Report, WeightRow, weights_table
from prune2onnx.running import file_nbytes
from prune2onnx.structure import BLOCK
from prune2onnx.validate import validate as validate_file

if TYPE_CHECKING:
    from prune2onnx.training import Epoch, Step

_console = Console(stderr=True)
if not _console.is_terminal:  # a log has no width: let no column be cut
    _console = Console(stderr=True, width=160)
_INTERRUPTED = 130


class _Verbs(click.Group):
    """Turns our errors into one line on stderr and an exit status, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Prune2OnnxError as error:
            click.echo(f"prune2onnx: {error}", err=True)
            ctx.exit(error.exit_status)
        except (KeyboardInterrupt, click.Abort):
            click.echo("prune2onnx: interrupted", err=True)
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:
            # the reader of our output went away, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(prune2onnx.__version__, prog_name="prune2onnx")
def main() -> None:
    """Make a network small: pruned, shared and coded in one ONNX file any onnxruntime opens."""


class _Size(click.ParamType[int]):
    """A number of bytes: 5000000, 5MB, 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(_BYTES.validate_python(value))
        except ValidationError:
            self.fail(f"{value!r} is not a size, such as 5000000, 5MB or 2GiB", param, ctx)


class _Integers(click.ParamType[tuple[int, ...]]):
    """Whole numbers in a row: 1,16."""

    name = "integers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no whole number, nor several such as 1,16", param, ctx)


_BYTES = TypeAdapter(ByteSize)


def _recipe_options(
    command: Callable[..., None], without: tuple[str, ...] = ("model",)
) -> Callable[..., None]:
    """Adds one option per setting of the recipe, but for the model, which is the argument."""
    for dotted, field in reversed(settings().items()):
        if dotted in without:
            continue
        kind, repeated = _click_type(field.annotation)
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, {}, ()) else f"  [default: {_shown(default)}]"
        flag = dotted.replace(".", "-").replace("_", "-")
        command = click.option(
            f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
            dotted.replace(".", "__"),  # a parameter of the function must be an identifier
            type=kind,
            multiple=repeated,
            default=None,
            help=f"{field.description}{shown}",
        )(command)
    return command


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """A recipe field's type as click's, and whether the option may be repeated."""
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return _click_type(inner[0])
    if annotation is ByteSize:
        return _Size(), False
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(inner), False
    if typing.get_origin(annotation) is tuple:
        return str, True
    if typing.get_origin(annotation) is dict:
        return _Factor(), True
    return annotation, False


def _shown(default: Any) -> str:
    return ", ".join(default) if isinstance(default, tuple) else str(default)


class _Factor(click.ParamType[tuple[str, float]]):
    """PATTERN=FACTOR, as in --prune-importance 'conv*=0.2'."""

    name = "pattern=factor"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        pattern, _, factor = str(value).rpartition("=")
        try:
            return pattern, float(factor)
        except ValueError:
            self.fail(f"{value!r} is not PATTERN=FACTOR, such as 'conv*=0.2'", param, ctx)


@main.command()
@click.argument("model", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the run")
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML file; options override it")
@click.option("--resume", type=click.Path(path_type=Path), help="continue the run in this folder")
@click.option("--overwrite", is_flag=True, help="start again in a folder that holds a run")
@click.option("--cpu", is_flag=True, help="do not use a GPU")
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
@_recipe_options
def compress(
    model: str | None,
    output: Path | None,
    recipe: Path | None,
    resume: Path | None,
    overwrite: bool,
    cpu: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train, prune, share, export, pack and prove MODEL.

    MODEL is path/to/file.py:callable or package.module:callable, a function that returns an
    nn.Module; it is given input_shape and classes if it takes them.

    \b
    prune2onnx compress models/lenet.py:lenet_300_100 --data digits -o runs/digits
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.pipeline import compress as run
    from prune2onnx.pipeline import recipe_of
    from prune2onnx.training import end_processes

    overrides = _overrides(options)
    if resume is not None:
        if model or output or recipe or overwrite or overrides:
            raise RecipeError(
                "--resume takes every setting from the run's own recipe.yaml; "
                "give it alone, with --cpu or --json at most"
            )
        resolved, directory = recipe_of(resume), resume
    else:
        content, directory = _started(model, recipe, output, overrides, "run")
        resolved = resolve(content, overrides, source=str(recipe or "options"))
    try:
        with _progress() as (on_step, on_epoch):
            report = run(
                resolved,
                directory,
                overwrite=overwrite,
                resume=resume is not None,
                cpu=cpu,
                on_step=on_step,
                on_epoch=on_epoch,
            )
    except KeyboardInterrupt:
        if not (directory / "recipe.yaml").exists():
            raise
        _console.print(f"continue with: prune2onnx compress --resume {directory}", markup=False)
        raise
    end_processes()
    if report is None:
        return
    _console.print(weights_table(report.weights, report.compressed.nbytes))
    _console.print(report.table())
    for name in ("model.onnx", "report.html"):
        _say(f"{directory / name}")
    if as_json:
        click.echo(report.to_json(), nl=False)
    _must_fold(report, directory / "model.onnx")
    if report.missed:
        told = "; ".join(map(str, report.missed))
        raise BudgetError(
            f"{directory / 'model.onnx'}: {told}; prune longer (--prune-epochs), give the last "
            "phases more time (--tune-epochs, --share-epochs), or ask for less"
        )


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value, of the recipe's options that were given."""
    return {
        name.replace("__", "."): dict(value) if name == "prune__importance" else value
        for name, value in options.items()
        if value not in (None, ())
    }


def _started(
    model: str | None,
    recipe: Path | None,
    output: Path | None,
    overrides: dict[str, Any],
    what: str,
) -> tuple[dict[str, Any], Path]:
    """A recipe's content and the folder, of what is begun anew; the model joins the overrides."""
    content = {} if recipe is None else read_recipe(recipe)
    if model is not None:
        overrides["model"] = model
    if "model" not in content and model is None:
        raise click.UsageError("Missing argument 'MODEL', and no recipe names one")
    if output is None:
        raise click.UsageError(f"Missing option '-o': the folder for the {what}")
    return content, output


_SWEPT = ("target_size", "target_density", "max_drop", "seed")
"""What a sweep sets itself, run by run."""


@main.command()
@click.argument("model", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the sweep")
@click.option("--sizes", metavar="6KB,10KB", help="budgets: bytes of the whole file")
@click.option("--densities", metavar="0.01,0.03", help="budgets: surviving part, 0-1")
@click.option("--drops", metavar="0.1,0.3", help="budgets: points of validation error")
@click.option("--seeds", metavar="0,1,2", help="each budget is run with each  [default: recipe's]")
@click.option(
    "--storage",
    metavar="URL",
    envvar="PRUNE2ONNX_STORAGE",
    help="database that many machines share, as optuna takes it  [default: sweep.db in the folder]",
)
@click.option("--study", help="name of the sweep in that database  [default: prune2onnx]")
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML file; options override it")
@click.option("--resume", type=click.Path(path_type=Path), help="continue, or join, this sweep")
@click.option("--cpu", is_flag=True, help="do not use a GPU")
@click.option("--json", "as_json", is_flag=True, help="print the front as JSON on stdout")
@partial(_recipe_options, without=("model", *_SWEPT))
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
    cpu: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compress MODEL to a list of budgets: what size costs in error.

    MODEL and the options are those of compress. Killed, or to be run by several processes at once:
    --resume.

    \b
    prune2onnx sweep models/lenet.py:lenet_300_100 -o runs/front --sizes 6KB,10KB --seeds 0,1
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.sweeping import sweep as run
    from prune2onnx.sweeping import sweep_of

    overrides = _overrides(options)
    lists = {"sizes": sizes, "densities": densities, "drops": drops, "seeds": seeds}
    given: dict[str, Any] = {k: v for k, v in lists.items() if v is not None}
    if resume is not None:
        if model or output or recipe or study or given or overrides:
            raise RecipeError(
                "--resume takes every setting from the sweep's own sweep.yaml; "
                "give it alone, with --storage, --cpu or --json at most"
            )
        given, directory = sweep_of(resume, storage), resume
    else:
        content, directory = _started(model, recipe, output, overrides, "sweep")
        if left := [name for name in _SWEPT[:3] if content.pop(name, None) is not None]:
            _say(f"{recipe}: {', '.join(left)} is left out, for each run has a budget of its own")
        given["recipe"] = resolve(content, overrides, source=str(recipe or "options"))
        given |= {"storage": storage, "study": study or "prune2onnx"}
    told: list[Callable[[Any], None]] = []
    with ExitStack() as bars:

        def on_note(text: str) -> None:
            bars.close()
            _say(text)
            told[:] = bars.enter_context(_progress())

        try:
            front = run(
                **given,
                directory=directory,
                resume=resume is not None,
                cpu=cpu,
                on_note=on_note,
                on_step=lambda step: told[0](step),
                on_epoch=lambda epoch: told[1](epoch),
            )
        except KeyboardInterrupt:
            if (directory / "sweep.yaml").exists():
                bars.close()
                _say(f"continue with: prune2onnx sweep --resume {directory}")
            raise
    _console.print(front.table())
    for name in ("front.json", "front.svg", "report.html"):
        _say(f"{directory / name}")
    if as_json:
        click.echo(front.to_json(), nl=False)
    if front.failed:
        told_of = "; ".join(f"{point.name}: {point.message}" for point in front.failed)
        raise Prune2OnnxError(
            f"{directory}: {len(front.failed)} of {len(front.points)} runs failed: {told_of}; "
            f"try them again with --resume {directory}"
        )
    if front.missed:
        names = ", ".join(point.name for point in front.missed)
        raise BudgetError(
            f"{directory}: {len(front.missed)} of {len(front.points)} runs missed their budget: "
            f"{names}; prune longer (--prune-epochs), or ask for less"
        )


def _must_fold(report: Report, file: Path) -> None:
    if not report.folded:
        raise MismatchError(
            f"{file}: onnxruntime {report.environment['onnxruntime']} does not fold the decoders; "
            "answers are right, but weights are decoded at every run"
        )


@contextmanager
def _progress() -> Iterator[tuple[Callable[[Step], None], Callable[[Epoch], None]]]:
    """A bar per phase with loss, density and validation error; lines where stderr is no screen."""
    bars: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description:<5}"),
        BarColumn(bar_width=24),
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=_console, disable=not _console.is_terminal)

    def bar(phase: str, epochs: int) -> Any:
        if phase not in bars:
            bars[phase] = progress.add_task(phase, total=epochs, epoch=0, epochs=epochs, facts="")
            errors[phase] = ""
        return bars[phase]

    errors: dict[str, str] = {}

    def facts(phase: str, loss: float, density: float) -> str:
        return f"loss {loss:.4f}  density {100 * density:6.2f} %{errors[phase]}"

    def on_step(step: Step) -> None:
        progress.update(
            bar(step.phase, step.epochs),
            completed=step.epoch - 1 + step.step / step.steps,
            epoch=step.epoch,
            facts=facts(step.phase, step.loss, step.density),
        )

    def on_epoch(epoch: Epoch) -> None:
        task = bar(epoch.phase, epoch.epochs)
        errors[epoch.phase] = f"  validation error {epoch.validation_error:.2f} %"
        text = facts(epoch.phase, epoch.loss, epoch.density)
        progress.update(task, completed=epoch.epoch, epoch=epoch.epoch, facts=text)
        if not _console.is_terminal and epoch.epoch in _milestones(epoch.epochs):
            line = f"{epoch.phase:<5} epoch {epoch.epoch}/{epoch.epochs}  {text}"
            _console.print(line, markup=False, highlight=False, soft_wrap=True)

    with progress:
        yield on_step, on_epoch


def _milestones(epochs: int) -> set[int]:
    """The epochs that a log tells of: ten a phase at most, the last among them."""
    return {1, epochs, *range(max(1, epochs // 10), epochs, max(1, epochs // 10))}


_max_bytes = click.option(
    "--max-bytes",
    type=_Size(),
    default=MAX_BYTES,
    show_default="2 GiB",
    help="largest array that decoding may make; a file from a stranger may ask for any",
)


@main.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="IN.onnx")
@click.argument("target", type=click.Path(path_type=Path), metavar="OUT.onnx")
@click.option(
    "--load",
    type=click.Choice(("small", "fast")),
    default="small",
    show_default=True,
    help="small: the fewest bytes; fast: no entropy code, sessions open quickly",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(("packed", "sparse-initializer")),
    default="packed",
    show_default=True,
    help="packed: coded weights; sparse-initializer: ONNX's own sparse tensors, far larger",
)
@click.option("--strip", is_flag=True, help="leave out notes, default attributes, inner names")
@click.option("--shrink", is_flag=True, help="take dead channels and neurons away, as shrink does")
@click.option(
    "--anonymize", is_flag=True, help="shortest names for weights; less for readers of the file"
)
@click.option("--bits", type=float, help="lossy: bits a weight on average, about, 1 to 8")
@click.option("--prune", type=float, help="lossy: share of the weights to make zero, 0 to 1")
@click.option(
    "--max-rel-error",
    type=float,
    help="lossy: largest relative error (L2) of each weight; with --data, of the outputs",
)
@click.option("--data", help="inputs for --max-rel-error, as for compress; or 'random'")
@click.option("--external", metavar="NAME", help="write large weights to this file beside OUT.onnx")
@click.option("--json", "as_json", is_flag=True, help="print the weights as JSON on stdout")
def pack(
    source: Path,
    target: Path,
    load: str,
    form: str,
    strip: bool,
    shrink: bool,
    anonymize: bool,
    bits: float | None,
    prune: float | None,
    max_rel_error: float | None,
    data: str | None,
    external: str | None,
    as_json: bool,
) -> None:
    """Make IN.onnx as small as its information; any onnxruntime opens OUT.onnx.

    Without loss, unless --bits, --prune or --max-rel-error ask for some.

    \b
    prune2onnx pack model.onnx small.onnx
    prune2onnx pack model.onnx small.onnx --bits 6
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.packing import Wish, pack_file

    wish = Wish(load, form, strip, shrink, bits, prune, max_rel_error, data, external, anonymize)
    done = pack_file(source, target, wish)
    for note in done.notes:
        _say(note)
    _tell(done.rows, target, as_json, before=done.nbytes_before, notes=done.notes)


@main.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="IN.onnx")
@click.argument("target", type=click.Path(path_type=Path), metavar="OUT.onnx")
@click.option("--external", metavar="NAME", help="write large weights to this file beside OUT.onnx")
@_max_bytes
def unpack(source: Path, target: Path, external: str | None, max_bytes: int) -> None:
    """Give the plain dense file back, every weight bit for bit."""
    from prune2onnx.sparse import from_sparse

    model = unpack_model(load_model(source, max_bytes), max_bytes)
    if model.graph.sparse_initializer:
        model = from_sparse(model, max_bytes)
    written = save(model, target, external)
    for path in written:
        _say(f"{path}: {path.stat().st_size:,} bytes")


@main.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="IN.onnx")
@click.argument("target", type=click.Path(path_type=Path), metavar="OUT.onnx")
@click.option(
    "--gather-inputs", is_flag=True, help="leave out unused inputs of the first layers by a Gather"
)
@click.option(
    "--multiple",
    type=click.IntRange(1),
    default=BLOCK,
    show_default=True,
    help="channels that a convolution keeps are a multiple of it, since with others onnxruntime "
    "may take longer; 1: the smallest file",
)
@click.option("--external", metavar="NAME", help="write large weights to this file beside OUT.onnx")
@click.option("--json", "as_json", is_flag=True, help="print what changed as JSON on stdout")
def shrink(
    source: Path,
    target: Path,
    gather_inputs: bool,
    multiple: int,
    external: str | None,
    as_json: bool,
) -> None:
    """Remove dead channels and neurons from IN.onnx, exactly: OUT.onnx answers alike.

    A channel is dead where no weight reads it, or where it is constant and the next layer's bias
    can take that. Outputs are compared in onnxruntime before anything is written.
    """
    from prune2onnx.shrinking import shrink_file

    done = shrink_file(
        source, target, gather_inputs=gather_inputs, multiple=multiple, external=external
    )
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=2))
        return
    for note in done.notes:
        _say(note)
    if done.rows:
        _console.print(done.table())
    for line in done.reasons():
        _say(line)
    if not done.rows:
        _say(f"{target}: nothing could go; the same model")
        return
    sizes = f"{done.nbytes_before:,} bytes before, {done.nbytes:,} now"
    branches = f", {done.bypassed} branches that added nothing gone" if done.bypassed else ""
    _say(f"{target}: {done.removed} channels and neurons fewer{branches}, {sizes}")
    if done.difference is not None:
        _say(f"outputs within {done.difference:.1e} of the file's before")


@main.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.onnx")
@click.option("--json", "as_json", is_flag=True, help="print the weights as JSON on stdout")
@_max_bytes
def inspect(file: Path, as_json: bool, max_bytes: int) -> None:
    """Show how each weight of an ONNX file is stored, and what other forms would take."""
    found = inspect_model(load_model(file, max_bytes), max_bytes)
    _tell(
        found.rows,
        file,
        as_json,
        load_ms=found.load_ms,
        load_nbytes=found.load_nbytes,
        warning=found.warning,
    )
    if found.load_ms and not as_json:
        _say(
            f"a load spends about {found.load_ms:,.0f} ms and {found.load_nbytes / 1e6:,.1f} MB on "
            "decoding; prune2onnx validate measures it"
        )
    if found.warning:
        click.echo(f"prune2onnx: {file}: {found.warning}", err=True)


@main.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="IN.onnx")
@click.argument("target", type=click.Path(path_type=Path), metavar="OUT.onnx")
@click.option("--data", required=True, help="examples, as for compress")
@click.option(
    "--max-drop",
    type=float,
    default=0.1,
    show_default=True,
    help="points of validation error that int8 may add; layers stay float until it is met",
)
@click.option(
    "--examples",
    type=int,
    default=512,
    show_default=True,
    help="to take ranges of activations from",
)
@click.option(
    "--method",
    type=click.Choice(("minmax", "entropy", "percentile")),
    default="minmax",
    show_default=True,
    help="how ranges are taken",
)
@click.option("--keep", multiple=True, metavar="WEIGHT", help="a layer that stays float")
@click.option("--seed", type=int, default=0, show_default=True, help="of the validation split")
@click.option(
    "--json", "as_json", is_flag=True, help="print what became of layers as JSON on stdout"
)
def quantize(
    source: Path,
    target: Path,
    data: str,
    max_drop: float,
    examples: int,
    method: str,
    keep: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Make IN.onnx compute in int8 where that costs no accuracy, by onnxruntime's quantizer.

    \b
    prune2onnx quantize model.onnx int8.onnx --data folder:images
    prune2onnx pack int8.onnx small.onnx --strip
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.quantizing import quantize_file

    done = quantize_file(
        source,
        target,
        data,
        examples=examples,
        method=method,
        max_drop=max_drop,
        keep=keep,
        seed=seed,
    )
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=2))
        return
    _console.print(done.table())
    _say(
        f"{target}: {done.nbytes_before:,} bytes in float32, {done.nbytes:,} now; validation error "
        f"{done.float_error:.2f} %, {done.error:.2f} % now; an inference takes "
        f"{done.timing.ratio:.2f} of the time"
    )
    for note in done.notes:
        _say(note)


@main.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.onnx")
@click.option("--data", required=True, help="examples, as for compress")
@click.option(
    "--layer",
    metavar="NAME",
    help="a value, node or weight of the graph  [default: what the last layer reads]",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".npz file")
@click.option("--json", "as_json", is_flag=True, help="print name and shapes as JSON on stdout")
def features(file: Path, data: str, layer: str | None, output: Path, as_json: bool) -> None:
    """Write what a layer of FILE.onnx makes of each example, for others to learn from.

    x_train, y_train, x_test and y_test, as --data npz:FILE reads them.

    \b
    prune2onnx features runs/digits/model.onnx --data digits -o features.npz
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.features import features_file

    name, shapes = features_file(file, output, data, layer=layer)
    if as_json:
        found = {"layer": name, "shapes": {key: list(shape) for key, shape in shapes.items()}}
        click.echo(json.dumps(found, indent=2))
        return
    told = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
    _say(f"{output}: {name}: {told}")


@main.command()
@click.argument(
    "files", type=click.Path(path_type=Path), metavar="FILE.onnx...", nargs=-1, required=True
)
@click.option(
    "--batch", type=_Integers(), default="1", show_default=True, help="examples, such as 1,16"
)
@click.option(
    "--threads", type=_Integers(), default="0", help="such as 1,2; 0, the default: onnxruntime's"
)
@click.option(
    "--seconds", type=float, default=5.0, show_default=True, help="to measure, for each setting"
)
@click.option("--warm-up", type=int, default=20, show_default=True, help="runs before any is timed")
@click.option("--profile", is_flag=True, help="time operators, too, with onnxruntime's profiler")
@click.option("--json", "as_json", is_flag=True, help="print all figures as JSON on stdout")
def benchmark(
    files: tuple[Path, ...],
    batch: tuple[int, ...],
    threads: tuple[int, ...],
    seconds: float,
    warm_up: int,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure latency, throughput, load time and memory of files side by side, on the CPU.

    Files are run by turns, with made-up inputs; a difference from the first file that may be none
    is said to be within noise.

    \b
    prune2onnx benchmark dense.onnx small.onnx --batch 1,16 --threads 1,2
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.benchmark import benchmark as measure

    found = measure(
        files, batches=batch, threads=threads, seconds=seconds, warm_up=warm_up, profile=profile
    )
    if as_json:
        click.echo(found.to_json(), nl=False)
        return
    for table in found.tables():
        _console.print(table)


def _tell(rows: tuple[WeightRow, ...], file: Path, as_json: bool, **facts: Any) -> None:
    nbytes = file_nbytes(file)
    if as_json:
        weights = [row.to_dict() for row in rows]
        known = {key: value for key, value in facts.items() if value is not None}
        content = {"file": str(file), "nbytes": nbytes, **known, "weights": weights}
        click.echo(json.dumps(content, indent=2))
        return
    _console.print(weights_table(rows, nbytes))
    before = facts.get("before")
    if before:
        _say(f"{before:,} bytes before, {nbytes:,} now: {before / nbytes:.2f} times smaller")


def _say(text: str) -> None:
    _console.print(text, markup=False, highlight=False, soft_wrap=True)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
def report(folder: Path) -> None:
    """Make the page of the run in DIR again: report.html, to be opened in any browser.

    Of a sweep's folder: the sweep's page, and those of its runs. Nothing is trained or measured.
    """
    from prune2onnx.page import write_pages

    for path in write_pages(folder):
        _say(f"{path}: {path.stat().st_size:,} bytes")


@main.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.onnx")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="DENSE.onnx",
    help="the file to compare with; default: what FILE unpacks to",
)
@click.option("--data", help="test examples, as for compress; default: random inputs, no error")
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
def validate(file: Path, reference: Path | None, data: str | None, as_json: bool) -> None:
    """Prove FILE in onnxruntime: weights, folding, outputs, error, size, load and latency."""
    examples = None
    if data is not None:
        from prune2onnx.data import batches, load_data

        examples = batches(load_data(data).test)
    report = validate_file(file, reference, batches=examples)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _console.print(report.table())
    _must_fold(report, file)


@main.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="folder for the page"
)
@click.option("--data", help="what DIR was trained on, as for compress; default: as its run says")
@click.option(
    "--ort-web",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    envvar="PRUNE2ONNX_ORT_WEB",
    help="the npm package onnxruntime-web  [default: the one in ./node_modules]",
)
def demo(source: Path, output: Path, data: str | None, ort_web: Path | None) -> None:
    """Write a web page that runs the model of DIR, a finished run or an .onnx file.

    For classifiers of images: one draws on it, or shows it an image.

    \b
    npm install onnxruntime-web
    prune2onnx demo runs/digits -o page
    python -m http.server -d page
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.demo import write_demo
    from prune2onnx.runfolder import MODEL

    done = write_demo(source, output, data=data, ort_web=ort_web)
    for note in done.notes:
        _say(note)
    _say(f"{output}: {done.nbytes:,} bytes, {done.files[MODEL]:,} of them the model")
    _say(f"look at it with: python -m http.server -d {output}")
