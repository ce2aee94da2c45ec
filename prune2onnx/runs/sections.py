"""The sections of a recipe: settings of each phase, and of augmentation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Settings that are checked, of which none is unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Dense(Section):
    """Phase 1: ordinary training. Skipped where trained weights are given."""

    epochs: int | None = Field(
        None, ge=1, description="epochs of dense training; default: 1,500 steps, at least 8 epochs"
    )
    lr: float = Field(2e-3, gt=0, description="peak learning rate (Adam)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW)")


class Channels(Section):
    """Phase 2: whole channels and neurons are pruned, so that layers get smaller."""

    epochs: int | None = Field(
        None,
        ge=0,
        description="epochs of channel pruning; default: 2,000 steps, at least 6 epochs, with goal "
        "latency or balanced or with target_macs, else none",
    )
    margin: float = Field(
        5.0,
        ge=1,
        description="weights that are left after channel pruning, as a multiple of the final "
        "density, with goal size",
    )
    price: Literal["time", "macs"] = Field(
        "time",
        description="cost of a layer, with goal latency or balanced: its time on this machine, or "
        "its multiply-adds",
    )
    batch: int = Field(1, ge=1, description="examples per inference, when layers are timed")
    multiple: int | None = Field(
        None,
        ge=1,
        description="channels of a convolution that are pruned as a block, the weakest together, "
        "since kernels compute several at a time; default: 4 with goal size, else 8",
    )


class Prune(Section):
    """Phase 3: weights and thresholds are trained together."""

    epochs: int | None = Field(
        None, ge=1, description="epochs of pruning; default: 3,000 steps, at least 12 epochs"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the weights (Adam)")
    threshold_lr: float = Field(1e-2, gt=0, description="peak learning rate of the thresholds")
    pressure: float = Field(
        2.0,
        ge=0,
        description="initial weight of the density penalty (lambda): loss per unit of (weighted) "
        "density, 0-1",
    )
    ramp: float = Field(
        0.75,
        ge=0,
        le=1,
        description="fraction of the phase over which the density falls to its target",
    )
    function: Literal["threshold-linear", "soft-threshold", "sigmoid-gate"] = Field(
        "threshold-linear", description="pruning function"
    )
    granularity: Literal["weight", "channel"] = Field(
        "weight", description="unit of pruning: single weights, or whole channels"
    )
    thresholds: Literal["layer", "channel"] = Field(
        "channel", description="one learned threshold per channel, or per layer"
    )
    beta: float = Field(
        10.0, gt=0, description="sharpness of the pruning function, in 1 / rms of the weight"
    )
    start: float = Field(0.05, gt=0, description="initial threshold, in rms of the weight")
    weigh: Literal["bytes", "count"] = Field(
        "bytes",
        description="cost of a survivor in the penalty: its bytes in the file, or 1",
    )
    balance: float = Field(
        0.0, ge=0, description="scale a layer's penalty by (size / largest size) ** balance"
    )
    importance: dict[str, float] = Field(
        default_factory=dict, description="further factor on the penalty, by name pattern"
    )
    include: tuple[str, ...] = Field(("*",), description="name patterns of the weights to prune")
    exclude: tuple[str, ...] = Field((), description="name patterns of weights not to prune")


class Tune(Section):
    """Phase 4: the survivors are fine-tuned under fixed masks."""

    epochs: int | None = Field(
        None, ge=1, description="epochs of tuning; default: 1,000 steps, at least 5 epochs"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate (Adam)")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay (AdamW)")


class Quantize(Section):
    """Phase 5: quantization-aware training, in which surviving values are few levels."""

    epochs: int | None = Field(
        None, ge=1, description="epochs on few levels; default: 800 steps, at least 5 epochs"
    )
    lr: float = Field(5e-4, gt=0, description="peak learning rate (Adam)")
    scale_lr: float = Field(1e-4, gt=0, description="peak learning rate of the levels' scales")
    levels: int | None = Field(
        None,
        ge=1,
        le=127,
        description="largest level k: -k ... k times one scale; default: 7, or 2 for few bytes",
    )
    step: Literal["weight", "network"] = Field(
        "weight",
        description="one scale per weight and bias, or one for the network, in fewer bytes",
    )
    small_levels: int = Field(15, ge=1, le=127, description="largest level of a bias")
    slack: float = Field(
        0.05, ge=0, description="points of validation error that coarser biases may add"
    )


class Augment(Section):
    """Augmentation of training images, in every phase."""

    shift: int = Field(
        0, ge=0, description="shift training images at random, by at most so many pixels"
    )
    flip: bool = Field(False, description="mirror half of the training images, left to right")
