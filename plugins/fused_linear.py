"""Product with a weight matrix, with the norm before it and the activation or the sum behind it.

    n[t] = x[t, :K]                                                    before = none
         | x[t, :K] * rsqrt(mean(x[t, :K]^2) + eps) * norm_weight      rms_norm
         | group_norm(x[t, :K]) * norm_weight * sigmoid(gate[t, -K:])  group_norm_gate
    z[t, i] = sum_d n[t, d] w[i, d]
    y[t] = z[t] | silu(z[t, :N/2]) * z[t, N/2:]                        after = none | swiglu
    y[t] = y[t] + residual[t]

with group_norm and the gate as in `group_norm_gate`, and w the values of `weight`: its numbers
(`bf16`), code times the scale of its 128x128 block (`fp8`), or (nibble - 8) times the scale of its
row and `group` along K (`int4`, nibbles as in `int4_weight_linear`). In `fp8` n is quantized per
128 channels as in `quantize_fp8`. What is read of x are its first K columns, of gate its last K.

Shapes: x [T, >= K]; gate [T, >= K]; norm_weight [K]; weight BF16 or E4M3 [N, K], or i32
[N, ceil(K / 8)]; scale f32 [ceil(N / 128), ceil(K / 128)], of each half by itself before a SwiGLU,
or BF16 [N, ceil(K / group)]; residual [T, N] or [T, N / 2]; y like residual, of `dtype`.
T symbolic.

Rounding: n is rounded to the dtype of x before it is multiplied in `bf16` and `int4`, and not
before it is quantized in `fp8`; sums, SwiGLU and the residual's sum in f32 (f64 for f64 x); y is
rounded once, to `dtype`.

Source: `rms_norm`, `group_norm_gate`, `silu_mul` and the linears that it is made of.
"""
# ruff: noqa: A002, PLR0913, PLR0917 (as many as the schema has, and its names)

from collections.abc import Mapping

import torch
from torch import Tensor

from lingc.math import (
    BLOCK,
    accumulator,
    dequantize_halves,
    dequantize_int4,
    dequantize_rows,
    elements,
    matmul,
    number,
    quantize_fp8,
    rms,
    stored_bytes,
    swiglu,
    wide,
)
from lingc.op import TORCH_DTYPE, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples

NIBBLES = 8


def _before(
    x: Tensor, gate: Tensor | None, norm_weight: Tensor | None, before: str, groups: int, eps: float
) -> Tensor:
    """What is multiplied, widened."""
    if norm_weight is None:
        return wide(x)
    if before == "rms_norm":
        return rms(x, norm_weight, eps)
    assert gate is not None, "a gated norm has a gate"
    rows = x.unflatten(1, (groups, -1))
    normed = rms(rows, norm_weight.view(groups, -1), eps).flatten(1)
    return normed * torch.sigmoid(wide(gate[:, gate.shape[1] - x.shape[1] :]))


def reference(
    x: Tensor, gate: Tensor | None, norm_weight: Tensor | None, weight: Tensor,
    scale: Tensor | None, residual: Tensor | None, before: str, after: str, format: str,
    group: int, groups: int, eps: float, dtype: str,
) -> Tensor:  # fmt: skip
    summed = accumulator(x)
    width = weight.shape[1] * (NIBBLES if format == "int4" else 1)
    width = min(width, x.shape[1]) if norm_weight is None else norm_weight.numel()
    n = _before(x[:, :width], gate, norm_weight, before, groups, eps)
    n = dequantize_rows(*quantize_fp8(n), summed) if format == "fp8" else n.to(x.dtype)
    halves = 2 if after == "swiglu" else 1
    if scale is None:
        matrix = weight.to(summed)
    elif format == "int4":
        matrix = dequantize_int4(weight, scale, width, group, summed)
    else:
        matrix = dequantize_halves(weight, scale, summed, halves)
    y = matmul(n.to(summed), matrix)
    if after == "swiglu":
        y = swiglu(*y.chunk(2, 1))
    return (y if residual is None else y + residual.to(summed)).to(TORCH_DTYPE[dtype])


def types(
    x: TensorType, gate: TensorType | None, norm_weight: TensorType | None, weight: TensorType,
    scale: TensorType | None, residual: TensorType | None, before: str, after: str, format: str,
    group: int, groups: int, eps: float, dtype: str,
) -> TensorType:  # fmt: skip
    rows = number(weight.shape[0])
    return TensorType(dtype, (x.shape[0], rows // 2 if after == "swiglu" else rows))


def cost(
    x: TensorType, gate: TensorType | None, norm_weight: TensorType | None, weight: TensorType,
    scale: TensorType | None, residual: TensorType | None, before: str, after: str, format: str,
    group: int, groups: int, eps: float, dtype: str,
) -> Cost:  # fmt: skip
    y = types(
        x, gate, norm_weight, weight, scale, residual, before, after, format, group, groups, eps,
        dtype,
    )  # fmt: skip
    (tokens, columns), (rows, width) = x.bind({}), weight.bind({})
    width = min(columns, width * NIBBLES) if format == "int4" else width
    read = TensorType(x.dtype, (tokens, width))
    gated = None if gate is None else TensorType(gate.dtype, (tokens, width))
    return Cost(
        flops=2.0 * tokens * rows * width + 10.0 * elements(read) * (norm_weight is not None),
        moved_bytes=stored_bytes(read, gated, norm_weight, weight, scale, residual, y),
    )


def layouts(
    x: TensorType, gate: TensorType | None, norm_weight: TensorType | None, weight: TensorType,
    scale: TensorType | None, residual: TensorType | None, before: str, after: str, format: str,
    *_: float | str,
) -> Mapping[str, str]:  # fmt: skip
    gated = "_gated" if after == "swiglu" else ""
    found = {"weight": f"tiled{gated}"}
    return found | {"scale": f"tiled{gated}_scales"} if format == "int4" else found


def inputs(
    tokens: int, outputs: int, width: int, before: str, after: str, format: str, group: int,
    has_residual: int, *, dtype: str, device: str,
) -> tuple[Tensor | str | float | None, ...]:  # fmt: skip
    """Arguments with `outputs` rows of the weight, two groups of a group norm, and wider x."""
    some = Samples(dtype=dtype, device=device)
    gated = before == "group_norm_gate"
    halves = 2 if after == "swiglu" else 1
    x = some.normal(tokens, width if before == "none" else width + BLOCK)
    gate = some.normal(tokens, 2 * width) if gated else None
    norm_weight = None if before == "none" else some.norm_weight(width)
    weight, scale = some.stored_weight(outputs, width, stored=format, group=group, halves=halves)
    residual = some.normal(tokens, outputs // halves) if has_residual else None
    groups = 2 if gated else 1
    return (
        x, gate, norm_weight, weight, scale, residual, before, after, format, group, groups, 1e-6,
        dtype,
    )  # fmt: skip


OP = define(
    "fused_linear(Tensor x, Tensor? gate, Tensor? norm_weight, Tensor weight, Tensor? scale, "
    "Tensor? residual, str before, str after, str format, int group, int groups, float eps, "
    "str dtype) -> Tensor y",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    layouts=layouts,
    mechanism="fp8_gemm",
    cases=(
        (1, 6, 8, "none", "none", "bf16", 0, 0),
        (7, 130, 300, "rms_norm", "none", "fp8", 0, 1),
        (3, 32, 64, "rms_norm", "swiglu", "int4", 32, 0),
        (5, 48, 128, "group_norm_gate", "none", "bf16", 0, 1),
        (2, 256, 256, "group_norm_gate", "none", "fp8", 0, 1),
        (4, 256, 128, "rms_norm", "swiglu", "fp8", 0, 0),
    ),
)
