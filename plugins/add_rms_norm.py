"""Residual add and the RMS norm that reads it, in one pass over memory.

    h[t, d] = x[t, d] + residual[t, d]
    y[t, d] = h[t, d] * rsqrt(mean_d(h[t, :]^2) + eps) * weight[d]

Shapes: x, residual, y, h [T, D]; weight [D]. T symbolic.

Rounding: h is rounded to x's dtype before the mean, which is taken in f32 (f64 for f64 x); y is
rounded once. The unfused graph rounds at the same two places, so fusing does not move the result.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import rows
from lingc.math import elements, number, rms, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms(h, weight, eps).to(x.dtype), h


def types(
    x: TensorType, residual: TensorType, weight: TensorType, eps: float
) -> tuple[TensorType, TensorType]:
    return x, x


def cost(x: TensorType, residual: TensorType, weight: TensorType, eps: float) -> Cost:
    return Cost(flops=5.0 * elements(x), moved_bytes=stored_bytes(x, residual, weight, x, x))


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
    return rows.norm(x, cost(x, residual, weight, eps), eps, add=True, codes=False)


def inputs(tokens: int, width: int, *, dtype: str, device: str) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    x, residual = some.normal(tokens, width), some.normal(tokens, width)
    return x, residual, some.norm_weight(width), 1e-6


OP = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor h)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 4), (3, 1000), (129, 96)),
    benchmarks=(Benchmark(name="hidden 4096", case=lambda tokens: (tokens, 4096), tokens=(8192,)),),
)
