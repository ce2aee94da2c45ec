"""The result of every rewrite of a graph, so that rewrites compose and report alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from onnx import ModelProto


@dataclass(frozen=True)
class Rewritten:
    """A model after a rewrite.

    Attributes:
        model: a new model, equal to the one given where there was nothing to do.
        notes: what was changed or assumed, in words; () where nothing was.
        reasons: name of a weight -> why it stays as it is.
    """

    model: ModelProto
    notes: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Changes:
    """Collects the notes and reasons of a rewrite's steps; a weight keeps its first reason."""

    notes: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def stays(self, weight: str, why: str) -> None:
        """Records why a weight stays as it is."""
        self.reasons.setdefault(weight, why)


Step = Callable[[ModelProto, Changes], None]
"""One step of a rewrite: it changes the model in place."""


def rewritten(model: ModelProto, *steps: Step) -> Rewritten:
    """Runs steps, one after the other, on one copy of a model."""
    result, changes = ModelProto(), Changes()
    result.CopyFrom(model)
    for step in steps:
        step(result, changes)
    return Rewritten(result, tuple(changes.notes), changes.reasons)
