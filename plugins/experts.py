"""The feed-forward of every token's experts, and what it is added to.

    y[t] = base[t] + sum_i weights[t, i] * down[e] @ (silu(g) * u),  e = ids[t, i]
    g = gate_up[e, :F] @ x[t],  u = gate_up[e, F:] @ x[t]

Without `base`, the sum alone.

Shapes: x, base, y [T, D]; ids, weights [T, k]; gate_up [E, 2F, D], gate rows first; down [E, D, F].
T symbolic.

Rounding: silu(g) * u is rounded to the dtype of x, as the operand of the second product; the sum
over experts and base is kept in f32 (f64 for f64 x) and rounded once.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202, eq. 6, for one expert.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import products
from lingc.math import elements, expert_bytes, expert_sum, matmul, stored_bytes, swiglu
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, base: Tensor | None
) -> Tensor:
    def feed_forward(expert: int, rows: Tensor) -> Tensor:
        gate, up = matmul(rows, gate_up[expert]).chunk(2, -1)
        return matmul(swiglu(gate, up).to(x.dtype), down[expert])

    return expert_sum(x, ids, weights, feed_forward, base).to(x.dtype)


def types(
    x: TensorType,
    ids: TensorType,
    weights: TensorType,
    gate_up: TensorType,
    down: TensorType,
    base: TensorType | None,
) -> TensorType:
    return x


def cost(
    x: TensorType,
    ids: TensorType,
    weights: TensorType,
    gate_up: TensorType,
    down: TensorType,
    base: TensorType | None,
) -> Cost:
    experts, width, inner = down.bind({})
    return Cost(
        flops=6.0 * elements(ids) * inner * width,
        moved_bytes=stored_bytes(x, x, ids, weights, base)
        + expert_bytes(ids, experts, gate_up, down),
    )


def refusal(_target: Target, x: TensorType, *_: Any) -> str | None:
    return products.Form(stored="bf16").refusal(x.dtype)


def tactics(
    target: Target,
    x: TensorType,
    ids: TensorType,
    weights: TensorType,
    gate_up: TensorType,
    down: TensorType,
    base: TensorType | None,
) -> Sequence[Tactic]:
    if refusal(target, x) is not None:
        return ()
    (tokens, top_k), (experts, width, inner) = ids.bind({}), down.bind({})
    return products.expert_tactics(
        products.Experts(
            tokens=tokens,
            top_k=top_k,
            experts=experts,
            inner=inner,
            width=width,
            form=products.Form(stored="bf16"),
            adds=base is not None,
        )
    )


def inputs(
    tokens: int,
    top_k: int,
    experts: int,
    inner: int,
    width: int,
    shared: int,
    *,
    dtype: str,
    device: str,
) -> tuple[Tensor | None, ...]:
    some = Samples(dtype=dtype, device=device)
    return (
        some.normal(tokens, width),
        *some.experts(tokens, top_k, experts),
        some.weight(experts, 2 * inner, width),
        some.weight(experts, width, inner),
        some.normal(tokens, width) if shared else None,
    )


OP = define(
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? base) "
    "-> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="experts",
    cases=(
        (1, 1, 2, 4, 8, 0),
        (7, 3, 5, 10, 12, 1),
        (20, 2, 3, 16, 32, 1),
        (40, 4, 4, 128, 256, 1),
    ),
)
