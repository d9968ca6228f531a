"""Product with a weight matrix: `linear`, and `linear_f32`, which keeps its f32 sums.

    y[t, n] = sum_d x[t, d] weight[n, d]

Shapes: x [T, D]; weight [N, D] as stored; y [T, N]. T symbolic.

Rounding: summed in f32 (f64 for f64 x). `linear` rounds to x's dtype, `linear_f32` does not: the
LM head, whose logits are compared with each other.

Source: inclusionAI/Ling-V2.5:models/modeling_bailing_moe_v2_5.py; that of Ling-2.6
is announced to keep f32 logits.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import products
from lingc.math import elements, matmul, stored_bytes, wide_name
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return matmul(x, weight).to(x.dtype)


def reference_f32(x: Tensor, weight: Tensor) -> Tensor:
    return matmul(x, weight)


def types(x: TensorType, weight: TensorType) -> TensorType:
    return TensorType(x.dtype, (*x.shape[:-1], weight.shape[0]))


def types_f32(x: TensorType, weight: TensorType) -> TensorType:
    return TensorType(wide_name(x.dtype), types(x, weight).shape)


def cost(x: TensorType, weight: TensorType) -> Cost:
    return _cost(x, weight, types(x, weight))


def cost_f32(x: TensorType, weight: TensorType) -> Cost:
    return _cost(x, weight, types_f32(x, weight))


def _cost(x: TensorType, weight: TensorType, y: TensorType) -> Cost:
    return Cost(
        flops=2.0 * elements(y) * weight.bind({})[1], moved_bytes=stored_bytes(x, weight, y)
    )


def refusal(_target: Target, x: TensorType, weight: TensorType) -> str | None:
    return products.Form(stored=weight.dtype).refusal(x.dtype)


def tactics_f32(target: Target, x: TensorType, weight: TensorType) -> Sequence[Tactic]:
    """Of the head alone: a library multiplies BF16 by BF16 as well, and rounds to BF16."""
    if refusal(target, x, weight) is not None:
        return ()
    (tokens, width), (rows, _) = x.bind({}), weight.bind({})
    return products.linear_tactics(
        products.Form(stored="bf16"), tokens, rows, width,
        x="x", scales=None, weight="weight", scale=None, wide=True,
    )  # fmt: skip


def inputs(
    tokens: int, outputs: int, width: int, *, dtype: str, device: str
) -> tuple[Tensor, Tensor]:
    some = Samples(dtype=dtype, device=device)
    return some.normal(tokens, width), some.weight(outputs, width)


CASES = ((1, 3, 4), (7, 33, 50), (20, 64, 128))

OP = define(
    "linear(Tensor x, Tensor weight) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=CASES,
)
OP_F32 = define(
    "linear_f32(Tensor x, Tensor weight) -> Tensor",
    reference=reference_f32,
    types=types_f32,
    cost=cost_f32,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics_f32,
    mechanism="gemm",
    cases=CASES,
)
