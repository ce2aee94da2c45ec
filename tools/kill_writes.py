"""Kills processes that write a model, and reads files while others write them.

    python tools/kill_writes.py --kills 600 --seconds 20

**Kills.** A process writes a new model over an old one, and is killed (SIGKILL): at a random
moment, or at each of the places where it opens, renames, copies or removes a file. Afterwards
`load` must give the old model or the new one, whole; a file that stands alone must have the old
bytes or the new ones; the next write must leave the new bytes, and nothing beside them. In the
cases "in place" the old model is the one that was read (`source=`).

**Readers.** Two processes write two models to one path over and over, three read it. Each read must
give one of the two.

Exit status 4 if anything else was found.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from onnx import ModelProto, helper, numpy_helper

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.file import load, save

MODEL, DATA = "m.onnx", "m.data"
_PLACES = ("open", "os.rename", "os.remove", "os.chmod", "os.truncate", "shutil.copyfile")

fork = multiprocessing.get_context("fork")  # a child that has imported everything


def network(seed: int, rows: int) -> ModelProto:
    """A model of two weights."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((rows, 64), (64, 64))]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("MatMul", ["h", "b"], ["y"]),
        ],
        f"net{seed}",
        [helper.make_tensor_value_info("x", 1, [1, rows])],
        [helper.make_tensor_value_info("y", 1, [1, 64])],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, "ab", strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _killed_at(place: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that kills the process at so many events of the file system."""
    left = [place]

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event in _PLACES:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _write(model: ModelProto, path: Path, external: str | None, place: int | None) -> None:
    if place is not None:
        sys.addaudithook(_killed_at(place))
    save(model, path, external, source=path if path.exists() else None)


class Case:
    """Writes of one kind that are killed.

    Args:
        external: whether weights go to a data file.
        over: whether there is an old model.
        rows: of the first weight, by which the length of a write is chosen.
    """

    def __init__(self, external: bool, over: bool, rows: int) -> None:
        self.name = f"{'with' if external else 'no'} data file, {'in place' if over else 'new'}"
        self.found: Counter[str] = Counter()
        self._external = DATA if external else None
        self._old = network(1, rows) if over else None
        self._new = network(2, rows + 7)

    def kill(self, folder: Path, wait: float | None, place: int | None) -> bool:
        """Kills one write, after a time or at a place; returns whether it was killed."""
        path = folder / MODEL
        before: dict[str, bytes] = {}
        if self._old is not None:
            save(self._old, path, self._external)
            before = bytes_of(folder)
        child = fork.Process(target=_write, args=(self._new, path, self._external, place))
        child.start()
        if wait is not None:
            time.sleep(wait)
            child.kill()
        child.join()
        killed = child.exitcode == -signal.SIGKILL
        left = bytes_of(folder)
        save(self._new, path, self._external)
        again = bytes_of(folder)
        save(self._new, folder / "fresh" / MODEL, self._external)
        after = bytes_of(folder / "fresh")
        if again != after:
            self.found["NOT CLEANED by the next write"] += 1
        for name in left:  # what the readers of that moment saw
            (folder / "fresh" / name).write_bytes(left[name])
        self.found[self._state(folder / "fresh" / MODEL, left, before, after)] += 1
        return killed

    def _state(
        self, path: Path, left: dict[str, bytes], before: dict[str, bytes], after: dict[str, bytes]
    ) -> str:
        whole = {name: content for name, content in left.items() if name in (MODEL, DATA)}
        for name in {MODEL, DATA} - whole.keys():
            (path.parent / name).unlink(missing_ok=True)
        if whole == before:
            return "old, to the byte" if whole else "nothing yet"
        if whole == after:
            return "new, to the byte"
        if MODEL not in whole:
            return "data, no model yet" if self._old is None else "LOST"
        try:
            model = load(path)
        except Prune2OnnxError as error:
            return f"BROKEN: {error}"
        if model == self._old:
            return "old, on its way"
        return "new, on its way" if model == self._new else "MIXED"


def readers(folder: Path, seconds: float, external: str | None) -> Counter[str]:
    """Two writers and three readers of one path: what the reads gave."""
    path = folder / MODEL
    models = [network(1, 3000), network(2, 3000)]
    save(models[0], path, external)
    end = time.monotonic() + seconds
    queue = fork.Queue()

    def write(model: ModelProto) -> None:
        count = 0
        while time.monotonic() < end:
            save(model, path, external)
            count += 1
        queue.put({"writes": count})

    def read() -> None:
        found: Counter[str] = Counter()
        while time.monotonic() < end:
            try:
                found["whole" if load(path) in models else "MIXED"] += 1
            except Prune2OnnxError as error:
                found[f"BROKEN: {str(error).replace(str(folder), '')}"] += 1
        queue.put(dict(found))

    children = [fork.Process(target=write, args=(model,)) for model in models]
    children += [fork.Process(target=read) for _ in range(3)]
    for child in children:
        child.start()
    total: Counter[str] = Counter()
    for _ in children:
        total.update(queue.get())
    for child in children:
        child.join()
    total["whole" if load(path) in models else "BROKEN at the end"] += 1
    left = set(bytes_of(folder)) - {MODEL, DATA}
    if left:
        total["LEFT BEHIND"] += len(left)
    return total


def kills(count: int, seed: int = 0, rows: int = 3000) -> list[Case]:
    """Kills so many writes at random moments, and one at each place."""
    random = Random(seed)
    cases = [Case(external, over, rows) for external in (False, True) for over in (False, True)]
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            case.kill(Path(folder), None, 10**6)
            length = time.perf_counter() - began
        case.found.clear()
        for _ in range(count // len(cases)):
            with tempfile.TemporaryDirectory() as folder:
                case.kill(Path(folder), random.uniform(0, length / 3), None)
        for place in range(10**6):
            with tempfile.TemporaryDirectory() as folder:
                if not case.kill(Path(folder), None, place):
                    break
    return cases


def bad(found: Counter[str]) -> int:
    """How many of the findings should not be: those that begin in capitals."""
    return sum(n for what, n in found.items() if what.split()[0].rstrip(":").isupper())


@click.command()
@click.option("--kills", "count", default=600, show_default=True, help="kills at random moments")
@click.option("--seconds", default=20.0, show_default=True, help="of reading, for each kind")
def main(count: int, seconds: float) -> None:
    """Kill, and read."""
    wrong = 0
    for case in kills(count):
        wrong += bad(case.found)
        print(f"{case.name}: {case.found.total()} kills: {dict(case.found.most_common())}")
    for external in (None, DATA):
        with tempfile.TemporaryDirectory() as folder:
            found = readers(Path(folder), seconds, external)
        wrong += bad(found)
        print(f"readers, {'with' if external else 'no'} data file: {dict(found.most_common())}")
    sys.exit(4 if wrong else 0)


if __name__ == "__main__":
    main()
