"""Shrinks random graphs and compares outputs in onnxruntime.

    python tools/shrink_fuzz.py --graphs 20000

The graphs are those of tests/support/random_graphs.py, by their number as the seed; CI tries the
first 300. Prints how many were run, smaller, and wrong, and how often each operator occurred. Exit
status 4 if any was wrong.
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from random_graphs import graph

from prune2onnx.errors import MismatchError, Prune2OnnxError
from prune2onnx.runtime.compare import check_outputs, coarsest
from prune2onnx.runtime.session import run, session
from prune2onnx.shrinking.shrink import shrink


def outcome(seed: int) -> tuple[str, Counter[str]]:
    """What became of one graph, and the operators in it."""
    model, inputs = graph(seed)
    try:
        wanted = run(session(model, threads=1), inputs)
    except Prune2OnnxError:
        return "onnxruntime has no kernel", Counter()
    operators = Counter(node.op_type for node in model.graph.node)
    small = shrink(model)
    try:
        got = run(session(small.model, threads=1), inputs)
        check_outputs(f"graph {seed}", got[0], wanted[0], coarsest(model))
    except (MismatchError, Prune2OnnxError) as error:
        return f"WRONG: {seed}: {error}", operators
    if shrink(small.model).model != small.model:
        return f"WRONG: {seed}: shrunk again, it changes", operators
    return "smaller" if small.rows else "the same", operators


@click.command()
@click.option("--graphs", default=20_000, show_default=True)
@click.option("--first", default=0, show_default=True, help="the first seed")
@click.option("--jobs", default=2, show_default=True)
def main(graphs: int, first: int, jobs: int) -> None:
    """Try so many graphs."""
    found: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs) as pool:
        for text, used in pool.map(outcome, range(first, first + graphs), chunksize=50):
            if text.startswith("WRONG"):
                print(text, flush=True)
                text = "WRONG"
            found[text] += 1
            operators += used
    print(dict(found))
    print(", ".join(f"{name} {count:,}" for name, count in operators.most_common()))
    sys.exit(4 if found["WRONG"] else 0)


if __name__ == "__main__":
    main()
