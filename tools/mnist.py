"""MNIST: learned thresholds beside magnitude pruning, same network, density, epochs and coding.

    python tools/mnist.py lenet_300_100 --data mnist:DIR -o runs/mnist

For each seed: `compress` by the recipe models/NAME.yaml; then, from the very same dense network,
iterative magnitude pruning (Han et al., arXiv 1506.02626) to the density the learned thresholds
reached, with as many epochs, then the same tuning, codebooks and packing. Everything is chosen
before the test set is read, which `compress` does once, at its end. Seconds are from nothing to
the report, dense training included. Prints a Markdown table; what
is finished in the folder is not run again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prune2onnx import compress, hold_zeros, load_data, read_recipe, resolve
from prune2onnx.data import Data, collate
from prune2onnx.pipeline import make_model
from prune2onnx.pruning import prunable_weights
from prune2onnx.recipe import Recipe

ROUNDS = 5


def magnitude_masks(model: nn.Module, density: float) -> dict[str, Tensor]:
    """Masks that keep |w| > q * std(w) of each layer, with one q for the wanted total density."""
    weights = {name: model.get_parameter(name).detach() for name in prunable_weights(model)}
    relative = {name: w.abs() / w[w != 0].std() for name, w in weights.items()}
    every = torch.cat([r.flatten() for r in relative.values()])
    keep = round(density * every.numel())
    q = every.kthvalue(every.numel() - keep).values
    return {name: r > q for name, r in relative.items()}


def retrain(
    model: nn.Module, masks: dict[str, Tensor], data: Data, recipe: Recipe, epochs: int, seed: int
) -> None:
    """Adam with a linear warm-up and half a cosine, masks held, as the tuning phase does it."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    lift = hold_zeros(model, masks)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        data.train, recipe.batch_size, True, generator=generator, collate_fn=collate, drop_last=True
    )
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.prune.lr, epochs * len(loader), pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
            schedule.step()
    lift()


def prune_by_magnitude(ours: Recipe, dense: Path, density: float, out: Path) -> None:
    """Five rounds of prune and retrain, densities in geometric progression."""
    began = time.perf_counter()
    torch.set_flush_denormal(True)
    data = load_data(ours.data, validation=ours.validation, seed=ours.seed)
    model = make_model(ours.model_copy(update={"weights": str(dense)}), data)
    epochs = np.diff(np.linspace(0, ours.prune.epochs or 0, ROUNDS + 1).round().astype(int))
    for number, count in enumerate(epochs, 1):
        masks = magnitude_masks(model, density ** (number / ROUNDS))
        retrain(model, masks, data, ours, int(count), seed=1000 * ours.seed + number)
    out.parent.mkdir(parents=True, exist_ok=True)
    spent = {"seconds": str(time.perf_counter() - began)}
    save_file({n: value.contiguous() for n, value in model.state_dict().items()}, out, spent)


def run(recipe: Recipe, folder: Path) -> dict[str, float]:
    """One `compress`, unless its report is there; the figures with its time."""
    summary = folder / "summary.json"
    if not summary.exists():
        began = time.perf_counter()
        report = compress(recipe, folder, overwrite=True)
        assert report is not None
        facts = {
            "dense_error": report.dense.error,
            "error": report.compressed.error,
            "dense_nbytes": report.dense.nbytes,
            "nbytes": report.compressed.nbytes,
            "density": report.density,
            "folded": report.folded,
            "seconds": time.perf_counter() - began,
        }
        summary.write_text(json.dumps(facts, indent=2))
    result: dict[str, float] = json.loads(summary.read_text())
    return result


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@click.command()
@click.argument("network", type=click.Choice(["lenet_300_100", "lenet5"]))
@click.option("--data", default="mnist", help="mnist or mnist:DIR")
@click.option("--seeds", default="0,1,2", help="comma-separated")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/mnist"))
@click.option("--ours-only", is_flag=True, help="leave the baseline out")
def main(network: str, data: str, seeds: str, output: Path, ours_only: bool) -> None:
    """Run both methods over the seeds and print the table."""
    rows: list[tuple[str, int, dict[str, float]]] = []
    root = Path(__file__).parent.parent
    for seed in map(int, seeds.split(",")):
        content = read_recipe(root / "models" / f"{network}.yaml")
        model = f"{root}/models/lenet.py:{network}"
        recipe = resolve(content, {"data": data, "seed": seed, "model": model})
        folder = output / network / f"seed{seed}"
        ours = run(recipe, folder / "learned")
        rows.append(("learned thresholds", seed, ours))
        if ours_only:
            continue
        pruned = folder / "magnitude.safetensors"
        dense = folder / "learned" / "checkpoints" / "dense.safetensors"
        if not pruned.exists():
            prune_by_magnitude(recipe, dense, ours["density"], pruned)
        again = recipe.model_copy(update={"weights": str(pruned), "start": "tune"})
        baseline = run(again, folder / "magnitude")
        baseline |= {key: ours[key] for key in ("dense_error", "dense_nbytes")}
        baseline["seconds"] += float(metadata(pruned)["seconds"])
        history = json.loads(metadata(dense)["prune2onnx"])["history"]
        baseline["seconds"] += sum(epoch["seconds"] for epoch in history)
        rows.append(("magnitude (Han et al.)", seed, baseline))
    print("| method | seed | dense error | error | drop | density | bytes | ratio | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for method in dict.fromkeys(name for name, _, _ in rows):
        mine = [(seed, facts) for name, seed, facts in rows if name == method]
        columns = []
        for seed, facts in mine:
            values = [
                facts["dense_error"],
                facts["error"],
                facts["error"] - facts["dense_error"],
                100 * facts["density"],
                facts["nbytes"],
                facts["dense_nbytes"] / facts["nbytes"],
                facts["seconds"],
            ]
            columns.append(values)
            print(_line(method, str(seed), values))
        print(_line(method, "mean", list(np.mean(columns, axis=0))))
        print(_line(method, "sd", list(np.std(columns, axis=0, ddof=min(1, len(columns) - 1)))))


def _line(method: str, seed: str, values: list[float]) -> str:
    dense, error, drop, density, nbytes, ratio, seconds = values
    return (
        f"| {method} | {seed} | {dense:.2f} % | {error:.2f} % | {drop:+.2f} | {density:.2f} % | "
        f"{nbytes:,.0f} | {ratio:.1f} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
