"""`experts` with FP8 weights in 128x128 blocks.

    y[t] = base[t] + sum_i weights[t, i] * D[e] @ a,  e = ids[t, i]
    a = silu(g) * u,  g = GU[e, :F] @ x[t],  u = GU[e, F:] @ x[t]

with D and GU the values of `down` and `gate_up`, code times the scale of its block; gate and up
have blocks of their own, gate's first, also where F is no multiple of 128. `fp8_experts` multiplies
FP8 activations: x[t] is code times scale, and a is quantized as in `quantize_fp8` before the second
product. `fp8_weight_experts` widens the weights alone.

Shapes: codes E4M3 [T, D]; scales f32 [T, ceil(D / 128)]; x, base, y [T, D]; ids, weights [T, k];
gate_up E4M3 [E, 2F, D]; gate_up_scale f32 [E, 2 ceil(F / 128), ceil(D / 128)]; down E4M3
[E, D, F]; down_scale f32 [E, ceil(D / 128), ceil(F / 128)]. T symbolic.

Rounding: a is rounded to `dtype`, or to x's dtype, before it is quantized or multiplied; sums are
kept in f32 (f64 where that dtype is f64); y is rounded once to it.

Source: `experts` and `fp8_linear`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lingc.compare import close
from lingc.kernel import Tactic
from lingc.kernels import products
from lingc.math import (
    accumulator,
    dequantize_blocks,
    dequantize_rows,
    elements,
    expert_bytes,
    expert_sum,
    matmul,
    quantize_fp8,
    stored_bytes,
    swiglu,
    wide_name,
)
from lingc.op import TORCH_DTYPE, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def _inner(rows: Tensor, gate_up: Tensor, scale: Tensor) -> Tensor:
    """`silu(g) * u` of one expert, not rounded."""
    gate, up = (
        matmul(rows, dequantize_blocks(codes, scales, rows.dtype))
        for codes, scales in zip(gate_up.chunk(2), scale.chunk(2), strict=True)
    )
    return swiglu(gate, up)


def reference(
    codes: Tensor, scales: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor,
    gate_up_scale: Tensor, down: Tensor, down_scale: Tensor, base: Tensor | None, dtype: str,
) -> Tensor:  # fmt: skip
    summed, rounded = TORCH_DTYPE[wide_name(dtype)], TORCH_DTYPE[dtype]

    def feed_forward(expert: int, rows: Tensor) -> Tensor:
        a = _inner(rows, gate_up[expert], gate_up_scale[expert]).to(rounded)
        again = dequantize_rows(*quantize_fp8(a), summed)
        return matmul(again, dequantize_blocks(down[expert], down_scale[expert], summed))

    x = dequantize_rows(codes, scales, summed)
    return expert_sum(x, ids, weights, feed_forward, base).to(rounded)


def reference_weight(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor,
    down: Tensor, down_scale: Tensor, base: Tensor | None,
) -> Tensor:  # fmt: skip
    summed = accumulator(x)

    def feed_forward(expert: int, rows: Tensor) -> Tensor:
        a = _inner(rows.to(summed), gate_up[expert], gate_up_scale[expert]).to(x.dtype)
        return matmul(a, dequantize_blocks(down[expert], down_scale[expert], summed))

    return expert_sum(x, ids, weights, feed_forward, base).to(x.dtype)


def types(
    codes: TensorType, scales: TensorType, ids: TensorType, weights: TensorType,
    gate_up: TensorType, gate_up_scale: TensorType, down: TensorType, down_scale: TensorType,
    base: TensorType | None, dtype: str,
) -> TensorType:  # fmt: skip
    return TensorType(dtype, codes.shape)


def types_weight(x: TensorType, *_: TensorType | None) -> TensorType:
    return x


def _cost(
    ids: TensorType, down: TensorType, stacks: tuple[TensorType, ...], *rest: TensorType | None
) -> Cost:
    experts, width, inner = down.bind({})
    return Cost(
        flops=6.0 * elements(ids) * inner * width,
        moved_bytes=stored_bytes(ids, *rest) + expert_bytes(ids, experts, down, *stacks),
    )


def cost(
    codes: TensorType, scales: TensorType, ids: TensorType, weights: TensorType,
    gate_up: TensorType, gate_up_scale: TensorType, down: TensorType, down_scale: TensorType,
    base: TensorType | None, dtype: str,
) -> Cost:  # fmt: skip
    y, stacks = TensorType(dtype, codes.shape), (gate_up, gate_up_scale, down_scale)
    return _cost(ids, down, stacks, codes, scales, weights, base, y)


def cost_weight(
    x: TensorType, ids: TensorType, weights: TensorType, gate_up: TensorType,
    gate_up_scale: TensorType, down: TensorType, down_scale: TensorType, base: TensorType | None,
) -> Cost:  # fmt: skip
    return _cost(ids, down, (gate_up, gate_up_scale, down_scale), x, weights, base, x)


def refusal(_target: Target, *args: Any) -> str | None:
    return products.Form(stored="fp8").refusal(args[-1])


def refusal_weight(_target: Target, x: TensorType, *_: Any) -> str | None:
    return products.Form(stored="fp8").refusal(x.dtype)


def _tactics(
    ids: TensorType, down: TensorType, base: TensorType | None, act: int, x: str
) -> Sequence[Tactic]:
    (tokens, top_k), (experts, width, inner) = ids.bind({}), down.bind({})
    return products.expert_tactics(
        products.Experts(
            tokens=tokens,
            top_k=top_k,
            experts=experts,
            inner=inner,
            width=width,
            form=products.Form(stored="fp8", act=act),
            adds=base is not None,
            x=x,
            scales="scales" if act == products.CODED else None,
        )
    )


def tactics(
    target: Target, codes: TensorType, scales: TensorType, ids: TensorType, weights: TensorType,
    gate_up: TensorType, gate_up_scale: TensorType, down: TensorType, down_scale: TensorType,
    base: TensorType | None, dtype: str,
) -> Sequence[Tactic]:  # fmt: skip
    if refusal(target, dtype) is not None:
        return ()
    return _tactics(ids, down, base, products.CODED, "codes")


def tactics_weight(
    target: Target, x: TensorType, ids: TensorType, weights: TensorType, gate_up: TensorType,
    gate_up_scale: TensorType, down: TensorType, down_scale: TensorType, base: TensorType | None,
) -> Sequence[Tactic]:  # fmt: skip
    if refusal_weight(target, x) is not None:
        return ()
    return _tactics(ids, down, base, products.PLAIN, "x")


def judge(arguments: Sequence[Any], got: Sequence[Tensor], _want: object) -> str | None:
    """Compare with the reference in the op's own dtype, to which it rounds before it quantizes."""
    found = close(got[0], reference(*arguments), dtype=arguments[-1], mechanism="experts")
    return None if found.ok else str(found)


def inputs(
    tokens: int, top_k: int, experts: int, inner: int, width: int, shared: int,
    *, dtype: str, device: str,
) -> tuple[Tensor | str | None, ...]:  # fmt: skip
    some = Samples(dtype=dtype, device=device)
    return (
        *some.fp8_rows(tokens, width),
        *some.experts(tokens, top_k, experts),
        *some.fp8_weight(experts, 2 * inner, width, halves=2),
        *some.fp8_weight(experts, width, inner),
        some.normal(tokens, width) if shared else None,
        dtype,
    )


def inputs_weight(
    tokens: int, top_k: int, experts: int, inner: int, width: int, shared: int,
    *, dtype: str, device: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    some = Samples(dtype=dtype, device=device)
    return (
        some.normal(tokens, width),
        *some.experts(tokens, top_k, experts),
        *some.fp8_weight(experts, 2 * inner, width, halves=2),
        *some.fp8_weight(experts, width, inner),
        some.normal(tokens, width) if shared else None,
    )


CASES = ((1, 1, 2, 4, 8, 0), (7, 3, 5, 130, 140, 1), (20, 2, 3, 128, 256, 1))

OP = define(
    "fp8_experts(Tensor codes, Tensor scales, Tensor ids, Tensor weights, Tensor gate_up, "
    "Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor? base, str dtype) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="fp8_gemm",
    judge=judge,
    cases=CASES,
)
OP_WEIGHT = define(
    "fp8_weight_experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, "
    "Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor? base) -> Tensor",
    reference=reference_weight,
    types=types_weight,
    cost=cost_weight,
    inputs=inputs_weight,
    refusal=refusal_weight,
    tactics=tactics_weight,
    mechanism="fp8_gemm",
    cases=CASES,
)
