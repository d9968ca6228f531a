"""A residual add and the RMS norm that reads it, as one op.

    h = x + residual, y = rms_norm(h; weight)    ->    y, h = add_rms_norm(x, residual, weight)

Why: the pair passes five times over [T, D], the fused op four; h stays a result, because the next
block adds to it. Where our own kernels are launched, the add ends the product before it instead
(`fuse_linear`).

Runs after `fuse_shared_expert_add`, which takes the add of the shared expert. Costs nothing: h is
rounded before the mean in both forms.
"""

from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import add_rms_norm
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(x: Value, residual: Value, dims: Value, weight: Value, eps: Value) -> Value:
    h = aten.add.Tensor(x, residual)
    return h, aten.rms_norm.default(h, dims, weight, eps)


def check(match: Match, context: Context) -> str | None:
    if context.fuses_launches:
        return NOT_MINE
    x, residual = match.type("x"), match.type("residual")
    if x.shape != residual.shape:
        return f"the add broadcasts {residual} to {x}"
    if len(match["dims"]) != 1:
        return f"the norm runs over {len(match['dims'])} axes, not the last one"
    return None


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    overload = add_rms_norm.OP.overload
    call = build.call(overload, match["x"], match["residual"], match["weight"], match["eps"])
    y, h = build.items(call)
    return h, y


def expected(context: Context) -> int:
    """Two a layer: attention and feed-forward; the last one meets the final norm."""
    return 0 if context.fuses_launches else 2 * len(context.layers)


RULE = Rewrite(
    name="fuse_add_rms_norm",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=expected,
)
