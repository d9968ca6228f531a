"""Norm, rope and linear attention of Q draft tokens of each sequence, from their projections.

    q, k = qk_norm_rope(qkvg, …);  v = qkvg[:, 2HK:3HK]
    o, state, pending_k, pending_v = lightning_verify(q, k, v, …)

The gate logits qkvg[:, 3HK:] are not read: the group norm and the gate are done by the reader of o.

The kernel reads a state once and writes it only where a token is committed or the sequence is
fresh; with S the state at the start of the step, committed, s the decay and q scaled,

    o[i] = exp(-s(i+1)) q[i] @ S + sum_{j<=i} exp(-s(i-j)) (q[i] . k[j]) v[j]

Shapes: qkvg [T, >= 3HK], T = B Q; q_weight, k_weight [K]; cos, sin [T, n]; decay [H]; state
[S, H, K, K]; pending_k, pending_v [S, M, H, K], Q <= M; slots, accepted [B]; offsets [B + 1], which
are 0, Q, 2Q, …; positions [T]; o [T, HK]. T, B, S symbolic.

Rounding: q, k and o are rounded to the dtype of qkvg, as between the two ops; all else in f32.

The kernel reads the state, what is pending, and slots, accepted and positions before the launches
ahead of it have ended, as `lightning_decode_qkv` says.

Source: `qk_norm_rope` and `lightning_verify`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.compare import close
from lingc.kernel import Tactic
from lingc.kernels import lightning_step
from lingc.math import Held, elements, lightning_verify, number, qk_norm_rope, stored_bytes, uneven
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target

# Columns a warp, warps that share a column's rows, warps a block.
FEW = ((32, 4, 8), (64, 4, 4), (32, 4, 4), (64, 8, 8))
MANY = ((64, 4, 4), (32, 2, 4), (16, 1, 4), (64, 8, 8))


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
    q, k = qk_norm_rope(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    width = heads * q_weight.numel()
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


def refusal(
    target: Target, qkvg: TensorType, q_weight: TensorType, k_weight: TensorType,
    cos: TensorType, sin: TensorType, decay: TensorType, state: TensorType,
    pending_k: TensorType, pending_v: TensorType, slots: TensorType, accepted: TensorType,
    offsets: TensorType, positions: TensorType, heads: int, eps: float,
) -> str | None:  # fmt: skip
    return uneven(
        qkvg.shape[0], slots.shape[0], lightning_step.MOST_TOKENS
    ) or lightning_step.refusal(qkvg, q_weight, cos, state, pending_k)


def tactics(
    target: Target, qkvg: TensorType, q_weight: TensorType, k_weight: TensorType,
    cos: TensorType, sin: TensorType, decay: TensorType, state: TensorType,
    pending_k: TensorType, pending_v: TensorType, slots: TensorType, accepted: TensorType,
    offsets: TensorType, positions: TensorType, heads: int, eps: float,
) -> Sequence[Tactic]:  # fmt: skip
    given = (
        qkvg, q_weight, k_weight, cos, sin, decay, state, pending_k, pending_v, slots, accepted,
        offsets, positions, heads, eps,
    )  # fmt: skip
    if refusal(target, *given) is not None:
        return ()
    sequences = number(slots.shape[0])
    shapes = lightning_step.choice(target, state, sequences, FEW, MANY)
    return lightning_step.tactics(
        shapes, qkvg, cos, state, pending_k,
        eps=eps, draft=number(qkvg.shape[0]) // sequences, needs=cost(*given),
    )  # fmt: skip


def pinned(target: Target, *given: Any) -> Sequence[Tactic]:
    """The shape of decode, token by token, for any number of sequences and drafts."""
    if refusal(target, *given) is not None:
        return ()
    qkvg, _, _, cos, _, _, state, pending_k, _, slots, *_ = given
    return lightning_step.tactics(
        lightning_step.PINNED, qkvg, cos, state, pending_k,
        eps=given[-1], draft=number(qkvg.shape[0]) // number(slots.shape[0]), needs=cost(*given),
    )  # fmt: skip


def judge(arguments: Sequence[Any], got: Sequence[Tensor], _want: object) -> str | None:
    """Compare with FP64 on q and k that are rounded as the op rounds them.

    What is no business of the step is to be the same bits, NaN included.
    """
    qkvg, q_weight, k_weight, cos, sin, decay, state, pending_k, pending_v, slots = arguments[:10]
    accepted, offsets, positions, heads, eps = arguments[10:]
    held = Held(
        decay=decay,
        state=state,
        pending_k=pending_k.double(),
        pending_v=pending_v.double(),
        slots=slots,
        accepted=accepted,
    )
    q, k = qk_norm_rope(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    v = qkvg[:, 2 * q[0].numel() : 3 * q[0].numel()].unflatten(1, (heads, -1))
    o, *after = lightning_verify(q.double(), k.double(), v.double(), held, offsets, positions)
    tokens, live = qkvg.shape[0] // slots.shape[0], slots[slots >= 0].long()
    for name, one, other, dtype in (
        ("o", got[0], o.flatten(1), "bf16"),
        ("state", got[1][live], after[0][live], "f32"),
        ("pending_k", got[2][live, :tokens], after[1][live, :tokens], "bf16"),
    ):
        found = close(one, other, dtype=dtype, mechanism="lightning")
        if not found.ok:
            return f"{name}: {found}"
    if not got[3][live, :tokens].equal(after[2][live, :tokens].to(pending_v.dtype)):
        return "pending_v is not v"
    idle = torch.ones(state.shape[0], dtype=torch.bool, device=state.device)
    idle[live] = False
    for name, one, before in zip(
        ("state", "pending_k", "pending_v"), got[1:], (state, pending_k, pending_v), strict=True
    ):
        if not _bits(one[idle]).equal(_bits(before[idle])):
            return f"{name} of a slot that is not of the step changed"
        if name != "state" and not _bits(one[:, tokens:]).equal(_bits(before[:, tokens:])):
            return f"{name} changed past the tokens of the step"
    return None


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def inputs(
    sequences: int, draft: int, heads: int, key: int, pairs: int, pending: int, accepted: int = -1,
    *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    """Arguments of the odd step, or where `accepted` is given one of running sequences alone."""
    some = Samples(dtype=dtype, device=device)
    slots, offsets, positions = some.sequences((draft,) * sequences)
    held, width = sequences + 2, heads * key
    counts = some.below(pending + 1, sequences)
    if accepted >= 0:
        slots, positions = some.ints(range(sequences, 0, -1)), positions + 7
        counts = some.ints([accepted] * sequences)
    waiting = [some.normal(held, pending, heads, key) for _ in range(2)]
    index = torch.arange(pending, device=device)
    # What this step writes over anyway.
    stale = (index >= counts[:, None]) & (index < draft) & (slots >= 0)[:, None]
    for tokens in waiting:
        kept = tokens[slots.long()]
        tokens[slots.long()] = torch.where(stale[..., None, None], torch.nan, kept)
    return (
        some.normal(sequences * draft, 4 * width),
        some.norm_weight(key),
        some.norm_weight(key),
        *some.rope(positions, pairs),
        some.decay(heads),
        some.state(held, heads, key, key),
        *waiting,
        slots,
        counts,
        offsets,
        positions,
        heads,
        1e-6,
    )


OP = define(
    "lightning_verify_qkv(Tensor qkvg, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor decay, Tensor state, Tensor pending_k, Tensor pending_v, Tensor slots, "
    "Tensor accepted, Tensor offsets, Tensor positions, int heads, float eps) "
    "-> (Tensor o, Tensor state, Tensor pending_k, Tensor pending_v)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    pinned=pinned,
    mechanism="lightning",
    judge=judge,
    # The last five have the kernel's width.
    cases=(
        (1, 1, 1, 4, 1, 1),
        (3, 2, 3, 10, 2, 4),
        (1, 4, 2, 128, 32, 4),
        (3, 2, 2, 128, 32, 2),
        (17, 3, 3, 128, 8, 4),
        (5, 8, 1, 128, 64, 8),
        (4, 1, 2, 128, 32, 3),
    ),
    # The states are copied for every call and so are cold; what launches before write is not.
    benchmarks=tuple(
        Benchmark(
            name=f"verify of {draft} a sequence",
            case=lambda tokens, draft=draft: (  # type: ignore[misc]
                tokens // draft,
                draft,
                32,
                128,
                32,
                4,
                draft - 1,
            ),
            tokens=(draft, 8 * draft, 32 * draft),
            vary=lambda arguments, _: arguments,
        )
        for draft in (2, 4)
    ),
)
