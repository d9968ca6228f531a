"""SwiGLU's activation over a merged projection, as one op.

    silu(gu[:, :F]) * gu[:, F:]    ->    silu_mul(gu)

Why: four passes over [T, F] become two reads and a write, and the slices vanish.

Runs after `merge_projections`. Costs nothing in precision in f32; in bf16 it rounds once.
"""

from typing import Any

import torch

from lingc.graph import Value
from lingc.plugins import silu_mul
from lingc.rewrite import Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(gate_up: Value, start: Value, middle: Value, end: Value) -> Value:
    gate = aten.slice.Tensor(gate_up, 1, start, middle)
    up = aten.slice.Tensor(gate_up, 1, middle, end)
    return aten.mul.Tensor(aten.silu.default(gate), up)


def check(match: Match, _context: Any) -> str | None:
    width = match.type("gate_up").shape[1]
    if match["start"] != 0 or match["end"] != width or 2 * match["middle"] != width:
        return "gate and up are not the two halves of the projection"
    return None


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return (build.call(silu_mul.OP.overload, match["gate_up"]),)


RULE = Rewrite(
    name="fuse_silu_mul",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=lambda context: len(context.mlp_layers),
)
