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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lingc.compare import close
from lingc.kernel import Tactic
from lingc.kernels import gemm, gemv
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
from lingc.op import DTYPE_NAME, TORCH_DTYPE, Benchmark, Cost, Mechanism, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target

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


def judge(arguments: Sequence[Any], got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """Hold y to what made it: behind SwiGLU to what experts are held to, which compute the same.

    A code of n that falls the other way moves a gate, and a large up multiplies that.
    """
    gated_codes = tuple(arguments[7:9]) == ("swiglu", "fp8")
    mechanism: Mechanism = "experts" if gated_codes else "fp8_gemm"
    dtype = DTYPE_NAME[got[0].dtype]
    found = close(got[0], want[0], dtype=dtype, mechanism=mechanism)
    return None if found.ok else f"y: {found}"


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


def _shape(
    x: TensorType, gate: TensorType | None, norm_weight: TensorType | None, weight: TensorType,
    scale: TensorType | None, residual: TensorType | None, before: str, after: str, format: str,
    group: int, groups: int, eps: float, dtype: str,
) -> gemv.Shape:  # fmt: skip
    (tokens, columns), (rows, width) = x.bind({}), weight.bind({})
    return gemv.Shape(
        tokens=tokens,
        rows=rows,
        width=width * NIBBLES if format == "int4" else width,
        format=format,
        group=group,
        before=before,
        after=after,
        groups=groups,
        residual=residual is not None,
        wide=dtype == "f32",
        x_pitch=columns,
        gate_pitch=0 if gate is None else gate.bind({})[1],
        eps=eps,
    )


def refusal(target: Target, x: TensorType, *rest: Any) -> str | None:
    """Kernels take BF16 activations; `lingc.kernels.gemv` and `gemm` say which sizes."""
    if x.dtype != "bf16":
        return f"activations are {x.dtype}; the kernels take bf16"
    shape = _shape(x, *rest)
    reason = gemv.refusal(target, shape)
    if reason is None or target.arch != "sm_90a":
        return reason
    return gemm.refusal(shape) if shape.tokens > FEW else reason


def tactics(target: Target, x: TensorType, *rest: Any) -> Sequence[Tactic]:
    """One read of the weights for few tokens; tiles of tokens for more, where there are both."""
    shape = _shape(x, *rest)
    many = target.arch == "sm_90a" and shape.tokens > FEW and gemm.refusal(shape) is None
    few = () if gemv.refusal(target, shape) is not None else gemv.tactics(target, shape)
    if not many:
        return few
    return (*gemm.tactics(target, shape), *(few if shape.tokens <= 2 * FEW else ()))


def pinned(target: Target, x: TensorType, *rest: Any) -> Sequence[Tactic]:
    """One read of the weights for every few tokens, or tiles of tokens: never both."""
    shape = _shape(x, *rest)
    if shape.tokens > MOST_READS * FEW:
        fits = target.arch == "sm_90a" and gemm.refusal(shape) is None
        return gemm.pinned(target, shape) if fits else ()
    some = replace(shape, tokens=min(shape.tokens, gemv.MOST_TOKENS))
    return () if gemv.refusal(target, some) is not None else gemv.pinned(target, shape)


def inputs(
    tokens: int, outputs: int, width: int, before: str, after: str, format: str, group: int,
    has_residual: int, groups: int = 2, columns: int = 0, result: str = "", *, dtype: str,
    device: str,
) -> tuple[Tensor | str | float | None, ...]:  # fmt: skip
    """Arguments with `outputs` rows of the weight.

    `groups` are those of a group norm; `columns` those of x, by default more than `width` where
    there is a norm; `result` is the dtype of y where it is not that of x.
    """
    some = Samples(dtype=dtype, device=device)
    gated = before == "group_norm_gate"
    halves = 2 if after == "swiglu" else 1
    x = some.normal(tokens, columns or (width if before == "none" else width + BLOCK))
    gate = some.normal(tokens, 2 * width) if gated else None
    norm_weight = None if before == "none" else some.norm_weight(width)
    weight, scale = some.stored_weight(outputs, width, stored=format, group=group, halves=halves)
    residual = some.normal(tokens, outputs // halves) if has_residual else None
    return (
        x, gate, norm_weight, weight, scale, residual, before, after, format, group,
        groups if gated else 1, 1e-6, result or dtype,
    )  # fmt: skip


def _benchmark(
    name: str, outputs: int, width: int, before: str, after: str, format: str, residual: int = 0,
    columns: int = 0, result: str = "", tokens: tuple[int, ...] = (1, 4, 16),
) -> Benchmark:  # fmt: skip
    group = 128 if format == "int4" else 0

    def case(count: int) -> tuple[int | str, ...]:
        return (
            count, outputs, width, before, after, format, group, residual, 4, columns or width,
            result,
        )  # fmt: skip

    return Benchmark(name=f"{name}, {format.upper()}", case=case, tokens=tokens)


FEW = 16
"""Tokens up to which the kernels that read weights once are alone."""

MOST_READS = 5
"""Of the weights in a step of a batch-invariant engine: for 64 tokens, and the logits of 65."""

_ONE = (1,)
_LONG = (1, 8192)
_MANY = (1, 8, 16, 64, 8192)

OP = define(
    "fused_linear(Tensor x, Tensor? gate, Tensor? norm_weight, Tensor weight, Tensor? scale, "
    "Tensor? residual, str before, str after, str format, int group, int groups, float eps, "
    "str dtype) -> Tensor y",
    reference=reference,
    types=types,
    refusal=refusal,
    cost=cost,
    inputs=inputs,
    layouts=layouts,
    tactics=tactics,
    pinned=pinned,
    judge=judge,
    mechanism="fp8_gemm",
    rows=("x", "gate", "residual"),
    cases=(
        (1, 6, 8, "none", "none", "bf16", 0, 0),
        (7, 130, 300, "rms_norm", "none", "fp8", 0, 1),
        (3, 32, 64, "rms_norm", "swiglu", "int4", 32, 0),
        (5, 48, 128, "group_norm_gate", "none", "bf16", 0, 1),
        (2, 256, 256, "group_norm_gate", "none", "fp8", 0, 1),
        (4, 256, 128, "rms_norm", "swiglu", "fp8", 0, 0),
        (1, 256, 256, "rms_norm", "none", "fp8", 0, 1),
        (1, 48, 1024, "group_norm_gate", "none", "fp8", 0, 1, 4),
        (3, 512, 768, "rms_norm", "swiglu", "fp8", 0, 0),
        (17, 64, 1024, "rms_norm", "none", "fp8", 0, 1),
        (1, 272, 1024, "rms_norm", "none", "bf16", 0, 0),
        (9, 96, 512, "none", "none", "bf16", 0, 1, 1, 0, "f32"),
        (1, 32, 128, "none", "none", "int4", 128, 1),
        (3, 64, 256, "group_norm_gate", "none", "int4", 32, 0),
        (1, 64, 2048, "rms_norm", "swiglu", "int4", 128, 0),
        (2, 144, 1024, "group_norm_gate", "none", "int4", 128, 1, 4),
        (1, 64, 768, "none", "none", "int4", 32, 1, 1, 0, "f32"),
        (5, 48, 1024, "rms_norm", "swiglu", "int4", 128, 0),
        (33, 64, 1024, "rms_norm", "none", "int4", 128, 1),
        (127, 256, 512, "rms_norm", "none", "fp8", 0, 1),
        (130, 144, 256, "none", "none", "bf16", 0, 0),
        (300, 512, 512, "none", "swiglu", "fp8", 0, 1),
        (40, 512, 256, "rms_norm", "swiglu", "bf16", 0, 1),
        (70, 256, 384, "none", "swiglu", "int4", 32, 0, 1, 0, "f32"),
        (600, 272, 128, "group_norm_gate", "none", "fp8", 0, 1),
    ),
    benchmarks=(
        _benchmark("qkv + gate", 16384, 4096, "rms_norm", "none", "fp8", tokens=_MANY),
        _benchmark("output", 4096, 4096, "group_norm_gate", "none", "fp8", 1, tokens=_MANY),
        _benchmark("qkv + gate", 16384, 4096, "rms_norm", "none", "int4"),
        _benchmark("output", 4096, 4096, "group_norm_gate", "none", "int4", 1),
        _benchmark("q_a + kv_a", 2112, 4096, "rms_norm", "none", "bf16"),
        _benchmark("q_b", 6144, 1536, "rms_norm", "none", "bf16", columns=2112),
        _benchmark("MLA output", 4096, 4096, "none", "none", "bf16", 1),
        _benchmark("dense gate + up", 18432, 4096, "rms_norm", "swiglu", "fp8", tokens=_LONG),
        _benchmark("dense down", 4096, 9216, "none", "none", "fp8", 1, tokens=_LONG),
        _benchmark("eh_proj", 4096, 8192, "none", "none", "bf16", tokens=_ONE),
        _benchmark("LM head", 157184, 4096, "none", "none", "bf16", result="f32", tokens=(1, 4)),
    ),
)
