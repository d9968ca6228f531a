"""Product of FP8 by FP8 with one known scale each: `fp8_static_linear`, and `_f32`, for an LM head.

    code[t, d] = E4M3(x[t, d] / x_scale)        to nearest even, saturating at 448
    y[t, n] = x_scale * weight_scale * sum_d code[t, d] weight[n, d]

No row has to be looked at before it is quantized, as `quantize_fp8` must, so the norm in front can
do it. Engines of TensorRT compute it, by its own product of FP8; there is no kernel of ours.

Shapes: x [T, D]; x_scale f32 [1]; weight E4M3 [N, D]; weight_scale f32 [1]; y [T, N]. T symbolic.

Rounding: the quotient is in f32; codes are multiplied and summed in f32 (f64 for f64 x), then
scaled; y is rounded once, to x's dtype, or not.

Source: the compressed-tensors package, format `float-quantized` with strategy `tensor`.
"""

import torch
from torch import Tensor

from lingc.math import E4M3_MAX, accumulator, elements, matmul, number, stored_bytes, wide_name
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return reference_f32(x, x_scale, weight, weight_scale).to(x.dtype)


def reference_f32(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    summed = accumulator(x)
    # In f32 whatever x is, as in `lingc.math.quantize_fp8`: ties must not hang on the division.
    ratio = (x.float() / x_scale.float()).clamp(-E4M3_MAX, E4M3_MAX)
    codes = ratio.to(torch.float8_e4m3fn).to(summed)
    return matmul(codes, weight) * (x_scale.to(summed) * weight_scale.to(summed))


def types(
    x: TensorType, x_scale: TensorType, weight: TensorType, weight_scale: TensorType
) -> TensorType:
    return TensorType(x.dtype, (*x.shape[:-1], weight.shape[0]))


def types_f32(
    x: TensorType, x_scale: TensorType, weight: TensorType, weight_scale: TensorType
) -> TensorType:
    return TensorType(wide_name(x.dtype), (*x.shape[:-1], weight.shape[0]))


def cost(x: TensorType, x_scale: TensorType, weight: TensorType, weight_scale: TensorType) -> Cost:
    return _cost(types(x, x_scale, weight, weight_scale), x, x_scale, weight, weight_scale)


def cost_f32(
    x: TensorType, x_scale: TensorType, weight: TensorType, weight_scale: TensorType
) -> Cost:
    return _cost(types_f32(x, x_scale, weight, weight_scale), x, x_scale, weight, weight_scale)


def _cost(y: TensorType, x: TensorType, *read: TensorType) -> Cost:
    flops = 2.0 * elements(y) * number(x.shape[-1])
    return Cost(flops=flops, moved_bytes=stored_bytes(y, x, *read))


def inputs(tokens: int, outputs: int, width: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    some = Samples(dtype=dtype, device=device)
    return some.normal(tokens, width), *some.fp8_scaled(outputs, width)


CASES = ((1, 3, 4), (7, 130, 300), (20, 256, 128))

OP = define(
    "fp8_static_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    mechanism="fp8_gemm",
    cases=CASES,
)
OP_F32 = define(
    "fp8_static_linear_f32(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale) -> Tensor",
    reference=reference_f32,
    types=types_f32,
    cost=cost_f32,
    inputs=inputs,
    mechanism="fp8_gemm",
    cases=CASES,
)
