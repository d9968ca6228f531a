"""Product with a weight matrix in INT4 groups: `int4_weight_linear`, and `_f32`, for an LM head.

    nibble[n, d] = (packed[n, d // 8] >> 4 (d % 8)) & 15
    w[n, d] = (nibble[n, d] - 8) * scales[n, d // group]
    y[t, n] = sum_d x[t, d] w[n, d]

Shapes: x [T, D]; packed i32 [N, ceil(D / 8)]; scales bf16 [N, ceil(D / group)]; y [T, N].
T symbolic.

Rounding: values are nibble times scale in f32 and summed in f32 (f64 for f64 x); y is rounded once,
to x's dtype, or not.

Source: the compressed-tensors package, compressed_tensors/compressors/pack_quantized/helpers.py.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import products
from lingc.math import accumulator, dequantize_int4, elements, matmul, stored_bytes, wide_name
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(x: Tensor, packed: Tensor, scales: Tensor, group: int) -> Tensor:
    return reference_f32(x, packed, scales, group).to(x.dtype)


def reference_f32(x: Tensor, packed: Tensor, scales: Tensor, group: int) -> Tensor:
    return matmul(x, dequantize_int4(packed, scales, x.shape[-1], group, accumulator(x)))


def types(x: TensorType, packed: TensorType, scales: TensorType, group: int) -> TensorType:
    return TensorType(x.dtype, (*x.shape[:-1], packed.shape[0]))


def types_f32(x: TensorType, packed: TensorType, scales: TensorType, group: int) -> TensorType:
    return TensorType(wide_name(x.dtype), (*x.shape[:-1], packed.shape[0]))


def cost(x: TensorType, packed: TensorType, scales: TensorType, group: int) -> Cost:
    return _cost(x, packed, scales, types(x, packed, scales, group))


def cost_f32(x: TensorType, packed: TensorType, scales: TensorType, group: int) -> Cost:
    return _cost(x, packed, scales, types_f32(x, packed, scales, group))


def _cost(x: TensorType, packed: TensorType, scales: TensorType, y: TensorType) -> Cost:
    flops = 2.0 * elements(y) * x.bind({})[-1]
    return Cost(flops=flops, moved_bytes=stored_bytes(x, packed, scales, y))


def refusal(
    _target: Target, x: TensorType, packed: TensorType, scales: TensorType, group: int
) -> str | None:
    return products.Form(stored="int4", group=group).refusal(x.dtype)


def tactics(
    target: Target, x: TensorType, packed: TensorType, scales: TensorType, group: int
) -> Sequence[Tactic]:
    return _tactics(target, x, packed, scales, group, wide=False)


def tactics_f32(
    target: Target, x: TensorType, packed: TensorType, scales: TensorType, group: int
) -> Sequence[Tactic]:
    return _tactics(target, x, packed, scales, group, wide=True)


def _tactics(
    target: Target, x: TensorType, packed: TensorType, scales: TensorType, group: int, *, wide: bool
) -> Sequence[Tactic]:
    if refusal(target, x, packed, scales, group) is not None:
        return ()
    (tokens, width), (rows, _) = x.bind({}), packed.bind({})
    return products.linear_tactics(
        products.Form(stored="int4", group=group), tokens, rows, width,
        x="x", scales=None, weight="packed", scale="scales", wide=wide,
    )  # fmt: skip


def inputs(
    tokens: int, outputs: int, width: int, group: int, *, dtype: str, device: str
) -> tuple[Tensor | int, ...]:
    some = Samples(dtype=dtype, device=device)
    x = some.normal(tokens, width)
    return x, *some.int4_weight(outputs, width, group=group), group


CASES = ((1, 3, 8, 4), (7, 33, 50, 32), (20, 64, 256, 128))

OP = define(
    "int4_weight_linear(Tensor x, Tensor packed, Tensor scales, int group) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="gemm",
    cases=CASES,
)
OP_F32 = define(
    "int4_weight_linear_f32(Tensor x, Tensor packed, Tensor scales, int group) -> Tensor",
    reference=reference_f32,
    types=types_f32,
    cost=cost_f32,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics_f32,
    mechanism="gemm",
    cases=CASES,
)
