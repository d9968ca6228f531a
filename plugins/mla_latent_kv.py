"""A row of MLA's cache for each token, from the last columns of its down-projection.

    a[t] = ... | latent | rope key,  the last two of widths c and r
    cache[rows[t]] = rms(latent; kv_weight) | rope_pairs(rope key)

with rms and rope_pairs as in `mla_latent`. Row -1 is not written.

Shapes: a [T, >= c + r]; kv_weight [c]; cos, sin [T, r / 2]; cache [R, c + r]; rows [T]. T and R
symbolic.

Rounding: in f32 (f64 for f64 a), rounded once to the cache's dtype.

Source: DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1.2-2.1.3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import mla
from lingc.math import elements, latent_rows, number, stored, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    a: Tensor,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    rows: Tensor,
    eps: float,
) -> Tensor:
    own = a[:, a.shape[1] - cache.shape[1] :]
    return stored(cache, rows, latent_rows(own, kv_weight, cos, sin, eps))


def types(
    a: TensorType,
    kv_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    cache: TensorType,
    rows: TensorType,
    eps: float,
) -> TensorType:
    return cache


def cost(
    a: TensorType,
    kv_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    cache: TensorType,
    rows: TensorType,
    eps: float,
) -> Cost:
    own = TensorType(a.dtype, (a.shape[0], cache.shape[1]))
    written = TensorType(cache.dtype, (*rows.shape, *cache.shape[1:]))
    return Cost(
        flops=4.0 * elements(own), moved_bytes=stored_bytes(own, kv_weight, cos, sin, rows, written)
    )


def refusal(
    _target: Target,
    a: TensorType,
    kv_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    cache: TensorType,
    rows: TensorType,
    eps: float,
) -> str | None:
    if {a.dtype, kv_weight.dtype, cache.dtype} != {"bf16"} or cos.dtype != "f32":
        return "a, kv_weight and the cache are not bf16, or cos and sin not f32"
    return None


def tactics(target: Target, *args: Any) -> Sequence[Tactic]:
    if refusal(target, *args) is not None:
        return ()
    a, kv_weight, cos, _, _, _, eps = args
    sizes = mla.Rows(
        tokens=number(a.shape[0]),
        pitch=number(a.shape[1]),
        latent=number(kv_weight.shape[0]),
        pairs=number(cos.shape[1]),
        eps=eps,
    )
    return mla.latent_tactics(sizes)


def inputs(
    tokens: int, before: int, latent: int, pairs: int, *, dtype: str, device: str
) -> tuple[Tensor | float, ...]:
    """Arguments with `before` columns of a that belong to others."""
    some = Samples(dtype=dtype, device=device)
    cos, sin = some.rope(7 * torch.arange(tokens) % 500, pairs)
    return (
        some.normal(tokens, before + latent + 2 * pairs),
        some.norm_weight(latent),
        cos,
        sin,
        some.normal(tokens + 3, latent + 2 * pairs),
        some.ints([*range(tokens, 1, -1), -1]),
        1e-6,
    )


OP = define(
    "mla_latent_kv(Tensor a, Tensor kv_weight, Tensor cos, Tensor sin, Tensor cache, "
    "Tensor rows, float eps) -> Tensor cache",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 0, 4, 1), (7, 2, 10, 3), (3, 0, 512, 32), (127, 1536, 512, 32)),
    refusal=refusal,
    tactics=tactics,
    mechanism="rope",
    benchmarks=(
        Benchmark(
            name="latent rows, 512 + 64", case=lambda n: (n, 1536, 512, 32), tokens=(1, 64, 8192)
        ),
    ),
)
