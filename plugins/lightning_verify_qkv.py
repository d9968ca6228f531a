"""`lightning_verify` straight from the merged projection: norms and rope of q and k are inside.

    q, k = qk_norm_rope(qkvg, …);  v = qkvg[:, 2HK:3HK]
    o, state, pending_k, pending_v = lightning_verify(q, k, v, …)

Shapes: qkvg [T, >= 3HK] of q, k, v and whatever follows, T = B Q; q_weight, k_weight [K]; cos, sin
[T, n]; decay [H]; state [S, H, K, K]; pending_k, pending_v [S, M, H, K], Q <= M; slots, accepted
[B]; offsets [B + 1]; positions [T]; o [T, HK]. T, B, S symbolic.

Rounding: q and k to the dtype of qkvg, as between the two ops; all else in f32 (f64 where qkvg or
the state is f64); o is rounded to the dtype of qkvg.

Source: `qk_norm_rope` and `lightning_verify`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from torch import Tensor

from lingc.math import Held, elements, lightning_verify, number, qk_norm_rope, stored_bytes
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(
    qkvg: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, decay: Tensor,
    state: Tensor, pending_k: Tensor, pending_v: Tensor, slots: Tensor, accepted: Tensor,
    offsets: Tensor, positions: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    held = Held(
        decay=decay,
        state=state,
        pending_k=pending_k,
        pending_v=pending_v,
        slots=slots,
        accepted=accepted,
    )
    width = heads * q_weight.numel()
    q, k = qk_norm_rope(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    v = qkvg[:, 2 * width : 3 * width].unflatten(1, (heads, -1))
    o, *after = lightning_verify(q, k, v, held, offsets, positions)
    return o.flatten(1), after[0], after[1], after[2]


def types(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, state: TensorType, pending_k: TensorType,
    pending_v: TensorType, slots: TensorType, accepted: TensorType, offsets: TensorType,
    positions: TensorType, heads: int, eps: float,
) -> tuple[TensorType, ...]:  # fmt: skip
    o = TensorType(qkvg.dtype, (qkvg.shape[0], heads * number(q_weight.shape[0])))
    return o, state, pending_k, pending_v


def cost(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, state: TensorType, pending_k: TensorType,
    pending_v: TensorType, slots: TensorType, accepted: TensorType, offsets: TensorType,
    positions: TensorType, heads: int, eps: float,
) -> Cost:  # fmt: skip
    # One pending token to commit, the least that a verify accepts; k and v are also kept.
    o = TensorType(qkvg.dtype, (qkvg.shape[0], heads * number(q_weight.shape[0])))
    live = TensorType(state.dtype, (*slots.shape, *state.shape[1:]))
    return Cost(
        flops=elements(o) * (4.0 * number(q_weight.shape[0]) + 12.0) + 2.0 * elements(live),
        moved_bytes=stored_bytes(*[o] * 6, cos, sin) + 2 * stored_bytes(live),
    )


def inputs(
    sequences: int, draft: int, heads: int, key: int, pairs: int, pending: int,
    *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    some = Samples(dtype=dtype, device=device)
    slots, offsets, positions = some.sequences((draft,) * sequences)
    held = sequences + 2
    return (
        some.normal(sequences * draft, 4 * heads * key),
        some.norm_weight(key),
        some.norm_weight(key),
        *some.rope(positions, pairs),
        some.decay(heads),
        some.state(held, heads, key, key),
        some.normal(held, pending, heads, key),
        some.normal(held, pending, heads, key),
        slots,
        some.below(pending + 1, sequences),
        offsets,
        positions,
        heads,
        1e-6,
    )


OP = define(
    "lightning_verify_qkv(Tensor qkvg, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor decay, Tensor state, Tensor pending_k, Tensor pending_v, Tensor slots, "
    "Tensor accepted, Tensor offsets, Tensor positions, int heads, float eps) -> "
    "(Tensor o, Tensor state, Tensor pending_k, Tensor pending_v)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    mechanism="lightning",
    cases=((1, 1, 1, 4, 1, 1), (3, 2, 3, 10, 2, 4), (2, 4, 2, 128, 32, 4)),
)
