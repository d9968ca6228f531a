"""A linear layer's whole attention for a few tokens, between its two projections, as one op.

    q, k = qk_norm_rope(qkvg, ...), v = qkvg[:, 2HK:3HK], gate = qkvg[:, 3HK:]
    o, state = lightning_decode(q, k, v, ...)    ->    y, state = decode_mixer(qkvg, ...)
    y = group_norm_gate(o, gate, ...)

and likewise `lightning_verify` -> `verify_mixer`, with the pending tokens among the results.

Why: four launches with round trips of a few kilobytes become one; at batch 1 its floor is the
state's bytes, about a microsecond.

Where our own kernels are launched, `fuse_lightning` stands in its place.

Runs after `fuse_qk_norm_rope`, `fuse_group_norm_gate` and `merge_projections`. Costs nothing in
precision: q and k stay in FP32 where the unfused form rounds them.
"""

import operator
from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import (
    decode_mixer,
    group_norm_gate,
    lightning_decode,
    lightning_verify,
    qk_norm_rope,
    verify_mixer,
)
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten


def _project(
    qkvg: Value, q_weight: Value, k_weight: Value, cos: Value, sin: Value, heads: Value,
    eps: Value, bounds: tuple[Value, Value], _shape: Value
) -> tuple[Value, Value, Value]:  # fmt: skip
    """q, k and v out of the merged projection."""
    roped = qk_norm_rope.OP.overload(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    v = aten.reshape.default(aten.slice.Tensor(qkvg, 1, *bounds), _shape)
    return operator.getitem(roped, 0), operator.getitem(roped, 1), v


def _gate(
    o: Value, qkvg: Value, start: Value, end: Value, weight: Value, groups: Value, eps: Value
) -> Value:
    gate = aten.slice.Tensor(qkvg, 1, start, end)
    return group_norm_gate.OP.overload(o, gate, weight, groups, eps)


def decode(
    qkvg: Value, q_weight: Value, k_weight: Value, cos: Value, sin: Value, decay: Value,
    norm_weight: Value, state: Value, pending_k: Value, pending_v: Value, slots: Value,
    accepted: Value, positions: Value, heads: Value, groups: Value, eps: Value, k_end: Value,
    v_end: Value, end: Value, _shape: Value
) -> Value:  # fmt: skip
    bounds = (k_end, v_end)
    q, k, v = _project(qkvg, q_weight, k_weight, cos, sin, heads, eps, bounds, _shape)
    mixed = lightning_decode.OP.overload(
        q, k, v, decay, state, pending_k, pending_v, slots, accepted, positions
    )
    after = operator.getitem(mixed, 1)
    return after, _gate(operator.getitem(mixed, 0), qkvg, v_end, end, norm_weight, groups, eps)


def verify(
    qkvg: Value, q_weight: Value, k_weight: Value, cos: Value, sin: Value, decay: Value,
    norm_weight: Value, state: Value, pending_k: Value, pending_v: Value, slots: Value,
    accepted: Value, offsets: Value, positions: Value, heads: Value, groups: Value, eps: Value,
    k_end: Value, v_end: Value, end: Value, _shape: Value
) -> Value:  # fmt: skip
    bounds = (k_end, v_end)
    q, k, v = _project(qkvg, q_weight, k_weight, cos, sin, heads, eps, bounds, _shape)
    mixed = lightning_verify.OP.overload(
        q, k, v, decay, state, pending_k, pending_v, slots, accepted, offsets, positions
    )
    after = tuple(operator.getitem(mixed, i) for i in (1, 2, 3))
    return *after, _gate(operator.getitem(mixed, 0), qkvg, v_end, end, norm_weight, groups, eps)


def check(match: Match, context: Context) -> str | None:
    if context.fuses_launches:
        return NOT_MINE
    width = match.type("qkvg").shape[1]
    block = match["k_end"] // 2
    if (match["v_end"], match["end"], width) != (3 * block, 4 * block, 4 * block):
        return f"the projection of {width} columns is not q, k, v and gate of one width"
    return None


_INPUTS = (
    "qkvg", "q_weight", "k_weight", "cos", "sin", "decay", "norm_weight", "state", "pending_k",
    "pending_v", "slots", "accepted",
)  # fmt: skip
_REST = ("positions", "heads", "groups", "eps")


def decode_replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = (*_INPUTS, *_REST)
    y, state = build.items(build.call(decode_mixer.OP.overload, *(match[n] for n in names)))
    return state, y


def verify_replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = (*_INPUTS, "offsets", *_REST)
    y, *after = build.items(build.call(verify_mixer.OP.overload, *(match[n] for n in names)))
    return *after, y


def _expected(phase: str, context: Context) -> int:
    fires = context.phase == phase and not context.fuses_launches
    return len(context.linear_layers) if fires else 0


DECODE_RULE = Rewrite(
    name="fuse_decode_mixer",
    patterns=(decode,),
    check=check,
    replacement=decode_replacement,
    expected=lambda context: _expected("decode", context),
)

VERIFY_RULE = Rewrite(
    name="fuse_verify_mixer",
    patterns=(verify,),
    check=check,
    replacement=verify_replacement,
    expected=lambda context: _expected("verify", context),
)
