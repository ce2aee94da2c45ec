"""Writes a static page that runs a model in the browser: `prune2onnx demo`.

The page (templates/demo.*) gets the model, three files of onnxruntime-web and a setup: the model's
input, how its data source converts pixels to numbers, and the names of the classes. Nothing is run
here, the network is not used, and torch is not imported. `data` reads examples for training, and
the page has to convert pixels in the same way.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from jinja2 import Environment, PackageLoader, StrictUndefined
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.files import replacing_folder, write_whole
from prune2onnx.graph.file import load
from prune2onnx.graph.tensors import external
from prune2onnx.graph.walk import in_model
from prune2onnx.runs.folder import MODEL, RECIPE, REPORT
from prune2onnx.runs.recipe import read_recipe

RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Files of onnxruntime-web (from 1.19 on, in the package's dist/) for one thread on the CPU."""

PAGE = ("index.html", "demo.js", "demo.css")

_PACKAGE = Path("node_modules") / "onnxruntime-web"
_GREY, _COLOUR = 1, 3  # channels


@dataclass(frozen=True)
class Drawing:
    """How a source's pictures were made, so that drawings are like them.

    Attributes:
        shape: `(channels, height, width)`.
        levels: a pixel is k / levels for k = 0 ... levels.
        stroke: width of the pen, as a fraction of the shorter side.
        fit: how the source scaled and centred its pictures: `box` is the longer side of the ink's
            bounding box in pixels, and `by` says which point is in the middle, the centre of "mass"
            or of the "box".
    """

    shape: tuple[int, int, int]
    levels: int
    stroke: float
    fit: dict[str, int | str]


# Ink is light in both. For other sources, pixels are uint8 / 255, and the pen is MNIST's.
DRAWINGS = {
    # http://yann.lecun.com/exdb/mnist: in a box of 20x20, by centre of mass
    "mnist": Drawing((1, 28, 28), levels=255, stroke=0.085, fit={"box": 20, "by": "mass"}),
    # https://archive.ics.uci.edu/dataset/80: 4x4 blocks of a bitmap that the digit fills
    "digits": Drawing((1, 8, 8), levels=16, stroke=0.12, fit={"box": 8, "by": "box"}),
}
_KNOWN = (*DRAWINGS, "idx", "folder")  # sources whose pixels the page converts as in training


@dataclass(frozen=True)
class Demo:
    """The result of `write_demo`.

    Attributes:
        files: name -> bytes, for all files in the folder.
        notes: facts about the data that are not known, in words.
    """

    files: dict[str, int]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that a first visit downloads, if the server does not compress."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Classifier:
    """Input and output of the model.

    Attributes:
        input: name of the input.
        shape: `(channels, height, width)` of one example.
        output: name of the first output, the scores.
        classes: number of classes.
        probabilities: whether the scores are the result of a Softmax.
    """

    input: str
    shape: tuple[int, int, int]
    output: str
    classes: int
    probabilities: bool


def write_demo(
    source: Path, target: Path, *, data: str | None = None, ort_web: Path | None = None
) -> Demo:
    """Writes the page for a finished run, or for an ONNX file alone.

    Args:
        source: the folder of a run of `compress`, or a file.
        target: folder for the page; it is made, or replaced if it holds nothing but such a page.
        data: the data that the model was trained on, as for `compress`; default: the run's own.
            If they are not known, pixels become 0 ... 1, and classes have numbers.
        ort_web: the npm package onnxruntime-web, or its dist; default: that in ./node_modules.

    Raises:
        Prune2OnnxError: `source` is no finished run, no ONNX file with its weights inside, or no
            classifier of images; onnxruntime-web is missing; `target` holds something else.
        RecipeError: `data` is no data source, or its images do not fit the model.
    """
    run = source if source.is_dir() else None
    path = source if run is None else run / MODEL
    recipe, figures = ({}, {}) if run is None else _finished(run)
    found = _single_file_classifier(path)
    head, _, argument = str(recipe.get("data", "") if data is None else data).partition(":")
    if data is not None and head not in _KNOWN and not argument:
        raise RecipeError(f"data {data!r}: expected mnist, digits, idx:DIR, folder:DIR or another")
    drawing = _drawing(head, found, path)
    names, note = _names(head, argument, found.classes)
    notes = [note] if note else []
    if head not in _KNOWN:
        notes.append(
            f"{path}: how its training data were scaled is not known; the page scales pixels to "
            "0 ... 1"
        )
    runtime = _runtime(_PACKAGE if ort_web is None else ort_web, given=ort_web is not None)
    setup = _setup(found, drawing or DRAWINGS["mnist"], names, sum(map(len, runtime.values())))
    page = rendered(
        "demo.html.j2",
        setup=setup | figures,
        title=str(recipe.get("model", path.stem)).rpartition(":")[2],
        drawn=found.shape[0] == _GREY,
        subject="digit" if drawing else "picture",
        known=drawing is not None,
    )
    templates = Path(__file__).with_name("templates")
    files = {
        PAGE[0]: page.encode(),
        **{name: (templates / name).read_bytes() for name in PAGE[1:]},
        MODEL: path.read_bytes(),
        **runtime,
    }
    _write_folder(target, files)
    return Demo({name: len(content) for name, content in files.items()}, tuple(notes))


def _single_file_classifier(path: Path) -> Classifier:
    """Reads a model that has all of its weights in its own file."""
    model = load(path)
    if any(external(tensor) for tensor in in_model(onnx.load(path, load_external_data=False))):
        raise Prune2OnnxError(
            f"{path}: its weights are in a second file, expected all in one; write it again with "
            "prune2onnx pack"
        )
    return classifier(model, path)


def _drawing(head: str, found: Classifier, path: Path) -> Drawing | None:
    """How the pictures of a known source were made; None for another source."""
    drawing = DRAWINGS.get(head)
    if drawing is not None and drawing.shape != found.shape:
        raise RecipeError(
            f"{path}: takes images of shape {list(found.shape)}, those of {head} are "
            f"{list(drawing.shape)}; name the data that it was trained on with --data"
        )
    return drawing


def _setup(
    found: Classifier, like: Drawing, names: list[str], runtime_nbytes: int
) -> dict[str, Any]:
    """The description of model and data for the page's script."""
    return {
        "input": found.input,
        "shape": found.shape,
        "output": found.output,
        "names": names,
        "probabilities": found.probabilities,
        "levels": like.levels,
        "stroke": like.stroke,
        # offered as an option for any pictures of this shape, and on by default for the source's
        "fit": like.fit if like.shape == found.shape else None,
        "runtime": RUNTIME[0],
        "runtimeBytes": runtime_nbytes,
        "probe": base64.b64encode(_probe()).decode(),
    }


def rendered(template: str, **facts: Any) -> str:
    """A page from a template of this folder."""
    templates = Environment(
        loader=PackageLoader("prune2onnx.runs.pages"), autoescape=True, undefined=StrictUndefined
    )
    return templates.get_template(template).render(**facts)


def classifier(model: ModelProto, path: Path) -> Classifier:
    """Reads input, output and number of classes of a classifier of images.

    Raises:
        Prune2OnnxError: the model has another number of inputs, or one that is not float32
            [N, C, H, W] with C 1 or 3 and H and W fixed, or its first output is not one score for
            each of at least two classes.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise Prune2OnnxError(f"{path}: inputs: {names}; a demo needs a model with one input")
    value, output = inputs[0], model.graph.output[0]
    extents = _extents(value)
    fixed = [extent for extent in extents[1:] if isinstance(extent, int) and extent > 0]
    if (
        value.type.tensor_type.elem_type != TensorProto.FLOAT
        or len(extents) != 4
        or len(fixed) != 3
        or fixed[0] not in (_GREY, _COLOUR)
        or (isinstance(extents[0], int) and extents[0] > 1)
    ):
        element_type = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        raise Prune2OnnxError(
            f"{path}: input {value.name} is {element_type} [{', '.join(map(str, extents))}], "
            "expected float [N, C, H, W] with N dynamic or 1, C 1 or 3, H and W fixed; a demo "
            "needs a classifier of images"
        )
    scores = _extents(output)
    classes = [extent for extent in scores[1:] if extent != 1]
    if len(classes) != 1 or not isinstance(classes[0], int) or classes[0] < 2:
        raise Prune2OnnxError(
            f"{path}: output {output.name} has shape [{', '.join(map(str, scores))}], expected "
            "[N, classes] with at least 2 classes; a demo needs a classifier of images"
        )
    last = [node.op_type for node in model.graph.node if output.name in node.output]
    shape = (fixed[0], fixed[1], fixed[2])
    return Classifier(value.name, shape, output.name, classes[0], last == ["Softmax"])


def _extents(value: ValueInfoProto) -> list[int | str]:
    """The shape, with "?" or a name for dynamic axes."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]


def _finished(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe of a run, and the figures of its report that the page shows."""
    for name in (MODEL, REPORT, RECIPE):
        if not (run / name).is_file():
            raise Prune2OnnxError(
                f"{run}: no {name} in it, so it is no finished run; finish it with prune2onnx "
                f"compress --resume {run}, or give an .onnx file"
            )
    path = run / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        dense, compressed = report["dense"], report["compressed"]
        figures = {
            "denseBytes": int(dense["nbytes"]),
            "denseError": _percent(dense["error"]),
            "error": _percent(compressed["error"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Prune2OnnxError(
            f"{path}: not a report of prune2onnx compress ({type(error).__name__}); give the "
            ".onnx file instead of the folder"
        ) from error
    return read_recipe(run / RECIPE), figures


def _percent(value: Any) -> float | None:
    """An error in a report; None for infinity and NaN, which are no JSON."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


def _names(head: str, argument: str, classes: int) -> tuple[list[str], str]:
    """The names of the classes, and why they are only numbers; "" where they are names."""
    numbers = [str(index) if head in DRAWINGS else f"class {index}" for index in range(classes)]
    if head != "folder":
        return numbers, ""
    root = Path(argument).expanduser()
    try:
        names = _class_folders(root)
    except OSError as error:
        return numbers, f"{root}: {error.strerror or error}; classes are shown as numbers"
    if len(names) != classes:
        return numbers, (
            f"{root}: {len(names)} class folders, but the model has {classes} classes; "
            "they are shown as numbers"
        )
    return names, ""


def _class_folders(root: Path) -> list[str]:
    """Class names in the order in which `data.folder` numbers them."""

    def folders(folder: Path) -> list[str]:
        found = (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        return sorted(found)

    top = folders(root)
    inside = folders(root / "train") if "train" in top else []
    return inside or top


def _runtime(folder: Path, *, given: bool) -> dict[str, bytes]:
    """The files of onnxruntime-web, from its package's folder or dist/."""
    places = (folder / "dist", folder, folder / _PACKAGE / "dist")
    place = next((place for place in places if (place / RUNTIME[-1]).is_file()), None)
    if place is None:
        lacks = "no onnxruntime-web in it" if given else "no such package"
        raise Prune2OnnxError(
            f"{folder}: {lacks}; get it with npm install onnxruntime-web, here or elsewhere, and "
            "name its folder with --ort-web FOLDER"
        )
    if missing := [name for name in RUNTIME if not (place / name).is_file()]:
        raise Prune2OnnxError(
            f"{place}: no {missing[0]} in it, expected onnxruntime-web 1.19 or newer; get that "
            "with npm install onnxruntime-web@latest"
        )
    try:
        return {name: (place / name).read_bytes() for name in RUNTIME}
    except OSError as error:
        raise Prune2OnnxError(
            f"{error.filename}: cannot be read: {error.strerror or error}; install "
            "onnxruntime-web again"
        ) from error


def _probe() -> bytes:
    """The smallest model: loaded first, so that load times exclude the start of the runtime."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "p", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def _write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files, whole or not at all, also in place of an earlier page."""
    require_ours(target, {*PAGE, MODEL, *RUNTIME})
    with replacing_folder(target) as folder:
        for name, content in files.items():
            write_whole(folder / name, content)


def require_ours(target: Path, ours: Collection[str]) -> None:
    """Makes sure that a folder is a page that may be replaced, is empty, or does not exist.

    Raises:
        Prune2OnnxError: it holds another file than those.
    """
    found = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if strange := [name for name in found if name not in ours]:
        raise Prune2OnnxError(
            f"{target}: holds {strange[0]}, which is no file of a demo; name a folder that is "
            "empty or does not exist"
        )
