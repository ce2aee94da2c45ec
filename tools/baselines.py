"""Learned thresholds against four methods of magnitude pruning: same network, data and coding.

    python tools/baselines.py lenet_300_100 --data mnist:DIR -o runs/baselines
    python tools/baselines.py lenet_300_100 --data mnist:DIR --front 4KB,6KB,8.4KB,12KB,20KB,30KB

First form: for each seed, `compress` with models/NETWORK.yaml (learned). Then, each from that run's
dense network and to the density that it had after pruning, with the same loss, augmentation,
batches and epochs: iterative magnitude pruning (imp), gradual (gmp), soft thresholds (str) and
one-shot (oneshot), see tools/magnitude.py. Each is then tuned, quantized and packed by the same
`compress`, to the same budget. Prints a table of the files, then one at equal error: the survivors
that imp needs for the error that the learned run has at the end of tuning, before quantization.
That is read from imp's curve (the dense network, and every round as it is and tuned): the least
error at or below each density, interpolated over log density. If imp never reaches the error, the
row has its best point and a ">"; if it is better everywhere, its sparsest point and a "<". With
--imp-epochs its pruning takes this number of epochs instead of the recipe's, to see how long it
needs. Second form: the learned method alone at several sizes, all from one dense network.

Seconds in the first table: the whole run, dense training included; of a baseline's pruning only its
epochs. In the second table: the epochs, dense ones included. All choices are made on validation
data. Results that are in the folder (DIR/NETWORK/seedN/METHOD/summary.json) are not computed again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from magnitude import RULES, Pruned, Setup, gradual, iterative, one_shot, soft
from safetensors import safe_open
from safetensors.torch import save_file

from prune2onnx import Recipe, RecipeError, compress, fit, load_data, read_recipe, resolve
from prune2onnx.runs.history import Callbacks, Epoch
from prune2onnx.training.denormals import denormals
from prune2onnx.training.fit import make_accelerator, with_epochs
from prune2onnx.training.model import make_model
from prune2onnx.training.scoring import evaluate

ROOT = Path(__file__).parent.parent
METHODS = {
    "learned": "learned thresholds",
    "imp": "iterative magnitude (Han)",
    "gmp": "gradual magnitude (Zhu, Gupta)",
    "str": "soft thresholds (Kusupati)",
    "oneshot": "one-shot magnitude",
}
COLUMNS = ("dense error", "error", "accuracy loss", "density", "bytes", "ratio", "seconds")

Facts = dict[str, Any]


# -- runs, each stored in a file --------------------------------------------------------------


def kept(path: Path, settings: Facts) -> Facts | None:
    """The facts that an earlier call of this tool wrote there; None without any.

    Settings that only one of the two has do not count: the program may have new ones.

    Raises:
        click.ClickException: they come from other settings.
    """
    if not path.exists():
        return None
    facts: Facts = json.loads(path.read_text())
    old = settings_in(path)
    changed = [name for name in settings.keys() & old.keys() if settings[name] != old[name]]
    if changed or not old:
        what = ", ".join(f"{name} was {old[name]!r}" for name in sorted(changed)) or "no settings"
        raise click.ClickException(f"{path}: {what}; remove {path.parent} or choose another -o")
    return facts


def settings_in(path: Path) -> Facts:
    """The settings that a file's facts come from; {} if there are none."""
    facts: Facts = json.loads(path.read_text()) if path.exists() else {}
    settings: Facts = facts.get("settings", {})
    return settings


def keep(path: Path, settings: Facts, facts: Facts) -> Facts:
    """Writes facts with the settings that they come from."""
    facts = {"settings": settings, **facts}
    path.write_text(json.dumps(facts, indent=2))
    return facts


def settings_of(recipe: Recipe) -> Facts:
    """A recipe as dotted names and JSON values, without paths that follow from the folder."""
    content = recipe.model_dump(mode="json", exclude={"model", "weights", "teacher"})
    flat: Facts = {}
    for name, value in content.items():
        nested = value if isinstance(value, dict) else None
        flat |= {f"{name}.{k}": v for k, v in nested.items()} if nested else {name: value}
    return flat


def run(recipe: Recipe, folder: Path) -> Facts:
    """One `compress`, unless it is kept: its figures, and those of the network after tuning."""
    summary, settings = folder / "summary.json", settings_of(recipe)
    found = kept(summary, settings)
    if found is not None:
        return found
    began = time.perf_counter()
    report = compress(
        recipe,
        folder,
        overwrite=True,
        callbacks=Callbacks(on_epoch=lambda e: note_phase(folder, e)),
    )
    assert report is not None
    facts = {
        "dense_error": report.dense.error,
        "error": report.compressed.error,
        "dense_nbytes": report.dense.nbytes,
        "nbytes": report.compressed.nbytes,
        "density": report.density,
        "validation": report.validation,
        "seconds": time.perf_counter() - began,
        "tuned": network(recipe, folder / "checkpoints" / "tune.safetensors"),
    }
    pruned = folder / "checkpoints" / "prune.safetensors"
    if pruned.exists():  # a run that starts with tuning was pruned by `prune`
        facts["pruned"] = network(recipe, pruned)
    return keep(summary, settings, facts)


def network(recipe: Recipe, path: Path) -> Facts:
    """The network in a checkpoint: survivors, errors, and seconds of the epochs so far."""
    data = load_data(recipe.data, validation=recipe.validation, seed=recipe.seed)
    model = make_model(recipe.model_copy(update={"weights": str(path)}), data)
    past = history(path)
    weights = [model.get_parameter(name) for name in past["pruned"]]
    size = sum(w.numel() for w in weights)
    return {
        "pruned": past["pruned"],
        "size": size,
        "density": sum(int(w.count_nonzero()) for w in weights) / size,
        "validation_error": evaluate(model, data.validation)[0],
        "test_error": evaluate(model, data.test)[0],
        "seconds": past["seconds"],
    }


def history(path: Path) -> Facts:
    """Facts of a checkpoint: names of the pruned weights, seconds of all epochs."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["prune2onnx"])
    seconds = sum(epoch["seconds"] for epoch in facts["history"])
    return {"pruned": facts["pruned"], "seconds": seconds}


def note_phase(folder: Path, epoch: Epoch) -> None:
    """A line of progress at the end of a phase."""
    if epoch.epoch == epoch.epochs:
        note(
            folder,
            f"{epoch.phase}: validation error {epoch.validation_error:.2f} %, "
            f"density {100 * epoch.density:.2f} %, {epoch.seconds:.1f} s an epoch",
        )


def note(folder: Path, text: str) -> None:
    """A line of progress."""
    click.echo(f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name} {text}", err=True)


def dense_of(folder: Path) -> Path:
    """The file of a seed's dense network."""
    return folder / "learned" / "checkpoints" / "dense.safetensors"


@dataclass(frozen=True)
class Options:
    """Options of the baselines.

    Attributes:
        rounds: of imp.
        gmp: the layer rule of gmp.
        imp_epochs: epochs of imp; None: the recipe's.
    """

    rounds: int
    gmp: str
    imp_epochs: int | None = None

    def folder(self, method: str) -> str:
        """Name of the folder for a method's run."""
        longer = method == "imp" and self.imp_epochs is not None
        return f"imp-{self.imp_epochs}" if longer else method


def baseline(method: str, recipe: Recipe, folder: Path, options: Options) -> Facts:
    """Prunes the dense network of a learned run by another method; `compress` does the rest.

    Args:
        method: one of `METHODS`.
        recipe: the learned run's.
        folder: of the seed, with the learned run in it.
        options: of the methods.

    Returns:
        As `run`, with the seconds of all steps, and `Pruned.facts` as "pruning".
    """
    dense, target = dense_of(folder), run(recipe, folder / "learned")["pruned"]
    before: float = history(dense)["seconds"]
    recipe = recipe.model_copy(update={"weights": str(dense)})
    place = folder / options.folder(method)
    place.mkdir(parents=True, exist_ok=True)
    record, weights = place / "pruning.json", place / "pruned.safetensors"
    settings = settings_of(recipe) | {"target": target["density"]}
    if method in ("imp", "gmp"):
        settings["option"] = options.rounds if method == "imp" else options.gmp
    pruning = kept(record, settings)
    if pruning is None:
        data = load_data(recipe.data, validation=recipe.validation, seed=recipe.seed)
        device = make_accelerator(recipe).device
        names = tuple(target["pruned"])
        with denormals(flushed=True):
            pruned = prune(method, Setup(data, recipe, names, target["density"], device), options)
        state = pruned.model.cpu().state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, weights)
        pruning = keep(record, settings, pruned.facts())
        note(place, f"pruned in {pruned.seconds:.0f} s of training {pruned.note}")
    again = {"weights": str(weights), "teacher": str(dense), "start": "tune"}
    facts = run(recipe.model_copy(update=again), place)
    facts["seconds"] += before + pruning["seconds"]
    facts["tuned"]["seconds"] += before + pruning["seconds"]
    for point in pruning["curve"]:
        point["seconds"] += before
    return facts | {"pruning": pruning}


def prune(method: str, setup: Setup, options: Options) -> Pruned:
    """Prunes by one method."""
    if method == "imp":
        return iterative(setup, options.rounds, options.imp_epochs)
    if method == "gmp":
        return gradual(setup, options.gmp)
    return {"str": soft, "oneshot": one_shot}[method](setup)


def at_size(recipe: Recipe, size: str, folder: Path) -> Facts:
    """The learned method at the recipe's size, from the seed's dense network.

    Args:
        recipe: has the size.
        size: as given on the command line, for the folder's name.
        folder: of the seed.
    """
    learned = folder / "learned"
    if settings_of(recipe) == settings_in(learned / "summary.json"):
        return run(recipe, learned)  # the same run, dense phase included
    dense = train_dense(recipe, folder)
    here = {"weights": str(dense), "start": "prune"}
    facts = run(recipe.model_copy(update=here), folder / f"front-{size}")
    facts["seconds"] += history(dense)["seconds"]
    return facts


def train_dense(recipe: Recipe, folder: Path) -> Path:
    """The dense network of a seed, trained unless a learned run has stored one."""
    dense, own = dense_of(folder), folder / "learned" / "dense.json"
    settings = {
        name: value
        for name, value in settings_of(recipe).items()
        if name.startswith(("dense.", "augment."))
        or name in ("data", "seed", "validation", "batch_size")
    }
    if any(kept(record, settings) for record in (own.with_name("summary.json"), own)):
        return dense
    data = load_data(recipe.data, validation=recipe.validation, seed=recipe.seed)
    fit(
        make_model(recipe, data),
        data,
        recipe,
        checkpoints=dense.parent,
        stop="dense",
        callbacks=Callbacks(on_epoch=lambda epoch: note_phase(folder / "learned", epoch)),
    )
    keep(own, settings, history(dense))
    return dense


# -- tables -----------------------------------------------------------------------------------


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def files_table(rows: Sequence[tuple[str, int, Facts]], first: str) -> list[str]:
    """A row per run, by groups of the first column, each with its mean and standard deviation."""
    lines = [line(first, "seed", *COLUMNS), line(*["---"] * (2 + len(COLUMNS)))]
    for group in dict.fromkeys(name for name, _, _ in rows):
        values = []
        for seed, facts in [(seed, facts) for name, seed, facts in rows if name == group]:
            error, drop = facts["error"], facts["error"] - facts["dense_error"]
            ratio = facts["dense_nbytes"] / facts["nbytes"]
            density, seconds = 100 * facts["density"], facts["seconds"]
            row = [facts["dense_error"], error, drop, density, facts["nbytes"], ratio, seconds]
            values.append(row)
            lines.append(line(group, seed, *_cells(row)))
        if len(values) > 1:
            lines.append(line(group, "mean", *_cells(np.mean(values, axis=0))))
            lines.append(line(group, "sd", *_cells(np.std(values, axis=0, ddof=1), signed=False)))
    return lines


def _cells(row: Sequence[float], signed: bool = True) -> list[str]:
    dense, error, drop, density, nbytes, ratio, seconds = row
    change = f"{drop:+.2f}" if signed else f"{drop:.2f}"
    percent = [f"{dense:.2f} %", f"{error:.2f} %", change, f"{density:.2f} %"]
    return [*percent, f"{nbytes:,.0f}", f"{ratio:.1f}", f"{seconds:.0f}"]


@dataclass(frozen=True)
class Need:
    """The density and seconds at which a curve reaches an error; bound is "", "<" or ">"."""

    density: float
    seconds: float
    bound: str = ""


def needed(curve: Sequence[Facts], error: float, by: str) -> Need:
    """Where a curve reaches an error.

    The curve is the least error at or below each density, so noise cannot make it rise; between its
    points, error and seconds are linear in log density.

    Args:
        curve: points as `magnitude.Point`.
        error: percent.
        by: "test_error" or "validation_error".
    """
    best: list[Facts] = []
    for point in sorted(curve, key=lambda p: (p["density"], p[by])):
        if not best or point[by] < best[-1][by]:
            best.append(point)
    if error >= best[0][by]:
        return Need(best[0]["density"], best[0]["seconds"], "" if error == best[0][by] else "<")
    if error < best[-1][by]:
        return Need(best[-1]["density"], best[-1]["seconds"], ">")
    after = next(index for index, point in enumerate(best) if point[by] <= error)
    a, b = best[after - 1], best[after]
    fraction = (a[by] - error) / (a[by] - b[by])
    density = a["density"] * (b["density"] / a["density"]) ** fraction
    return Need(density, a["seconds"] + fraction * (b["seconds"] - a["seconds"]))


def curve_of(facts: Facts, dense: Facts) -> list[Facts]:
    """A method's error over density: the dense network, the rounds, the final network."""
    return [dense, *facts["pruning"]["curve"], facts["tuned"]]


def average(points: Sequence[Facts]) -> Facts:
    """The same point of several seeds: geometric mean of the densities, mean of the rest."""
    names = ("validation_error", "test_error", "seconds")
    mean: Facts = {name: float(np.mean([p[name] for p in points])) for name in names}
    return mean | {"density": math.exp(np.mean([math.log(p["density"]) for p in points]))}


def equal_error_table(runs: dict[int, tuple[Facts, list[Facts]]]) -> list[str]:
    """Survivors and seconds at the learned run's error, by seed, and on the mean of the curves.

    Args:
        runs: by seed, the learned run's network after tuning and imp's curve.
    """
    size = next(iter(runs.values()))[0]["size"]
    head = ["seed", "error", "survivors", "seconds", "survivors imp needs", "seconds imp needs"]
    head += ["imp / learned", "fewer", "imp / learned on validation data"]
    lines, ratios = [line(*head), line(*["---"] * len(head))], []

    def row(name: object, ours: Facts, curve: Sequence[Facts]) -> float:
        need = needed(curve, ours["test_error"], "test_error")
        other = needed(curve, ours["validation_error"], "validation_error")
        ratio: float = need.density / ours["density"]
        ours_cells = [f"{ours['test_error']:.2f} %", f"{ours['density'] * size:,.0f}"]
        theirs = [f"{need.bound}{need.density * size:,.0f}", f"{need.seconds:.0f}"]
        times = [f"{need.bound}{ratio:.2f}", f"{need.bound}{100 * (1 - 1 / ratio):.0f} %"]
        checked = f"{other.bound}{other.density / ours['density']:.2f}"
        lines.append(line(name, *ours_cells, f"{ours['seconds']:.0f}", *theirs, *times, checked))
        return ratio

    for seed, (ours, curve) in runs.items():
        ratios.append(row(seed, ours, curve))
    curves = [curve for _, curve in runs.values()]
    means = [average(points) for points in zip(*curves, strict=True)]
    row("mean of curves", average([ours for ours, _ in runs.values()]), means)
    mean = math.exp(np.mean(np.log(ratios)))
    cells = [f"{mean:.2f}", f"{100 * (1 - 1 / mean):.0f} %", ""]
    lines.append(line("geometric mean", *[""] * 5, *cells))
    return lines


# -- the command ------------------------------------------------------------------------------


def recipe_for(network: str, data: str, seed: int, overrides: Sequence[str]) -> Recipe:
    """The recipe of a network with the changes of the command line, epochs filled in.

    Raises:
        click.ClickException: it does not fit.
    """
    given = dict(text.partition("=")[::2] for text in overrides)
    try:
        content = read_recipe(ROOT / "models" / f"{network}.yaml")
        changes = {name: yaml.safe_load(value) for name, value in given.items()}
        changes |= {"data": data, "seed": seed, "model": str(ROOT / content["model"])}
        recipe = resolve(content, changes, f"{network}.yaml")
    except (RecipeError, yaml.YAMLError) as error:
        raise click.ClickException(str(error)) from error
    if recipe.searches or recipe.precision != "no" or recipe.first_phase != "dense":
        raise click.ClickException(
            "the recipe searches, uses mixed precision or starts from weights; expected a target "
            "size, a target density or no budget, precision no, and the dense phase first; change "
            "that with --set"
        )
    split = load_data(recipe.data, validation=recipe.validation, seed=recipe.seed).train
    return with_epochs(recipe, len(split))  # type: ignore[arg-type]


def dense_point(recipe: Recipe, path: Path) -> Facts:
    """The dense network as the first point of a curve."""
    data = load_data(recipe.data, validation=recipe.validation, seed=recipe.seed)
    model = make_model(recipe.model_copy(update={"weights": str(path)}), data)
    errors = [evaluate(model, split)[0] for split in (data.validation, data.test)]
    names = ("validation_error", "test_error")
    return dict(zip(names, errors, strict=True)) | {
        "density": 1.0,
        "seconds": history(path)["seconds"],
    }


@click.command()
@click.argument("network", type=click.Choice([p.stem for p in (ROOT / "models").glob("*.yaml")]))
@click.option("--data", default="mnist", help="data set: mnist, mnist:DIR or another")
@click.option("--seeds", default="0,1,2", help="random seeds, comma-separated")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/baselines"))
@click.option(
    "--methods", default=",".join(METHODS), help="methods, comma-separated; learned always runs"
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change a setting of the recipe"
)
@click.option(
    "--front", default="", metavar="SIZES", help="run learned alone at these sizes, as 4KB,8.4KB"
)
@click.option("--rounds", default=6, type=click.IntRange(min=1), help="rounds of imp")
@click.option(
    "--imp-epochs", type=click.IntRange(min=1), help="epochs of imp  [default: the recipe's]"
)
@click.option(
    "--gmp", default="better", type=click.Choice(["better", *RULES]), help="layer rule of gmp"
)
def main(
    network: str,
    data: str,
    seeds: str,
    output: Path,
    methods: str,
    overrides: tuple[str, ...],
    front: str,
    rounds: int,
    imp_epochs: int | None,
    gmp: str,
) -> None:
    """Run the methods, or the learned one at several sizes, over the seeds; print the tables."""
    wanted = methods.split(",")
    unknown = set(wanted) - METHODS.keys()
    if unknown:
        raise click.UsageError(f"--methods: {', '.join(unknown)}; known are {', '.join(METHODS)}")
    recipes = {
        seed: recipe_for(network, data, seed, overrides) for seed in map(int, seeds.split(","))
    }
    folders = {seed: (output / network / f"seed{seed}").resolve() for seed in recipes}
    rows: list[tuple[str, int, Facts]] = []
    if front:
        recipes_at = {
            (size, seed): recipe_for(network, data, seed, (*overrides, f"target_size={size}"))
            for size in front.split(",")
            for seed in recipes
        }
        for (size, seed), recipe in recipes_at.items():
            rows.append((size, seed, at_size(recipe, size, folders[seed])))
        click.echo("\n".join(files_table(rows, "target")))
        return
    curves: dict[int, tuple[Facts, list[Facts]]] = {}
    for seed, recipe in recipes.items():
        folder = folders[seed]
        ours = run(recipe, folder / "learned")
        rows.append((METHODS["learned"], seed, ours))
        for method in [name for name in METHODS if name in wanted and name != "learned"]:
            facts = baseline(method, recipe, folder, Options(rounds, gmp, imp_epochs))
            rows.append((METHODS[method], seed, facts))
            if method == "imp":
                dense = dense_point(recipe, dense_of(folder))
                curves[seed] = ours["tuned"], curve_of(facts, dense)
    click.echo("\n".join(files_table(rows, "method")))
    if curves:
        click.echo("\nAt the learned run's error:\n")
        click.echo("\n".join(equal_error_table(curves)))


if __name__ == "__main__":
    main()
