"""The verbs that measure: validate and benchmark."""

from __future__ import annotations

from pathlib import Path

import click

from prune2onnx.cli.options import (
    PATH,
    GroupedCommand,
    Integers,
    input_options,
    input_options_of,
)
from prune2onnx.cli.output import console, must_fold
from prune2onnx.cli.tables import benchmark_tables, report_table
from prune2onnx.runs.defaults import BenchmarkOptions


@click.command(cls=GroupedCommand)
@click.argument("file", type=PATH, metavar="FILE.onnx")
@click.option(
    "--reference",
    type=PATH,
    metavar="DENSE.onnx",
    help="the file to compare with; default: the unpacked FILE",
)
@input_options
@click.option(
    "--task",
    default="classification",
    show_default=True,
    help="what the model is for, as for compress: its metric on --data is measured",
)
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON on stdout")
def validate(
    file: Path,
    reference: Path | None,
    data: str | None,
    input_shapes: tuple[str, ...],
    tokenizer: Path | None,
    task: str,
    as_json: bool,
) -> None:
    """Validate FILE in onnxruntime: weights, folding, outputs, error, size, load time, latency.

    The error, or the metric of another task, is that of the test examples of --data, where it is a
    data set with labels.
    """
    from prune2onnx.runtime.validate import validate as run
    from prune2onnx.tasks.task import load_task

    inputs = input_options_of(data, input_shapes, tokenizer, file)
    report = run(file, reference, inputs=inputs, task=load_task(task))
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        console.print(report_table(report))
    must_fold(report, file)


@click.command(cls=GroupedCommand)
@click.argument("files", type=PATH, metavar="FILE.onnx...", nargs=-1, required=True)
@click.option(
    "--batch",
    type=Integers(),
    default=(),
    help="batch sizes, such as 1,16  [default: the one that a file is made for, or 1]",
)
@click.option(
    "--threads",
    type=Integers(),
    default="0",
    help="numbers of threads, such as 1,2; 0, the default: chosen by onnxruntime",
)
@click.option(
    "--seconds",
    type=float,
    default=BenchmarkOptions.seconds,
    show_default=True,
    help="seconds of timed inferences for each batch size and number of threads",
)
@click.option(
    "--warm-up",
    type=int,
    default=BenchmarkOptions.warm_up,
    show_default=True,
    help="inferences of each file before any is timed",
)
@input_options
@click.option("--profile", is_flag=True, help="also time operators, with onnxruntime's profiler")
@click.option("--json", "as_json", is_flag=True, help="print all figures as JSON on stdout")
def benchmark(
    files: tuple[Path, ...],
    batch: tuple[int, ...],
    threads: tuple[int, ...],
    seconds: float,
    warm_up: int,
    data: str | None,
    input_shapes: tuple[str, ...],
    tokenizer: Path | None,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure latency, throughput, load time and memory of files side by side, on the CPU.

    Inferences of the files are interleaved, on random inputs unless --data is given. A
    difference from the first file that is not significant is marked as within noise.

    \b
    prune2onnx benchmark dense.onnx small.onnx --batch 1,16 --threads 1,2
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.runtime.benchmark import benchmark as run

    found = run(
        files,
        batches=batch,
        threads=threads,
        seconds=seconds,
        warm_up=warm_up,
        profile=profile,
        inputs=input_options_of(data, input_shapes, tokenizer, files[0]),
    )
    if as_json:
        click.echo(found.to_json(), nl=False)
        return
    for table in benchmark_tables(found):
        console.print(table)
