"""The gate of a SwiGLU feed-forward, on the joined result of its two projections.

    y[t, f] = silu(gate_up[t, f]) * gate_up[t, F + f],  silu(x) = x / (1 + exp(-x))

Shapes: gate_up [T, 2F], gate first; y [T, F]. T symbolic.

Rounding: in f32 (f64 for f64), rounded once to the dtype of gate_up.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202, eq. 5.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import rows
from lingc.math import elements, number, stored_bytes, swiglu
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return swiglu(gate, up).to(gate_up.dtype)


def types(gate_up: TensorType) -> TensorType:
    *tokens, width = gate_up.shape
    return TensorType(gate_up.dtype, (*tokens, number(width) // 2))


def cost(gate_up: TensorType) -> Cost:
    made = types(gate_up)
    return Cost(flops=5.0 * elements(made), moved_bytes=stored_bytes(gate_up, made))


def refusal(_target: Target, gate_up: TensorType) -> str | None:
    return rows.dtype_refusal(gate_up=gate_up)


def tactics(target: Target, gate_up: TensorType) -> Sequence[Tactic]:
    if refusal(target, gate_up) is not None:
        return ()
    return rows.gated(gate_up, cost(gate_up), codes=False)


def inputs(tokens: int, inner: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    return (Samples(dtype=dtype, device=device).normal(tokens, 2 * inner),)


OP = define(
    "silu_mul(Tensor gate_up) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 2), (7, 33), (3, 320)),
    benchmarks=(
        Benchmark(name="dense, 9216 wide", case=lambda tokens: (tokens, 9216), tokens=(8192,)),
        Benchmark(
            name="expert, 1024 wide", case=lambda tokens: (tokens, 1024), tokens=(8192, 73728)
        ),
    ),
)
