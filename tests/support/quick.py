"""Settings of a short `compress` run on the digits."""

from places import ROOT

QUICK = {
    "model": f"{ROOT / 'models' / 'lenet.py'}:lenet_300_100",
    "dense": {"epochs": 4},
    "prune": {"epochs": 4, "threshold_lr": 0.1},
    "tune": {"epochs": 3},
    "quantize": {"epochs": 3},
}
