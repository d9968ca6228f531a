"""Causal MLA over the paged cache, keys and values made from the cached latents.

For a token t of sequence b, and every position x <= positions[t], with
row(x) = page_table[b, x // page_size] * page_size + x % page_size:

    c | k_r = cache[row(x)]
    k_n[x, h] | v[x, h] = kv_b[h] @ c                          of widths nope_dim and V
    score[t, h, x] = scale * (q_n[t, h] . k_n[x, h] + q_r[t, h] . k_r[x])
    y[t, h] = sum_x softmax_x(score[t, h, :])[x] v[x, h]

The rows of the step's own tokens are in the cache already. Other rows are not read.

Shapes: q [T, H, nope_dim + r] after rope; cache [R, c + r]; page_table [B, P]; offsets [B + 1];
positions [T]; kv_b [H (nope_dim + V), c]; y [T, HV]. T, B, P, R symbolic.

Rounding: everything in f32 (f64 for f64 q); y is rounded once to the dtype of q.

Source: DeepSeek-V2, 2024, arXiv:2405.04434, eq. 9-19.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernel import Tensor as Operand
from lingc.kernels import mla, mla_many
from lingc.math import (
    accumulator,
    cached_rows,
    causal_softmax,
    elements,
    number,
    stored_bytes,
    wide,
)
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    q: Tensor, cache: Tensor, page_table: Tensor, offsets: Tensor, positions: Tensor,
    kv_b: Tensor, page_size: int, nope_dim: int, scale: float,
) -> Tensor:  # fmt: skip
    dtype, heads, latent = accumulator(q), q.shape[1], kv_b.shape[1]
    weight = kv_b.to(dtype).unflatten(0, (heads, -1))  # [H, nope + V, c]
    y = q.new_zeros(q.shape[0], heads, weight.shape[1] - nope_dim)
    for b, (first, last) in enumerate(pairwise(offsets.tolist())):
        if first == last:
            continue
        at = positions[first:last]
        rows = cached_rows(cache, page_table[b], int(at.max()) + 1, page_size).to(dtype)
        kv = torch.einsum("xc,hnc->xhn", rows[:, :latent], weight)
        k_r = rows[:, None, latent:].expand(-1, heads, -1)
        k = torch.cat((kv[..., :nope_dim], k_r), -1)
        scores = scale * torch.einsum("thk,xhk->htx", wide(q[first:last]), k)
        o = torch.einsum("htx,xhv->thv", causal_softmax(scores, at), kv[..., nope_dim:])
        y[first:last] = o.to(q.dtype)
    return y.flatten(1)


def types(
    q: TensorType, cache: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, kv_b: TensorType, page_size: int, nope_dim: int, scale: float,
) -> TensorType:  # fmt: skip
    width = number(kv_b.shape[0]) - number(q.shape[1]) * nope_dim
    return TensorType(q.dtype, (q.shape[0], width))


def cost(
    q: TensorType, cache: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, kv_b: TensorType, page_size: int, nope_dim: int, scale: float,
) -> Cost:  # fmt: skip
    # Every sequence fills its pages, and a token reads half of the step's own tokens.
    y = types(q, cache, page_table, offsets, positions, kv_b, page_size, nope_dim, scale)
    (tokens, heads, key), (sequences, pages) = q.bind({}), page_table.bind({})
    context = sequences * pages * page_size
    pairs = tokens * (pages * page_size - tokens / sequences / 2)
    value = elements(y) // tokens // heads
    rows = TensorType(cache.dtype, (context, cache.shape[1]))
    return Cost(
        flops=2.0 * context * elements(kv_b) + 2.0 * pairs * heads * (key + value),
        moved_bytes=stored_bytes(q, page_table, kv_b, y, rows),
    )


def sizes_of(
    q: TensorType, cache: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, kv_b: TensorType, page_size: int, nope_dim: int, scale: float,
) -> mla.Sizes:  # fmt: skip
    (tokens, heads, key), (sequences, pages) = q.bind({}), page_table.bind({})
    together = number(kv_b.shape[0]) // heads
    return mla.Sizes(
        tokens=tokens,
        sequences=sequences,
        pages=pages,
        page_size=page_size,
        heads=heads,
        nope=nope_dim,
        rope=key - nope_dim,
        value=together - nope_dim,
        latent=number(kv_b.shape[1]),
        head_pitch=together,
        scale=scale,
    )


def refusal(
    target: Target, q: TensorType, cache: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, kv_b: TensorType, page_size: int, nope_dim: int, scale: float,
) -> str | None:  # fmt: skip
    if {q.dtype, cache.dtype, kv_b.dtype} != {"bf16"}:
        return f"q is {q.dtype}, the cache {cache.dtype}, kv_b {kv_b.dtype}; all must be bf16"
    heads, key = number(q.shape[1]), number(q.shape[2])
    value = number(kv_b.shape[0]) // heads - nope_dim
    return mla.size_refusal(nope_dim, key - nope_dim, value, number(kv_b.shape[1]))


def tactics(target: Target, *args: Any) -> Sequence[Tactic]:
    if refusal(target, *args) is not None:
        return ()
    sizes = sizes_of(*args)
    w_k, w_v = Operand("kv_b"), Operand("kv_b", 2 * sizes.nope * sizes.latent)
    return mla_many.attention_tactics(target, sizes, w_k, w_v, "q", "out")


def inputs(
    lengths: tuple[int, ...], heads: int, nope: int, pairs: int, value: int, latent: int,
    page_size: int, past: tuple[int, ...] | None = None, *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    """Arguments for sequences of `lengths` new tokens, each after `past` cached ones."""
    some = Samples(dtype=dtype, device=device)
    held = tuple(5 * b for b in range(len(lengths))) if past is None else past
    offsets, positions, _, pages, rows = some.histories(lengths, held, page_size)
    key = nope + 2 * pairs
    return (
        some.normal(sum(lengths), heads, key),
        some.normal(rows, latent + 2 * pairs),
        pages,
        offsets,
        positions,
        some.weight(heads * (nope + value), latent),
        page_size,
        nope,
        key**-0.5,
    )


def _benchmark(name: str, past: int) -> Benchmark:
    """One sequence of the full model."""
    return Benchmark(
        name=f"causal MLA, {name}",
        case=lambda tokens: ((tokens,), 32, 128, 32, 128, 512, 64, (past,)),
        tokens=(2048, 8192),
        context=past,
    )


OP = define(
    "mla_attention(Tensor q, Tensor cache, Tensor page_table, Tensor offsets, Tensor positions, "
    "Tensor kv_b, int page_size, int nope_dim, float scale) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=(
        ((1,), 1, 2, 1, 2, 4, 4),
        ((5, 0, 9, 1), 3, 10, 2, 6, 12, 4),
        ((33, 1), 2, 16, 4, 16, 20, 16),
        ((1,), 1, 16, 8, 16, 32, 4),
        ((3, 0, 129, 1), 2, 32, 8, 16, 64, 8, (70, 2, 0, 130)),
        ((17, 127), 2, 128, 32, 128, 512, 64, (0, 200)),
    ),
    refusal=refusal,
    tactics=tactics,
    mechanism="attention",
    rows=("q", "positions"),
    benchmarks=(_benchmark("from the start", 0), _benchmark("after 24576", 24576)),
)
