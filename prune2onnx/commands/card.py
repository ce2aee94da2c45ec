"""The model card of a packed folder: a section of README.md with sizes, errors and times.

The section stands between two marks and is replaced by the next `pack`; all text around it is the
user's own and stays as it is.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from prune2onnx.runs.defaults import PackOptions

_BEGIN = "<!-- prune2onnx: this section is written by pack, and replaced by the next one -->"
_END = "<!-- /prune2onnx -->"


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        name: in the folder.
        nbytes: of the packed file.
        nbytes_before: of the file that was packed.
        error: of the outputs; 0 without loss, None where it is not known.
        time: milliseconds of an inference, and its ratio to the file before; None where it is not
            known.
    """

    name: str
    nbytes: int
    nbytes_before: int
    error: float | None
    time: tuple[float, float] | None


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        rows: one for each file.
        options: of the command, as they are typed.
        data: the kind of the inputs that it was measured on, such as "text" or "random".
        runtime: the version of onnxruntime.
    """

    rows: tuple[Row, ...]
    options: str
    data: str
    runtime: str


def is_ours(text: str | None) -> bool:
    """Whether a README.md has the section."""
    return text is not None and _BEGIN in text


def written(text: str | None, title: str, facts: Facts) -> str:
    """A README.md with the section.

    Args:
        text: a README.md of the user's, or an earlier one of ours; None where there is none.
        title: of a new one.
        facts: what the section says.
    """
    section = f"{_BEGIN}\n{_section(facts)}{_END}\n"
    if text is None:
        tags = "library_name: transformers.js\ntags:\n- onnx\n- prune2onnx\n"
        return f"---\n{tags}---\n\n# {title}\n\n{section}"
    if _BEGIN not in text:
        return f"{text.rstrip()}\n\n{section}"
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2].removeprefix("\n")
    return f"{before}{section}{after}"


def _section(facts: Facts) -> str:
    lines = [
        "## Packed with prune2onnx",
        "",
        "| file | bytes | before | outputs | an inference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in facts.rows:
        times = f"{row.nbytes_before:,} ({row.nbytes_before / row.nbytes:.1f} times)"
        lines.append(f"| `{row.name}` | {row.nbytes:,} | {times} | {_error(row)} | {_time(row)} |")
    on = "random inputs" if facts.data == "random" else f"examples of `--data {facts.data}`"
    lossy = any(row.error != 0 for row in facts.rows)
    versions = f"prune2onnx {importlib.metadata.version('prune2onnx')}, onnxruntime {facts.runtime}"
    command = f"prune2onnx pack FOLDER -o PACKED{facts.options}"
    lines += [
        "",
        f"Made by `{command}` ({versions}). The files are plain ONNX: transformers.js, optimum and "
        "onnxruntime open them as they are.",
        *(
            [f"Outputs: relative distance (L2) to those before, on {on}{_held(facts)}."]
            if lossy
            else ["Weights are equal to those before, bit for bit."]
        ),
        "Time: median of one example on one thread, and its ratio to the file before.",
        "",
    ]
    return "\n".join(lines)


def _held(facts: Facts) -> str:
    return "" if facts.data == "random" else " that are held out"


def _error(row: Row) -> str:
    if row.error is None:
        return "not measured"
    return f"move by {100 * row.error:.2g} %" if row.error else "weights are equal"


def _time(row: Row) -> str:
    return "not measured" if row.time is None else f"{row.time[0]:.3g} ms ({row.time[1]:.2f} x)"


def command(options: PackOptions) -> str:
    """The options that differ from their defaults, as they are typed, without paths.

    >>> command(PackOptions(bits=4.0, strip=True, pattern=(2, 4)))
    ' --strip --bits 4 --prune 2:4'
    """
    text = ""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = getattr(PackOptions(), field.name)
        if value == default or field.name == "inputs":
            continue
        name = {"form": "format", "pattern": "prune"}.get(field.name, field.name)
        text += f" --{name.replace('_', '-')}{_value(value)}"
    data = options.inputs.data
    return text + (f" --data {_without_path(data)}" if data is not None else "")


def _value(value: Any) -> str:
    if value is True:
        return ""
    if isinstance(value, tuple):
        return f" {':'.join(map(str, value))}"
    return f" {value:g}" if isinstance(value, float) else f" {value}"


def _without_path(data: str) -> str:
    """A source of data without the folders that lead to its file: they say nothing to others."""
    head, colon, argument = data.partition(":")
    return f"{head}{colon}{argument.rstrip('/').rpartition('/')[2]}"
