"""Residual add, the RMS norm that reads it, and the FP8 codes of the norm's result.

    y, h = add_rms_norm(x, residual, weight, eps);  codes, scales = quantize_fp8(y)

Shapes: x, residual, y, h [T, D]; weight [D]; codes E4M3 [T, D]; scales f32 [T, ceil(D / 128)].
T symbolic.

Rounding: h and y are rounded to x's dtype, y before it is quantized, so that codes are those of
the y that others read.

Source: `add_rms_norm` and `quantize_fp8`.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.compare import judge_codes
from lingc.kernel import Tactic
from lingc.kernels import rows
from lingc.math import BLOCK, ceil_div, elements, number, quantize_fp8, rms, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x + residual
    y = rms(h, weight, eps).to(x.dtype)
    return y, h, *quantize_fp8(y)


def types(
    x: TensorType, residual: TensorType, weight: TensorType, eps: float
) -> tuple[TensorType, TensorType, TensorType, TensorType]:
    blocks = ceil_div(x.shape[1], BLOCK)
    return x, x, TensorType("f8e4m3", x.shape), TensorType("f32", (x.shape[0], blocks))


def cost(x: TensorType, residual: TensorType, weight: TensorType, eps: float) -> Cost:
    made = types(x, residual, weight, eps)
    return Cost(flops=7.0 * elements(x), moved_bytes=stored_bytes(x, residual, weight, *made))


def refusal(
    _target: Target, x: TensorType, residual: TensorType, weight: TensorType, _eps: float
) -> str | None:
    wrong = rows.dtype_refusal(x=x, residual=residual, weight=weight)
    return wrong or rows.width_refusal(number(x.shape[-1]))


def tactics(
    target: Target, x: TensorType, residual: TensorType, weight: TensorType, eps: float
) -> Sequence[Tactic]:
    if refusal(target, x, residual, weight, eps) is not None:
        return ()
    return rows.norm(x, cost(x, residual, weight, eps), eps, add=True, codes=True)


def inputs(tokens: int, width: int, *, dtype: str, device: str) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    x, residual = some.normal(tokens, width), some.normal(tokens, width)
    return x, residual, some.norm_weight(width), 1e-6


OP = define(
    "add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, float eps) "
    "-> (Tensor y, Tensor h, Tensor codes, Tensor scales)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    judge=judge_codes,
    cases=((1, 4), (3, 1000), (5, 256)),
    benchmarks=(Benchmark(name="hidden 4096", case=lambda tokens: (tokens, 4096), tokens=(8192,)),),
)
