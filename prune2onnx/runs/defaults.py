"""Options of the verbs that take ONNX files, and the only definition of their defaults.

Data only, so that the command line needs none of the libraries that do the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class InputOptions:
    """Where the inputs come from on which a model is run.

    Attributes:
        data: `npz:FILE` with one array per input name, `text:FILE` with one example a line, a
            source as for `load_data`, or "random", the default.
        shapes: of random inputs, by name, where the graph leaves them open.
        tokenizer: the tokenizer.json for text.
    """

    data: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokenizer: Path | None = None

    @property
    def has_examples(self) -> bool:
        """Whether the inputs are given, not random."""
        return self.data not in (None, "random")


RANDOM_INPUTS = InputOptions()


@dataclass(frozen=True)
class PackOptions:
    """Options of a packed file.

    Attributes:
        load: "small", "balanced" or "fast", as for `packing.pack`.
        form: "packed", or "sparse-initializer".
        strip: whether everything that inference does not need is left out (`graph.strip`).
        shrink: whether dead channels and neurons are removed first (`shrinking`).
        bits: lossy: bits per weight, 1 to 8.
        prune: lossy: fraction of the weights that become zero.
        pattern: lossy: (n, m): n of m neighbouring weights stay; with data.
        blocks: neighbouring outputs and inputs whose weights become zero together; with `prune`
            and data.
        channels: lossy: fraction of the weights that goes with whole channels; with data.
        max_rel_error: lossy: largest relative error of each weight, or, with `data`, of outputs.
        target_size: lossy: most bytes of the file; with data.
        max_error: lossy: largest relative error of the outputs on held-out examples; with data.
        max_drop: lossy: most points of error that it may add on held-out examples; with labels.
        examples: to calibrate with.
        curve: whether sizes around the chosen one are tried, too.
        inputs: what lossy packing is calibrated with, and outputs are compared on.
        external: name of a data file for large weights.
        anonymize: as for `packing.pack`.
        portable: as for `packing.pack`.
        compute: what matrices compute in (`packing.compute`); "auto": what is fastest here.
    """

    load: Literal["small", "balanced", "fast"] = "balanced"
    form: Literal["packed", "sparse-initializer"] = "packed"
    strip: bool = False
    shrink: bool = False
    bits: float | None = None
    prune: float | None = None
    pattern: tuple[int, int] | None = None
    blocks: tuple[int, int] | None = None
    channels: float | None = None
    max_rel_error: float | None = None
    target_size: int | None = None
    max_error: float | None = None
    max_drop: float | None = None
    examples: int = 512
    curve: bool = False
    inputs: InputOptions = RANDOM_INPUTS
    external: str | None = None
    anonymize: bool = False
    portable: bool = False
    compute: Literal["float32", "int8", "int8-weights", "int4", "auto"] = "float32"

    @property
    def lossy(self) -> bool:
        """Whether weights may change."""
        limits = (self.bits, self.prune, self.pattern, self.channels, self.max_rel_error)
        budgets = (self.target_size, self.max_error, self.max_drop)
        return any(one is not None for one in (*limits, *budgets))


@dataclass(frozen=True)
class FileOptions:
    """Options of the file that is written.

    Attributes:
        opset: ONNX operator set, 18 or newer.
        anonymize: whether weights get the shortest names, as for `packing.pack`.
        portable: whether the decoder stands in the graph, as for `packing.pack`.
        multiple: convolutions keep a multiple of so many channels, as for `shrinking.shrink`.
        form: "packed", "sparse-initializer" or "dense".
        compute: what matrices compute in (`packing.compute`).
    """

    opset: int = 18
    anonymize: bool = False
    portable: bool = False
    multiple: int = 1
    form: Literal["packed", "sparse-initializer", "dense"] = "packed"
    compute: Literal["float32", "int8", "int8-weights", "int4"] = "float32"


MAX_DROP = 0.1
MAX_REL_ERROR = 0.05


@dataclass(frozen=True)
class Int8Options:
    """Options of quantization to int8.

    Attributes:
        examples: number of calibration examples, from the training split.
        method: onnxruntime's method for the ranges of activations.
        max_drop: points of error that int8 may add to data with labels; layers stay float until
            that is met. Default: `MAX_DROP`.
        max_rel_error: in its place, how far the outputs may move, relative to their norm: for
            models that are no classifiers, and for data without labels. Default: `MAX_REL_ERROR`.
        keep: weights of layers that stay float in any case.
        compute: what matrices and tables compute in. "static": int8 with fixed ranges, as
            convolutions do; others: as of `packing.compute`, while convolutions are static; "auto":
            what is fastest here.
    """

    examples: int = 512
    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    max_drop: float | None = None
    max_rel_error: float | None = None
    keep: tuple[str, ...] = ()
    compute: Literal["static", "float32", "int8", "int8-weights", "int4", "auto"] = "static"


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of a benchmark.

    Attributes:
        batches: batch sizes; none: the one that a file is made for, or one example.
        threads: numbers of threads; 0: onnxruntime's default.
        seconds: of timed inferences, for each batch size and number of threads.
        warm_up: inferences of each file before any is timed.
        profile: whether to time operators, too.
    """

    batches: tuple[int, ...] = ()
    threads: tuple[int, ...] = (0,)
    seconds: float = 5.0
    warm_up: int = 20
    profile: bool = False
