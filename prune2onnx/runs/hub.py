"""Folders as on the Hugging Face hub: the names by which readers find a model in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ONNX = "onnx"
CONFIG = "config.json"
CARD = "README.md"
SETTINGS = "transformers.js_config"
"""Key of config.json that transformers.js alone reads."""

DTYPES = {
    "": "fp32",
    "_fp16": "fp16",
    "_quantized": "q8",
    "_int8": "int8",
    "_uint8": "uint8",
    "_q4f16": "q4f16",
    "_q4": "q4",
    "_q2f16": "q2f16",
    "_q2": "q2",
    "_q1f16": "q1f16",
    "_q1": "q1",
    "_bnb4": "bnb4",
}
"""Ending of a file's name -> the dtype of transformers.js (src/utils/dtypes.js, 4.3.2)."""


def ending(model: Path) -> str:
    """The ending of a model's name that stands for its dtype; "" for float32.

    >>> ending(Path("onnx/model_q4f16.onnx")), ending(Path("decoder_model.onnx"))
    ('_q4f16', '')
    """
    stem = model.name.removesuffix(".onnx")
    return next((end for end in DTYPES if end and stem.endswith(end)), "")


def base(model: Path) -> str:
    """A model's name without that ending."""
    return model.name.removesuffix(".onnx").removesuffix(ending(model))


def config_of(folder: Path) -> dict[str, Any] | None:
    """The content of config.json; None where there is none, or none with settings."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
