"""Chooses a payload for each weight: the fewest bytes in the file, functions counted once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from onnx import FunctionProto

from prune2onnx.codecs import Codec, Payload, Weight
from prune2onnx.codecs.codec import framed
from prune2onnx.errors import Prune2OnnxError


def candidates(weight: Weight, codecs: Sequence[Codec]) -> tuple[list[Payload], str]:
    """Every payload smaller than the dense weight, and why there is none."""
    fits: list[Payload] = []
    refusals: dict[str, str] = {}
    least: Payload | None = None
    for codec in codecs:
        if refusal := codec.refusal(weight):
            refusals.setdefault(refusal, codec.name)
            continue
        try:
            payload = codec.encode(weight)
        except Prune2OnnxError as error:
            refusals.setdefault(str(error), codec.name)
            continue
        if payload.nbytes < weight.array.nbytes:
            fits.append(payload)
        elif least is None or payload.nbytes < least.nbytes:
            least = payload
    if least is not None:
        return fits, (
            f"{least.codec.name} takes {least.nbytes:,} bytes, dense {weight.array.nbytes:,}"
        )
    return fits, "; ".join(f"{codec}: {refusal}" for refusal, codec in refusals.items())


def plan(
    choices: Mapping[str, list[Payload]], dense: Mapping[str, int], opset: int
) -> dict[str, Payload]:
    """The payload of each weight that is packed, by the fewest bytes in all.

    With the functions in the file given, each weight takes its smallest payload by itself; so
    every set of codecs is tried, and its functions are paid once.
    """
    names = sorted({p.codec.name for payloads in choices.values() for p in payloads})
    best: dict[str, Payload] = {}
    least = sum(dense[name] for name in choices)
    for count in range(1, len(names) + 1):
        for allowed in itertools.combinations(names, count):
            chosen = {}
            total = 0
            for name, payloads in choices.items():
                usable = [p for p in payloads if p.codec.name in allowed]
                choice = min(usable, key=lambda payload: payload.nbytes, default=None)
                if choice is not None and choice.nbytes < dense[name]:
                    chosen[name] = choice
                    total += choice.nbytes
                else:
                    total += dense[name]
            used = functions(chosen.values(), opset)
            total += sum(framed(function.ByteSize(), tag=2) for function in used)
            if total < least:
                best, least = chosen, total
    return best


def functions(payloads: Iterable[Payload], opset: int) -> list[FunctionProto]:
    """The functions these payloads need, each once, the called before the calling."""
    found: dict[str, FunctionProto] = {}
    kinds = {(payload.codec, payload.dtype): None for payload in payloads}
    for codec, dtype in kinds:
        for function in codec.functions(dtype, opset):
            found.setdefault(function.name, function)
    return list(found.values())
