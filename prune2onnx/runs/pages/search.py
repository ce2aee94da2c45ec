"""Writes a static page that searches sentences with a model of a folder: `prune2onnx demo`.

The page (templates/search.*) gets the files of the folder that transformers.js reads, that library,
its wasm, and sentences. Nothing is run here, and neither this nor the page uses the network.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto

from prune2onnx.data.text import TOKENIZER, is_text, read_lines
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.files import replacing_folder, write_whole
from prune2onnx.graph.file import files_of, load
from prune2onnx.runs.hub import CONFIG, DTYPES, ONNX, SETTINGS, config_of, ending
from prune2onnx.runs.pages.demo import Demo, rendered, require_ours

LIBRARY = "transformers.min.js"
"""Of the npm package @huggingface/transformers, 3 or newer, in its dist/."""
WASM = ("ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Of the onnxruntime-web beside it: for one thread on the CPU."""
PAGE = ("index.html", "search.js", "search.css", "demo.css")
MODEL = "model"

_PACKAGE = Path("node_modules") / "@huggingface" / "transformers"
_READ = (CONFIG, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")
_OUTPUTS = ("last_hidden_state", "token_embeddings")
_POOLING = Path("1_Pooling") / CONFIG
_MOST_SENTENCES = 1000

SENTENCES = (
    "The train to the coast leaves at seven.",
    "A ferry crosses the bay every hour.",
    "Bicycles may be taken on the tram after nine.",
    "The bakery on the corner sells rye bread.",
    "Tomatoes grow best in a sunny spot.",
    "Add the onions when the butter is hot.",
    "The soup needs another pinch of salt.",
    "My doctor told me to sleep more.",
    "A cold usually passes within a week.",
    "She broke her arm while skiing.",
    "The striker scored twice in the second half.",
    "Rain stopped the tennis match.",
    "He runs ten kilometres before breakfast.",
    "The central bank raised interest rates.",
    "Shares fell after the company's report.",
    "The rent is due on the first of the month.",
    "A comet will be visible before dawn.",
    "The telescope found water on a distant planet.",
    "Electrons have a negative charge.",
    "The orchestra rehearses in the old church.",
    "Her new novel is set in Lisbon.",
    "The museum is closed on Mondays.",
    "Restart the computer after the update.",
    "The battery lasts for two days.",
    "Your password must have twelve characters.",
    "The cat sleeps on the warm windowsill.",
    "Wolves have returned to the forest.",
    "Swallows fly south in autumn.",
)
"""What the page searches by default."""


def is_folder_of_a_model(source: Path) -> bool:
    """Whether a folder is one as on the hub, not that of a run."""
    return (source / CONFIG).is_file() or (source / ONNX).is_dir()


def write_search(
    source: Path, target: Path, *, data: str | None = None, transformers_js: Path | None = None
) -> Demo:
    """Writes the page.

    Args:
        source: a folder with config.json, tokenizer.json and one model in onnx/.
        target: folder for the page; it is made, or replaced if it holds nothing but such a page.
        data: `text:FILE` with the sentences to search, at most 1,000; default: `SENTENCES`.
        transformers_js: the npm package @huggingface/transformers, with its onnxruntime-web
            beside it; default: that in ./node_modules.

    Raises:
        RecipeError: `data` is no text.
        Prune2OnnxError: the folder lacks a file, its model gives no states of tokens, the package
            is missing, or `target` holds something else.
    """
    if data is not None and not is_text(data):
        raise RecipeError(f"data {data!r}: expected text:FILE, the sentences to search, one a line")
    model = _model(source)
    config = config_of(source)
    for name in (CONFIG, TOKENIZER):
        if config is None or not (source / name).is_file():
            raise Prune2OnnxError(
                f"{source}: no {name} in it, or none that can be read; transformers.js needs it"
            )
    _check_output(load(model, lazily=True), model)
    lines = list(SENTENCES) if data is None else read_lines(data.partition(":")[2], _MOST_SENTENCES)
    weights = files_of(model)
    copied = {Path(MODEL) / name: source / name for name in _READ if (source / name).is_file()}
    copied |= {Path(MODEL) / ONNX / path.name: path for path in weights}
    runtime = _runtime(_PACKAGE if transformers_js is None else transformers_js)
    copied |= {Path(path.name): path for path in runtime}
    setup = {
        "model": MODEL,
        "dtype": _dtype(model, config or {}),
        "pooling": _pooling(source),
        "sentences": lines,
        "modelBytes": sum(path.stat().st_size for path in weights),
        "runtimeBytes": sum(path.stat().st_size for path in runtime),
        "library": LIBRARY,
        "wasm": list(WASM),
    }
    page = rendered("search.html.j2", setup=setup, title=source.resolve().name)
    templates = Path(__file__).with_name("templates")
    written = {Path(name): (templates / name).read_bytes() for name in PAGE[1:]}
    return _write(target, {Path(PAGE[0]): page.encode(), **written}, copied)


def _model(source: Path) -> Path:
    """The one model of a folder."""
    found = sorted((source / ONNX).glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise Prune2OnnxError(
            f"{source}: models in {ONNX}/: {names}; a demo needs a folder with one, as prune2onnx "
            f"pack {source} -o FOLDER writes it"
        )
    return found[0]


def _check_output(model: ModelProto, path: Path) -> None:
    names = [value.name for value in model.graph.output]
    if not set(_OUTPUTS) & set(names):
        raise Prune2OnnxError(
            f"{path}: its outputs are {', '.join(names)}, expected {' or '.join(_OUTPUTS)}; a demo "
            "needs a model of sentence embeddings"
        )


def _dtype(model: Path, config: Mapping[str, Any]) -> str:
    settings = config.get(SETTINGS)
    stated = settings.get("dtype") if isinstance(settings, dict) else None
    return stated if isinstance(stated, str) else DTYPES[ending(model)]


def _pooling(source: Path) -> str:
    """How the states of tokens become one vector: as sentence-transformers stored it, or mean."""
    try:
        stated = json.loads((source / _POOLING).read_text(encoding="utf-8"))
        return "cls" if stated.get("pooling_mode_cls_token") else "mean"
    except (OSError, ValueError, AttributeError):
        return "mean"


def _runtime(folder: Path) -> list[Path]:
    """The files of transformers.js and of onnxruntime-web, from the packages' folders."""
    package = next((p for p in (folder, folder / _PACKAGE) if (p / "dist").is_dir()), None)
    library = None if package is None else package / "dist" / LIBRARY
    if library is None or not library.is_file():
        raise Prune2OnnxError(
            f"{folder}: no {LIBRARY} of the package @huggingface/transformers in it; get it with "
            "npm install --ignore-scripts @huggingface/transformers, here or elsewhere, and name "
            "its folder with --transformers-js FOLDER"
        )
    assert package is not None
    places = [
        parent / "onnxruntime-web" / "dist"
        for parent in (package / "node_modules", package.resolve().parent.parent)
    ]
    place = next((p for p in places if all((p / name).is_file() for name in WASM)), None)
    if place is None:
        raise Prune2OnnxError(
            f"{package}: no onnxruntime-web beside it, which it needs; install it again with npm "
            "install --ignore-scripts @huggingface/transformers"
        )
    return [library, *(place / name for name in WASM)]


def _write(target: Path, made: Mapping[Path, bytes], copied: Mapping[Path, Path]) -> Demo:
    require_ours(target, {*PAGE, LIBRARY, *WASM, MODEL})
    with replacing_folder(target) as folder:
        for path, content in made.items():
            write_whole(folder / path, content)
        for path, source in copied.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / path)
        sizes = {str(path): (folder / path).stat().st_size for path in (*made, *copied)}
    return Demo(sizes, ())
