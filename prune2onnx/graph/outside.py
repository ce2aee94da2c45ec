"""Large tensors whose data stay in a file until somebody reads them.

Such a tensor is in the form of ONNX's external data: an absolute path, an offset and a length; and
an entry of ours, which tells the file from any other that takes its place. The data may lie in a
data file, in an ONNX file itself (`without_data`), or in one that is only kept for a while
(`Spill`). So a model of gigabytes takes as much memory as the weight that is being looked at.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto

from prune2onnx.errors import Prune2OnnxError

LEAST_NBYTES = 1 << 16
"""Smaller tensors are read at once."""

_PIECE = 1 << 24  # bytes that are read at a time

_FOUND = "prune2onnx.found"
_OURS = secrets.token_hex(8)  # a file cannot claim that a tensor of it was found by this process

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf
_FIXED = {_FIXED64: 8, _FIXED32: 4}

_MOST_FIELDS = 1 << 22

_ELSEWHERE = (
    TensorProto.EXTERNAL_DATA_FIELD_NUMBER,
    TensorProto.DATA_LOCATION_FIELD_NUMBER,
    TensorProto.SEGMENT_FIELD_NUMBER,
)


def refer(tensor: TensorProto, file: Path, offset: int, nbytes: int) -> None:
    """Makes a tensor without data one whose data are in a file.

    Args:
        tensor: changed in place.
        file: that exists.
        offset: where its data begin.
        nbytes: how many they are.
    """
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    path = file.resolve()
    entries = (
        ("location", path),
        ("offset", offset),
        ("length", nbytes),
        (_FOUND, _identity(path.stat())),
    )
    for key, value in entries:
        tensor.external_data.add(key=key, value=str(value))


def is_outside(tensor: TensorProto) -> bool:
    """Whether the data are in a file, from which `read` gets them."""
    return any(e.key == _FOUND and e.value.endswith(_OURS) for e in tensor.external_data)


def nbytes_outside(tensor: TensorProto) -> int:
    """How many bytes `read` gets."""
    return int(_entries(tensor)["length"])


def read(tensor: TensorProto, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
    """The data of a tensor that `is_outside`, or a part of them.

    Args:
        tensor: the tensor.
        begin: the first byte.
        end: behind the last byte; default: all.

    Raises:
        Prune2OnnxError: the file is gone, was replaced, or cannot be read.
    """
    entries = _entries(tensor)
    path, length = Path(entries["location"]), int(entries["length"])
    end = length if end is None else end
    try:
        with path.open("rb") as stream:
            same = _identity(os.fstat(stream.fileno())) == entries[_FOUND]
            offset = int(entries["offset"]) + begin
            found = np.fromfile(stream, np.uint8, end - begin, offset=offset)
    except OSError as error:
        raise Prune2OnnxError(
            f"{path}: cannot be read: {error.strerror or error}; run it again"
        ) from error
    if not same or found.size != end - begin:
        raise Prune2OnnxError(
            f"{path}: another process changed it while it was read; run it again when that is done"
        )
    return found


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _identity(status: os.stat_result) -> str:
    return f"{status.st_ino} {status.st_mtime_ns} {status.st_size} {_OURS}"


class Spill:
    """A file for data that shall not stay in memory; whoever makes the file removes it.

    Args:
        stream: of a new file, open for writing.
        path: its path.
        free: bytes that stay in memory before anything goes to the file.
    """

    def __init__(self, stream: BinaryIO, path: Path, free: int = 0) -> None:
        self._stream, self._path, self._free = stream, path, free
        self._tensors: list[tuple[TensorProto, int, int]] = []

    def tensor(self, name: str, array: NDArray[Any], data_type: int) -> TensorProto:
        """An initializer; the data of a large one go to the file, and can be read after `finish`.

        (Not from the message to the file: protobuf does not give memory back.)
        """
        made = TensorProto(name=name, dims=array.shape, data_type=data_type)
        self.fill(made, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return made

    def fill(self, tensor: TensorProto, data: bytes | memoryview) -> None:
        """Gives a tensor without data these, in the form of `raw_data`, as `tensor` does."""
        nbytes = len(data)
        if nbytes < LEAST_NBYTES or nbytes <= self._free:
            tensor.raw_data = bytes(data)
            self._free -= nbytes
            return
        self._tensors.append((tensor, self._stream.tell(), nbytes))
        self._stream.write(data)

    def finish(self) -> None:
        """Makes what was kept readable."""
        self._stream.flush()
        for tensor, offset, nbytes in self._tensors:
            refer(tensor, self._path, offset, nbytes)
        self._tensors = []


def pieces(tensor: TensorProto) -> Iterator[memoryview]:
    """The data of a tensor that `is_outside`, some bytes at a time."""
    nbytes = nbytes_outside(tensor)
    for begin in range(0, nbytes, _PIECE):
        yield read(tensor, begin, min(begin + _PIECE, nbytes)).data


def without_data(path: Path) -> ModelProto | None:
    """The model in a file; data of its large initializers stay there.

    Args:
        path: an ONNX file.

    Returns:
        The model; None where the file is none that this function understands: then it is damaged,
        or must be parsed whole.
    """
    if not path.stat().st_size:
        return None
    parts: list[bytes] = []
    large: dict[int, tuple[int, int]] = {}
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            graphs = 0
            for number, wire, begin, inside, end in _fields(data, 0, len(data)):
                if number == ModelProto.GRAPH_FIELD_NUMBER and wire == _BYTES:
                    graphs += 1
                    graph = b"".join(_graph_parts(data, inside, end, large))
                    parts += [prefix(number, len(graph)), graph]
                else:
                    parts.append(data[begin:end])
        except (IndexError, ValueError):
            return None
    if graphs != 1 or not large:
        return None
    model = ModelProto.FromString(b"".join(parts))
    for index, (offset, nbytes) in large.items():
        refer(model.graph.initializer[index], path, offset, nbytes)
    return model


def _graph_parts(
    data: mmap.mmap, at: int, stop: int, large: dict[int, tuple[int, int]]
) -> Iterator[bytes]:
    """The fields of a graph, without the data of large initializers.

    Args:
        data: the file.
        at: where the graph begins.
        stop: where it ends.
        large: index of an initializer -> offset and bytes of its data; filled meanwhile.
    """
    index = -1
    for number, wire, begin, inside, end in _fields(data, at, stop):
        index += number == GraphProto.INITIALIZER_FIELD_NUMBER
        if number != GraphProto.INITIALIZER_FIELD_NUMBER or end - inside < LEAST_NBYTES:
            yield data[begin:end]
            continue
        fields = list(_fields(data, inside, end))
        found = [field for field in fields if field[0] == TensorProto.RAW_DATA_FIELD_NUMBER]
        elsewhere = any(field[0] in _ELSEWHERE for field in fields)
        if wire != _BYTES or len(found) != 1 or elsewhere:
            yield data[begin:end]
            continue
        large[index] = found[0][3], found[0][4] - found[0][3]
        tensor = b"".join(data[field[2] : field[4]] for field in fields if field is not found[0])
        yield prefix(number, len(tensor)) + tensor


def _fields(data: mmap.mmap, at: int, stop: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The fields of a message: number, wire type, begin, begin of its value, end.

    Raises:
        IndexError, ValueError: it is cut short, has a field of an unknown kind, or far too many.
    """
    for _ in range(_MOST_FIELDS):
        if at >= stop:
            return
        begin = at
        key, at = _read_varint(data, at)
        wire, inside = key & 7, at
        if wire == _VARINT:
            _, at = _read_varint(data, at)
        elif wire == _BYTES:
            length, inside = _read_varint(data, at)
            at = inside + length
        else:
            at += _FIXED.get(wire, stop)
        if at > stop or not key >> 3:
            raise ValueError("cut short")
        yield key >> 3, wire, begin, inside, at
    raise ValueError("too many fields")


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def prefix(number: int, nbytes: int) -> bytes:
    """The tag of a field that holds bytes or a message, and its length as a varint."""
    return varint(number << 3 | _BYTES) + varint(nbytes)


def varint(number: int) -> bytes:
    """A number, at least 0, as protobuf writes it: 7 bits a byte, low ones first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
