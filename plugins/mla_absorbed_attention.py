"""Causal MLA over the paged cache, in the space of the latents: few queries, many cached rows.

For a token t of sequence b, and every position x <= positions[t], with
row(x) = page_table[b, x // page_size] * page_size + x % page_size:

    c[x] | k_r[x] = cache[row(x)]
    z[t, h] = q_n[t, h] @ w_k[h]
    score[t, h, x] = scale * (z[t, h] . c[x] + q_r[t, h] . k_r[x])
    y[t, h] = w_v[h] @ sum_x softmax_x(score[t, h, :])[x] c[x]

which is `mla_attention` with kv_b moved to the query's and the output's side. The rows of the
step's own tokens are in the cache already. Other rows are not read.

Shapes: q [T, H, nope + r] after rope; cache [R, c + r]; page_table [B, P]; offsets [B + 1];
positions [T]; w_k [H, nope, c]; w_v [H, V, c]; y [T, HV]. T, B, P, R symbolic.

Rounding: everything in f32 (f64 for f64 q); y is rounded once to the dtype of q.

Source: DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1.2 and appendix C.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import mla, portable
from lingc.kernels.rows import power
from lingc.math import absorbed_attention, elements, number, stored_bytes, wide
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    q: Tensor, cache: Tensor, page_table: Tensor, offsets: Tensor, positions: Tensor,
    w_k: Tensor, w_v: Tensor, page_size: int, scale: float,
) -> Tensor:  # fmt: skip
    y = absorbed_attention(
        wide(q), cache, page_table, offsets, positions, (w_k, w_v), page_size, scale
    )
    return y.to(q.dtype)


def types(
    q: TensorType, cache: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, scale: float,
) -> TensorType:  # fmt: skip
    return TensorType(q.dtype, (q.shape[0], number(w_v.shape[0]) * number(w_v.shape[1])))


def cost(
    q: TensorType, cache: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, scale: float,
) -> Cost:  # fmt: skip
    # Every sequence fills its pages, and a token reads half of the step's own tokens.
    y = types(q, cache, page_table, offsets, positions, w_k, w_v, page_size, scale)
    (tokens, heads, _), (sequences, pages) = q.bind({}), page_table.bind({})
    width, latent = number(cache.shape[1]), number(w_k.shape[2])
    pairs = tokens * (pages * page_size - tokens / sequences / 2)
    rows = TensorType(cache.dtype, (sequences * pages * page_size, width))
    return Cost(
        flops=2.0 * tokens * (elements(w_k) + elements(w_v))
        + 2.0 * pairs * heads * (width + latent),
        moved_bytes=stored_bytes(q, page_table, w_k, w_v, y, rows),
    )


def refusal(
    _target: Target, q: TensorType, cache: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, scale: float,
) -> str | None:  # fmt: skip
    if {q.dtype, cache.dtype, w_k.dtype, w_v.dtype} != {"bf16"}:
        return "queries, cache and weights are not all bf16"
    _, nope, latent = (number(size) for size in w_k.shape)
    rope = number(cache.shape[1]) - latent
    return mla.size_refusal(nope, rope, number(w_v.shape[1]), latent)


def tactics(target: Target, *args: Any) -> Sequence[Tactic]:
    if refusal(target, *args) is not None:
        return ()
    sizes = _sizes(*args)
    splits = min(32, -(-sizes.room // 256), 2 * (target.sms or 64) // sizes.tokens)
    return portable.absorbed_tactics(sizes, power(max(1, splits)))


def _sizes(
    q: TensorType, cache: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, scale: float,
) -> mla.Sizes:  # fmt: skip
    (tokens, heads, _), (sequences, pages) = q.bind({}), page_table.bind({})
    (_, nope, latent), (_, value, _) = w_k.bind({}), w_v.bind({})
    return mla.Sizes(
        tokens=tokens,
        sequences=sequences,
        pages=pages,
        page_size=page_size,
        heads=heads,
        nope=nope,
        rope=number(cache.shape[1]) - latent,
        value=value,
        latent=latent,
        head_pitch=nope,
        scale=scale,
    )


def inputs(
    lengths: tuple[int, ...], heads: int, nope: int, pairs: int, value: int, latent: int,
    page_size: int, *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    some = Samples(dtype=dtype, device=device)
    _, offsets, positions = some.sequences(lengths)
    pages, rows = some.pages(lengths, page_size)
    key = nope + 2 * pairs
    return (
        some.normal(sum(lengths), heads, key),
        some.normal(rows, latent + 2 * pairs),
        pages,
        offsets,
        positions,
        some.weight(heads, nope, latent),
        some.weight(heads, value, latent),
        page_size,
        key**-0.5,
    )


OP = define(
    "mla_absorbed_attention(Tensor q, Tensor cache, Tensor page_table, Tensor offsets, "
    "Tensor positions, Tensor w_k, Tensor w_v, int page_size, float scale) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="attention",
    cases=(
        ((1,), 1, 2, 1, 2, 4, 4),
        ((1, 1, 1), 3, 10, 2, 6, 12, 4),
        ((3, 0, 3), 2, 16, 4, 12, 20, 2),
        ((1, 3), 3, 16, 8, 32, 64, 4),
        ((2,), 2, 128, 32, 128, 512, 64),
    ),
)
