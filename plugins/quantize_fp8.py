"""FP8 codes of activations, with one scale a token and 128 channels.

For block n, the channels d of 128 n … min(128 n + 127, D - 1):

    scales[t, n] = max_d |x[t, d]| / 448        (1 where that is zero)
    codes[t, d]  = E4M3(x[t, d] / scales[t, n]), to nearest even, saturating at 448

Shapes: x [T, D]; codes E4M3 [T, D]; scales f32 [T, ceil(D / 128)]. T symbolic.

Rounding: the scale is rounded to f32, and the quotient is of the rounded scale.

Source: DeepSeek-V3 technical report, 2024, arXiv:2412.19437, section 3.3.2 (1x128 tiles).
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import rows
from lingc.math import BLOCK, ceil_div, elements, quantize_fp8, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_fp8(x)


def types(x: TensorType) -> tuple[TensorType, TensorType]:
    tokens, width = x.shape
    return TensorType("f8e4m3", x.shape), TensorType("f32", (tokens, ceil_div(width, BLOCK)))


def cost(x: TensorType) -> Cost:
    return Cost(flops=2.0 * elements(x), moved_bytes=stored_bytes(x, *types(x)))


def refusal(_target: Target, x: TensorType) -> str | None:
    return rows.dtype_refusal(x=x)


def tactics(target: Target, x: TensorType) -> Sequence[Tactic]:
    return () if refusal(target, x) is not None else rows.coded(x, cost(x))


def inputs(tokens: int, width: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    return (Samples(dtype=dtype, device=device).normal(tokens, width),)


OP = define(
    "quantize_fp8(Tensor x) -> (Tensor codes, Tensor scales)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 3), (5, 128), (7, 300)),
    benchmarks=(Benchmark(name="hidden 4096", case=lambda tokens: (tokens, 4096), tokens=(8192,)),),
)
