"""The gate of a SwiGLU feed-forward, and the FP8 codes of its result.

    codes, scales = quantize_fp8(silu_mul(gate_up))

Shapes: gate_up [T, 2F], gate first; codes E4M3 [T, F]; scales f32 [T, ceil(F / 128)]. T symbolic.

Rounding: the product is rounded to the dtype of gate_up before it is quantized.

Source: `silu_mul` and `quantize_fp8`.
"""

from torch import Tensor

from lingc.math import BLOCK, ceil_div, elements, number, quantize_fp8, stored_bytes, swiglu
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, -1)
    return quantize_fp8(swiglu(gate, up).to(gate_up.dtype))


def types(gate_up: TensorType) -> tuple[TensorType, TensorType]:
    tokens, width = gate_up.shape
    inner = number(width) // 2
    return (
        TensorType("f8e4m3", (tokens, inner)),
        TensorType("f32", (tokens, ceil_div(inner, BLOCK))),
    )


def cost(gate_up: TensorType) -> Cost:
    made = types(gate_up)
    return Cost(flops=7.0 * elements(made[0]), moved_bytes=stored_bytes(gate_up, *made))


def inputs(tokens: int, inner: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    return (Samples(dtype=dtype, device=device).normal(tokens, 2 * inner),)


OP = define(
    "silu_mul_fp8(Tensor gate_up) -> (Tensor codes, Tensor scales)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 2), (7, 33), (3, 320)),
)
