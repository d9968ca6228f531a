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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.compare import routing_problem
from lingc.kernel import Tactic
from lingc.kernels import router
from lingc.math import (
    elements,
    expert_lists,
    matmul,
    number,
    rms,
    route,
    stored_bytes,
    times,
    wide_name,
)
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


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


def refusal(
    target: Target, x: TensorType, norm_weight: TensorType, weight: TensorType, bias: TensorType,
    groups: int, topk_groups: int, top_k: int, scale: float, normalize: bool, eps: float,  # noqa: FBT001
) -> str | None:  # fmt: skip
    for name, kind in (("x", x), ("norm_weight", norm_weight), ("weight", weight)):
        if kind.dtype != "bf16":
            return f"{name} is {kind.dtype}, not bf16"
    if bias.dtype != "f32":
        return f"bias is {bias.dtype}, not f32"
    return router.refusal(
        _shape(x, weight, groups, topk_groups, top_k, scale, normalize, eps)
    )  # fmt: skip


def tactics(
    target: Target, x: TensorType, norm_weight: TensorType, weight: TensorType, bias: TensorType,
    groups: int, topk_groups: int, top_k: int, scale: float, normalize: bool, eps: float,  # noqa: FBT001
) -> Sequence[Tactic]:  # fmt: skip
    numbers = (groups, topk_groups, top_k, scale, normalize, eps)
    if refusal(target, x, norm_weight, weight, bias, *numbers) is not None:
        return ()
    dependent = (target.compute_capability or (0, 0)) >= (9, 0)
    return router.tactics(_shape(x, weight, *numbers), dependent=dependent)


def pinned(
    target: Target, x: TensorType, norm_weight: TensorType, weight: TensorType, bias: TensorType,
    groups: int, topk_groups: int, top_k: int, scale: float, normalize: bool, eps: float,  # noqa: FBT001
) -> Sequence[Tactic]:  # fmt: skip
    """One kernel for few tokens, and one way for many."""
    numbers = (groups, topk_groups, top_k, scale, normalize, eps)
    if refusal(target, x, norm_weight, weight, bias, *numbers) is not None:
        return ()
    dependent = (target.compute_capability or (0, 0)) >= (9, 0)
    return router.pinned(_shape(x, weight, *numbers), dependent=dependent)


def _shape(
    x: TensorType, weight: TensorType, groups: int, topk_groups: int, top_k: int, scale: float,
    normalize: bool, eps: float,  # noqa: FBT001
) -> router.Shape:  # fmt: skip
    (tokens, pitch), (experts, width) = x.bind({}), weight.bind({})
    return router.Shape(
        tokens=tokens, pitch=pitch, width=width, experts=experts, groups=groups, kept=topk_groups,
        top=top_k, scale=scale, normalize=normalize, eps=eps,
    )  # fmt: skip


def judge(arguments: Sequence[Any], got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """Experts may differ where scores nearly tie; weights and lists follow from the experts."""
    x, norm_weight, weight, bias, groups, kept, _, scale, normalize, eps = arguments
    n = rms(x[:, : norm_weight.numel()].double(), norm_weight, eps)
    scores = torch.sigmoid(matmul(n, weight))
    problem = routing_problem(scores, bias, groups, kept, scale, normalize, got, want[0])
    if problem is not None:
        return problem
    lists = expert_lists(got[0], bias.numel())
    if not (torch.equal(got[2], lists[0]) and torch.equal(got[3], lists[1])):
        return "the lists are not those of the ids"
    return None


def inputs(
    tokens: int, width: int, experts: int, groups: int, topk_groups: int, top_k: int,
    alike: int = 0, *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    """Arguments; where `alike` is 1, all tokens are one, and experts e and e + 1 score alike."""
    some = Samples(dtype=dtype, device=device)
    x, norm_weight = some.normal(tokens, width), some.norm_weight(width)
    weight, bias = some.weight(experts, width), 0.1 * some.state(experts)
    if alike:
        x = x[:1].repeat(tokens, 1)
        weight, bias = (w[::2].repeat_interleave(2, 0) for w in (weight, bias))
    return x, norm_weight, weight, bias, groups, topk_groups, top_k, 2.5, True, 1e-6


def _benchmark(tokens: int) -> tuple[int, ...]:
    return tokens, 4096, 256, 8, 4, 8


OP = define(
    "norm_router(Tensor x, Tensor norm_weight, Tensor weight, Tensor bias, int groups, "
    "int topk_groups, int top_k, float scale, bool normalize, float eps) -> "
    "(Tensor ids, Tensor weights, Tensor pairs, Tensor starts)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    pinned=pinned,
    judge=judge,
    mechanism="router",
    # The kernels run those of 128 channels and more.
    cases=(
        (1, 8, 4, 2, 1, 2),
        (7, 20, 12, 3, 2, 5),
        (3, 16, 6, 6, 4, 3),  # groups of one
        (5, 64, 16, 4, 2, 4),
        (2, 32, 8, 1, 1, 8),
        (1, 128, 16, 4, 2, 4),
        (3, 256, 12, 3, 2, 5),
        (17, 384, 64, 8, 4, 8),
        (127, 128, 16, 4, 2, 4, 1),  # all tokens to the same experts, and ties
        (4, 1024, 256, 8, 4, 8, 1),
        (70, 256, 256, 8, 4, 8),
        (600, 128, 16, 4, 2, 4),
        (545, 128, 256, 8, 4, 8, 1),
    ),
    benchmarks=(
        Benchmark(name="256 experts", case=_benchmark, tokens=(1, 2, 4, 8, 16, 32, 64, 512, 8192)),
    ),
)
