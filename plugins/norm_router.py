"""`router` on the normed residual stream, and for every expert the list of its tokens.

    n[t] = x[t, :D] * rsqrt(mean(x[t, :D]^2) + eps) * norm_weight
    ids, weights = router(n, weight, bias, …)

Pair t top_k + i is the i-th expert of token t. `pairs` holds all of them by rising expert, those of
one expert by rising number; those of expert e are pairs[starts[e]], …, pairs[starts[e + 1] - 1].

Shapes: x [T, >= D]; norm_weight [D]; weight [E, D]; bias [E]; ids i32 [T, top_k]; weights
[T, top_k]; pairs i32 [T top_k]; starts i32 [E + 1]. T symbolic.

Rounding: none; n, logits and weights are kept in f32 (f64 for f64 x), for a rounded logit moves
tokens to other experts.

Source: `rms_norm` and `router`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from torch import Tensor

from lingc.math import elements, expert_lists, number, rms, route, stored_bytes, times, wide_name
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, groups: int, topk_groups: int,
    top_k: int, scale: float, normalize: bool, eps: float,  # noqa: FBT001 (the schema's order)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n = rms(x[:, : norm_weight.numel()], norm_weight, eps)
    ids, weights = route(n, weight, bias, groups, topk_groups, top_k, scale, normalize)
    return ids, weights, *expert_lists(ids, bias.numel())


def types(
    x: TensorType, norm_weight: TensorType, weight: TensorType, bias: TensorType, groups: int,
    topk_groups: int, top_k: int, scale: float, normalize: bool, eps: float,  # noqa: FBT001
) -> tuple[TensorType, ...]:  # fmt: skip
    tokens = x.shape[0]
    return (
        TensorType("i32", (tokens, top_k)),
        TensorType(wide_name(x.dtype), (tokens, top_k)),
        TensorType("i32", (times(tokens, top_k),)),
        TensorType("i32", (number(bias.shape[0]) + 1,)),
    )


def cost(
    x: TensorType, norm_weight: TensorType, weight: TensorType, bias: TensorType, groups: int,
    topk_groups: int, top_k: int, scale: float, normalize: bool, eps: float,  # noqa: FBT001
) -> Cost:  # fmt: skip
    made = types(
        x, norm_weight, weight, bias, groups, topk_groups, top_k, scale, normalize, eps
    )  # fmt: skip
    (tokens, _), experts = x.bind({}), elements(bias)
    read = TensorType(x.dtype, (tokens, elements(norm_weight)))
    return Cost(
        flops=2.0 * tokens * elements(weight) + 6.0 * tokens * experts + 4.0 * elements(read),
        moved_bytes=stored_bytes(read, norm_weight, weight, bias, *made),
    )


def inputs(
    tokens: int, width: int, experts: int, groups: int, topk_groups: int, top_k: int,
    *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    some = Samples(dtype=dtype, device=device)
    x, norm_weight = some.normal(tokens, width), some.norm_weight(width)
    weight, bias = some.weight(experts, width), 0.1 * some.state(experts)
    return x, norm_weight, weight, bias, groups, topk_groups, top_k, 2.5, True, 1e-6


OP = define(
    "norm_router(Tensor x, Tensor norm_weight, Tensor weight, Tensor bias, int groups, "
    "int topk_groups, int top_k, float scale, bool normalize, float eps) -> "
    "(Tensor ids, Tensor weights, Tensor pairs, Tensor starts)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    mechanism="router",
    cases=(
        (1, 8, 4, 2, 1, 2),
        (7, 20, 12, 3, 2, 5),
        (3, 16, 6, 6, 4, 3),  # groups of one
        (5, 64, 16, 4, 2, 4),
        (2, 32, 8, 1, 1, 8),
    ),
)
