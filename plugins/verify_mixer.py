"""Everything between the two projections of a linear-attention layer, for Q tokens a sequence.

    q, k = qk_norm_rope(qkvg, …);  v = qkvg[:, 2HK:3HK];  gate = qkvg[:, 3HK:]
    o, state, pending_k, pending_v = lightning_verify(q, k, v, …)
    y = group_norm_gate(o, gate, norm_weight, …)

Shapes: qkvg [T, 4HK] of q, k, v and gate logits, T = B Q; q_weight, k_weight [K]; cos, sin
[T, n]; decay [H]; norm_weight [HK]; state [S, H, K, K]; pending_k, pending_v [S, M, H, K], Q <= M;
slots, accepted [B]; offsets [B + 1]; positions [T]; y [T, HK]. T, B, S symbolic.

Rounding: q, k and o are rounded to the dtype of qkvg, as between the three ops; all else in f32.

Source: `qk_norm_rope`, `lightning_verify` and `group_norm_gate`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.compare import close
from lingc.kernel import Tactic
from lingc.kernels import portable
from lingc.math import (
    Held,
    elements,
    group_norm_gate,
    lightning_verify,
    number,
    qk_norm_rope,
    stored_bytes,
)
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    qkvg: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, decay: Tensor,
    norm_weight: Tensor, state: Tensor, pending_k: Tensor, pending_v: Tensor, slots: Tensor,
    accepted: Tensor, offsets: Tensor, positions: Tensor, heads: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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
    o, *after = lightning_verify(q, k, v.unflatten(1, (heads, -1)), held, offsets, positions)
    return group_norm_gate(o, gate, norm_weight, groups, eps), after[0], after[1], after[2]


def types(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, norm_weight: TensorType, state: TensorType,
    pending_k: TensorType, pending_v: TensorType, *_: TensorType | float,
) -> tuple[TensorType, ...]:  # fmt: skip
    y = TensorType(qkvg.dtype, (qkvg.shape[0], norm_weight.shape[0]))
    return y, state, pending_k, pending_v


def cost(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, norm_weight: TensorType, state: TensorType,
    pending_k: TensorType, pending_v: TensorType, slots: TensorType, *_: TensorType | float,
) -> Cost:  # fmt: skip
    # One pending token to commit, the least that a verify accepts; k and v are also kept.
    y = TensorType(qkvg.dtype, (qkvg.shape[0], norm_weight.shape[0]))
    live = TensorType(state.dtype, (*slots.shape, *state.shape[1:]))
    return Cost(
        flops=elements(y) * (4.0 * number(q_weight.shape[0]) + 21.0) + 2.0 * elements(live),
        moved_bytes=stored_bytes(qkvg, y, y, y, cos, sin, norm_weight) + 2 * stored_bytes(live),
    )


def refusal(
    _target: Target, qkvg: TensorType, q_weight: TensorType, k_weight: TensorType,
    cos: TensorType, sin: TensorType, decay: TensorType, norm_weight: TensorType,
    state: TensorType, *_: Any,
) -> str | None:  # fmt: skip
    return portable.mixer_refusal(qkvg, state, norm_weight)


def tactics(target: Target, *args: Any) -> Sequence[Tactic]:
    if refusal(target, *args) is not None:
        return ()
    qkvg, q_weight, _, cos, _, _, _, _, pending, _, slots, *_, heads, groups, eps = args
    return portable.mixer_tactics(
        qkvg, q_weight, cos, pending, slots, heads,
        groups=groups, eps=eps, verify=True, needs=cost(*args),
    )  # fmt: skip


def judge(arguments: Sequence[Any], got: Sequence[Tensor], _want: object) -> str | None:
    """Compare with FP64 on q, k and o that are rounded as the op rounds them.

    What is no business of the step is to be the same, NaN included.
    """
    qkvg, q_weight, k_weight, cos, sin, decay, norm_weight, state = arguments[:8]
    pending_k, pending_v, slots, accepted, offsets, positions, heads, groups, eps = arguments[8:]
    held = Held(
        decay=decay,
        state=state,
        pending_k=pending_k.double(),
        pending_v=pending_v.double(),
        slots=slots,
        accepted=accepted,
    )
    q, k = qk_norm_rope(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    _, _, v, gate = qkvg.double().chunk(4, 1)
    o, *after = lightning_verify(
        q.double(), k.double(), v.unflatten(1, (heads, -1)), held, offsets, positions
    )
    y = group_norm_gate(o.to(qkvg.dtype).double(), gate, norm_weight, groups, eps)
    live = slots[slots >= 0].long()
    for name, one, other, dtype in (
        ("y", got[0], y, "bf16"),
        ("state", got[1][live], after[0][live], "f32"),
        ("pending_k", got[2][live], after[1][live], "bf16"),
        ("pending_v", got[3][live], after[2][live], "bf16"),
    ):
        found = close(one, other, dtype=dtype, mechanism="lightning")
        if not found.ok:
            return f"{name}: {found}"
    idle = torch.ones(state.shape[0], dtype=torch.bool, device=state.device)
    idle[live] = False
    for name, one, before in zip(
        ("state", "pending_k", "pending_v"), got[1:], (state, pending_k, pending_v), strict=True
    ):
        if not one[idle].equal(before[idle]):
            return f"{name} of a slot that is not of the step changed"
    return None


def inputs(
    sequences: int, draft: int, heads: int, key: int, pairs: int, groups: int, pending: int,
    *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    some = Samples(dtype=dtype, device=device)
    slots, offsets, positions = some.sequences((draft,) * sequences)
    held, width = sequences + 2, heads * key
    return (
        some.normal(sequences * draft, 4 * width),
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
        offsets,
        positions,
        heads,
        groups,
        1e-6,
    )


OP = define(
    "verify_mixer(Tensor qkvg, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor decay, Tensor norm_weight, Tensor state, Tensor pending_k, Tensor pending_v, "
    "Tensor slots, Tensor accepted, Tensor offsets, Tensor positions, int heads, int groups, "
    "float eps) -> (Tensor y, Tensor state, Tensor pending_k, Tensor pending_v)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="lightning",
    judge=judge,
    cases=(
        (1, 1, 1, 4, 1, 1, 1),
        (3, 2, 3, 10, 2, 3, 4),
        (2, 4, 2, 16, 4, 2, 4),
        (2, 3, 2, 128, 32, 2, 4),
    ),
)
