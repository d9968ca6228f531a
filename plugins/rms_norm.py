"""RMS norm over the last axis.

    y[t, d] = x[t, d] * rsqrt(mean_d(x[t, :]^2) + eps) * weight[d]

Shapes: x, y [T, D] (more leading axes do no harm); weight [D]. T symbolic.

Rounding: mean, root and both products in f32 (f64 for f64 x); y is rounded once, to x's dtype.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import norm, rows
from lingc.math import elements, number, rms, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms(x, weight, eps).to(x.dtype)


def types(x: TensorType, weight: TensorType, eps: float) -> TensorType:
    return x


def cost(x: TensorType, weight: TensorType, eps: float) -> Cost:
    return Cost(flops=4.0 * elements(x), moved_bytes=stored_bytes(x, x, weight))


def refusal(_target: Target, x: TensorType, weight: TensorType, _eps: float) -> str | None:
    return rows.dtype_refusal(x=x, weight=weight) or rows.width_refusal(number(x.shape[-1]))


def tactics(target: Target, x: TensorType, weight: TensorType, eps: float) -> Sequence[Tactic]:
    if refusal(target, x, weight, eps) is not None:
        return ()
    dependent = (target.compute_capability or (0, 0)) >= (9, 0)
    return [
        *norm.tactics(x, weight, eps, dependent=dependent),
        *rows.norm(x, cost(x, weight, eps), eps, add=False, codes=False),
    ]


def inputs(tokens: int, width: int, *, dtype: str, device: str) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    return some.normal(tokens, width), some.norm_weight(width), 1e-6


OP = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 4), (3, 1000), (17, 4096), (129, 96)),
    benchmarks=(
        Benchmark(name="hidden 4096", case=lambda tokens: (tokens, 4096), tokens=(1, 8, 64, 8192)),
    ),
)
