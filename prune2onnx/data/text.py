"""Text: `text:FILE`, one example a line, and the tokenizer that makes numbers of it.

A line becomes the token ids that the tokenizer's own application would feed, special tokens
included; what a graph asks for beside them is in `runtime.texts`. A tokenizer is a `tokenizer.json`
of the `tokenizers` library, which is an extra: `pip install 'prune2onnx[text]'`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2onnx.data.examples import Arrays
from prune2onnx.data.shaped import shaped
from prune2onnx.errors import Prune2OnnxError, RecipeError, first_line
from prune2onnx.tasks.task import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PREFIX = "text"
TOKENIZER = "tokenizer.json"
MOST_TOKENS = 512
"""Of a line where neither the tokenizer nor the graph says less: attention costs its square."""

_PIECE = 128  # tokens that a language model is trained on at a time, where nothing else is said
_FEWEST_PIECES = 10  # for three splits


@dataclass(frozen=True)
class Tokens:
    """A line as numbers, without padding.

    Attributes:
        ids: the tokens, special ones included.
        types: of each, the sentence of a pair that it belongs to; all 0 here.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


def is_text(data: str | None) -> bool:
    """Whether a source of data is `text:FILE`."""
    return data is not None and data.partition(":")[0] == PREFIX and ":" in data


def tokenizer_beside(model: Path) -> Path | None:
    """The tokenizer.json of a model's folder, where the model is a file in it or in onnx/."""
    folders = (model,) if model.is_dir() else (model.parent, model.absolute().parent.parent)
    return next((f / TOKENIZER for f in folders if (f / TOKENIZER).is_file()), None)


def read_lines(argument: str, most: int | None = None) -> list[str]:
    """The lines of a file in UTF-8; blank ones and repetitions are left out.

    Args:
        argument: the file.
        most: of lines to read, from the first; default: all.

    Raises:
        Prune2OnnxError: the file is missing, holds no text, or is not UTF-8.
    """
    path = Path(argument).expanduser()
    if not argument or not path.is_file():
        raise Prune2OnnxError(
            f"{argument or 'text:FILE'}: no such file; expected text:FILE with one example a line"
        )
    found: dict[str, None] = {}
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for line in stream:
                if text := line.strip():
                    found[text] = None
                if most is not None and len(found) >= most:
                    break
    except UnicodeDecodeError as error:
        raise Prune2OnnxError(
            f"{path}: not text in UTF-8 ({error.reason}); convert it, one example a line"
        ) from error
    except OSError as error:
        raise Prune2OnnxError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise Prune2OnnxError(f"{path}: no text in it; expected one example a line")
    return list(found)


class TextTokenizer:
    """A tokenizer without padding, that cuts long lines unless it is told not to.

    Attributes:
        most: tokens of a line at most.
        pad: the token that fills up a line where a graph needs one length.
        size: how many tokens it knows.
    """

    def __init__(self, path: Path, length: int | None = None, *, cuts: bool = True) -> None:
        """Reads a tokenizer.json.

        Args:
            path: the file; `tokenizer_config.json` beside it may say how long a line may be.
            length: tokens of a line at most, where the graph says so.
            cuts: whether lines of more tokens are cut.

        Raises:
            Prune2OnnxError: the library is not installed, or the file is missing or damaged.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Prune2OnnxError(
                "text needs the tokenizers library, which is not installed; "
                "pip install 'prune2onnx[text]'"
            ) from error
        if not path.is_file():
            raise Prune2OnnxError(f"{path}: no such file; give --tokenizer tokenizer.json")
        try:
            self._inner = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise Prune2OnnxError(
                f"{path}: not a tokenizer.json that the tokenizers library reads "
                f"({first_line(error)}); save it with tokenizer.save, or save_pretrained"
            ) from error
        own = (self._inner.truncation or {}).get("max_length")
        self.most = length or min(filter(None, (own, _model_length(path), MOST_TOKENS)))
        self.pad, self.size = _padding(self._inner), self._inner.get_vocab_size()
        self._inner.no_padding()
        self._path = path
        if cuts:
            self._inner.enable_truncation(self.most)
        else:
            self._inner.no_truncation()

    def __call__(self, lines: Sequence[str]) -> list[Tokens]:
        """The tokens of each line.

        Raises:
            Prune2OnnxError: a line has none, or one that the tokenizer does not know.
        """
        try:
            made = self._inner.encode_batch_fast(list(lines))
        except Exception as error:  # the library raises bare Exception
            raise Prune2OnnxError(
                f"{self._path}: cannot tokenize a line: {first_line(error)}; give the tokenizer "
                "that belongs to the model"
            ) from error
        found = [Tokens(tuple(one.ids), tuple(one.type_ids)) for one in made]
        for line, tokens in zip(lines, found, strict=True):
            if not len(tokens):
                raise Prune2OnnxError(
                    f"{self._path}: makes no token of {line[:40]!r}; give the tokenizer that "
                    "belongs to the model, or leave that line out"
                )
        return found


def _model_length(path: Path) -> int | None:
    """`model_max_length` of the tokenizer_config.json beside a tokenizer.json; None without one."""
    try:
        found = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8"))
        length = int(found["model_max_length"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return length if 0 < length < 1 << 31 else None  # 1e30 where it is not known


def _padding(tokenizer: Tokenizer) -> int:
    """The id of the token for padding; 0, which is masked out, where there is none."""
    stated: dict[str, Any] = tokenizer.padding or {}
    named = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>"))
    return int(stated.get("pad_id", next((i for i in named if i is not None), 0)))


def read_text(
    argument: str, task: Task, tokenizer: Path | None, length: int | None
) -> tuple[Arrays, int]:
    """`text:FILE` to train with, for the tasks that need no labels.

    Args:
        argument: the file, one text a line; blank lines and repetitions are left out.
        task: language modelling: the tokens of all lines are joined, and cut into pieces; or
            distillation: each line is an example, padded, as input_ids and attention_mask.
        tokenizer: the file of the tokenizer.
        length: tokens of an example, at most; default: what the tokenizer says, or 128 for pieces.

    Returns:
        The examples; and how many tokens there are.

    Raises:
        RecipeError: the task needs labels, or no tokenizer is given.
        Prune2OnnxError: the file or the tokenizer cannot be read, or the text is too short.
    """
    where = f"text:{argument}"
    if task.targets not in ("next token", "outputs"):
        raise RecipeError(
            f"data {where!r}: lines of text have no labels, and task {task.name} needs them; "
            "train with --task language-modelling or distillation, or give a file.py:callable"
        )
    lines = read_lines(argument)
    if tokenizer is None:
        raise RecipeError(
            f"data {where!r}: no tokenizer; give --tokenizer tokenizer.json, or hf:FOLDER as the "
            "model, with one in it"
        )
    reader = TextTokenizer(tokenizer, length, cuts=task.targets == "outputs")
    made = [tokens.ids for tokens in reader(lines)]
    if task.targets == "outputs":
        longest = max(map(len, made))
        ids = np.full((len(made), longest), reader.pad, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(made):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        x = {"input_ids": ids, "attention_mask": mask}
        return shaped(x, None, task, where), reader.size
    piece = 1 + (length or min(reader.most, _PIECE))  # each token's target is the next one
    joined = np.concatenate([np.asarray(tokens, np.int64) for tokens in made])
    count = len(joined) // piece
    if count < _FEWEST_PIECES:
        raise Prune2OnnxError(
            f"{where}: {len(joined):,} tokens, expected at least {_FEWEST_PIECES * piece:,}: "
            f"{_FEWEST_PIECES} pieces of {piece}; give more text, or a smaller --length"
        )
    pieces = joined[: count * piece].reshape(count, piece)
    return shaped(pieces, None, task, where), reader.size
