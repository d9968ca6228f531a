"""Everything between the two projections of a linear-attention layer, for one token a sequence.

    q, k = qk_norm_rope(qkvg, …);  v = qkvg[:, 2HK:3HK];  gate = qkvg[:, 3HK:]
    o, state = lightning_decode(q, k, v, …)
    y = group_norm_gate(o, gate, norm_weight, …)

Shapes: qkvg [B, 4HK] of q, k, v and gate logits; q_weight, k_weight [K]; cos, sin [B, n]; decay
[H]; norm_weight [HK]; state [S, H, K, K]; pending_k, pending_v [S, M, H, K]; slots, accepted,
positions [B]; y [B, HK]. B and S symbolic.

Rounding: q, k and o are rounded to the dtype of qkvg, as between the three ops; all else in f32.

Source: `qk_norm_rope`, `lightning_decode` and `group_norm_gate`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from torch import Tensor

from lingc.math import (
    Held,
    elements,
    group_norm_gate,
    lightning_decode,
    number,
    qk_norm_rope,
    stored_bytes,
)
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(
    qkvg: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, decay: Tensor,
    norm_weight: Tensor, state: Tensor, pending_k: Tensor, pending_v: Tensor, slots: Tensor,
    accepted: Tensor, positions: Tensor, heads: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    held = Held(
        decay=decay,
        state=state,
        pending_k=pending_k,
        pending_v=pending_v,
        slots=slots,
        accepted=accepted,
    )
    q, k = qk_norm_rope(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    _, _, v, gate = qkvg.chunk(4, 1)
    o, after = lightning_decode(q, k, v.unflatten(1, (heads, -1)), held, positions)
    return group_norm_gate(o, gate, norm_weight, groups, eps), after


def types(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, norm_weight: TensorType, state: TensorType,
    *_: TensorType | float,
) -> tuple[TensorType, TensorType]:  # fmt: skip
    return TensorType(qkvg.dtype, (qkvg.shape[0], norm_weight.shape[0])), state


def cost(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, norm_weight: TensorType, state: TensorType,
    *_: TensorType | float,
) -> Cost:  # fmt: skip
    # Nothing pending, which is the least: one update and one read of each live state.
    y = TensorType(qkvg.dtype, (qkvg.shape[0], norm_weight.shape[0]))
    live = TensorType(state.dtype, (*qkvg.shape[:1], *state.shape[1:]))
    return Cost(
        flops=elements(y) * (4.0 * number(q_weight.shape[0]) + 21.0),
        moved_bytes=stored_bytes(qkvg, y, cos, sin, norm_weight) + 2 * stored_bytes(live),
    )


def inputs(
    sequences: int,
    heads: int,
    key: int,
    pairs: int,
    groups: int,
    pending: int,
    *,
    dtype: str,
    device: str,
) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    slots, _, positions = some.sequences((1,) * sequences)
    held, width = sequences + 2, heads * key
    return (
        some.normal(sequences, 4 * width),
        some.norm_weight(key),
        some.norm_weight(key),
        *some.rope(positions, pairs),
        some.decay(heads),
        some.norm_weight(width),
        some.state(held, heads, key, key),
        some.normal(held, pending, heads, key),
        some.normal(held, pending, heads, key),
        slots,
        some.below(pending + 1, sequences),
        positions,
        heads,
        groups,
        1e-6,
    )


OP = define(
    "decode_mixer(Tensor qkvg, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor decay, Tensor norm_weight, Tensor state, Tensor pending_k, Tensor pending_v, "
    "Tensor slots, Tensor accepted, Tensor positions, int heads, int groups, float eps) "
    "-> (Tensor y, Tensor state)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 1, 4, 1, 1, 1), (4, 3, 10, 2, 3, 4), (2, 2, 128, 32, 2, 2)),
)
