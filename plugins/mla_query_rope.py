"""Rotary embedding of the last channels of each head of an MLA query.

With n the width of cos and m = K - 2n, for pair j < n of head h:

    y[t, h, m + 2j]     = q[m + 2j] cos[t, j] - q[m + 2j + 1] sin[t, j]
    y[t, h, m + 2j + 1] = q[m + 2j + 1] cos[t, j] + q[m + 2j] sin[t, j]

and the first m channels as they are. Pairs stay where they are, as in the cache.

Shapes: q [T, HK], heads slowest; cos, sin [T, n]; y [T, H, K]. T symbolic.

Rounding: in f32 (f64 for f64 q), rounded once to the dtype of q.

Source: inclusionAI/Ling-V2.5:models/modeling_bailing_moe_v2_5.py, up to a permutation of channels
that queries and keys share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import rows
from lingc.math import elements, number, rope_pairs, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(q: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    by_head = q.unflatten(1, (heads, -1))
    plain, turned = by_head.tensor_split((by_head.shape[-1] - 2 * cos.shape[-1],), -1)
    made = rope_pairs(turned, cos[:, None], sin[:, None]).to(q.dtype)
    return torch.cat((plain, made), -1)


def types(q: TensorType, cos: TensorType, sin: TensorType, heads: int) -> TensorType:
    return TensorType(q.dtype, (q.shape[0], heads, number(q.shape[1]) // heads))


def cost(q: TensorType, cos: TensorType, sin: TensorType, heads: int) -> Cost:
    return Cost(flops=6.0 * heads * elements(cos), moved_bytes=stored_bytes(q, cos, sin, q))


def refusal(
    _target: Target, q: TensorType, cos: TensorType, sin: TensorType, heads: int
) -> str | None:
    wrong = rows.dtype_refusal(q=q)
    return wrong or ("cos and sin are not f32" if {cos.dtype, sin.dtype} != {"f32"} else None)


def tactics(
    target: Target, q: TensorType, cos: TensorType, sin: TensorType, heads: int
) -> Sequence[Tactic]:
    if refusal(target, q, cos, sin, heads) is not None:
        return ()
    return rows.rope_query(q, cos, heads, cost(q, cos, sin, heads))


def inputs(
    tokens: int, heads: int, plain: int, pairs: int, *, dtype: str, device: str
) -> tuple[Tensor | int, ...]:
    some = Samples(dtype=dtype, device=device)
    q = some.normal(tokens, heads * (plain + 2 * pairs))
    return q, *some.rope(some.below(500, tokens), pairs), heads


OP = define(
    "mla_query_rope(Tensor q, Tensor cos, Tensor sin, int heads) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="rope",
    cases=((1, 1, 2, 1), (7, 3, 10, 2), (3, 2, 128, 32)),
    benchmarks=(
        Benchmark(
            name="32 heads of 192", case=lambda tokens: (tokens, 32, 128, 32), tokens=(8192,)
        ),
    ),
)
