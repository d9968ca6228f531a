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

import torch
from torch import Tensor

from lingc.math import elements, number, rope_pairs, stored_bytes
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(q: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    by_head = q.unflatten(1, (heads, -1))
    plain, turned = by_head.tensor_split((by_head.shape[-1] - 2 * cos.shape[-1],), -1)
    made = rope_pairs(turned, cos[:, None], sin[:, None]).to(q.dtype)
    return torch.cat((plain, made), -1)


def types(q: TensorType, cos: TensorType, sin: TensorType, heads: int) -> TensorType:
    return TensorType(q.dtype, (q.shape[0], heads, number(q.shape[1]) // heads))


def cost(q: TensorType, cos: TensorType, sin: TensorType, heads: int) -> Cost:
    return Cost(flops=6.0 * heads * elements(cos), moved_bytes=stored_bytes(q, cos, sin, q))


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
    cases=((1, 1, 2, 1), (7, 3, 10, 2), (3, 2, 128, 32)),
)
