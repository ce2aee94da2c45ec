"""Regression on tables: scikit-learn's diabetes, and Friedman's function of 20 inputs.

Friedman, "Multivariate adaptive regression splines" (1991): five of the inputs count, the others
are noise.
"""

import numpy as np
from sklearn.datasets import load_diabetes, make_friedman1
from torch import nn


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """442 patients: `[442, 10]` measurements, and the disease's progress after a year."""
    return load_diabetes(return_X_y=True)


def friedman(examples: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    """`[n, 20]` uniform numbers, and 10 sin(pi a b) + 20 (c - 0.5)^2 + 10 d + 5 e + noise."""
    return make_friedman1(examples, n_features=20, noise=1.0, random_state=0)


def mlp(input_shape: tuple[int, ...], classes: int = 1, width: int = 256) -> nn.Module:
    """Three linear layers: `[batch, inputs]` to `[batch, classes]` numbers."""
    return nn.Sequential(
        nn.Linear(input_shape[0], width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )
