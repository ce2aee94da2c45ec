"""`pack` of a folder: one as on the Hugging Face hub becomes one that opens in the same way.

transformers.js and optimum find a model by names: `onnx/model.onnx` is float32,
`onnx/model_quantized.onnx` computes in int8, and so on; `config.json` may say which of them is
meant, and whether weights are in a data file. What is copied, what is left out, and those names are
decided here; how a file is packed is in `commands.pack`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from prune2onnx.commands import card
from prune2onnx.commands.compute.computing import Computing
from prune2onnx.commands.compute.runtime_type import runtime_type
from prune2onnx.commands.pack import PackResult, pack_file
from prune2onnx.commands.source import read
from prune2onnx.data.text import is_text, tokenizer_beside
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.files import replacing_folder, write_whole
from prune2onnx.graph.file import file_nbytes, files_of, load
from prune2onnx.graph.tensors import external
from prune2onnx.graph.walk import in_model
from prune2onnx.packing.pack import Progress
from prune2onnx.runs.defaults import InputOptions, PackOptions
from prune2onnx.runs.hub import CARD, CONFIG, DTYPES, ONNX, SETTINGS, base, config_of, ending
from prune2onnx.runtime.benchmark import Timing, timings
from prune2onnx.runtime.session import UnrunnableError, environment, load_runnable

_ENDINGS = {"float32": "", "float16": "_fp16", "int8": "_quantized", "int4": "_q4"}
"""What most weights are at run time -> the ending of the file's name."""

_OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".tflite"),
    *(".gguf", ".onnx_data", ".data"),
)
_INDEX = (".safetensors.index.json", ".bin.index.json")
_SECONDS = 1.0  # of inferences, for the card


@dataclass(frozen=True, eq=False)
class PackedFile:
    """One model of a folder.

    Attributes:
        source: the file, relative to the folder that was read.
        name: the packed one, relative to the folder that was written.
        nbytes: its size, external data included.
        packed: as `pack_file` returned it.
        error: relative error of the outputs; 0.0 without loss, None where it was not measured.
        timing: of one example on one thread, against the file before; None where it does not run.
    """

    source: Path
    name: Path
    nbytes: int
    packed: PackResult
    error: float | None
    timing: Timing | None


@dataclass(frozen=True, eq=False)
class FolderResult:
    """What `pack_folder` wrote.

    Attributes:
        files: the models.
        copied: other files, relative to the folder.
        notes: what was left out or changed, in words.
    """

    files: tuple[PackedFile, ...]
    copied: tuple[Path, ...]
    notes: tuple[str, ...]


def pack_folder(
    source: Path,
    target: Path,
    options: PackOptions | None = None,
    progress: Progress = lambda name, done, total: None,
) -> FolderResult:
    """Packs the models of a folder into another, which appears whole or not at all.

    Args:
        source: with `onnx/*.onnx` or `*.onnx`, config.json, tokenizer.json and the like.
        target: made, or replaced where `pack_folder` wrote it and nothing else is in it.
        options: as for `pack_file`; text is read by the folder's own tokenizer by default.
        progress: as for `pack_file`.

    Raises:
        RecipeError: options that do not fit a folder.
        MismatchError: as for `pack_file`.
        Prune2OnnxError: there is no model in it, `target` holds something else or is inside of
            `source`, or a file cannot be read, packed or written.
    """
    options = _fitting(options or PackOptions(), source)
    _check_apart(source, target)
    models, notes = _models(source)
    if options.target_size is not None and len(models) > 1:
        raise RecipeError(
            f"--target-size is for one file, and {source} has {len(models)}: "
            f"{', '.join(map(str, models))}; pack them one by one"
        )
    others, left = _others(source, models)
    notes += left
    _check_ours(target, [*others, *(Path(ONNX) / model.name for model in models)])
    own = _text_of(target / CARD) or _text_of(source / CARD)
    with replacing_folder(target) as folder:
        files = [_packed(source, model, folder, options, progress) for model in models]
        for path in others:
            _copy(source / path, folder / path)
        notes += _configured(folder, files)
        text = card.written(own, target.absolute().name, _card_rows(files, options))
        write_whole(folder / CARD, text)
    return FolderResult(tuple(files), tuple(others), tuple(notes))


def _fitting(options: PackOptions, source: Path) -> PackOptions:
    """Options for the files of a folder."""
    if options.external is not None:
        raise RecipeError(
            f"--external {options.external}: data files of a folder have the names that "
            "transformers.js expects, and are written above 2 GB; leave it out"
        )
    given = options.inputs
    if is_text(given.data) and given.tokenizer is None:
        given = replace(given, tokenizer=tokenizer_beside(source))
    return replace(options, inputs=given)


def _check_apart(source: Path, target: Path) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise Prune2OnnxError(
            f"{target}: the same folder as {source}, or one in the other; name another with -o"
        )


def _models(source: Path) -> tuple[list[Path], list[str]]:
    """The models to pack, relative to the folder, and what is said about others."""
    found = [p.relative_to(source) for p in sorted(source.glob(f"{ONNX}/*.onnx"))]
    names = {path.name for path in found}
    notes = []
    for path in sorted(source.glob("*.onnx")):
        if path.name in names:
            notes.append(f"{path.name}: left out, {ONNX}/{path.name} is packed")
        else:
            found.append(path.relative_to(source))
    if not found:
        raise Prune2OnnxError(
            f"{source}: no .onnx file in it or in {ONNX}/, expected {ONNX}/model.onnx; export the "
            "model first, as with optimum-cli export onnx"
        )
    whole = {base(path) for path in found if not ending(path)}
    chosen = [path for path in found if not ending(path) or base(path) not in whole]
    notes += [
        f"{path}: left out, another form of {base(path)}.onnx, which is packed; pack it by itself"
        for path in found
        if path not in chosen
    ]
    return chosen, notes


def _others(source: Path, models: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files to copy, relative to the folder, and what is said about those left out."""
    data: set[Path] = set()
    for model in models:
        load_runnable(source / model, lazily=True)  # its errors are clear
        data.update(file.resolve() for file in files_of(source / model))
    copied: list[Path] = []
    left: list[Path] = []
    for path in _walk(source):
        if path.suffix == ".onnx" or (source / path).resolve() in data or path == Path(CARD):
            continue
        other = path.suffix in _OTHER_WEIGHTS or path.name.endswith(_INDEX)
        (left if other else copied).append(path)
    if not left:
        return copied, []
    nbytes = sum((source / path).stat().st_size for path in left if (source / path).exists())
    return copied, [
        f"left out: {', '.join(map(str, left))}; weights of other files and frameworks, {nbytes:,} "
        "bytes"
    ]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except (OSError, shutil.SpecialFileError) as error:
        raise Prune2OnnxError(
            f"{source}: cannot be copied: {getattr(error, 'strerror', None) or error}; check the "
            "file, or remove it"
        ) from error


def _walk(source: Path) -> Iterator[Path]:
    """All files, relative to the folder; hidden ones are not."""
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(source)


def _check_ours(target: Path, expected: Iterable[Path]) -> None:
    """Makes sure that a folder is empty, or that it was written here and has nothing else in it."""
    if not target.is_dir():
        return
    present = [p.relative_to(target) for p in sorted(target.rglob("*")) if not p.is_dir()]
    if present and not card.is_ours(_text_of(target / CARD)):
        raise Prune2OnnxError(
            f"{target}: holds {present[0]}, and pack did not write it; name a folder that is empty "
            "or does not exist"
        )
    known = {*expected, Path(CARD)}
    models = {base(path) for path in known if path.suffix == ".onnx"}
    for path in present:
        model = path.with_name(path.name.partition(".onnx")[0] + ".onnx")
        if path not in known and not (path.parts[0] == ONNX and base(model) in models):
            raise Prune2OnnxError(
                f"{target}: holds {path}, which would not be written again; name another folder, "
                "or move it"
            )


def _packed(
    source: Path, model: Path, folder: Path, options: PackOptions, progress: Progress
) -> PackedFile:
    """Packs one model into the folder, under the name that its weights ask for."""
    before = source / model
    made = folder / ONNX / model.name
    _check_free(made, model)
    packed = pack_file(before, made, options, progress=progress)
    was, now = runtime_type(before), runtime_type(made, packed.rows)
    name = model.name
    if was != now and now in _ENDINGS:
        name = f"{base(model)}{_ENDINGS[now]}.onnx"
        _check_free(made.with_name(name), model)
    made = _renamed(made, name)
    changed = options.lossy or was != now
    error = _error(before, made, options) if changed else 0.0
    timing = _timing(before, made, options.inputs)
    return PackedFile(model, made.relative_to(folder), file_nbytes(made), packed, error, timing)


def _check_free(made: Path, model: Path) -> None:
    if made.exists():
        raise Prune2OnnxError(
            f"{model}: would become {ONNX}/{made.name}, as another model of the folder does; leave "
            "one of them out, or pack it by itself"
        )


def _renamed(made: Path, name: str) -> Path:
    """Gives a model its name, and a data file the one that transformers.js asks for."""
    _, *data = files_of(made)
    for file in data:
        model = onnx.load(made, load_external_data=False)
        for tensor in filter(external, in_model(model)):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{name}_data"
        file.replace(made.with_name(f"{name}_data"))
        write_whole(made, model.SerializeToString())
    return made.replace(made.with_name(name))


def _error(before: Path, made: Path, options: PackOptions) -> float | None:
    """Relative error of the outputs, on held-out examples or on random inputs."""
    model: ModelProto = read(before).unpacked
    try:
        return Computing(model, options).error(load(made))
    except UnrunnableError:
        return None


def _timing(before: Path, made: Path, inputs: InputOptions) -> Timing | None:
    try:
        return timings([before, made], threads=(1,), seconds=_SECONDS, inputs=inputs)[1]
    except Prune2OnnxError:  # it does not run on random inputs, or takes no text: not measured
        return None


def _configured(folder: Path, files: Sequence[PackedFile]) -> list[str]:
    """Says in config.json which files there are, so that they open without further options."""
    config = config_of(folder)
    if config is None:
        return [f"no {CONFIG} with settings, so a reader has to know the model's type"]
    stated = config.get(SETTINGS)
    own: dict[str, Any] = dict(stated) if isinstance(stated, dict) else {}
    own.pop("use_external_data_format", None)
    data = {f.name.name: 1 for f in files if len(files_of(folder / f.name)) > 1}
    if data:
        own["use_external_data_format"] = data
    dtypes = {DTYPES[ending(file.name)] for file in files}
    own.pop("dtype", None)
    if len(dtypes) == 1:
        own["dtype"] = dtypes.pop()
    write_whole(
        folder / CONFIG, json.dumps(config | {SETTINGS: own}, indent=2, ensure_ascii=False) + "\n"
    )
    if "dtype" in own:
        return []
    return ["the files have several dtypes: name them where transformers.js opens the folder"]


def _text_of(path: Path) -> str | None:
    """The text of a model card; None where there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except ValueError as error:
        raise Prune2OnnxError(
            f"{path}: not text in UTF-8, and it would get a section; convert it"
        ) from error


def _card_rows(files: Sequence[PackedFile], options: PackOptions) -> card.Facts:
    """What the card says."""
    rows = [
        card.Row(
            file.name.as_posix(),
            file.nbytes,
            file.packed.nbytes_before,
            file.error,
            None if file.timing is None else (file.timing.p50_ms, file.timing.ratio or 1.0),
        )
        for file in files
    ]
    measured_on = options.inputs.data or "random"
    return card.Facts(
        tuple(rows),
        card.command(options),
        measured_on.partition(":")[0],
        str(environment()["onnxruntime"]),
    )
