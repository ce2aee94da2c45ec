"""The verbs that write web pages: report and demo."""

from __future__ import annotations

from pathlib import Path

import click

from prune2onnx.cli.options import PATH, GroupedCommand
from prune2onnx.cli.output import say


@click.command(cls=GroupedCommand)
@click.argument("folder", type=PATH, metavar="DIR")
def report(folder: Path) -> None:
    """Write report.html for the run in DIR again, to be opened in any browser.

    For a sweep's folder: the sweep's page, and those of its runs. Nothing is trained or measured.
    """
    from prune2onnx.runs.pages.page import write_pages

    for path in write_pages(folder):
        say(f"{path}: {path.stat().st_size:,} bytes")


@click.command(cls=GroupedCommand)
@click.argument("source", type=PATH, metavar="DIR")
@click.option("-o", "--output", required=True, type=PATH, help="folder for the page")
@click.option(
    "--data",
    help="data set that the model was trained on, as for compress; default: the run's; or "
    "text:FILE, the sentences to search, one a line",
)
@click.option(
    "--ort-web",
    type=PATH,
    metavar="FOLDER",
    envvar="PRUNE2ONNX_ORT_WEB",
    help="folder of the npm package onnxruntime-web  [default: the one in ./node_modules]",
)
@click.option(
    "--transformers-js",
    type=PATH,
    metavar="FOLDER",
    envvar="PRUNE2ONNX_TRANSFORMERS_JS",
    help="folder of the npm package @huggingface/transformers, for a folder with a tokenizer  "
    "[default: the one in ./node_modules]",
)
def demo(
    source: Path,
    output: Path,
    data: str | None,
    ort_web: Path | None,
    transformers_js: Path | None,
) -> None:
    """Write a web page that runs the model of DIR, a finished run or an .onnx file.

    For classifiers of images: draw a picture on the page, or choose an image. For a folder as on
    the Hugging Face hub with a model of sentence embeddings: search sentences, those of --data
    text:FILE or the page's own.

    \b
    npm install onnxruntime-web
    prune2onnx demo runs/digits -o page
    prune2onnx demo small_dir -o page --data text:sentences.txt
    python -m http.server -d page
    """  # noqa: D301  # \b is click's mark for "do not rewrap"
    from prune2onnx.runs.folder import MODEL
    from prune2onnx.runs.pages.demo import write_demo
    from prune2onnx.runs.pages.search import is_folder_of_a_model, write_search

    if is_folder_of_a_model(source):
        result = write_search(source, output, data=data, transformers_js=transformers_js)
        taken = sum(size for name, size in result.files.items() if name.startswith("model/onnx/"))
    else:
        result = write_demo(source, output, data=data, ort_web=ort_web)
        taken = result.files[MODEL]
    for note in result.notes:
        say(note)
    say(f"{output}: {result.nbytes:,} bytes, of which the model takes {taken:,}")
    say(f"view it with: python -m http.server -d {output}")
