"""Per-head RMS norm of q and k, then half-split rotary embedding.

For head h, x either of q = qkv[t, :HK] and k = qkv[t, HK:2HK], and n = the width of cos:

    z[d] = x[t, h, d] * rsqrt(mean_d(x[t, h, :]^2) + eps) * weight[d]
    y[j]     = z[j] cos[t, j] - z[j + n] sin[t, j]      j < n
    y[j + n] = z[j + n] cos[t, j] + z[j] sin[t, j]      j < n
    y[d]     = z[d]                                     d >= 2n

Shapes: qkv [T, >= 2HK], the rest ignored; q_weight, k_weight [K], shared by heads; cos, sin
[T, n], 2n <= K; q, k [T, H, K]. T symbolic.

Rounding: in f32 (f64 for f64 qkv), rounded once to the dtype of qkv. q is not scaled.

Source: inclusionAI/Ling-V2.5:models/modeling_bailing_moe_v2_5.py; Su et al., RoFormer, 2021,
arXiv:2104.09864, eq. 34.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import rows
from lingc.math import elements, qk_norm_rope, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)


def types(
    qkv: TensorType,
    q_weight: TensorType,
    k_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    heads: int,
    eps: float,
) -> tuple[TensorType, TensorType]:
    made = TensorType(qkv.dtype, (qkv.shape[0], heads, q_weight.shape[0]))
    return made, made


def cost(
    qkv: TensorType,
    q_weight: TensorType,
    k_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    heads: int,
    eps: float,
) -> Cost:
    q, k = types(qkv, q_weight, k_weight, cos, sin, heads, eps)
    return Cost(
        flops=2 * (4.0 * elements(q) + 6.0 * heads * elements(cos)),
        moved_bytes=stored_bytes(q, k, q, k, q_weight, k_weight, cos, sin),
    )


def refusal(
    _target: Target,
    qkv: TensorType,
    q_weight: TensorType,
    k_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    heads: int,
    _eps: float,
) -> str | None:
    wrong = rows.dtype_refusal(qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    return wrong or ("cos and sin are not f32" if {cos.dtype, sin.dtype} != {"f32"} else None)


def tactics(
    target: Target,
    qkv: TensorType,
    q_weight: TensorType,
    k_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    heads: int,
    eps: float,
) -> Sequence[Tactic]:
    if refusal(target, qkv, q_weight, k_weight, cos, sin, heads, eps) is not None:
        return ()
    moved = cost(qkv, q_weight, k_weight, cos, sin, heads, eps)
    return rows.rope_heads(qkv, q_weight, cos, heads, moved, eps)


def inputs(
    tokens: int, heads: int, key: int, pairs: int, rest: int, *, dtype: str, device: str
) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    cos, sin = some.rope(some.below(500, tokens), pairs)
    qkv = some.normal(tokens, 2 * heads * key + rest)
    return qkv, some.norm_weight(key), some.norm_weight(key), cos, sin, heads, 1e-6


OP = define(
    "qk_norm_rope(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "int heads, float eps) -> (Tensor q, Tensor k)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="rope",
    # The last turns every channel.
    cases=((1, 1, 4, 1, 0), (7, 3, 10, 2, 30), (5, 2, 128, 32, 512), (3, 2, 8, 4, 5)),
    benchmarks=(
        Benchmark(
            name="32 heads of 128, half turned",
            case=lambda tokens: (tokens, 32, 128, 32, 8192),
            tokens=(8192,),
        ),
    ),
)
