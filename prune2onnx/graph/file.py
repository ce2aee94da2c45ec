"""Reads and writes ONNX files, with weights inside or in a data file beside them.

Declared sizes are checked against the data before anything is allocated, and a model is never
serialized whole where it may exceed the 2 GB of a protobuf message. Files appear whole or not at
all. Operators are the other modules' task; how weights are coded is that of `packing`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto, TensorProto, numpy_helper

from prune2onnx.errors import Prune2OnnxError, one_line
from prune2onnx.files import alone_in, keep_inputs, replacing, write_whole
from prune2onnx.graph.checks import check_expansion, check_parts
from prune2onnx.graph.domain import DOMAIN, MARK, OP
from prune2onnx.graph.outside import (
    LEAST_NBYTES,
    is_outside,
    nbytes_outside,
    pieces,
    refer,
    without_data,
)
from prune2onnx.graph.protobuf import MAX_NBYTES, TYPED_FIELDS, copy_but, nbytes, serialized
from prune2onnx.graph.shapes import without_weights
from prune2onnx.graph.tensors import (
    MORE_BYTES,
    check,
    check_loaded,
    declared_nbytes,
    external,
)
from prune2onnx.graph.walk import in_model

EXTERNAL_NBYTES = 1024
"""A smaller tensor stays in the model when a data file is written, as it does in onnx's own."""

_MOST_READS = 100  # of a file that others keep replacing

_PAGE = 4096  # onnxruntime maps a large tensor into memory where it starts on a page
_PAGED_NBYTES = 2**20


class InvalidModelError(Prune2OnnxError):
    """A whole file that onnx's checker refuses, which is stricter than runtimes are.

    Attributes:
        model: what is in it.
    """

    def __init__(self, text: str, model: ModelProto) -> None:
        super().__init__(text)
        self.model = model


def load(path: str | Path, max_bytes: int | None = None, *, lazily: bool = False) -> ModelProto:
    """Reads an ONNX file, with external data beside it.

    A truncated file may still parse, so the model is checked, too.

    Args:
        path: the .onnx file.
        max_bytes: most bytes of external data to read; default: no limit.
        lazily: whether large tensors stay in their files (`graph.outside`), which must then stay
            as they are.

    Returns:
        The model; all its tensors hold their data, or can read them.

    Raises:
        InvalidModelError: onnx's checker refuses the model.
        Prune2OnnxError: the file is missing, unreadable, empty, above 2 GB, not ONNX or damaged; a
            tensor's data have another size than its shape says; or external data are missing, too
            short, outside the file's folder, or more than `max_bytes`.
    """
    path = Path(path)
    model = _whole(path, max_bytes, lazily)
    _drop_repeated_keys(model)
    check_expansion(model, path)
    if _is_decoder_alone(model):
        raise Prune2OnnxError(
            f"{path}: a decoder is in the graph, the metadata of packed weights are missing; the "
            "file is cut short, copy it again"
        )
    defined = {function.name for function in model.functions if function.domain == DOMAIN}
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type not in defined:
            raise Prune2OnnxError(
                f"{path}: {', '.join(node.output)}: its decode function {node.op_type!r} is "
                "missing; the file is cut short"
            )
    try:
        onnx.checker.check_model(without_weights(model))
    except EncodeError:
        return model  # more than 2 GB of weights outside initializers: onnx cannot check it
    except (onnx.checker.ValidationError, ValueError) as error:
        raise InvalidModelError(
            f"{path}: not a valid ONNX model: {one_line(error)[:1000]}", model
        ) from error
    return model


def _is_decoder_alone(model: ModelProto) -> bool:
    """Whether a decoder is written out (docs/FORMAT.md) without the metadata behind the graph."""
    if any(entry.key == MARK for entry in model.metadata_props):
        return False
    known = {tensor.name for tensor in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        if node.domain or not known.issuperset(filter(None, node.input)):
            return False
        if node.name:
            return node.name == OP and index > 0
        known.update(node.output)
    return False


def _whole(path: Path, max_bytes: int | None, lazily: bool) -> ModelProto:
    """The model in a file with its data, which belong together also while others replace both.

    As long as a writer (`_write_pair`) leaves the model, the data file has what the model refers
    to. So it is read again if another model is there after the data were read.
    """
    for _ in range(_MOST_READS):
        before = _identity(path)
        try:
            model = _parsed(path, lazily)
            check_parts(model, path)
            tensors = [tensor for tensor in in_model(model) if external(tensor)]
            _read_external(tensors, path, max_bytes, lazily)
        except Prune2OnnxError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return model
    raise Prune2OnnxError(
        f"{path}: another process replaced it {_MOST_READS} times while it was read; "
        "try again when that is done"
    )


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from another that takes its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _parsed(path: Path, lazily: bool) -> ModelProto:
    try:
        if path.is_dir():
            raise Prune2OnnxError(f"{path}: a folder; give the .onnx file in it{_models_in(path)}")
        nbytes = path.stat().st_size
        if not path.is_file():
            raise Prune2OnnxError(f"{path}: not a file; give an .onnx file")
        if not nbytes:
            raise Prune2OnnxError(f"{path}: an empty file; export or copy the model again")
        if nbytes > MAX_NBYTES:
            raise Prune2OnnxError(
                f"{path}: {nbytes:,} bytes, an ONNX file has at most {MAX_NBYTES:,}; "
                "export it with external data"
            )
        model = without_data(path) if lazily else None
        return model or onnx.load(path, format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise Prune2OnnxError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise Prune2OnnxError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        if "alloc" in str(error):  # protobuf has no other sign that memory has ended
            raise MemoryError(f"{path} cannot be read: {one_line(error)}") from error
        raise Prune2OnnxError(
            f"{path}: not an ONNX model, or cut short ({one_line(error)}); export or copy it again"
        ) from error


def _models_in(folder: Path) -> str:
    """Names some models in a folder, for an error."""
    found = sorted(folder.glob("*.onnx")) + sorted(folder.glob("onnx/*.onnx"))
    return "".join(f"{sign} {path}" for sign, path in zip(":,,", found, strict=False))


def _drop_repeated_keys(model: ModelProto) -> None:
    """Leaves one of metadata with the same key, of this project's own; others are refused."""
    seen: set[str] = set()
    for index, entry in reversed(list(enumerate(model.metadata_props))):
        if entry.key in seen and entry.key.split(".")[0] == DOMAIN:
            del model.metadata_props[index]
        seen.add(entry.key)


def _read_external(
    tensors: Sequence[TensorProto], path: Path, max_bytes: int | None, lazily: bool
) -> None:
    """Loads external data in place; every size is known and checked before the first is read."""
    try:
        places = [_place(tensor, path) for tensor in tensors]
        total = sum(nbytes for _, _, nbytes in places)
        if max_bytes is not None and total > max_bytes:
            raise Prune2OnnxError(
                f"{path}: its external data take {total:,} bytes, at most {max_bytes:,} are "
                f"allowed; {MORE_BYTES}"
            )
        for tensor, (file, offset, nbytes) in zip(tensors, places, strict=True):
            if lazily and nbytes >= LEAST_NBYTES:
                refer(tensor, file, offset, nbytes)
                continue
            with file.open("rb") as stream:
                stream.seek(offset)
                tensor.raw_data = stream.read(nbytes)
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            check(tensor)  # the file may have shrunk since its size was read
    except OSError as error:
        raise Prune2OnnxError(
            f"{path}: external data cannot be read: {error.filename}: {error.strerror or error}; "
            "put it beside the file"
        ) from error


def _place(tensor: TensorProto, path: Path) -> tuple[Path, int, int]:
    """Where a tensor's external data are: (file, offset, nbytes)."""

    def refused(what: str, advice: str = "export the model again") -> Prune2OnnxError:
        return Prune2OnnxError(
            f"{path}: external data cannot be read: {tensor.name}: {what}; {advice}"
        )

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if not posix.parts or "\0" in location:
        raise refused(f"its location is {location!r}, expected a file name")
    if posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts):
        raise refused(f"{location!r} lies outside of the model's folder")
    file = path.parent / location
    # Where the model itself is a link, as in a download cache, its data file may link to the same
    # folder.
    allowed = {path.parent.resolve(), path.resolve().parent}
    if not any(file.resolve().is_relative_to(folder) for folder in allowed):
        raise refused(f"{location!r} links to a file outside of the model's folder")
    if not file.exists():
        raise refused(f"there is no file {location!r}", "put it beside the file")
    if not file.is_file():
        raise refused(f"{location!r} is not a file")
    available = file.stat().st_size
    wanted = declared_nbytes(tensor)
    if wanted is None:
        raise refused("data of its element type cannot be external")
    numbers = {}
    for key, default in (("offset", 0), ("length", wanted)):
        text = entries.get(key, str(default))
        if not text.isascii() or not text.isdecimal():
            raise refused(f"its {key} is {text!r}, expected a number of bytes")
        numbers[key] = int(text) if len(text) < 100 else 10**100
    offset, length = numbers["offset"], numbers["length"]
    if length != wanted:
        raise refused(f"its length is {length:,} bytes, its shape and type take {wanted:,}")
    if offset + length > available:
        raise refused(
            f"it lies at bytes {offset:,} to {offset + length:,} of {location!r}, which has "
            f"{available:,}",
            "the data file is cut short, copy it again",
        )
    return file, offset, wanted


def save(
    model: ModelProto,
    path: str | Path,
    external: str | None = None,
    *,
    source: Path | None = None,
) -> tuple[Path, ...]:
    """Writes a model, whole or not at all, with a data file beside it where that is needed.

    Initializers of `EXTERNAL_NBYTES` or more go to the data file. The streams of packed weights
    stay in the model, unless it would still exceed 2 GB. The model is not modified.

    Other processes see the old pair or the new one, also where this process is killed.

    Args:
        model: all tensors hold their data.
        path: the .onnx file; its folder is created.
        external: name of the data file; default: none up to 2 GB, above `<path's name>.data`.
        source: the file that the model was read from; it may be replaced whole by `path`, but no
            file that it consists of may be lost otherwise.

    Returns:
        The files written, the model first.

    Raises:
        Prune2OnnxError: a file cannot be written or belongs to `source`, `external` is not a plain
            file name, or the model is above 2 GB without its initializers.
    """
    path = Path(path)
    for tensor in in_model(model):
        check_loaded(tensor)
    total = nbytes(model)
    if external is None and total <= MAX_NBYTES:
        if source is not None:
            _keep(source, path)
        with replacing(path, total) as stream:
            stream.writelines(serialized(model))
        return (path,)
    name = f"{path.name}.data" if external is None else external
    if name in ("", ".", "..", path.name) or {"/", "\\", "\0"} & set(name):
        raise Prune2OnnxError(
            f"{name!r}: not a name for a data file; give a file name without a folder, other than "
            f"{path.name!r}"
        )
    streams = {n for node in model.graph.node if node.domain == DOMAIN for n in node.input}
    shell, outside = _split(model, name, streams)
    if nbytes(shell) > MAX_NBYTES:
        shell, outside = _split(model, name, set())
    if (left := nbytes(shell)) > MAX_NBYTES:
        raise Prune2OnnxError(
            f"{path}: {left:,} bytes without its initializers, an ONNX file has at most "
            f"{MAX_NBYTES:,}; keep its weights as initializers of the main graph"
        )
    data = path.with_name(name)
    if source is not None:
        _keep(source, path, data)
    _write_pair(path, shell, data, outside)
    return (path, data)


def _keep(source: Path, path: Path, *beside: Path) -> None:
    """Makes sure that writing does not destroy what was read."""
    if not any(file.exists() for file in (path, *beside)) or not source.exists():
        return
    if path.exists() and path.samefile(source):
        keep_inputs([source], beside)  # the rest of it goes with it
    else:
        keep_inputs(files_of(source), (path, *beside))


def _split(
    model: ModelProto, name: str, inline: set[str]
) -> tuple[ModelProto, list[tuple[TensorProto, int]]]:
    """The model without its large initializers, and those: (tensor, offset in the data file)."""
    shell = ModelProto()
    copy_but(shell, model, "graph")
    copy_but(shell.graph, model.graph, "initializer")
    outside = []
    end = 0
    for tensor in model.graph.initializer:
        size = declared_nbytes(tensor)
        if size is None or size < EXTERNAL_NBYTES or tensor.name in inline:
            shell.graph.initializer.append(tensor)
            continue
        offset = -(-end // _PAGE) * _PAGE if size >= _PAGED_NBYTES else end
        end = offset + size
        stub = shell.graph.initializer.add()
        copy_but(stub, tensor, "raw_data", "external_data", *TYPED_FIELDS)
        stub.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", size)):
            stub.external_data.add(key=key, value=str(value))
        outside.append((tensor, offset))
    return shell, outside


def _write_pair(
    path: Path, shell: ModelProto, data: Path, outside: list[tuple[TensorProto, int]]
) -> None:
    """Writes a data file and the model that refers to it.

    Two files cannot be replaced in one step. Where there is a data file, it first becomes one with
    the old bytes and, behind them, the new ones; then the model that refers to these takes its
    place; then both are replaced by what they shall be, in the same way. So at any moment the two
    that are there belong together, whoever reads them and whenever the process is killed. A second
    writer waits: it would replace the data file between these steps.
    """
    with alone_in(data.parent):
        _replace_pair(path, shell, data, outside)


def _replace_pair(
    path: Path, shell: ModelProto, data: Path, outside: list[tuple[TensorProto, int]]
) -> None:
    size = max((offset + (declared_nbytes(tensor) or 0) for tensor, offset in outside), default=0)
    if data.is_file():
        old = data.stat().st_size
        base = -(-max(old, size) // _PAGE) * _PAGE
        with replacing(data, base + size) as stream:
            with data.open("rb") as before:
                shutil.copyfileobj(before, stream, 1 << 24)
            _write_at(stream, outside, base)
        outside = _now_in(outside, data, base)
        write_whole(path, _moved(shell, base).SerializeToString())
        with replacing(data, base + size) as stream:
            _write_at(stream, outside, 0)
            _write_at(stream, outside, base)
        outside = _now_in(outside, data, 0)
        write_whole(path, shell.SerializeToString())
        with replacing(data, size) as stream:
            _write_at(stream, outside, 0)
        return
    with replacing(data, size) as stream:
        _write_at(stream, outside, 0)
    try:
        write_whole(path, shell.SerializeToString())
    except BaseException:
        data.unlink()
        raise


def _now_in(
    outside: list[tuple[TensorProto, int]], data: Path, base: int
) -> list[tuple[TensorProto, int]]:
    """The same tensors, read from where they were written: their own files may be replaced now."""
    found = []
    for tensor, offset in outside:
        if is_outside(tensor):
            size, original = nbytes_outside(tensor), tensor
            tensor = TensorProto()
            copy_but(tensor, original, "external_data", "data_location")
            refer(tensor, data, base + offset, size)
        found.append((tensor, offset))
    return found


def _write_at(stream: BinaryIO, outside: list[tuple[TensorProto, int]], base: int) -> None:
    for tensor, offset in outside:
        stream.seek(base + offset)
        stream.writelines(_raw(tensor))


def _moved(shell: ModelProto, base: int) -> ModelProto:
    """The model whose data begin at `base` in its data file."""
    result = ModelProto()
    result.CopyFrom(shell)
    for tensor in result.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(base + int(entry.value))
    return result


def _raw(tensor: TensorProto) -> Iterator[bytes | memoryview]:
    if is_outside(tensor):
        yield from pieces(tensor)
    elif tensor.HasField("raw_data"):
        yield tensor.raw_data
    else:
        yield bytes(numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data)


def files_of(path: Path) -> list[Path]:
    """The file of a model, and the data files that it refers to."""
    proto = without_data(path) or onnx.load(path, load_external_data=False)
    names = {
        entry.value
        for tensor in in_model(proto)
        if external(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path, *(path.parent / name for name in sorted(names))]


def file_nbytes(path: Path) -> int:
    """Bytes of a model: the file and its external data."""
    return sum(file.stat().st_size for file in files_of(path))
