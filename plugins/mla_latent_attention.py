"""MLA of a few new tokens over the paged cache: the tokens' own rows, then attention on latents.

    cache[rows[t]] = rms(latent; kv_weight) | rope_pairs(rope key)      last c + r columns of a[t]
    z[t, h] = q_n[t, h] @ w_k[h]
    score[t, h, x] = scale * (z[t, h] . c[x] + rope_pairs(q_r[t, h]) . k_r[x])
    y[t, h] = w_v[h] @ sum_x softmax_x(score[t, h, :])[x] c[x]

over every position x <= positions[t] of the token's sequence b, with c[x] | k_r[x] the cache's row
page_table[b, x // page_size] * page_size + x % page_size, the new rows included. That is
`mla_latent_kv`, `mla_query_rope` and `mla_absorbed_attention` in one op: rms and rope_pairs as
there. Row -1 is not written. Other rows are not read.

Shapes: a [T, >= c + r]; q [T, H (nope + r)] before rope; kv_weight [c]; cos, sin [T, r / 2]; cache
[R, c + r]; rows [T]; page_table [B, P]; offsets [B + 1]; positions [T]; w_k [H, nope, c]; w_v
[H, V, c]; y [T, HV]. T, B, P, R symbolic.

Rounding: everything in f32 (f64 for f64 q); rows are rounded once to the cache's dtype, y once to
the dtype of q. Kernels multiply z, the shares and the sum of latents rounded to bf16, and add up
means of parts of the rows rounded to f16.

Source: DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1.2 and appendix C.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernel import Tensor as Operand
from lingc.kernels import mla, mla_few, mla_many
from lingc.kernels.rows import power
from lingc.math import (
    absorbed_attention,
    elements,
    latent_rows,
    number,
    rope_pairs,
    stored,
    stored_bytes,
    wide,
)
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target

MOST_ABSORBED = 512
"""Tokens beyond which keys and values are made, as in prefill: the draft layer over a prompt."""


def reference(
    a: Tensor, q: Tensor, kv_weight: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor,
    page_table: Tensor, offsets: Tensor, positions: Tensor, w_k: Tensor, w_v: Tensor,
    page_size: int, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads, nope, _ = w_k.shape
    own = a[:, a.shape[1] - cache.shape[1] :]
    after = stored(cache, rows, latent_rows(own, kv_weight, cos, sin, eps))
    by_head = wide(q).unflatten(1, (heads, -1))
    turned = rope_pairs(by_head[..., nope:], cos[:, None], sin[:, None])
    query = torch.cat((by_head[..., :nope], turned), -1)
    y = absorbed_attention(
        query, after, page_table, offsets, positions, (w_k, w_v), page_size, scale
    )
    return y.to(q.dtype), after


def types(
    a: TensorType, q: TensorType, kv_weight: TensorType, cos: TensorType, sin: TensorType,
    cache: TensorType, rows: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, eps: float,
    scale: float,
) -> tuple[TensorType, TensorType]:  # fmt: skip
    return TensorType(q.dtype, (q.shape[0], number(w_v.shape[0]) * number(w_v.shape[1]))), cache


def cost(
    a: TensorType, q: TensorType, kv_weight: TensorType, cos: TensorType, sin: TensorType,
    cache: TensorType, rows: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, eps: float,
    scale: float,
) -> Cost:  # fmt: skip
    # Every sequence fills its pages, and a token reads half of the step's own tokens.
    (tokens, _), (sequences, pages) = q.bind({}), page_table.bind({})
    heads, width, latent = number(w_k.shape[0]), number(cache.shape[1]), number(w_k.shape[2])
    y = TensorType(q.dtype, (tokens, heads * number(w_v.shape[1])))
    pairs = tokens * (pages * page_size - tokens / sequences / 2)
    own = TensorType(a.dtype, (tokens, width))
    read = TensorType(cache.dtype, (sequences * pages * page_size, width))
    written = TensorType(cache.dtype, (tokens, width))
    return Cost(
        flops=2.0 * tokens * (elements(w_k) + elements(w_v))
        + 2.0 * pairs * heads * (width + latent),
        moved_bytes=stored_bytes(
            own, q, kv_weight, cos, sin, rows, page_table, w_k, w_v, y, read, written
        ),
    )


def inputs(
    lengths: tuple[int, ...], past: tuple[int, ...], heads: int, nope: int, pairs: int, value: int,
    latent: int, page_size: int, *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    """Arguments for sequences of `lengths` new tokens, each after `past` cached ones."""
    some = Samples(dtype=dtype, device=device)
    offsets, positions, rows, pages, count = some.histories(lengths, past, page_size)
    tokens, key, width = sum(lengths), nope + 2 * pairs, latent + 2 * pairs
    at = [p + i for n, p in zip(lengths, past, strict=True) for i in range(n)]
    cos, sin = some.rope(torch.tensor(at), pairs)
    return (
        some.normal(tokens, width + 3 * 8),
        some.normal(tokens, heads * key),
        some.norm_weight(latent),
        cos,
        sin,
        some.normal(count, width),
        rows,
        pages,
        offsets,
        positions,
        some.weight(heads, nope, latent),
        some.weight(heads, value, latent),
        page_size,
        1e-6,
        key**-0.5,
    )


def shape_of(
    a: TensorType, q: TensorType, kv_weight: TensorType, cos: TensorType, sin: TensorType,
    cache: TensorType, rows: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, eps: float,
    scale: float,
) -> mla_few.Shape:  # fmt: skip
    sequences, pages = page_table.bind({})
    return mla_few.Shape(
        tokens=number(q.shape[0]),
        sequences=sequences,
        pages=pages,
        page_count=(number(cache.shape[0]) - 1) // page_size,
        page_size=page_size,
        pitch=number(a.shape[1]),
        heads=number(w_k.shape[0]),
        nope=number(w_k.shape[1]),
        rope=2 * number(cos.shape[1]),
        value=number(w_v.shape[1]),
        latent=number(w_k.shape[2]),
        eps=eps,
        scale=scale,
    )


def refusal(
    target: Target, a: TensorType, q: TensorType, kv_weight: TensorType, cos: TensorType,
    sin: TensorType, cache: TensorType, rows: TensorType, page_table: TensorType,
    offsets: TensorType, positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int,
    eps: float, scale: float,
) -> str | None:  # fmt: skip
    if {a.dtype, q.dtype, cache.dtype, w_k.dtype, w_v.dtype} != {"bf16"}:
        return "activations, cache and weights are not all bf16"
    _, nope, latent = (number(size) for size in w_k.shape)
    return mla.size_refusal(nope, 2 * number(cos.shape[1]), number(w_v.shape[1]), latent)


def tactics(target: Target, *args: Any) -> Sequence[Tactic]:
    if refusal(target, *args) is not None:
        return ()
    shape = shape_of(*args)
    if shape.tokens > MOST_ABSORBED:
        w_k, w_v = Operand("w_k"), Operand("w_v")
        ways = mla_many.attention_tactics(target, shape.sizes, w_k, w_v, "turned", "y")
        return mla.whole_tactics(shape.sizes, shape.rows, ways)
    if target.arch == "sm_90a" and shape.has_own_kernels:
        return mla_few.tactics(target, shape)
    splits = min(32, -(-shape.context // 256), 2 * (target.sms or 64) // shape.tokens)
    return mla.absorbed_tactics(shape.sizes, shape.rows, power(max(1, splits)))


def pinned(target: Target, *args: Any) -> Sequence[Tactic]:
    """Runs of one length, on Hopper; else there is none."""
    shape = shape_of(*args)
    fits = target.arch == "sm_90a" and shape.has_own_kernels and shape.tokens <= MOST_ABSORBED
    if refusal(target, *args) is not None or not fits:
        return ()
    return mla_few.pinned(target, shape)


def _benchmark(name: str, new: int, context: int, tokens: tuple[int, ...]) -> Benchmark:
    """`new` tokens of each sequence, the last at the end of `context`."""
    return Benchmark(
        name=f"{name}, {context} cached",
        case=lambda count: (
            (new,) * (count // new), (context - new,) * (count // new), 32, 128, 32, 128, 512, 64,
        ),
        tokens=tokens,
        context=context,
    )  # fmt: skip


OP = define(
    "mla_latent_attention(Tensor a, Tensor q, Tensor kv_weight, Tensor cos, Tensor sin, "
    "Tensor cache, Tensor rows, Tensor page_table, Tensor offsets, Tensor positions, Tensor w_k, "
    "Tensor w_v, int page_size, float eps, float scale) -> (Tensor y, Tensor cache)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=(
        ((1,), (0,), 1, 2, 1, 2, 4, 4),
        ((1, 1, 1), (0, 5, 11), 3, 10, 2, 6, 12, 4),
        ((3, 0, 3), (2, 4, 0), 2, 16, 4, 12, 20, 2),
        ((3, 0, 2), (300, 4, 7), 3, 16, 8, 32, 64, 4),
        ((1,), (0,), 2, 128, 32, 128, 512, 64),
        ((1, 1, 1), (126, 0, 63), 4, 128, 32, 128, 512, 64),
        ((1,), (1100,), 3, 128, 32, 128, 512, 8),
        ((6,), (61,), 32, 128, 32, 128, 512, 64),
        ((501, 40), (0, 90), 2, 16, 8, 16, 32, 16),
        ((3, 0, 4), (500, 2, 61), 8, 128, 32, 128, 512, 64),
    ),
    refusal=refusal,
    tactics=tactics,
    pinned=pinned,
    mechanism="attention",
    benchmarks=(
        _benchmark("absorbed MLA", 1, 512, (1, 8, 64)),
        _benchmark("absorbed MLA", 1, 4096, (1, 8, 32)),
        _benchmark("absorbed MLA", 1, 65536, (1,)),
        _benchmark("absorbed MLA of 4 drafts", 4, 4096, (4, 16)),
        _benchmark("absorbed MLA of 4 drafts", 4, 65536, (4,)),
    ),
)
