"""The per-head norms of q and k and their half-split rotation, as one op.

    q = rope_half(rms_norm(qkv[:, :HK]; w_q)), k = rope_half(rms_norm(qkv[:, HK:2HK]; w_k))
        ->    q, k = qk_norm_rope(qkv, w_q, w_k, cos, sin)

Why: the unfused form passes over q and k seven times and takes a dozen launches; the fused one
reads the projection once and writes q and k once.

Runs after `canonicalize_splits`. Costs nothing in precision in f32; in bf16 it rounds once, at the
end, where the unfused form rounds after the norm as well.
"""

from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import qk_norm_rope
from lingc.rewrite import Builder, Match, Rewrite

aten = torch.ops.aten


def _branch(
    qkv: Value, bounds: tuple[Value, Value], shape: Value, weight: Value, eps: Value,
    table: tuple[Value, Value], halves: tuple[Value, ...], *, rest: bool
) -> Value:  # fmt: skip
    """One of q and k: slice, norm and rotate."""
    part = aten.reshape.default(aten.slice.Tensor(qkv, 1, *bounds), shape)
    dims = halves[4]
    x = aten.rms_norm.default(part, dims, weight, eps)
    low = aten.slice.Tensor(x, 2, halves[0], halves[1])
    high = aten.slice.Tensor(x, 2, halves[1], halves[2])
    cos, sin = aten.unsqueeze.default(table[0], 1), aten.unsqueeze.default(table[1], 1)
    first = aten.sub.Tensor(aten.mul.Tensor(low, cos), aten.mul.Tensor(high, sin))
    second = aten.add.Tensor(aten.mul.Tensor(high, cos), aten.mul.Tensor(low, sin))
    parts = [first, second]
    if rest:
        parts.append(aten.slice.Tensor(x, 2, halves[2], halves[3]))
    return aten.cat.default(parts, -1)


def pattern(
    qkv: Value, zero: Value, q_end: Value, k_end: Value, _shape: Value, dims: Value,
    q_weight: Value, k_weight: Value, eps: Value, cos: Value, sin: Value,
    origin: Value, half: Value, rotary: Value, end: Value
) -> Value:  # fmt: skip
    halves = (origin, half, rotary, end, dims)
    table = (cos, sin)
    q = _branch(qkv, (zero, q_end), _shape, q_weight, eps, table, halves, rest=True)
    k = _branch(qkv, (q_end, k_end), _shape, k_weight, eps, table, halves, rest=True)
    return q, k


def pattern_whole_head(
    qkv: Value, zero: Value, q_end: Value, k_end: Value, _shape: Value, dims: Value,
    q_weight: Value, k_weight: Value, eps: Value, cos: Value, sin: Value,
    origin: Value, half: Value, rotary: Value
) -> Value:  # fmt: skip
    halves = (origin, half, rotary, rotary, dims)
    table = (cos, sin)
    q = _branch(qkv, (zero, q_end), _shape, q_weight, eps, table, halves, rest=False)
    k = _branch(qkv, (q_end, k_end), _shape, k_weight, eps, table, halves, rest=False)
    return q, k


def check(match: Match, _context: Any) -> str | None:
    if match["zero"] != 0 or match["origin"] != 0 or match["k_end"] != 2 * match["q_end"]:
        return "q and k are not the first two blocks of the projection"
    if match["rotary"] != 2 * match["half"]:
        return f"the rotary halves end at {match['half']} and {match['rotary']}"
    return None


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    (dim,) = match["dims"]
    call = build.call(
        qk_norm_rope.OP.overload,
        match["qkv"],
        match["q_weight"],
        match["k_weight"],
        match["cos"],
        match["sin"],
        match["q_end"] // dim,
        match["eps"],
    )
    return build.items(call)


def expected(context: Context) -> int:
    return len(context.linear_layers)


RULE = Rewrite(
    name="fuse_qk_norm_rope",
    patterns=(pattern, pattern_whole_head),
    check=check,
    replacement=replacement,
    expected=expected,
    shares=True,
)
