"""Causal attention of packed tokens over the pages of their own sequences, as one op.

    context = cache[rows of the page table]
    k, v = expand(context W_kvb), mask = own sequence and not after the token's position
    o = softmax(q k^T * scale, masked) v    ->    o = mla_attention(q, cache, page_table, ...)

Why: the unfused form gathers every page of every sequence, expands it, and scores each token
against all of them; the op reads a token's own rows.

Costs nothing in precision: sums over other sequences are sums over zeros.
"""

import operator
from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import mla_attention
from lingc.rewrite import Builder, Match, Rewrite

aten = torch.ops.aten


def _mask(
    pages: Value, offsets: Value, positions: Value, page: Value, tokens: Value, batch: Value,
    many: Value, _open: Value
) -> Value:  # fmt: skip
    """[T, B * C]: the row belongs to the token's sequence and is not after it."""
    after = aten.ge.Tensor(
        aten.unsqueeze.default(aten.arange.default(tokens), 1),
        aten.slice.Tensor(offsets, 0, 1, _open),
    )
    sequence = aten.unsqueeze.default(aten.sum.dim_IntList(after, [1]), 1)
    mine = aten.eq.Tensor(sequence, aten.arange.default(batch))
    length = operator.mul(page, many)
    past = aten.le.Tensor(aten.arange.default(length), aten.unsqueeze.default(positions, 1))
    both = aten.__and__.Tensor(aten.unsqueeze.default(mine, 2), aten.unsqueeze.default(past, 1))
    return aten.flatten.using_ints(both, 1)


def _heads_first(x: Value) -> Value:
    return aten.unsqueeze.default(aten.transpose.int(x, 0, 1), 0)


def pattern(
    q: Value, cache: Value, pages: Value, offsets: Value, positions: Value, kv_b: Value,
    page: Value, rank: Value, rank_end: Value, nope: Value, width: Value, per_head: Value,
    spread: Value, tokens: Value, batch: Value, many: Value, _open: Value, scale: Value
) -> Value:  # fmt: skip
    at = aten.mul.Tensor(aten.unsqueeze.default(pages, -1), page)
    rows = aten.flatten.using_ints(aten.add.Tensor(at, aten.arange.default(page)), 1)
    context = aten.index.Tensor(cache, [rows])
    latent = aten.slice.Tensor(context, 2, 0, rank)
    key_rope = aten.slice.Tensor(context, 2, rank, rank_end)
    kv = aten.unflatten.int(aten.linear.default(latent, kv_b), -1, per_head)
    key_nope = aten.slice.Tensor(kv, 3, 0, nope)
    v = aten.slice.Tensor(kv, 3, nope, width)
    shared = aten.expand.default(aten.unsqueeze.default(key_rope, 2), spread)
    k = aten.cat.default([key_nope, shared], -1)
    mask = _mask(pages, offsets, positions, page, tokens, batch, many, _open)
    out = aten.scaled_dot_product_attention.default(
        _heads_first(q),
        _heads_first(aten.flatten.using_ints(k, 0, 1)),
        _heads_first(aten.flatten.using_ints(v, 0, 1)),
        mask,
        scale=scale,
    )
    tokens_first = aten.transpose.int(aten.squeeze.dim(out, 0), 0, 1)
    return aten.flatten.using_ints(tokens_first, 1)


def check(match: Match, context: Context) -> str | None:
    if not match.is_weight("kv_b"):
        return "kv_b is not a weight"
    config = context.config
    stored = context.plain_refusal(match.weight("kv_b"))
    if stored is not None:
        return stored
    if match["rank"] != config.kv_lora_rank or match["nope"] != config.qk_nope_head_dim:
        return f"the cache row is cut at {match['rank']}, the head at {match['nope']}"
    return None


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = ("q", "cache", "pages", "offsets", "positions", "kv_b", "page", "nope", "scale")
    return (build.call(mla_attention.OP.overload, *(match[name] for name in names)),)


def expected(context: Context) -> int:
    return len(context.mla_layers)


RULE = Rewrite(
    name="fuse_mla_attention",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=expected,
)
