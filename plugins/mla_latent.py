"""What MLA derives from its merged down-projection: the query's latent, and a row of the cache.

    a[t] = q_a | latent | rope key,  of widths q_rank, c and r
    cq[t]          = rms(q_a; q_weight)
    cache[rows[t]] = rms(latent; kv_weight) | rope_pairs(rope key)

with rms as in `rms_norm`, and rope_pairs(z), for pair j of r / 2:

    y[2j] = z[2j] cos[t, j] - z[2j+1] sin[t, j],  y[2j+1] = z[2j+1] cos[t, j] + z[2j] sin[t, j]

The rope key is not normed. Row -1 is not written.

Shapes: a [T, q_rank + c + r]; q_weight [q_rank]; kv_weight [c]; cos, sin [T, r / 2]; cache
[R, c + r]; rows [T]; cq [T, q_rank]. T and R symbolic.

Rounding: in f32 (f64 for f64 a); cq is rounded once to the dtype of a, the row once to the cache's.

Source: DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1.2-2.1.3.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import portable, rows
from lingc.math import elements, latent_rows, rms, stored, stored_bytes
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    a: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    rows: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    rank = q_weight.numel()
    cq = rms(a[:, :rank], q_weight, eps).to(a.dtype)
    made = latent_rows(a[:, rank:], kv_weight, cos, sin, eps)
    return cq, stored(cache, rows, made)


def types(
    a: TensorType,
    q_weight: TensorType,
    kv_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    cache: TensorType,
    rows: TensorType,
    eps: float,
) -> tuple[TensorType, TensorType]:
    return TensorType(a.dtype, (a.shape[0], q_weight.shape[0])), cache


def cost(
    a: TensorType,
    q_weight: TensorType,
    kv_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    cache: TensorType,
    rows: TensorType,
    eps: float,
) -> Cost:
    cq, _ = types(a, q_weight, kv_weight, cos, sin, cache, rows, eps)
    written = TensorType(cache.dtype, (*rows.shape, *cache.shape[1:]))
    return Cost(
        flops=4.0 * elements(a),
        moved_bytes=stored_bytes(a, q_weight, kv_weight, cos, sin, rows, cq, written),
    )


def refusal(
    _target: Target, a: TensorType, q_weight: TensorType, kv_weight: TensorType,
    cos: TensorType, sin: TensorType, cache: TensorType, *_: TensorType | float,
) -> str | None:  # fmt: skip
    return rows.dtype_refusal(a=a, q_weight=q_weight, kv_weight=kv_weight, cache=cache)


def tactics(target: Target, a: TensorType, *args: Any) -> Sequence[Tactic]:
    if refusal(target, a, *args) is not None:
        return ()
    q_weight, kv_weight, cos, *_, eps = args
    return portable.latent_tactics(a, q_weight, kv_weight, cos, eps)


def inputs(
    tokens: int, rank: int, latent: int, pairs: int, *, dtype: str, device: str
) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    cos, sin = some.rope(some.below(500, tokens), pairs)
    return (
        some.normal(tokens, rank + latent + 2 * pairs),
        some.norm_weight(rank),
        some.norm_weight(latent),
        cos,
        sin,
        some.normal(tokens + 3, latent + 2 * pairs),
        some.ints([*range(tokens, 1, -1), -1]),
        1e-6,
    )


OP = define(
    "mla_latent(Tensor a, Tensor q_weight, Tensor kv_weight, Tensor cos, Tensor sin, "
    "Tensor cache, Tensor rows, float eps) -> (Tensor cq, Tensor cache)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="rope",
    cases=((1, 4, 4, 1), (7, 24, 10, 3), (3, 128, 512, 32)),
)
