"""The feed-forward of every token's experts, as the model says it: three stacks of matrices.

    y[t] = sum_i weights[t, i] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])),  e = ids[t, i]

Structural: captured programs hold it, fusing makes `experts` of it, which has gate and up in one
stack and takes in the shared expert's sum.

Shapes: x, y [T, D]; ids, weights [T, k]; gate, up [E, F, D]; down [E, D, F]. T symbolic.

Rounding: silu(gate) * up is rounded to the dtype of x, as the operand of the second product; the
sum over experts is kept in f32 (f64 for f64 x) and rounded once.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202, eq. 6, for one expert.
"""

from torch import Tensor

from lingc.math import elements, expert_bytes, expert_sum, matmul, stored_bytes, swiglu
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(
    x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    def feed_forward(expert: int, rows: Tensor) -> Tensor:
        inner = swiglu(matmul(rows, gate[expert]), matmul(rows, up[expert])).to(x.dtype)
        return matmul(inner, down[expert])

    return expert_sum(x, ids, weights, feed_forward, None).to(x.dtype)


def types(
    x: TensorType,
    ids: TensorType,
    weights: TensorType,
    gate: TensorType,
    up: TensorType,
    down: TensorType,
) -> TensorType:
    return x


def cost(
    x: TensorType,
    ids: TensorType,
    weights: TensorType,
    gate: TensorType,
    up: TensorType,
    down: TensorType,
) -> Cost:
    experts, inner, width = gate.bind({})
    return Cost(
        flops=6.0 * elements(ids) * inner * width,
        moved_bytes=stored_bytes(x, x, ids, weights) + expert_bytes(ids, experts, gate, up, down),
    )


def inputs(
    tokens: int, top_k: int, experts: int, inner: int, width: int, *, dtype: str, device: str
) -> tuple[Tensor, ...]:
    some = Samples(dtype=dtype, device=device)
    return (
        some.normal(tokens, width),
        *some.experts(tokens, top_k, experts),
        some.weight(experts, inner, width),
        some.weight(experts, inner, width),
        some.weight(experts, width, inner),
    )


OP = define(
    "expert_dispatch(Tensor x, Tensor ids, Tensor weights, Tensor gate, Tensor up, Tensor down) "
    "-> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 1, 2, 4, 8), (7, 3, 5, 10, 12), (20, 2, 3, 16, 32)),
)
