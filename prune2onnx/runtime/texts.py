"""Lines of text as the inputs that a graph asks for: tokens, masks, types, positions, no past.

What is fed, by the name of the input:

1. `input_ids` (or the only input of integers): the tokens of a line;
2. `attention_mask`: 1 for a token, 0 for padding;
3. `token_type_ids`: the sentence of a pair; `position_ids`: 0, 1, 2, ...;
4. `past_key_values...`: nothing yet, of length 0; `use_cache_branch`: false.

Lines of one length make a batch, so that nothing is padded: what is calibrated on padding fits
padding. Lines are padded where the graph has one length, or where all are to be in one batch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from prune2onnx.data.text import TextTokenizer, Tokens, read_lines
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.defaults import InputOptions
from prune2onnx.runtime.session import element_type, input_text

_IDS = ("input_ids", "input_word_ids", "ids", "tokens")
_MASK = ("attention_mask", "input_mask", "mask")
_TYPES = ("token_type_ids", "segment_ids", "input_type_ids", "type_ids")
_POSITIONS = ("position_ids", "positions")
_PAST = re.compile(r"^past([._]|$)", re.IGNORECASE)
_BRANCH = "use_cache_branch"


def text_inputs(
    opened: ort.InferenceSession, options: InputOptions, *, examples: int, batch: int = 1
) -> list[dict[str, NDArray[Any]]]:
    """Lines of a file as inputs of a model.

    Args:
        opened: the model.
        options: with `text:FILE` and a tokenizer.
        examples: how many lines at most, from the first.
        batch: lines at a time, where the model leaves that open. If all fit into one batch, they
            are padded to the longest; else each batch has lines of one length.

    Raises:
        RecipeError: no tokenizer is given.
        Prune2OnnxError: the file or the tokenizer cannot be read, or the model has inputs that
            cannot be made of text.
    """
    assert options.data is not None
    if options.tokenizer is None:
        raise RecipeError(
            f"data {options.data!r}: no tokenizer.json in the model's folder; give --tokenizer FILE"
        )
    graph = _Inputs(opened)
    tokenizer = TextTokenizer(options.tokenizer, graph.length)
    lines = tokenizer(read_lines(options.data.partition(":")[2], examples))
    size = graph.batch or batch
    groups = [lines]
    if not graph.length and 1 < size < len(lines):  # one by one they keep their order
        ordered = sorted(lines, key=len)
        groups = [list(group) for _, group in itertools.groupby(ordered, len)]
    parts = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
    if graph.batch:
        parts = [part + part[-1:] * (size - len(part)) for part in parts]
    return [graph.filled(part, tokenizer.pad) for part in parts]


class _Inputs:
    """The inputs of a model that reads tokens.

    Attributes:
        batch: the number of lines that it always takes; 0 where that is open.
        length: the number of tokens that it always takes; 0 where that is open.
    """

    def __init__(self, opened: ort.InferenceSession) -> None:
        self._infos = {info.name: info for info in opened.get_inputs()}
        self._roles = {name: _role(info) for name, info in self._infos.items()}
        whole = [n for n, role in self._roles.items() if role is None and self._is_tokens(n)]
        if "ids" not in self._roles.values() and len(whole) == 1:
            self._roles[whole[0]] = "ids"
        unknown = [name for name, role in self._roles.items() if role is None]
        if unknown or "ids" not in self._roles.values():
            lacks = f"{unknown[0]} cannot be made" if unknown else "none of them takes tokens"
            raise Prune2OnnxError(
                f"the model's inputs are {input_text(opened)}: of text, {lacks}; give --data "
                "npz:FILE with an array for each input, by its name"
            )
        ids = next(name for name, role in self._roles.items() if role == "ids")
        extents = [e if isinstance(e, int) and e > 0 else 0 for e in self._infos[ids].shape]
        self.batch, self.length = extents if len(extents) == 2 else (0, 0)

    def _is_tokens(self, name: str) -> bool:
        info = self._infos[name]
        return "int" in info.type and len(info.shape or ()) == 2

    def filled(self, lines: Sequence[Tokens], pad: int) -> dict[str, NDArray[Any]]:
        """Lines, padded on the right to the longest or to the length that the model takes."""
        length = self.length or max(map(len, lines))
        made = {
            "ids": np.full((len(lines), length), pad),
            "mask": np.zeros((len(lines), length), np.int64),
            "types": np.zeros((len(lines), length), np.int64),
            "positions": np.tile(np.arange(length), (len(lines), 1)),
        }
        for row, line in enumerate(lines):
            made["ids"][row, : len(line)] = line.ids
            made["mask"][row, : len(line)] = 1
            made["types"][row, : len(line)] = line.types
        return {
            name: self._typed(name, made.get(role or ""), len(lines))
            for name, role in self._roles.items()
        }

    def _typed(self, name: str, values: NDArray[Any] | None, lines: int) -> NDArray[Any]:
        info = self._infos[name]
        kind = element_type(info.type)
        assert kind is not None  # a tensor's, else it has no role
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        if values is not None:
            return values.astype(dtype)
        if self._roles[name] == "branch":
            return np.zeros(len(info.shape) * [1], dtype)
        own = [extent if isinstance(extent, int) else None for extent in info.shape]
        at = own.index(None) if None in own else 0  # the batch is the first that is open
        return np.zeros([lines if axis == at else e or 0 for axis, e in enumerate(own)], dtype)


def _role(info: Any) -> str | None:
    """What an input is for, by its name; None where that is not known."""
    if element_type(info.type) is None:
        return None
    name = info.name.lower()
    named = {"ids": _IDS, "mask": _MASK, "types": _TYPES, "positions": _POSITIONS}
    for role, names in named.items():
        if name in names:
            return role
    if name == _BRANCH:
        return "branch"
    return "past" if _PAST.search(info.name) else None
