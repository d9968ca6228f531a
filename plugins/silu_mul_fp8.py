"""The gate of a SwiGLU feed-forward, and the FP8 codes of its result.

    codes, scales = quantize_fp8(silu_mul(gate_up))

Shapes: gate_up [T, 2F], gate first; codes E4M3 [T, F]; scales f32 [T, ceil(F / 128)]. T symbolic.

Rounding: the product is rounded to the dtype of gate_up before it is quantized.

Source: `silu_mul` and `quantize_fp8`.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.compare import judge_codes
from lingc.kernel import Tactic
from lingc.kernels import rows
from lingc.math import BLOCK, ceil_div, elements, number, quantize_fp8, stored_bytes, swiglu
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


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


def refusal(_target: Target, gate_up: TensorType) -> str | None:
    return rows.dtype_refusal(gate_up=gate_up)


def tactics(target: Target, gate_up: TensorType) -> Sequence[Tactic]:
    if refusal(target, gate_up) is not None:
        return ()
    return rows.gated(gate_up, cost(gate_up), codes=True)


def inputs(tokens: int, inner: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    return (Samples(dtype=dtype, device=device).normal(tokens, 2 * inner),)


OP = define(
    "silu_mul_fp8(Tensor gate_up) -> (Tensor codes, Tensor scales)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    judge=judge_codes,
    cases=((1, 2), (7, 33), (3, 320)),
    benchmarks=(
        Benchmark(name="dense, 9216 wide", case=lambda tokens: (tokens, 9216), tokens=(8192,)),
        Benchmark(
            name="expert, 1024 wide", case=lambda tokens: (tokens, 1024), tokens=(8192, 73728)
        ),
    ),
)
