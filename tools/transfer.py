"""Whether features of a pruned network transfer as well as the dense one's (arXiv 1712.01721).

    python tools/transfer.py RUN... --letters idx:DIR

RUN is the folder of a run of `compress`. There are two other tasks: EMNIST's letters (26 classes,
drawn like MNIST) and scikit-learn's digits, enlarged to the same frame. For dense.onnx and
model.onnx of each run:

1. Features: the input of the last layer (`prune2onnx.features`), without constant features, scaled
   to unit variance. A linear SVM and a logistic regression are trained on them, with C chosen by
   3-fold cross-validation on at most 100 training examples per class, then fitted to at most 400.
2. Fine-tuning: the network with a new last layer is trained by Adam on the same examples, from the
   dense weights, from the pruned ones with their zeros held, and from the pruned ones without.

Runs of one network and file size count as seeds of one experiment. The interval is the 95 %
interval of the paired difference, compressed minus dense on the same test examples, by the normal
approximation; with several runs it is that of their mean, with independent test examples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.feature_selection import VarianceThreshold
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from prune2onnx import hold_zeros, load_data, resolve
from prune2onnx.commands.features import features
from prune2onnx.data import Arrays, Data
from prune2onnx.graph.file import load
from prune2onnx.pruning import prunable_weights
from prune2onnx.runs.folder import recipe_of
from prune2onnx.training.denormals import denormals
from prune2onnx.training.model import make_model

GRID = (0.001, 0.01, 0.1)
MOST_FOR_CHOICE, MOST_TO_FIT = 100, 400  # training examples of a class
FRAME, BOX = 28, 20  # of MNIST: a digit fills a box within a frame
EPOCHS, BATCH, RATE = 8, 128, 1e-3  # of fine-tuning

MNIST = Data("mnist", *[None] * 3, (1, FRAME, FRAME), 10)  # type: ignore[arg-type]
"""The shape and classes that networks are made for, without examples."""

Xy = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Task:
    """Another task: images [n, 1, 28, 28] of 0-1, and labels; compared by identity."""

    name: str
    train: Xy
    test: Xy
    classes: int


def task(name: str, data: Data) -> Task:
    """A data set as arrays; its validation split counts as training data here."""
    train, held, test = (arrays_of(split) for split in (data.train, data.validation, data.test))
    both = np.concatenate([train[0], held[0]]), np.concatenate([train[1], held[1]])
    return Task(name, both, test, data.classes)


def arrays_of(split: Any) -> Xy:
    """All examples of a split; images are enlarged to MNIST's frame."""
    assert isinstance(split, Arrays)
    x, y = split.__getitems__(range(len(split)))
    return np.stack([framed(image) for image in x]), y


def framed(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """[1, h, w] to [1, 28, 28]: enlarged to MNIST's box and put in the middle."""
    if image.shape[1:] == (FRAME, FRAME):
        return image
    grey = Image.fromarray(np.uint8(255 * image[0])).resize((BOX, BOX), Image.Resampling.BILINEAR)
    edge = (FRAME - BOX) // 2
    return np.pad(np.asarray(grey, np.float32)[None] / 255, ((0, 0), (edge, edge), (edge, edge)))


def some(given: Task, seed: int) -> Xy:
    """Training examples, drawn at random: of each class `MOST_TO_FIT` at most."""
    images, labels = given.train
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == c][:MOST_TO_FIT] for c in range(given.classes)])
    return images[chosen], labels[chosen]


# -- a linear classifier on features ----------------------------------------------------------


def batches_of(xy: Xy) -> list[Xy]:
    """In batches, for onnxruntime."""
    return [(xy[0][i : i + 512], xy[1][i : i + 512]) for i in range(0, len(xy[1]), 512)]


@cache
def rights(classifier: str, file: Path, given: Task, seed: int) -> NDArray[np.bool_]:
    """Which test examples a linear classifier on a file's features gets right."""
    model = load(file)
    (x, y), (u, v) = (features(model, batches_of(part)) for part in (some(given, seed), given.test))
    x, u = x.reshape(len(x), -1), u.reshape(len(u), -1)
    few = np.concatenate([np.flatnonzero(y == c)[:MOST_FOR_CHOICE] for c in range(given.classes)])
    linear: Any = LinearSVC(dual=False, tol=1e-3, random_state=seed)
    if classifier == "logistic":
        linear = LogisticRegression(max_iter=300, tol=1e-3, random_state=seed)
    grid = {f"{type(linear).__name__.lower()}__C": GRID}
    whole = make_pipeline(VarianceThreshold(), StandardScaler(), linear)
    best = GridSearchCV(whole, grid, cv=3).fit(x[few], y[few]).best_params_
    return whole.set_params(**best).fit(x, y).predict(u) == v


# -- fine-tuning ------------------------------------------------------------------------------


@cache
def tuned(network: str, weights: Path, held: bool, given: Task, seed: int) -> NDArray[np.bool_]:
    """Which test examples a network gets right after fine-tuning from given weights.

    Args:
        network: the function that makes it, as in a recipe.
        weights: a checkpoint.
        held: whether zeros stay zeros, except in the new last layer.
        given: the task.
        seed: of the new layer, the choice of examples and their order.
    """
    recipe = resolve({"model": network, "data": MNIST.name, "weights": str(weights)})
    model = make_model(recipe, MNIST)
    torch.manual_seed(seed)
    *others, last = prunable_weights(model)
    name = last.removesuffix(".weight")
    old: Any = model.get_submodule(name)
    model.set_submodule(name, nn.Linear(old.in_features, given.classes))
    if held:
        hold_zeros(model, {other: model.get_parameter(other).detach() != 0 for other in others})
    x, y = (torch.from_numpy(part) for part in some(given, seed))
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = EPOCHS * (len(y) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with denormals(flushed=True):
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(y), generator=generator).split(BATCH):
                if len(chosen) == BATCH:
                    loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    schedule.step()
    model.eval()
    with torch.no_grad():
        parts = torch.from_numpy(given.test[0]).split(512)
        answers = np.concatenate([model(part).argmax(1).numpy() for part in parts])
    return answers == given.test[1]


# -- tables -----------------------------------------------------------------------------------


def difference(ours: Sequence[NDArray[np.bool_]], dense: Sequence[NDArray[np.bool_]]) -> str:
    """Mean paired difference in points, and its 95 % interval."""
    each = [100 * (a.astype(float) - b) for a, b in zip(ours, dense, strict=True)]
    mean = float(np.mean([d.mean() for d in each]))
    error = float(np.sqrt(np.sum([d.var(ddof=1) / len(d) for d in each])) / len(each))
    return f"{mean:+.2f} ({mean - 1.96 * error:+.2f} to {mean + 1.96 * error:+.2f})"


def percent(rights: Sequence[NDArray[np.bool_]]) -> str:
    """Accuracy, mean over runs and standard deviation."""
    each = [100 * right.mean() for right in rights]
    spread = f" ± {np.std(each, ddof=1):.2f}" if len(each) > 1 else ""
    return f"{np.mean(each):.2f}{spread}"


def grouped(runs: Sequence[Path]) -> dict[tuple[str, str], list[Path]]:
    """Runs by network and file size: the target size, if there was one, and the ratio to dense."""
    groups: dict[tuple[str, int], dict[Path, float]] = {}
    for run in runs:
        recipe, report = recipe_of(run), json.loads((run / "report.json").read_text())
        size = recipe.target_size or report["compressed"]["nbytes"]
        groups.setdefault((recipe.model.rpartition(":")[2], size), {})[run] = report["ratio"]
    return {
        (network, f"{size:,} bytes, {np.mean(list(ratios.values())):.0f}x"): list(ratios)
        for (network, size), ratios in groups.items()
    }


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--letters", required=True, help="data set of EMNIST's letters, as idx:DIR")
@click.option("--skip-tuning", is_flag=True, help="print the table of features alone")
def main(runs: tuple[Path, ...], letters: str, skip_tuning: bool) -> None:
    """Print the table of features, then that of fine-tuning."""
    seen: dict[bytes, Path] = {}

    def first(file: Path) -> Path:
        """The first file with these bytes: runs from one dense network share its features."""
        return seen.setdefault(sha256(file.read_bytes()).digest(), file)

    tasks = [task("letters", load_data(letters)), task("digits", load_data("digits"))]
    groups = grouped(runs)
    click.echo("| network | file | task | classifier | runs | dense | compressed | difference |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (network, size), members in groups.items():
        for given in tasks:
            for classifier in ("svm", "logistic"):
                dense, ours = (
                    [
                        rights(classifier, first(run / file), given, recipe_of(run).seed)
                        for run in members
                    ]
                    for file in ("dense.onnx", "model.onnx")
                )
                row(network, size, given.name, classifier, dense, ours)
    if skip_tuning:
        return
    began = time.perf_counter()
    click.echo("\n| network | file | task | start | runs | dense | compressed | difference |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (network, size), members in groups.items():
        for given in tasks:
            dense = [tuned_of(run, "dense", False, given) for run in members]
            for how, held in (("zeros held", True), ("all free", False)):
                ours = [tuned_of(run, "quantize", held, given) for run in members]
                row(network, size, given.name, how, dense, ours)
    click.echo(f"\nfine-tuning: {time.perf_counter() - began:.0f} s", err=True)


def tuned_of(run: Path, phase: str, held: bool, given: Task) -> NDArray[np.bool_]:
    """`tuned` from a run's weights at the end of a phase, or its first ones without that phase."""
    recipe = recipe_of(run)
    weights = run / "checkpoints" / f"{phase}.safetensors"
    if not weights.exists():
        assert phase == "dense" and recipe.weights is not None  # it began with pruning
        weights = Path(recipe.weights)
    return tuned(recipe.model, weights, held, given, recipe.seed)


def row(
    network: str,
    size: str,
    name: str,
    how: str,
    dense: Sequence[NDArray[np.bool_]],
    ours: Sequence[NDArray[np.bool_]],
) -> None:
    """A line of a table."""
    cells = [network, size, name, how, str(len(ours)), percent(dense), percent(ours)]
    click.echo(f"| {' | '.join([*cells, difference(ours, dense)])} |")


if __name__ == "__main__":
    main()
