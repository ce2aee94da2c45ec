"""Training: a network becomes small while it learns (`fit`), and the rooms that `fit` needs."""

from prune2onnx.history import Epoch
from prune2onnx.training.augment import check_images
from prune2onnx.training.denormals import denormals
from prune2onnx.training.fit import Fitted, end_processes, fit, make_accelerator, with_epochs
from prune2onnx.training.loop import PHASES, Step, step_with_brake
from prune2onnx.training.phases import Deployment
from prune2onnx.training.scoring import check_output, evaluate

__all__ = [
    "PHASES",
    "Deployment",
    "Epoch",
    "Fitted",
    "Step",
    "check_images",
    "check_output",
    "denormals",
    "end_processes",
    "evaluate",
    "fit",
    "make_accelerator",
    "step_with_brake",
    "with_epochs",
]
