"""The gate of a SwiGLU feed-forward, on the joined result of its two projections.

    y[t, f] = silu(gate_up[t, f]) * gate_up[t, F + f],  silu(x) = x / (1 + exp(-x))

Shapes: gate_up [T, 2F], gate first; y [T, F]. T symbolic.

Rounding: in f32 (f64 for f64), rounded once to the dtype of gate_up.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202, eq. 5.
"""

from torch import Tensor

from lingc.math import elements, number, stored_bytes, swiglu
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return swiglu(gate, up).to(gate_up.dtype)


def types(gate_up: TensorType) -> TensorType:
    *tokens, width = gate_up.shape
    return TensorType(gate_up.dtype, (*tokens, number(width) // 2))


def cost(gate_up: TensorType) -> Cost:
    made = types(gate_up)
    return Cost(flops=5.0 * elements(made), moved_bytes=stored_bytes(gate_up, made))


def inputs(tokens: int, inner: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    return (Samples(dtype=dtype, device=device).normal(tokens, 2 * inner),)


OP = define(
    "silu_mul(Tensor gate_up) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 2), (7, 33), (3, 320)),
)
