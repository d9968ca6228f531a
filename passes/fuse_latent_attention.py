"""MLA around its projections, as the GPU's own kernels compute it.

    cq, cache = mla_latent(a, ...), q = fused_linear(cq, W)
        ->    cache = mla_latent_kv(a, ...), q = fused_linear(a, norm w_q, W)

    cache = mla_latent_kv(a, ...), o = mla_absorbed_attention(mla_query_rope(q), cache, ...)
        ->    o, cache = mla_latent_attention(a, q, ...)

The second not in prefill, which has no absorbed attention. For targets whose engine launches our
kernels.

Why: the query's norm is the prologue of the projection that reads it, and the step's own cache rows
need nothing but the first projection: written by the attention itself, they cost no launch.

Gains precision: the query's norm and rope are not rounded in between.
"""

import operator
from typing import Any

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import (
    fused_linear,
    mla_absorbed_attention,
    mla_latent,
    mla_latent_attention,
    mla_latent_kv,
    mla_query_rope,
)
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite


def latent(
    a: Value, q_weight: Value, kv_weight: Value, cos: Value, sin: Value, cache: Value, rows: Value,
    eps: Value, weight: Value, scale: Value, stored: Value, group: Value, _eps: Value, dtype: Value
) -> tuple[Value, Value]:  # fmt: skip
    made = mla_latent.OP.overload(a, q_weight, kv_weight, cos, sin, cache, rows, eps)
    return operator.getitem(made, 1), fused_linear.OP.overload(
        operator.getitem(made, 0), None, None, weight, scale, None, "none", "none", stored, group,
        1, _eps, dtype,
    )  # fmt: skip


def check(_match: Match, context: Context) -> str | None:
    return None if context.fuses_launches else NOT_MINE


def replace_latent(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = ("a", "kv_weight", "cos", "sin", "cache", "rows", "eps")
    cache = build.call(mla_latent_kv.OP.overload, *(match[name] for name in names))
    matrix = (match["weight"], match["scale"], None, "rms_norm", "none", match["stored"])
    rest = (match["group"], 1, match["eps"], match["dtype"])
    before = (match["a"], None, match["q_weight"])
    return cache, build.call(fused_linear.OP.overload, *before, *matrix, *rest)


def expected_latent(context: Context) -> int:
    """Where queries have a latent of their own."""
    fires = context.fuses_launches and context.config.q_lora_rank is not None
    return len(context.mla_layers) if fires else 0


LATENT_RULE = Rewrite(
    name="fuse_linear_latent",
    patterns=(latent,),
    check=check,
    replacement=replace_latent,
    expected=expected_latent,
)


def attention(
    a: Value, q: Value, kv_weight: Value, cos: Value, sin: Value, cache: Value, rows: Value,
    eps: Value, _heads: Value, pages: Value, offsets: Value, positions: Value, w_k: Value,
    w_v: Value, page: Value, scale: Value
) -> tuple[Value, Value]:  # fmt: skip
    after = mla_latent_kv.OP.overload(a, kv_weight, cos, sin, cache, rows, eps)
    turned = mla_query_rope.OP.overload(q, cos, sin, _heads)
    return after, mla_absorbed_attention.OP.overload(
        turned, after, pages, offsets, positions, w_k, w_v, page, scale
    )


def replace_attention(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = (
        "a", "q", "kv_weight", "cos", "sin", "cache", "rows", "pages", "offsets", "positions",
        "w_k", "w_v", "page", "eps", "scale",
    )  # fmt: skip
    call = build.call(mla_latent_attention.OP.overload, *(match[name] for name in names))
    return tuple(reversed(build.items(call)))


def expected_attention(context: Context) -> int:
    fires = context.fuses_launches and context.phase != "prefill"
    return len(context.mla_layers) if fires else 0


ATTENTION_RULE = Rewrite(
    name="fuse_latent_attention",
    patterns=(attention,),
    check=check,
    replacement=replace_attention,
    expected=expected_attention,
)
