"""Product with a weight matrix in FP8 with 128x128 blocks.

    w[n, d] = weight[n, d] * weight_scale[n // 128, d // 128]
    y[t, n] = sum_d x[t, d] w[n, d]

`fp8_linear` multiplies FP8 activations, x[t, d] = codes[t, d] * scales[t, d // 128];
`fp8_weight_linear` widens the weight alone, for activations x as they are. The `_f32` forms of both
keep their f32 sums, for an LM head.

Shapes: codes E4M3 [T, D]; scales f32 [T, ceil(D / 128)]; x [T, D]; weight E4M3 [N, D];
weight_scale f32 [ceil(N / 128), ceil(D / 128)]; y [T, N]. T symbolic.

Rounding: values are code times scale in f32 and summed in f32 (f64 for f64 x or `dtype`); y is
rounded once, to `dtype` or to x's dtype, or not.

Source: DeepSeek-V3 technical report, 2024, arXiv:2412.19437, section 3.3.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import products
from lingc.math import (
    accumulator,
    dequantize_blocks,
    dequantize_rows,
    elements,
    matmul,
    number,
    stored_bytes,
    wide_name,
)
from lingc.op import TORCH_DTYPE, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def _product(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    x = dequantize_rows(codes, scales, dtype)
    return matmul(x, dequantize_blocks(weight, weight_scale, dtype))


def reference(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, dtype: str
) -> Tensor:
    summed = TORCH_DTYPE[wide_name(dtype)]
    return _product(codes, scales, weight, weight_scale, summed).to(TORCH_DTYPE[dtype])


def reference_f32(codes: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return _product(codes, scales, weight, weight_scale, torch.float32)


def reference_weight(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return reference_weight_f32(x, weight, weight_scale).to(x.dtype)


def reference_weight_f32(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return matmul(x, dequantize_blocks(weight, weight_scale, accumulator(x)))


def types(
    codes: TensorType,
    scales: TensorType,
    weight: TensorType,
    weight_scale: TensorType,
    dtype: str,
) -> TensorType:
    return TensorType(dtype, (codes.shape[0], weight.shape[0]))


def types_f32(
    codes: TensorType, scales: TensorType, weight: TensorType, weight_scale: TensorType
) -> TensorType:
    return TensorType("f32", (codes.shape[0], weight.shape[0]))


def types_weight(x: TensorType, weight: TensorType, weight_scale: TensorType) -> TensorType:
    return TensorType(x.dtype, (*x.shape[:-1], weight.shape[0]))


def types_weight_f32(x: TensorType, weight: TensorType, weight_scale: TensorType) -> TensorType:
    return TensorType(wide_name(x.dtype), (*x.shape[:-1], weight.shape[0]))


def _cost(y: TensorType, weight: TensorType, *read: TensorType) -> Cost:
    flops = 2.0 * elements(y) * number(weight.shape[1])
    return Cost(flops=flops, moved_bytes=stored_bytes(y, weight, *read))


def cost(
    codes: TensorType,
    scales: TensorType,
    weight: TensorType,
    weight_scale: TensorType,
    dtype: str,
) -> Cost:
    y = types(codes, scales, weight, weight_scale, dtype)
    return _cost(y, weight, weight_scale, codes, scales)


def cost_f32(
    codes: TensorType, scales: TensorType, weight: TensorType, weight_scale: TensorType
) -> Cost:
    return cost(codes, scales, weight, weight_scale, "f32")


def cost_weight(x: TensorType, weight: TensorType, weight_scale: TensorType) -> Cost:
    return _cost(types_weight(x, weight, weight_scale), weight, weight_scale, x)


def cost_weight_f32(x: TensorType, weight: TensorType, weight_scale: TensorType) -> Cost:
    return _cost(types_weight_f32(x, weight, weight_scale), weight, weight_scale, x)


def refusal(_target: Target, *args: Any) -> str | None:
    return products.Form(stored="fp8").refusal(args[-1])


def refusal_f32(_target: Target, *_: Any) -> str | None:
    """Codes are codes, whatever they were made of."""
    return None


def refusal_weight(_target: Target, x: TensorType, *_: Any) -> str | None:
    return products.Form(stored="fp8").refusal(x.dtype)


def _tactics(x: TensorType, weight: TensorType, *, coded: bool, wide: bool) -> Sequence[Tactic]:
    (tokens, width), (rows, _) = x.bind({}), weight.bind({})
    act = products.CODED if coded else products.PLAIN
    return products.linear_tactics(
        products.Form(stored="fp8", act=act), tokens, rows, width,
        x="codes" if coded else "x", scales="scales" if coded else None, weight="weight",
        scale="weight_scale", wide=wide,
    )  # fmt: skip


def tactics(
    target: Target,
    codes: TensorType,
    scales: TensorType,
    weight: TensorType,
    weight_scale: TensorType,
    dtype: str,
) -> Sequence[Tactic]:
    if refusal(target, dtype) is not None:
        return ()
    return _tactics(codes, weight, coded=True, wide=False)


def tactics_f32(
    target: Target,
    codes: TensorType,
    scales: TensorType,
    weight: TensorType,
    weight_scale: TensorType,
) -> Sequence[Tactic]:
    return _tactics(codes, weight, coded=True, wide=True)


def tactics_weight(
    target: Target, x: TensorType, weight: TensorType, weight_scale: TensorType
) -> Sequence[Tactic]:
    if refusal_weight(target, x) is not None:
        return ()
    return _tactics(x, weight, coded=False, wide=False)


def tactics_weight_f32(
    target: Target, x: TensorType, weight: TensorType, weight_scale: TensorType
) -> Sequence[Tactic]:
    if refusal_weight(target, x) is not None:
        return ()
    return _tactics(x, weight, coded=False, wide=True)


def inputs(
    tokens: int, outputs: int, width: int, *, dtype: str, device: str
) -> tuple[Tensor | str, ...]:
    return *inputs_f32(tokens, outputs, width, dtype=dtype, device=device), dtype


def inputs_f32(
    tokens: int, outputs: int, width: int, *, dtype: str, device: str
) -> tuple[Tensor, ...]:
    some = Samples(dtype=dtype, device=device)
    return *some.fp8_rows(tokens, width), *some.fp8_weight(outputs, width)


def inputs_weight(
    tokens: int, outputs: int, width: int, *, dtype: str, device: str
) -> tuple[Tensor, ...]:
    some = Samples(dtype=dtype, device=device)
    return some.normal(tokens, width), *some.fp8_weight(outputs, width)


CASES = ((1, 3, 4), (7, 130, 300), (20, 256, 128))

OP = define(
    "fp8_linear(Tensor codes, Tensor scales, Tensor weight, Tensor weight_scale, str dtype) "
    "-> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="fp8_gemm",
    cases=CASES,
)
OP_F32 = define(
    "fp8_linear_f32(Tensor codes, Tensor scales, Tensor weight, Tensor weight_scale) -> Tensor",
    reference=reference_f32,
    types=types_f32,
    cost=cost_f32,
    inputs=inputs_f32,
    refusal=refusal_f32,
    tactics=tactics_f32,
    mechanism="fp8_gemm",
    cases=CASES,
)
OP_WEIGHT = define(
    "fp8_weight_linear(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor",
    reference=reference_weight,
    types=types_weight,
    cost=cost_weight,
    inputs=inputs_weight,
    refusal=refusal_weight,
    tactics=tactics_weight,
    mechanism="fp8_gemm",
    cases=CASES,
)
OP_WEIGHT_F32 = define(
    "fp8_weight_linear_f32(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor",
    reference=reference_weight_f32,
    types=types_weight_f32,
    cost=cost_weight_f32,
    inputs=inputs_weight,
    refusal=refusal_weight,
    tactics=tactics_weight_f32,
    mechanism="fp8_gemm",
    cases=CASES,
)
