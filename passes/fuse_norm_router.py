"""The router with the norm before it, as the GPU's own kernel computes it.

    ids, weights = router(rms_norm(x, w), ...)
        ->    ids, weights, pairs, starts = norm_router(x, w, ...)

For targets whose engine launches our kernels.

Why: the router is the first to read the norm of the residual stream, and its kernel waits for
nothing else; the lists of every expert's tokens are what the experts' kernels of many tokens begin
with.

Gains precision: the norm is not rounded before the logits, and a rounded logit moves tokens to
other experts.
"""

import operator
from typing import Any

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import norm_router, rms_norm, router
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite


def pattern(
    x: Value, norm_weight: Value, eps: Value, weight: Value, bias: Value, groups: Value,
    kept: Value, top_k: Value, scale: Value, normalize: Value
) -> tuple[Value, Value]:  # fmt: skip
    normed = rms_norm.OP.overload(x, norm_weight, eps)
    routed = router.OP.overload(normed, weight, bias, groups, kept, top_k, scale, normalize)
    return operator.getitem(routed, 0), operator.getitem(routed, 1)


def check(_match: Match, context: Context) -> str | None:
    return None if context.fuses_launches else NOT_MINE


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = (
        "x", "norm_weight", "weight", "bias", "groups", "kept", "top_k", "scale", "normalize",
        "eps",
    )  # fmt: skip
    call = build.call(norm_router.OP.overload, *(match[name] for name in names))
    return build.items(call)[:2]


def expected(context: Context) -> int:
    return len(context.moe_layers) if context.fuses_launches else 0


RULE = Rewrite(
    name="fuse_norm_router",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=expected,
    again=(rms_norm.OP.overload,),
)
