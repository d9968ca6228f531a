"""Norm, rope and linear attention of one token of each sequence, from the row of its projections.

    q, k = qk_norm_rope(qkvg, …);  v = qkvg[:, 2HK:3HK]
    o, state = lightning_decode(q, k, v, …)

The gate logits qkvg[:, 3HK:] are not read: the group norm and the gate are done by the reader of o.

Shapes: qkvg [B, >= 3HK]; q_weight, k_weight [K]; cos, sin [B, n]; decay [H]; state [S, H, K, K];
pending_k, pending_v [S, M, H, K]; slots, accepted, positions [B]; o [B, HK]. B and S symbolic.

Rounding: q, k and o are rounded to the dtype of qkvg, as between the two ops; all else in f32.

The kernel reads the state, what is pending, and slots, accepted and positions before the launches
ahead of it have ended: they are hidden behind the projection. So whatever writes these must have
ended before the first launch of the step, which depends on no other, and no two layers of a step
may share a state.

Source: `qk_norm_rope` and `lightning_decode`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.compare import close
from lingc.kernel import Tactic
from lingc.kernels import lightning_step
from lingc.math import Held, elements, lightning_decode, number, qk_norm_rope, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target

# Columns a warp, warps that share a column's rows, warps a block. Blocks of 32 columns are one for
# each multiprocessor at one sequence of 32 heads; where there are many, wide rows are better.
FEW = ((32, 4, 4), (16, 2, 4), (32, 2, 2), (64, 8, 8))
MANY = ((64, 8, 8), (64, 2, 2), (64, 4, 4), (128, 4, 4))


def reference(
    qkvg: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, decay: Tensor,
    state: Tensor, pending_k: Tensor, pending_v: Tensor, slots: Tensor, accepted: Tensor,
    positions: Tensor, heads: int, eps: float,
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
    width = heads * q_weight.numel()
    v = qkvg[:, 2 * width : 3 * width].unflatten(1, (heads, -1))
    o, after = lightning_decode(q, k, v, held, positions)
    return o.flatten(1), after


def types(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, state: TensorType, pending_k: TensorType,
    pending_v: TensorType, slots: TensorType, accepted: TensorType, positions: TensorType,
    heads: int, eps: float,
) -> tuple[TensorType, TensorType]:  # fmt: skip
    return TensorType(qkvg.dtype, (qkvg.shape[0], heads * number(q_weight.shape[0]))), state


def cost(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, state: TensorType, pending_k: TensorType,
    pending_v: TensorType, slots: TensorType, accepted: TensorType, positions: TensorType,
    heads: int, eps: float,
) -> Cost:  # fmt: skip
    # Nothing pending, which is the least: one update and one read of each live state.
    o = TensorType(qkvg.dtype, (qkvg.shape[0], heads * number(q_weight.shape[0])))
    live = TensorType(state.dtype, (*qkvg.shape[:1], *state.shape[1:]))
    return Cost(
        flops=elements(o) * (4.0 * number(q_weight.shape[0]) + 12.0),
        moved_bytes=stored_bytes(o, o, o, o, cos, sin) + 2 * stored_bytes(live),
    )


def refusal(
    target: Target, qkvg: TensorType, q_weight: TensorType, k_weight: TensorType,
    cos: TensorType, sin: TensorType, decay: TensorType, state: TensorType, pending_k: TensorType,
    pending_v: TensorType, slots: TensorType, accepted: TensorType, positions: TensorType,
    heads: int, eps: float,
) -> str | None:  # fmt: skip
    return lightning_step.refusal(qkvg, q_weight, cos, state, pending_k)


def tactics(
    target: Target, qkvg: TensorType, q_weight: TensorType, k_weight: TensorType,
    cos: TensorType, sin: TensorType, decay: TensorType, state: TensorType, pending_k: TensorType,
    pending_v: TensorType, slots: TensorType, accepted: TensorType, positions: TensorType,
    heads: int, eps: float,
) -> Sequence[Tactic]:  # fmt: skip
    given = (
        qkvg, q_weight, k_weight, cos, sin, decay, state, pending_k, pending_v, slots, accepted,
        positions, heads, eps,
    )  # fmt: skip
    if refusal(target, *given) is not None:
        return ()
    shapes = lightning_step.choice(target, state, number(qkvg.shape[0]), FEW, MANY)
    return lightning_step.tactics(
        shapes, qkvg, cos, state, pending_k,
        eps=eps, draft=None, needs=cost(*given),
    )  # fmt: skip


def pinned(target: Target, *given: Any) -> Sequence[Tactic]:
    """One shape for any number of sequences, which verify has as well."""
    if refusal(target, *given) is not None:
        return ()
    qkvg, _, _, cos, _, _, state, pending_k, *_ = given
    return lightning_step.tactics(
        lightning_step.PINNED, qkvg, cos, state, pending_k,
        eps=given[-1], draft=None, needs=cost(*given),
    )  # fmt: skip


def judge(arguments: Sequence[Any], got: Sequence[Tensor], _want: object) -> str | None:
    """Compare with FP64 on q and k that are rounded as the op rounds them.

    Where k lies so near the middle of two neighbours that f32 may round it either way, the row of
    the state that it is added to is compared as what it is, a sum of bf16 products.
    """
    qkvg, q_weight, k_weight, cos, sin, decay, state, pending_k, pending_v, slots = arguments[:10]
    accepted, positions, heads, eps = arguments[10:]
    held = Held(
        decay=decay,
        state=state,
        pending_k=pending_k,
        pending_v=pending_v,
        slots=slots,
        accepted=accepted,
    )
    q, k = qk_norm_rope(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    v = qkvg[:, 2 * q[0].numel() : 3 * q[0].numel()].unflatten(1, (heads, -1))
    o, after = lightning_decode(q.double(), k.double(), v.double(), held, positions)
    live, rows = slots >= 0, slots[slots >= 0].long()
    _, exact = qk_norm_rope(qkvg.double(), q_weight, k_weight, cos, sin, heads, eps)
    below, above = ((exact * (1 + side)).to(qkvg.dtype) for side in (-1e-6, 1e-6))
    tied = (below != above)[live]  # [live, H, K]
    made, want = got[1][rows], after[rows]
    idle = torch.ones(state.shape[0], dtype=torch.bool, device=state.device)
    idle[rows] = False
    for name, one, other, dtype in (
        ("o", got[0], o.flatten(1), "bf16"),
        ("state", made[~tied], want[~tied], "f32"),
        ("state", made[tied], want[tied], "bf16"),
    ):
        found = close(one, other, dtype=dtype, mechanism="lightning")
        if not found.ok:
            return f"{name}: {found}"
    if not got[1][idle].equal(state[idle]):
        return "a state that is not of the step changed"
    return None


def inputs(
    sequences: int, heads: int, key: int, pairs: int, pending: int, accepted: int = -1,
    *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    """Arguments of the odd step, or where `accepted` is given one of running sequences alone."""
    some = Samples(dtype=dtype, device=device)
    slots, _, positions = some.sequences((1,) * sequences)
    held, width = sequences + 2, heads * key
    counts = some.below(pending + 1, sequences)
    if accepted >= 0:
        slots, positions = some.ints(range(sequences, 0, -1)), positions + 7
        counts = some.ints([accepted] * sequences)
    waiting = [some.normal(held, pending, heads, key) for _ in range(2)]
    stale = torch.arange(pending, device=device) >= counts[:, None]
    for tokens in waiting:
        kept = tokens[slots.long()]
        tokens[slots.long()] = torch.where(stale[..., None, None], torch.nan, kept)
    return (
        some.normal(sequences, 4 * width),
        some.norm_weight(key),
        some.norm_weight(key),
        *some.rope(positions, pairs),
        some.decay(heads),
        some.state(held, heads, key, key),
        *waiting,
        slots,
        counts,
        positions,
        heads,
        1e-6,
    )


OP = define(
    "lightning_decode_qkv(Tensor qkvg, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor decay, Tensor state, Tensor pending_k, Tensor pending_v, Tensor slots, "
    "Tensor accepted, Tensor positions, int heads, float eps) -> (Tensor o, Tensor state)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    pinned=pinned,
    mechanism="lightning",
    judge=judge,
    # The last four have the kernel's width.
    cases=(
        (1, 1, 4, 1, 1),
        (4, 3, 10, 2, 4),
        (1, 2, 128, 32, 4),
        (3, 2, 128, 32, 2),
        (17, 3, 128, 8, 1),
        (5, 1, 128, 64, 8),
    ),
    # The state is copied for every call and so is cold; what the launches before write is not.
    benchmarks=(
        Benchmark(
            name="decode, nothing pending",
            case=lambda tokens: (tokens, 32, 128, 32, 4, 0),
            tokens=(1, 8, 32),
            vary=lambda arguments, _: arguments,
        ),
        Benchmark(
            name="decode after a verify of 3",
            case=lambda tokens: (tokens, 32, 128, 32, 4, 3),
            tokens=(1,),
            vary=lambda arguments, _: arguments,
        ),
    ),
)
