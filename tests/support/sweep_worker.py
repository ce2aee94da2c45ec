"""`python sweep_worker.py`: a worker whose runs are pretended; does one sweep per line of stdin.

A line is JSON: folder, url, log, budgets, and dies_after: runs to add before the process kills
itself, or null. It is answered by a line: the Pareto front, or the error.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any


def pretend(name: str, **content: Any) -> None:
    """Takes the place of a module whose imports take longer than many sweeps."""
    if __name__ != "__main__":
        return  # where pytest imports it, the modules themselves are wanted
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


asked: dict[str, Any] = {}


def compress(recipe: Any, directory: Path, **_: Any) -> Any:
    """Notes the run in the log, and takes a moment."""
    with Path(asked["log"]).open("a") as stream:
        stream.write(f"{directory.name}\n")
    time.sleep(0.02)
    return REPORT


pretend("prune2onnx.commands.compress", compress=compress)
pretend(
    "prune2onnx.commands.prepare",
    prepared=lambda recipe: None,
    train_dense=lambda recipe, folder, **_: folder / "dense.safetensors",
)
pretend("prune2onnx.runs.pages.charts", front_picture=lambda front: b"")
pretend("prune2onnx.runs.pages.page", write_page=lambda folder: None)

from prune2onnx.commands import sweep as sweeping  # noqa: E402
from prune2onnx.runs.recipe import resolve  # noqa: E402
from prune2onnx.runs.report import Measured, Report  # noqa: E402
from prune2onnx.runs.study import Study  # noqa: E402

REPORT = Report(
    version="0",
    seed=0,
    environment={},
    dense=Measured(9000, 1.0),
    compressed=Measured(1000, 2.0),
    folded=True,
    max_abs_diff=0.0,
    density=0.1,
    weights=(),
    validation={"dense_error": 1.5, "error": 2.5},
)


def say(answer: str) -> None:
    """Answers one line."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class Dying(Study):
    """Kills the process while it adds the runs."""

    added = 0

    def _add(self, *run: Any) -> None:
        if self.added == asked["dies_after"]:
            os.kill(os.getpid(), signal.SIGKILL)
        self.added += 1
        super()._add(*run)


def main() -> None:
    """Answers every line."""
    sweeping._POLL, sweeping.Study = 0.05, Dying
    recipe = resolve({"model": "unused:unused"})
    say("ready")
    for line in sys.stdin:
        asked.update(json.loads(line))
        try:
            front = sweeping.sweep(
                recipe, asked["folder"], storage=asked["url"], **asked["budgets"]
            )
            answer = front.to_json()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        say(answer)


if __name__ == "__main__":
    main()
