"""`experts` with weights in INT4 groups.

    y[t] = base[t] + sum_i weights[t, i] * D[e] @ (silu(g) * u),  e = ids[t, i]
    g = GU[e, :F] @ x[t],  u = GU[e, F:] @ x[t]

with D and GU the values of `down` and `gate_up`, (nibble - 8) * scale as in `int4_weight_linear`.

Shapes: x, base, y [T, D]; ids, weights [T, k]; gate_up i32 [E, 2F, ceil(D / 8)], gate rows first;
gate_up_scale bf16 [E, 2F, ceil(D / group)]; down i32 [E, D, ceil(F / 8)]; down_scale bf16
[E, D, ceil(F / group)]. T symbolic.

Rounding: silu(g) * u is rounded to the dtype of x, as the operand of the second product; sums are
kept in f32 (f64 for f64 x); y is rounded once.

Source: `experts` and `int4_weight_linear`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import products
from lingc.math import (
    accumulator,
    dequantize_int4,
    elements,
    expert_bytes,
    expert_sum,
    matmul,
    number,
    stored_bytes,
    swiglu,
)
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor,
    down: Tensor, down_scale: Tensor, base: Tensor | None, group: int,
) -> Tensor:  # fmt: skip
    summed, width, inner = accumulator(x), x.shape[-1], gate_up.shape[1] // 2

    def feed_forward(expert: int, rows: Tensor) -> Tensor:
        w = dequantize_int4(gate_up[expert], gate_up_scale[expert], width, group, summed)
        gate, up = matmul(rows, w).chunk(2, -1)
        w = dequantize_int4(down[expert], down_scale[expert], inner, group, summed)
        return matmul(swiglu(gate, up).to(x.dtype), w)

    return expert_sum(x, ids, weights, feed_forward, base).to(x.dtype)


def types(x: TensorType, *_: TensorType | int | None) -> TensorType:
    return x


def cost(
    x: TensorType, ids: TensorType, weights: TensorType, gate_up: TensorType,
    gate_up_scale: TensorType, down: TensorType, down_scale: TensorType,
    base: TensorType | None, group: int,
) -> Cost:  # fmt: skip
    experts, width = number(down.shape[0]), number(down.shape[1])
    stacks = (gate_up, gate_up_scale, down, down_scale)
    return Cost(
        flops=3.0 * elements(ids) * number(gate_up.shape[1]) * width,
        moved_bytes=stored_bytes(x, x, ids, weights, base) + expert_bytes(ids, experts, *stacks),
    )


def refusal(_target: Target, x: TensorType, *args: Any) -> str | None:
    return products.Form(stored="int4", group=args[-1]).refusal(x.dtype)


def tactics(
    target: Target, x: TensorType, ids: TensorType, weights: TensorType, gate_up: TensorType,
    gate_up_scale: TensorType, down: TensorType, down_scale: TensorType,
    base: TensorType | None, group: int,
) -> Sequence[Tactic]:  # fmt: skip
    if refusal(target, x, group) is not None:
        return ()
    (tokens, top_k), (experts, width, _) = ids.bind({}), down.bind({})
    return products.expert_tactics(
        products.Experts(
            tokens=tokens,
            top_k=top_k,
            experts=experts,
            inner=number(gate_up.shape[1]) // 2,
            width=width,
            form=products.Form(stored="int4", group=group),
            adds=base is not None,
        )
    )


def inputs(
    tokens: int, top_k: int, experts: int, inner: int, width: int, group: int, shared: int,
    *, dtype: str, device: str,
) -> tuple[Tensor | int | None, ...]:  # fmt: skip
    some = Samples(dtype=dtype, device=device)
    return (
        some.normal(tokens, width),
        *some.experts(tokens, top_k, experts),
        *some.int4_weight(experts, 2 * inner, width, group=group),
        *some.int4_weight(experts, width, inner, group=group),
        some.normal(tokens, width) if shared else None,
        group,
    )


OP = define(
    "int4_weight_experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, "
    "Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor? base, int group) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="experts",
    cases=(
        (1, 1, 2, 4, 8, 4, 0),
        (7, 3, 5, 20, 36, 32, 1),
        (20, 2, 3, 64, 128, 32, 1),
        (40, 4, 4, 128, 256, 128, 1),
    ),
)
