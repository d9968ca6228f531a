"""Which experts a token goes to, and with what weights: sigmoid scores, groups, a bias.

    s[t, e] = sigmoid(sum_d x[t, d] weight[e, d])
    b[t, e] = s[t, e] + bias[e]                         the bias selects and weighs nothing
    G[t, g] = sum of the 2 largest b of group g         (of the 1 there is, in groups of one)
    ids[t]  = the top_k experts by b, among the topk_group groups by G, best first
    weights[t, i] = scale * s[t, ids[t, i]] / n[t],  n = sum_i s[t, ids[t, i]] + 1e-20

or n = 1 where `normalize` is off. Groups are of consecutive experts. Of equal scores the lower
index comes first, for groups and for experts.

Shapes: x [T, D]; weight [E, D]; bias [E]; ids i32 [T, top_k]; weights f32 [T, top_k]. T symbolic.

Rounding: none; logits are added up and kept in f32 (f64 for f64 x), for a rounded logit moves
tokens to other experts.

Source: DeepSeek-V3 technical report, 2024, arXiv:2412.19437, eq. 12-16 and section 2.1.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.compare import routing_problem
from lingc.kernel import Tactic
from lingc.kernels import products, rows
from lingc.math import elements, matmul, route, stored_bytes, wide_name
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    topk_groups: int,
    top_k: int,
    scale: float,
    normalize: bool,  # noqa: FBT001  (the schema's order)
) -> tuple[Tensor, Tensor]:
    return route(x, weight, bias, groups, topk_groups, top_k, scale, normalize)


def types(
    x: TensorType,
    weight: TensorType,
    bias: TensorType,
    groups: int,
    topk_groups: int,
    top_k: int,
    scale: float,
    normalize: bool,  # noqa: FBT001
) -> tuple[TensorType, TensorType]:
    shape = (x.shape[0], top_k)
    return TensorType("i32", shape), TensorType(wide_name(x.dtype), shape)


def cost(
    x: TensorType,
    weight: TensorType,
    bias: TensorType,
    groups: int,
    topk_groups: int,
    top_k: int,
    scale: float,
    normalize: bool,  # noqa: FBT001
) -> Cost:
    made = types(x, weight, bias, groups, topk_groups, top_k, scale, normalize)
    (tokens, _), experts = x.bind({}), elements(bias)
    return Cost(
        flops=2.0 * tokens * elements(weight) + 6.0 * tokens * experts,
        moved_bytes=stored_bytes(x, weight, bias, *made),
    )


def refusal(_target: Target, x: TensorType, weight: TensorType, *_: Any) -> str | None:
    return rows.dtype_refusal(x=x, weight=weight)


def tactics(target: Target, x: TensorType, *args: Any) -> Sequence[Tactic]:
    if refusal(target, x, *args) is not None:
        return ()
    _, bias, groups, kept, top, scale, normalize = args
    (tokens, width), (experts,) = x.bind({}), bias.bind({})
    return products.router_tactics(
        tokens, width, experts, groups, kept, top, scale, normalize=normalize
    )


def judge(arguments: Sequence[Any], got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """Experts may differ where scores nearly tie; weights follow from the experts."""
    x, weight, bias, groups, kept, _, scale, normalize = arguments
    scores = torch.sigmoid(matmul(x.double(), weight))
    return routing_problem(scores, bias, groups, kept, scale, normalize, got, want[0])


def inputs(
    tokens: int,
    width: int,
    experts: int,
    groups: int,
    topk_groups: int,
    top_k: int,
    *,
    dtype: str,
    device: str,
) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    x, weight = some.normal(tokens, width), some.weight(experts, width)
    bias = 0.1 * some.state(experts)
    return x, weight, bias, groups, topk_groups, top_k, 2.5, True


OP = define(
    "router(Tensor x, Tensor weight, Tensor bias, int groups, int topk_groups, int top_k, "
    "float scale, bool normalize) -> (Tensor ids, Tensor weights)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="router",
    judge=judge,
    cases=(
        (1, 8, 4, 2, 1, 2),
        (7, 20, 12, 3, 2, 5),
        (3, 16, 6, 6, 4, 3),  # groups of one
        (5, 64, 16, 4, 2, 4),
        (2, 32, 8, 1, 1, 8),
    ),
)
