"""FP8 codes of activations, with one scale a token and 128 channels.

For block n, the channels d of 128 n … min(128 n + 127, D - 1):

    scales[t, n] = max_d |x[t, d]| / 448        (1 where that is zero)
    codes[t, d]  = E4M3(x[t, d] / scales[t, n]), to nearest even, saturating at 448

Shapes: x [T, D]; codes E4M3 [T, D]; scales f32 [T, ceil(D / 128)]. T symbolic.

Rounding: the scale is rounded to f32, and the quotient is of the rounded scale.

Source: DeepSeek-V3 technical report, 2024, arXiv:2412.19437, section 3.3.2 (1x128 tiles).
"""

from torch import Tensor

from lingc.math import BLOCK, ceil_div, elements, quantize_fp8, stored_bytes
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_fp8(x)


def types(x: TensorType) -> tuple[TensorType, TensorType]:
    tokens, width = x.shape
    return TensorType("f8e4m3", x.shape), TensorType("f32", (tokens, ceil_div(width, BLOCK)))


def cost(x: TensorType) -> Cost:
    return Cost(flops=2.0 * elements(x), moved_bytes=stored_bytes(x, *types(x)))


def inputs(tokens: int, width: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    return (Samples(dtype=dtype, device=device).normal(tokens, width),)


OP = define(
    "quantize_fp8(Tensor x) -> (Tensor codes, Tensor scales)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 3), (5, 128), (7, 300)),
)
