"""The router: GEMM, sigmoid, group choice and expert choice, as one op.

    p = sigmoid(n W^T), b = p + bias, the best groups by their two best b, the best k of those
        ->    ids, weights = router(n, W, bias, ...)

Why: twenty launches over a few hundred numbers become one; the logits never leave FP32.

Costs nothing in precision: BF16 operands are multiplied into FP32 where the model widens them
first, which is the same product.
"""

from itertools import product

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import router
from lingc.rewrite import Builder, Match, Pattern, Rewrite, either

aten = torch.ops.aten


def _largest(x: Value, end: Value, *, whole: bool) -> Value:
    order = aten.sort.stable(x, stable=True, dim=-1, descending=True)[1]
    return order if whole else aten.slice.Tensor(order, 1, 0, end)


def _choice(
    x: Value, weight: Value, bias: Value, grouping: Value, best: Value, kept: Value,
    wide: Value, _flat: Value, top_k: Value, *, every_group: bool, every_expert: bool
) -> tuple[Value, Value]:  # fmt: skip
    """The chosen ids, and the scores they chose from."""
    scores = aten.sigmoid.default(aten.linear.default(either(x), either(weight)))
    biased = aten.add.Tensor(scores, either(bias))
    grouped = aten.reshape.default(biased, grouping)
    group_scores = aten.sum.dim_IntList(aten.topk.default(grouped, best)[0], [-1])
    keep = _largest(group_scores, kept, whole=every_group)
    mask = aten.scatter.value(aten.zeros_like.default(group_scores), 1, keep, 1.0)
    spread = aten.expand.default(aten.unsqueeze.default(mask, -1), wide)
    out = aten.eq.Scalar(aten.reshape.default(spread, _flat), 0)
    masked = aten.masked_fill.Scalar(biased, out, float("-inf"))
    return _largest(masked, top_k, whole=every_expert), scores


def _pattern(*, normalize: bool, every_group: bool, every_expert: bool) -> Pattern:
    """A spelling: a cut that keeps everything is no call, and weights may stay as they are."""

    def pattern(
        x: Value, weight: Value, bias: Value, grouping: Value, best: Value, kept: Value,
        wide: Value, _flat: Value, top_k: Value, tiny: Value, scale: Value
    ) -> tuple[Value, Value]:  # fmt: skip
        ids, scores = _choice(
            x, weight, bias, grouping, best, kept, wide, _flat, top_k,
            every_group=every_group, every_expert=every_expert,
        )  # fmt: skip
        weights = aten.gather.default(scores, 1, ids)
        if normalize:
            total = aten.add.Tensor(aten.sum.dim_IntList(weights, [-1], keepdim=True), tiny)
            weights = aten.div.Tensor(weights, total)
        return ids, aten.mul.Tensor(weights, scale)

    return pattern


PATTERNS = tuple(
    _pattern(normalize=normalize, every_group=every_group, every_expert=every_expert)
    for normalize, every_group, every_expert in product((True, False), repeat=3)
)


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


def replacement(build: Builder, match: Match, _context: Context) -> tuple[Value, ...]:
    groups, per_group = match["grouping"][1:]
    call = build.call(
        router.OP.overload,
        match["x"],
        match["weight"],
        match["bias"],
        groups,
        match.bound.get("kept", groups),
        match.bound.get("top_k", groups * per_group),
        float(match["scale"]),
        "tiny" in match.bound,
    )
    return build.items(call)


def expected(context: Context) -> int:
    return len(context.moe_layers)


RULE = Rewrite(
    name="fuse_router",
    patterns=PATTERNS,
    check=check,
    replacement=replacement,
    expected=expected,
)
