"""Linear attention straight from the merged projection, as the GPU's own kernels compute it.

    q, k = qk_norm_rope(qkvg, ...), v = qkvg[:, 2HK:3HK]
    o, state = lightning_decode(q, k, v, ...)    ->    o, state = lightning_decode_qkv(qkvg, ...)

and likewise `lightning_verify` -> `lightning_verify_qkv` and `lightning_prefill` ->
`lightning_prefill_qkv`. For targets whose engine launches our kernels; others have `fuse_mixer`.

Why: one launch instead of two, and q and k never leave it. The group norm and the gate behind it go
into the output projection (`fuse_linear_gate`), whose blocks each need all channels of a row.

Costs nothing in precision.
"""

import operator
from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import (
    group_norm_gate,
    lightning_decode,
    lightning_decode_qkv,
    lightning_prefill,
    lightning_prefill_qkv,
    lightning_verify,
    lightning_verify_qkv,
    qk_norm_rope,
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


def prefill(
    qkvg: Value, q_weight: Value, k_weight: Value, cos: Value, sin: Value, decay: Value,
    state: Value, slots: Value, offsets: Value, positions: Value, heads: Value, eps: Value,
    k_end: Value, v_end: Value, _shape: Value, gate: Value, weight: Value, groups: Value,
    norm_eps: Value
) -> tuple[Value, ...]:  # fmt: skip
    qkv = _project(qkvg, q_weight, k_weight, cos, sin, heads, eps, (k_end, v_end), _shape)
    mixed = lightning_prefill.OP.overload(*qkv, decay, state, slots, offsets, positions)
    o = operator.getitem(mixed, 0)
    return operator.getitem(mixed, 1), group_norm_gate.OP.overload(
        o, gate, weight, groups, norm_eps
    )


def decode(
    qkvg: Value, q_weight: Value, k_weight: Value, cos: Value, sin: Value, decay: Value,
    state: Value, pending_k: Value, pending_v: Value, slots: Value, accepted: Value,
    positions: Value, heads: Value, eps: Value, k_end: Value, v_end: Value, _shape: Value,
    gate: Value, weight: Value, groups: Value, norm_eps: Value
) -> tuple[Value, ...]:  # fmt: skip
    qkv = _project(qkvg, q_weight, k_weight, cos, sin, heads, eps, (k_end, v_end), _shape)
    mixed = lightning_decode.OP.overload(
        *qkv, decay, state, pending_k, pending_v, slots, accepted, positions
    )
    o = operator.getitem(mixed, 0)
    return operator.getitem(mixed, 1), group_norm_gate.OP.overload(
        o, gate, weight, groups, norm_eps
    )


def verify(
    qkvg: Value, q_weight: Value, k_weight: Value, cos: Value, sin: Value, decay: Value,
    state: Value, pending_k: Value, pending_v: Value, slots: Value, accepted: Value,
    offsets: Value, positions: Value, heads: Value, eps: Value, k_end: Value, v_end: Value,
    _shape: Value, gate: Value, weight: Value, groups: Value, norm_eps: Value
) -> tuple[Value, ...]:  # fmt: skip
    qkv = _project(qkvg, q_weight, k_weight, cos, sin, heads, eps, (k_end, v_end), _shape)
    mixed = lightning_verify.OP.overload(
        *qkv, decay, state, pending_k, pending_v, slots, accepted, offsets, positions
    )
    after = tuple(operator.getitem(mixed, i) for i in (1, 2, 3))
    o = operator.getitem(mixed, 0)
    return *after, group_norm_gate.OP.overload(o, gate, weight, groups, norm_eps)


def check(match: Match, context: Context) -> str | None:
    if not context.fuses_launches:
        return NOT_MINE
    width = match["heads"] * match.type("q_weight").shape[0]
    bounds = (match["k_end"], match["v_end"])
    if bounds != (2 * width, 3 * width):
        return f"v is not the third block of {width} columns, but {bounds[0]} to {bounds[1]}"
    return None


_PROJECTED = ("qkvg", "q_weight", "k_weight", "cos", "sin", "decay", "state")
_PENDING = ("pending_k", "pending_v", "slots", "accepted")
_ENDS = ("positions", "heads", "eps")


def _replace(
    build: Builder, match: Match, overload: Any, names: tuple[str, ...]
) -> tuple[Value, ...]:
    o, *after = build.items(build.call(overload, *(match[name] for name in names)))
    gate = (match[name] for name in ("gate", "weight", "groups", "norm_eps"))
    return *after, build.call(group_norm_gate.OP.overload, o, *gate)


def replace_prefill(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = (*_PROJECTED, "slots", "offsets", *_ENDS)
    return _replace(build, match, lightning_prefill_qkv.OP.overload, names)


def replace_decode(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = (*_PROJECTED, *_PENDING, *_ENDS)
    return _replace(build, match, lightning_decode_qkv.OP.overload, names)


def replace_verify(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = (*_PROJECTED, *_PENDING, "offsets", *_ENDS)
    return _replace(build, match, lightning_verify_qkv.OP.overload, names)


def _expected(phase: str, context: Context) -> int:
    fires = context.fuses_launches and context.phase == phase
    return len(context.linear_layers) if fires else 0


PREFILL_RULE = Rewrite(
    name="fuse_lightning_prefill",
    patterns=(prefill,),
    check=check,
    replacement=replace_prefill,
    expected=lambda context: _expected("prefill", context),
)

DECODE_RULE = Rewrite(
    name="fuse_lightning_decode",
    patterns=(decode,),
    check=check,
    replacement=replace_decode,
    expected=lambda context: _expected("decode", context),
)

VERIFY_RULE = Rewrite(
    name="fuse_lightning_verify",
    patterns=(verify,),
    check=check,
    replacement=replace_verify,
    expected=lambda context: _expected("verify", context),
)
