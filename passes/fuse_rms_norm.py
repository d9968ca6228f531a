"""A norm that no add was fused with: the first of a phase, and those of the MTP layer's inputs.

    rms_norm(x, [D], weight, eps)    ->    rms_norm(x, weight, eps)

Why: the weight stays in its storage format. Runs after every larger fusion that takes a norm. Where
our own kernels are launched, that is every norm, until `fuse_linear` takes them.

Costs nothing in precision.
"""

from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import rms_norm
from lingc.rewrite import Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(x: Value, dims: Value, weight: Value, eps: Value) -> Value:
    return aten.rms_norm.default(x, dims, weight, eps)


def check(match: Match, _context: Any) -> str | None:
    if not match.is_weight("weight"):
        return "the norm has no weight"
    if len(match["dims"]) != 1:
        return f"the norm runs over {len(match['dims'])} axes, not the last one"
    return None


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return (build.call(rms_norm.OP.overload, match["x"], match["weight"], match["eps"]),)


def expected(context: Context) -> int:
    """The first layer's input norm, or all norms; in the draft phase also those of its inputs."""
    behind_adds = 2 * len(context.layers) if context.fuses_launches else 0
    return behind_adds + (3 if context.phase == "draft" else 1)


RULE = Rewrite(
    name="fuse_rms_norm",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=expected,
)
