"""Does calibrated rounding help where training puts weights on levels?

    PRUNE2ONNX_DATA=DIR python tools/seams.py [--seeds 0,1,2] [--epochs 0,1,3]

LeNet-300-100 on MNIST, a tenth of its weights left, largest level 2. At the seam from tune to
quantize, weights are rounded to the nearest level, as `fit` does, or one input after the other with
those that follow making up for errors (`packing.calibration.rounding`), on 2,048 training images.
Then so many epochs of quantization-aware training follow. Printed is the error on the validation
split, in percent: before the seam, behind it, and at the end. The other seam, from prune to tune,
leaves nothing to make up for: pruned weights are below their thresholds, and zero already.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from prune2onnx.callables import load_callable
from prune2onnx.data import load_data
from prune2onnx.packing.calibration.moments import DAMPING
from prune2onnx.packing.calibration.rounding import Factor, rounded
from prune2onnx.runs.recipe import Recipe
from prune2onnx.training import phases
from prune2onnx.training.compression.course import Course
from prune2onnx.training.fit import fit

MODELS = Path(__file__).parent.parent / "models"
DATA = Path(os.environ.get("PRUNE2ONNX_DATA", "data"))
EXAMPLES, LEVELS, DENSITY = 2048, 2, 0.1


def calibrate(model: nn.Module, x: torch.Tensor) -> None:
    """Moves the weights of linear layers on levels so that later inputs make up for errors."""
    for layer in [one for one in model.modules() if isinstance(one, nn.Linear)]:
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _, given, out, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            model(x)
        hook.remove()
        own: Any = layer
        original = own.parametrizations.weight.original
        on_levels = own.parametrizations.weight[0]
        inputs = seen[0].double().numpy()
        moments = inputs.T @ inputs / len(inputs)
        moments += (DAMPING * np.trace(moments) / len(moments) + 1e-12) * np.eye(len(moments))
        target = original.detach().double().numpy().T
        step = np.full(target.shape[1], on_levels.step().item(), np.float32)
        alive = on_levels.alive.numpy().T
        nearest = np.clip(np.rint(target / step), -LEVELS, LEVELS).astype(np.int16)
        codes = rounded(target, Factor.of(moments), step, 0.0, nearest, alive, (-LEVELS, LEVELS))
        with torch.no_grad():
            original.copy_(torch.from_numpy((codes * step).T))


def run(seed: int, epochs: int, calibrates: bool) -> tuple[float, float, float]:
    """Validation error before the seam, behind it, and at the end."""
    data = load_data(f"mnist:{DATA / 'mnist'}", seed=seed)
    recipe = Recipe.model_validate(
        {
            "model": "lenet",
            "data": "mnist",
            "seed": seed,
            "target_density": DENSITY,
            "dense": {"epochs": 3},
            "prune": {"epochs": 6},
            "tune": {"epochs": 2},
            "quantize": {"epochs": epochs, "levels": LEVELS},
        }
    )
    torch.manual_seed(seed)
    model = load_callable(f"{MODELS / 'lenet.py'}:lenet_300_100")()
    x = torch.from_numpy(np.stack([data.train[at][0] for at in range(EXAMPLES)]))
    plain, errors = phases.put_on_recipe_levels, []

    def put(course: Course, network: nn.Module, names: Iterable[str]) -> None:
        errors.append(course.error(network))
        plain(course, network, names)
        if calibrates:
            calibrate(network, x)
        errors.append(course.error(network))

    phases.put_on_recipe_levels = put  # type: ignore[attr-defined]
    try:
        fitted = fit(model, data, recipe)
    finally:
        phases.put_on_recipe_levels = plain  # type: ignore[attr-defined]
    return errors[0], errors[1], fitted.history[-1].value


@click.command()
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--epochs", default="1,3", show_default=True)
def main(seeds: str, epochs: str) -> None:
    """Prints a line for each seed and number of epochs."""
    torch.set_flush_denormal(True)
    print(f"| seed | epochs | rounding | before | behind | at the end |\n{'| --- ' * 6}|")
    for count in map(int, epochs.split(",")):
        for seed in map(int, seeds.split(",")):
            for calibrates in (False, True):
                figures = " | ".join(f"{value:.2f}" for value in run(seed, count, calibrates))
                how = "calibrated" if calibrates else "nearest"
                print(f"| {seed} | {count} | {how} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
