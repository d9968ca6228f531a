"""RMS norm of groups of channels after linear attention, then the output gate.

For group n, the channels d of W n … W n + W - 1 with W = HV / groups:

    y[t, d] = o[t, d] * rsqrt(mean_{d in n}(o[t, d]^2) + eps) * weight[d] * sigmoid(gate[t, d])

Shapes: o [T, H, V] or [T, HV]; gate, y [T, HV]; weight [HV]; groups divides HV. T symbolic.

Rounding: in f32 (f64 for f64 o), rounded once to the dtype of o.

Source: inclusionAI/Ling-V2.5:models/modeling_bailing_moe_v2_5.py (`group_norm_size` there counts
the groups).
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import rows
from lingc.math import elements, group_norm_gate, number, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(o: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    return group_norm_gate(o, gate, weight, groups, eps)


def types(
    o: TensorType, gate: TensorType, weight: TensorType, groups: int, eps: float
) -> TensorType:
    return TensorType(o.dtype, (o.shape[0], weight.shape[0]))


def cost(o: TensorType, gate: TensorType, weight: TensorType, groups: int, eps: float) -> Cost:
    return Cost(flops=9.0 * elements(o), moved_bytes=stored_bytes(o, gate, weight, o))


def refusal(
    _target: Target, o: TensorType, gate: TensorType, weight: TensorType, groups: int, _eps: float
) -> str | None:
    wrong = rows.dtype_refusal(o=o, gate=gate, weight=weight)
    return wrong or rows.width_refusal(number(weight.shape[0]) // groups)


def tactics(
    target: Target, o: TensorType, gate: TensorType, weight: TensorType, groups: int, eps: float
) -> Sequence[Tactic]:
    if refusal(target, o, gate, weight, groups, eps) is not None:
        return ()
    return rows.gate_norm(o, weight, groups, cost(o, gate, weight, groups, eps), eps)


def inputs(
    tokens: int, shape: tuple[int, ...], groups: int, *, dtype: str, device: str
) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    o = some.normal(tokens, *shape)
    gate = some.normal(*o.flatten(1).shape)
    return o, gate, some.norm_weight(gate.shape[1]), groups, 1e-6


OP = define(
    "group_norm_gate(Tensor o, Tensor gate, Tensor weight, int groups, float eps) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, (2, 4), 1), (7, (3, 10), 3), (5, (30,), 2), (3, (4, 8), 4)),
    benchmarks=(
        Benchmark(
            name="4 groups of 1024", case=lambda tokens: (tokens, (32, 128), 4), tokens=(8192,)
        ),
    ),
)
