"""Options: their types, those made from the recipe's fields, and how --help groups them.

`compress` and `sweep` have one option for each setting of the recipe (`prune.epochs` is
`--prune-epochs`). --help shows the most used options first, then the others by subject; --help-all
adds every setting of every phase.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ByteSize, TypeAdapter, ValidationError

from prune2onnx.errors import RecipeError
from prune2onnx.packing.decoding import MAX_BYTES
from prune2onnx.runs.defaults import InputOptions
from prune2onnx.runs.recipe import PHASES, RENAMED, settings

_BYTES = TypeAdapter(ByteSize)
_CHANNELS = "channels:"
_LARGEST = 128  # side of a block


class Size(click.ParamType[int]):
    """A number of bytes: 5000000, 5MB, 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads the number."""
        try:
            return int(_BYTES.validate_python(value))
        except ValidationError:
            self.fail(f"{value!r} is not a size, such as 5000000, 5MB or 2GiB", param, ctx)


class Fraction(click.ParamType[float]):
    """A fraction: 0.01 or 1%."""

    name = "fraction"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Reads the number."""
        text = str(value).strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{value!r} is not a fraction, such as 0.01 or 1%", param, ctx)


@dataclass(frozen=True)
class Zeros:
    """What --prune asks for: the attributes of `PackOptions`."""

    prune: float | None = None
    pattern: tuple[int, int] | None = None
    blocks: tuple[int, int] | None = None
    channels: float | None = None


class Pruned(click.ParamType[Zeros]):
    """A fraction that becomes zero, in blocks, N:M, of which N stay, or channels.

    So 0.5, 4x1:0.5, 2:4 or channels:0.5.
    """

    name = "fraction|n:m|rxc:fraction|channels:fraction"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Zeros:
        """Reads a fraction of anything, or a pair."""
        if isinstance(value, Zeros):
            return value
        text = str(value)
        if text.startswith(_CHANNELS):
            fraction = Fraction().convert(text.removeprefix(_CHANNELS), param, ctx)
            if not 0 < fraction < 1:
                self.fail(f"{value!r}: expected 0 < F < 1, such as channels:0.5", param, ctx)
            return Zeros(channels=fraction)
        if block := re.fullmatch(r"(\d+)x(\d+):(.*)", text):
            rows, columns = int(block[1]), int(block[2])
            fraction = Fraction().convert(block[3], param, ctx)
            if not (0 < rows <= _LARGEST and 0 < columns <= _LARGEST and 0 < fraction < 1):
                self.fail(
                    f"{value!r}: expected blocks of R outputs by C inputs, 1 to {_LARGEST} each, "
                    "and 0 < F < 1, such as 4x1:0.5",
                    param,
                    ctx,
                )
            return Zeros(fraction, blocks=(rows, columns))
        if ":" not in text:
            return Zeros(Fraction().convert(value, param, ctx))
        n, _, m = text.partition(":")
        if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 64):
            self.fail(f"{value!r}: expected N of M neighbours that stay, such as 2:4", param, ctx)
        return Zeros(pattern=(int(n), int(m)))


class Integers(click.ParamType[tuple[int, ...]]):
    """Whole numbers, comma-separated: 1,16."""

    name = "integers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Reads the numbers."""
        if isinstance(value, tuple):  # a default
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, such as 1,16", param, ctx)


PATH = click.Path(path_type=Path)
external_option = click.option(
    "--external", metavar="NAME", help="write large weights to a data file NAME beside OUT.onnx"
)
input_shape_option = click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="NAME=SIZES",
    help="sizes of a random input, such as images=1,3,224,224; default: found by trying",
)

tokenizer_option = click.option(
    "--tokenizer",
    type=PATH,
    metavar="FILE",
    help="tokenizer.json for --data text:FILE; default: the one in the model's folder",
)


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --data, --input-shape and --tokenizer, for verbs that run a model."""
    data = click.option(
        "--data",
        help="run on these examples: npz:FILE with an array per input, text:FILE with one a line, "
        "or a data set as for compress; default: random inputs",
    )
    return data(tokenizer_option(input_shape_option(command)))


def input_options_of(
    data: str | None, input_shapes: Iterable[str], tokenizer: Path | None, model: Path
) -> InputOptions:
    """What `input_options` were given; text is read by the tokenizer beside the model, if any."""
    from prune2onnx.data.text import is_text, tokenizer_beside

    if tokenizer is not None and not is_text(data):
        raise RecipeError("--tokenizer is for --data text:FILE; leave it out, or give that")
    if is_text(data) and tokenizer is None:
        tokenizer = tokenizer_beside(model)
    shapes = {}
    for text in input_shapes:
        name, equals, sizes = text.rpartition("=")
        try:
            shape = tuple(int(size) for size in re.split("[,x]", sizes) if sizes)
        except ValueError:
            shape = (-1,)
        if not (name and equals) or min(shape, default=0) < 0:
            raise RecipeError(
                f"--input-shape {text!r}, expected NAME=SIZES such as images=1,3,224,224"
            )
        shapes[name] = shape
    return InputOptions(data, shapes, tokenizer)


class Amount(click.ParamType[float | str]):
    """A number, or one relative to another: 0.5 or 5%."""

    name = "amount"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        """Reads the number; one with % stays a text."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            self.fail(f"{value!r} is not a number, such as 0.5, or 5%", param, ctx)
        return text if text.endswith("%") else number


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers, comma-separated: 0.485,0.456,0.406."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Reads the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, such as 0.5,0.25", param, ctx)


class _Argument(click.ParamType[tuple[str, Any]]):
    """NAME=VALUE, as in --model-args width=32; the value as in YAML."""

    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        name, equals, text = str(value).partition("=")
        try:
            read = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        if not (equals and name.isidentifier()):
            self.fail(f"{value!r} is not NAME=VALUE, such as width=32", param, ctx)
        return name, read


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


FIRST, BUDGET, DATA, MODEL, PHASE, OUTPUT = (
    "What most runs need",
    "Budget",
    "Data",
    "Model and training",
    "Phases",
    "Output",
)
"""Headings of --help, in their order."""

_IMAGES = ("resize", "crop", "mean", "std")
_TEXTS = ("tokenizer", "length")
_SELDOM = (*_IMAGES, *_TEXTS, "model_args", "format", "temperature", "teacher", "opset")
"""Settings with a heading that only --help-all shows."""

_GROUPS = {
    FIRST: ("data", "task", "weights", "target_size", "max_drop", "goal"),
    BUDGET: ("target_density", "target_macs", "trials"),
    DATA: ("validation", "batch_size", "augment.shift", "augment.flip", "seed", *_IMAGES, *_TEXTS),
    MODEL: ("model_args", "start", "distill", "temperature", "teacher", "precision"),
    OUTPUT: ("format", "int8", "compute", "anonymize", "portable", "opset"),
}
"""Heading -> settings of the recipe under it; the settings of a phase are under its name."""

_HEADING = {setting: heading for heading, listed in _GROUPS.items() for setting in listed}


class Option(click.Option):
    """An option under a heading of --help.

    Args:
        group: the heading.
        detail: whether only --help-all shows it.
    """

    def __init__(
        self, *args: Any, group: str = "Options", detail: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.group, self.detail = group, detail


option = partial(click.option, cls=Option)


class GroupedCommand(click.Command):
    """A command whose --help lists options under headings; a command without any has one list."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options as click does, one heading after the other."""
        every = ctx.meta.get("help_all", False)
        found: dict[str, list[tuple[str, str]]] = {}
        left_out = False
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None or isinstance(param, click.Argument):
                continue
            if getattr(param, "detail", False) and not every:
                left_out = True
                continue
            found.setdefault(getattr(param, "group", "Options"), []).append(record)
        order = [FIRST, BUDGET, DATA, MODEL, PHASE, *(f"Phase {name}" for name in PHASES), OUTPUT]
        for heading in sorted(found, key=lambda h: order.index(h) if h in order else len(order)):
            with formatter.section(heading):
                formatter.write_dl(found[heading])
        if left_out:
            formatter.write_paragraph()
            formatter.write_text("--help-all shows every setting of every phase.")


def _help_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta["help_all"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


help_all_option = click.option(
    "--help-all",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_help_all,
    help="Show every setting of every phase and exit.",
)


def choice_of(options: type, name: str) -> click.Choice[str]:
    """The values that a field of some options may have."""
    return click.Choice(typing.get_args(typing.get_type_hints(options)[name]))


def recipe_options(
    command: Callable[..., None], without: tuple[str, ...] = ("model",)
) -> Callable[..., None]:
    """Adds one option per setting of the recipe, except the model, which is the argument."""
    fields = settings()
    for old, new in RENAMED.items():
        if new in fields:
            command = _recipe_option(old, fields[new], hidden=True)(command)
    for dotted, field in reversed(fields.items()):
        if dotted not in without:
            command = _recipe_option(dotted, field)(command)
    return help_all_option(command)


def _recipe_option(dotted: str, field: Any, *, hidden: bool = False) -> Callable[..., Any]:
    click_type, repeated = _click_type(field.annotation)
    default = field.get_default(call_default_factory=True)
    shown = "" if default in (None, {}, ()) else f"  [default: {_shown(default)}]"
    flag = dotted.replace(".", "-").replace("_", "-")
    section, _, name = dotted.rpartition(".")
    return option(
        f"--{flag}/--no-{flag}" if click_type is bool else f"--{flag}",
        dotted.replace(".", "__"),  # the function's parameter must be an identifier
        type=click_type,
        multiple=repeated,
        default=None,
        hidden=hidden,
        help=f"{field.description}{shown}",
        group=_HEADING.get(dotted, PHASE if name == "epochs" else f"Phase {section}"),
        detail=dotted in _SELDOM or (dotted not in _HEADING and name != "epochs"),
    )


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """A recipe field's type as click's, and whether the option may be repeated."""
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return (Amount(), False) if set(inner) == {float, str} else _click_type(inner[0])
    if annotation is ByteSize:
        return Size(), False
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(inner), False
    if typing.get_origin(annotation) is tuple:
        listed = {int: Integers(), float: Numbers()}
        return (listed[inner[0]], False) if inner[0] in listed else (str, True)
    if typing.get_origin(annotation) is dict:
        return (_Factor() if inner[1] is float else _Argument()), True
    return annotation, False


def _shown(default: Any) -> str:
    return ", ".join(default) if isinstance(default, tuple) else str(default)


_PAIRS = ("prune__importance", "model_args")


def overrides_of(options: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value, for the recipe's options that were given."""
    return {
        name.replace("__", "."): dict(value) if name in _PAIRS else value
        for name, value in options.items()
        if value not in (None, ())
    }


max_bytes_option = click.option(
    "--max-bytes",
    type=Size(),
    default=MAX_BYTES,
    show_default="2 GiB",
    help="limit the largest array that decoding may make, for files that are not trusted",
)
