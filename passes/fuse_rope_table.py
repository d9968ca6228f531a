"""Cosines and sines of the rotary angles, as one op.

    angle = f32(positions)[:, None] * inv_freq
    cos, sin = cos(angle) * scale, sin(angle) * scale    ->    cos, sin = rope_table(positions, ...)

Why: one launch instead of six, once a phase; every layer reads the same tables.

Costs nothing in precision: the op multiplies in f32 as the model does.
"""

from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import rope_table
from lingc.rewrite import Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(positions: Value, frequencies: Value, scale: Value) -> Value:
    wide = aten.unsqueeze.default(aten.to.dtype(positions, torch.float32), -1)
    angle = aten.mul.Tensor(wide, frequencies)
    cos = aten.mul.Tensor(aten.cos.default(angle), scale)
    return cos, aten.mul.Tensor(aten.sin.default(angle), scale)


def check(match: Match, _context: Any) -> str | None:
    if match["frequencies"].meta.get("role") != "constant":
        return "the frequencies are not constants"
    return None


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    values = list(match["frequencies"].meta["values"])
    scale = float(match["scale"])
    return build.items(build.call(rope_table.OP.overload, match["positions"], values, scale))


def expected(context: Context) -> int:
    """One table a distinct rotary dimension; the draft phase has MLA alone."""
    config = context.config
    linear = config.rotary_dim if context.linear_layers else config.qk_rope_head_dim
    return len({linear, config.qk_rope_head_dim})


RULE = Rewrite(
    name="fuse_rope_table",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=expected,
)
