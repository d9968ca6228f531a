"""Latent attention on the cache itself: W_kvb moves to the query and the output.

    mla_attention(q, cache, ..., W_kvb)    ->    mla_absorbed_attention(q, cache, ..., W_k, W_v)

Why: with few new tokens, expanding the whole cache to keys and values reads and writes 60 times
what the cache holds; the absorbed form reads 576 values a position. Prefill keeps the plain form,
which needs a third of the multiplications. The draft phase is absorbed too: but for the prompt it
runs over a handful of tokens.

Costs nothing in precision but the order of summation (1e-14 in float64).
"""

from dataclasses import replace

from lingc.context import Context
from lingc.graph import Value
from lingc.plan import TensorType
from lingc.plugins import mla_absorbed_attention, mla_attention
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite


def pattern(
    q: Value, cache: Value, pages: Value, offsets: Value, positions: Value, kv_b: Value,
    page: Value, nope: Value, scale: Value
) -> Value:  # fmt: skip
    return mla_attention.OP.overload(q, cache, pages, offsets, positions, kv_b, page, nope, scale)


def check(match: Match, context: Context) -> str | None:
    if context.phase == "prefill":
        return NOT_MINE
    return context.plain_refusal(match.weight("kv_b"))


def replacement(build: Builder, match: Match, context: Context) -> tuple[Value, ...]:
    config, whole = context.config, match.weight("kv_b")
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    rank = config.kv_lora_rank
    parts = []
    for take, width in (("absorb_k", nope), ("absorb_v", value)):
        spec = replace(
            whole,
            name=whole.name.removesuffix("kv_b_proj.weight") + take,
            type=TensorType(whole.type.dtype, (heads, width, rank)),
            take=take,
            split=(heads, nope, value),
        )
        parts.append(build.weight(spec))
    names = ("q", "cache", "pages", "offsets", "positions")
    given = (*(match[name] for name in names), *parts, match["page"], match["scale"])
    return (build.call(mla_absorbed_attention.OP.overload, *given),)


def expected(context: Context) -> int:
    return 0 if context.phase == "prefill" else len(context.mla_layers)


RULE = Rewrite(
    name="absorb_mla",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=expected,
)
