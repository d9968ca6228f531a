"""The router: GEMM, sigmoid, group choice and expert choice, as one op.

    p = sigmoid(n W^T), b = p + bias, the best groups by their two best b, the best k of those
        ->    ids, weights = router(n, W, bias, ...)

Why: twenty launches over a few hundred numbers become one; the logits never leave FP32.

Costs nothing in precision: BF16 operands are multiplied into FP32 where the model widens them
first, which is the same product.
"""

from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import router
from lingc.rewrite import Builder, Match, Rewrite, either

aten = torch.ops.aten


def _largest(x: Value, end: Value) -> Value:
    order = aten.sort.stable(x, stable=True, dim=-1, descending=True)[1]
    return aten.slice.Tensor(order, 1, 0, end)


def _choice(
    x: Value, weight: Value, bias: Value, grouping: Value, best: Value, kept: Value,
    wide: Value, _flat: Value, top_k: Value
) -> tuple[Value, Value]:  # fmt: skip
    """The chosen ids, and the scores they chose from."""
    scores = aten.sigmoid.default(aten.linear.default(either(x), either(weight)))
    biased = aten.add.Tensor(scores, either(bias))
    grouped = aten.reshape.default(biased, grouping)
    group_scores = aten.sum.dim_IntList(aten.topk.default(grouped, best)[0], [-1])
    keep = _largest(group_scores, kept)
    mask = aten.scatter.value(aten.zeros_like.default(group_scores), 1, keep, 1.0)
    spread = aten.expand.default(aten.unsqueeze.default(mask, -1), wide)
    out = aten.eq.Scalar(aten.reshape.default(spread, _flat), 0)
    masked = aten.masked_fill.Scalar(biased, out, float("-inf"))
    return _largest(masked, top_k), scores


def pattern(
    x: Value, weight: Value, bias: Value, grouping: Value, best: Value, kept: Value,
    wide: Value, _flat: Value, top_k: Value, tiny: Value, scale: Value
) -> Value:  # fmt: skip
    ids, scores = _choice(x, weight, bias, grouping, best, kept, wide, _flat, top_k)
    chosen = aten.gather.default(scores, 1, ids)
    total = aten.add.Tensor(aten.sum.dim_IntList(chosen, [-1], True), tiny)
    return ids, aten.mul.Tensor(aten.div.Tensor(chosen, total), scale)


def pattern_raw(
    x: Value, weight: Value, bias: Value, grouping: Value, best: Value, kept: Value,
    wide: Value, _flat: Value, top_k: Value, scale: Value
) -> Value:  # fmt: skip
    ids, scores = _choice(x, weight, bias, grouping, best, kept, wide, _flat, top_k)
    return ids, aten.mul.Tensor(aten.gather.default(scores, 1, ids), scale)


def check(match: Match, context: Context) -> str | None:
    if not (match.is_weight("weight") and match.is_weight("bias")):
        return "the matrix or the bias is not a weight"
    stored = context.plain_refusal(match.weight("weight"))
    if stored is not None:
        return stored
    per_group = match["grouping"][-1]
    if match["best"] != min(2, per_group):
        return f"a group is scored by its {match['best']} best of {per_group}, not by two"
    return None


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    call = build.call(
        router.OP.overload,
        match["x"],
        match["weight"],
        match["bias"],
        match["grouping"][1],
        match["kept"],
        match["top_k"],
        float(match["scale"]),
        "tiny" in match.bound,
    )
    return build.items(call)


def expected(context: Context) -> int:
    return len(context.moe_layers)


RULE = Rewrite(
    name="fuse_router",
    patterns=(pattern, pattern_raw),
    check=check,
    replacement=replacement,
    expected=expected,
)
