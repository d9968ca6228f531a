"""The head, with FP32 results whatever the activations are.

    linear(hidden, lm_head)    ->    linear_f32(hidden, lm_head)

Why: logits rounded to bf16 tie and flip; the accumulator is FP32 anyway.

Raises precision in bf16 against a rounded result; changes nothing in f32.
"""

from typing import Any

import torch

from lingc.graph import Value
from lingc.plugins import linear
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(x: Value, weight: Value) -> Value:
    return aten.linear.default(x, weight)


def check(match: Match, _context: Any) -> str | None:
    head = match.is_weight("weight") and match.weight("weight").name == "lm_head.weight"
    return None if head else NOT_MINE


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return (build.call(linear.OP_F32.overload, match["x"], match["weight"]),)


RULE = Rewrite(
    name="fuse_lm_head",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=lambda _context: 1,
)
