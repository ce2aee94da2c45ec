"""Rules for attention in one node: of ONNX (opset 23), and of com.microsoft, with its activations.

MultiHeadAttention, GroupQueryAttention, Attention (with the projections in it), RotaryEmbedding.
Heads that share keys go together. Where keys are kept from call to call (past and present values),
nothing is followed: the graph's inputs and outputs keep their shapes.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from prune2onnx.graph.walk import attribute, set_attribute
from prune2onnx.shrinking.flow import Channels, Claim, Flow, Ids, Kept, Layer, Link, Opaque
from prune2onnx.shrinking.operators.channelwise import operand


def multi_head_attention(flow: Flow, node: NodeProto) -> None:
    """Query, key, value, bias of the three; [batch, tokens, heads * size]."""
    _stateless(flow, node, past=(6, 7))
    parts = _projected(flow, node)
    heads = _attended(flow, node, parts, "num_heads", "num_heads", _bias(flow, node, 3, parts))
    _mask(flow, node, 5, heads)


def group_query_attention(flow: Flow, node: NodeProto) -> None:
    """Query, key, value; fewer heads of keys than of queries."""
    _stateless(flow, node, past=(3, 4))
    heads = _attended(flow, node, _projected(flow, node), "num_heads", "kv_num_heads")
    _mask(flow, node, 10, heads)


def standard_attention(flow: Flow, node: NodeProto) -> None:
    """ONNX's own, of [batch, heads, tokens, size] or [batch, tokens, heads * size]."""
    _stateless(flow, node, past=(4, 5))
    if len(flow.shape(node.input[0])) == 3:
        heads = _attended(flow, node, _projected(flow, node), "q_num_heads", "kv_num_heads")
    else:
        parts = [flow.at(name, 1) for name in node.input[:3]]
        if not any(parts):
            return
        q, k, v = (_required(part) for part in parts)
        heads = _shared(flow, q.ids, [k.ids, v.ids], len(k.ids))
        held = np.repeat(v.constants, len(q.ids) // len(k.ids))
        flow.heads.append(heads)
        flow.carry(node, 1, q.ids, np.where(held == 0, 0.0, np.nan))
    _mask(flow, node, 3, heads)


def packed_attention(flow: Flow, node: NodeProto) -> None:
    """com.microsoft's Attention: the weight [in, query + key + value] and its bias are in it."""
    _stateless(flow, node, past=(4,))
    weight = flow.weight(node.input[1])
    if weight.ndim != 2 or attribute(node, "do_rotary", 0):
        raise Opaque("with rotary positions")
    inputs = flow.at(node.input[0], 2)
    rows = weight.shape[1]
    sizes = list(attribute(node, "qkv_hidden_sizes", [])) or [rows // 3] * 3
    if sum(sizes) != rows:
        raise Opaque("of sizes that do not fit")
    ids = flow.fresh(rows)
    bias = np.zeros(rows)
    if len(node.input) > 2 and node.input[2]:
        bias = flow.weight(node.input[2]).astype(np.float64)
        flow.claims.append(Claim(node.input[2], {0: ids}, zeroed=True))
    nonzero = weight.T != 0
    if inputs is not None:
        nonzero &= inputs.constants != 0
    constants = np.where(nonzero.any(axis=1), np.nan, bias)
    along = {1: ids}
    if inputs is not None:
        along[0] = inputs.ids
        nothing = np.zeros(0, np.int64)
        flow.links.append(Link(node, ids, inputs.ids, nonzero, nothing, np.zeros((rows, 0)), None))
    flow.claims.append(Claim(node.input[1], along, zeroed=True))
    made = Channels(2, ids, constants)
    flow.layers.append(Layer(node, node.input[1], made, None if inputs is None else inputs.ids))
    ends = [0, *itertools.accumulate(sizes)]
    parts = [
        Channels(2, ids[begin:end], constants[begin:end]) for begin, end in itertools.pairwise(ends)
    ]
    heads = _attended(flow, node, parts, "num_heads", "num_heads")
    if attribute(node, "qkv_hidden_sizes") is not None:
        flow.edits.append(
            lambda kept: set_attribute(
                node, "qkv_hidden_sizes", [int(kept(part.ids).sum()) for part in parts]
            )
        )
    _mask(flow, node, 5, heads)


def rotary_embedding(flow: Flow, node: NodeProto) -> None:
    """Turns pairs of a head; of [batch, heads, tokens, size], or as wide as all heads."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    own = attribute(node, "rotary_embedding_dim", 0)
    count = int(attribute(node, "num_heads", 0))
    if channels.axis == 2 and len(flow.shape(node.input[0])) == 3 and (count or not own):
        cosines = flow.shape(node.input[2 if node.domain else 1])[-1]
        count = count or len(channels.ids) // (2 * (cosines or 1))
        ids, held = channels.ids.reshape(count, -1), channels.constants.reshape(count, -1)
        for column in ids.T[1:]:
            flow.couple(ids[:, 0], column)
        zero = np.repeat((held == 0).all(axis=1), held.shape[1])
        if attribute(node, "num_heads", 0):
            _count(flow, node, "num_heads", ids[:, 0])
        flow.carry(node, 2, channels.ids, np.where(zero, 0.0, np.nan))
    elif channels.axis == 1 and len(flow.shape(node.input[0])) == 4:
        held = np.where(channels.constants == 0, 0.0, np.nan)
        if count:
            _count(flow, node, "num_heads", channels.ids)
        flow.carry(node, 1, channels.ids, held)
    else:
        raise Opaque("along other axes than heads")


def activation(flow: Flow, node: NodeProto) -> None:
    """Gelu and the like of each channel, perhaps with a bias: zero of zero."""
    channels = flow.channels.get(node.input[0])
    if channels is None:
        return
    held = channels.constants
    if len(node.input) > 1 and node.input[1]:
        axis = channels.axis - len(flow.shape(node.input[0]))
        held = held + operand(flow, node, node.input[1], axis, channels.ids)
    flow.carry(node, channels.axis, channels.ids, np.where(held == 0, 0.0, np.nan))


def _stateless(flow: Flow, node: NodeProto, past: tuple[int, ...]) -> None:
    kept = any(len(node.input) > at and node.input[at] for at in past)
    if kept or any(flow.uses[name] for name in node.output[1:]):
        raise Opaque("whose keys are kept from call to call")


def _projected(flow: Flow, node: NodeProto) -> list[Channels]:
    """Query, key and value, [batch, tokens, heads * size]."""
    names = [*node.input[:3], "", ""][:3]
    if not all(names) or any(len(flow.shape(name)) != 3 for name in names):
        raise Opaque("of packed values")
    return [_required(flow.at(name, 2)) for name in names]


def _required(channels: Channels | None) -> Channels:
    if channels is None:
        raise Opaque("with a value whose channels stay")
    return channels


def _attended(
    flow: Flow,
    node: NodeProto,
    parts: list[Channels],
    queries: str,
    keys: str,
    bias: NDArray[np.float64] | None = None,
) -> Ids:
    """Couples the channels of each head; returns [heads] one of each head of queries.

    Args:
        flow: changed.
        node: the attention.
        parts: query, key, value, heads side by side.
        queries: name of the attribute that counts their heads.
        keys: the same of keys and values.
        bias: that is added to the value.
    """
    q, k, v = parts
    count, shared = int(attribute(node, queries, 0)), int(attribute(node, keys, 0))
    sizes = [len(part.ids) for part in parts]
    fits = count and shared and not count % shared and not sizes[0] % count
    if not fits or any(size % shared for size in sizes[1:]):
        raise Opaque("whose heads do not fit")
    heads = _shared(flow, q.ids.reshape(count, -1)[:, 0], [k.ids, v.ids], shared)
    for column in q.ids.reshape(count, -1).T[1:]:
        flow.couple(q.ids.reshape(count, -1)[:, 0], column)
    _count(flow, node, queries, heads)
    if keys != queries:
        _count(flow, node, keys, k.ids.reshape(shared, -1)[:, 0])
    held = v.constants if bias is None else v.constants + bias
    every = np.arange(len(v.ids)).reshape(shared, 1, -1)
    places = np.repeat(every, count // shared, axis=1).ravel()
    flow.heads.append(heads)
    flow.carry(node, 2, v.ids[places], np.where(held[places] == 0, 0.0, np.nan))
    return heads


def _shared(flow: Flow, heads: Ids, others: list[Ids], shared: int) -> Ids:
    """Couples heads of queries with the keys and values that they share."""
    if not shared or len(heads) % shared:
        raise Opaque("whose heads do not fit")
    for ids in (heads, *others):
        for column in ids.reshape(shared, -1).T:
            flow.couple(heads.reshape(shared, -1)[:, 0], column)
    return heads


def _count(flow: Flow, node: NodeProto, name: str, ids: Ids) -> None:
    def edit(kept: Kept) -> None:
        set_attribute(node, name, int(kept(ids).sum()))

    flow.edits.append(edit)


def _bias(
    flow: Flow, node: NodeProto, index: int, parts: list[Channels]
) -> NDArray[np.float64] | None:
    """What is added to the value; the bias is that of query, key and value."""
    if len(node.input) <= index or not node.input[index]:
        return None
    ids = np.concatenate([part.ids for part in parts])
    bias = flow.weight(node.input[index])
    if bias.shape != ids.shape:
        raise Opaque("with a bias that does not fit")
    flow.claims.append(Claim(node.input[index], {0: ids}, zeroed=True))
    return bias[-len(parts[2].ids) :].astype(np.float64)


def _mask(flow: Flow, node: NodeProto, index: int, heads: Ids) -> None:
    """What is added to the scores, [.., heads or 1, tokens, tokens]."""
    if len(node.input) > index and node.input[index]:
        operand(flow, node, node.input[index], -3, heads)
