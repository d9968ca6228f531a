"""Lightning linear attention of Q draft tokens of each sequence, which may be rejected later.

For sequence b, in slot slots[b], with S its state and t = offsets[b] its first token:

    for i < accepted[b]:  S = exp(-s) S + pending_k[slot, i] (outer) pending_v[slot, i]
    state[slot] = S
    for i < Q:  S = exp(-s) S + k[t + i] (outer) v[t + i];  o[t + i] = K^-0.5 q[t + i] @ S
    pending_k[slot, :Q] = k[t : t + Q];  pending_v[slot, :Q] = v[t : t + Q]

So the tokens of this step are left out of the state and wait in `pending` for the next step, which
commits as many as were accepted. A rejected token never was in the state: that is the rollback.
Position 0 starts from S = 0 and commits nothing; so does slot -1, which also writes nothing.

Shapes: q, k [T, H, K] after norm and rope, q not scaled; v, o [T, H, V], T = B Q; decay [H]; state
[S, H, K, V]; pending_k [S, M, H, K], pending_v [S, M, H, V], Q <= M; slots, accepted [B]; offsets
[B + 1], positions [T]. T, B, S symbolic.

Rounding: everything in f32 (f64 where q or the state is f64); o is rounded to the dtype of q, and
k and v to the dtype of `pending`, which is theirs.

Source: as `lightning_prefill`, in recurrent form.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from torch import Tensor

from lingc.math import Held, elements, lightning_verify, stored_bytes
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, pending_k: Tensor,
    pending_v: Tensor, slots: Tensor, accepted: Tensor, offsets: Tensor, positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    held = Held(
        decay=decay,
        state=state,
        pending_k=pending_k,
        pending_v=pending_v,
        slots=slots,
        accepted=accepted,
    )
    return lightning_verify(q, k, v, held, offsets, positions)


def types(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    decay: TensorType,
    state: TensorType,
    pending_k: TensorType,
    pending_v: TensorType,
    *_: TensorType,
) -> tuple[TensorType, ...]:
    return TensorType(q.dtype, v.shape), state, pending_k, pending_v


def cost(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    decay: TensorType,
    state: TensorType,
    pending_k: TensorType,
    pending_v: TensorType,
    slots: TensorType,
    *_: TensorType,
) -> Cost:
    # One pending token to commit, the least that a verify accepts; k and v are also kept.
    live = TensorType(state.dtype, (*slots.shape, *state.shape[1:]))
    return Cost(
        flops=4.0 * elements(v) * k.bind({})[-1] + 2.0 * elements(live),
        moved_bytes=stored_bytes(q, k, v, v, k, v) + 2 * stored_bytes(live),
    )


def inputs(
    sequences: int,
    draft: int,
    heads: int,
    key: int,
    value: int,
    pending: int,
    *,
    dtype: str,
    device: str,
) -> tuple[Tensor, ...]:
    some = Samples(dtype=dtype, device=device)
    slots, offsets, positions = some.sequences((draft,) * sequences)
    tokens, held = sequences * draft, sequences + 2
    return (
        some.normal(tokens, heads, key),
        some.normal(tokens, heads, key),
        some.normal(tokens, heads, value),
        some.decay(heads),
        some.state(held, heads, key, value),
        some.normal(held, pending, heads, key),
        some.normal(held, pending, heads, value),
        slots,
        some.below(pending + 1, sequences),
        offsets,
        positions,
    )


OP = define(
    "lightning_verify(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor state, Tensor pending_k, "
    "Tensor pending_v, Tensor slots, Tensor accepted, Tensor offsets, Tensor positions) "
    "-> (Tensor o, Tensor state, Tensor pending_k, Tensor pending_v)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 1, 1, 4, 4, 1), (3, 2, 3, 6, 10, 4), (2, 4, 2, 16, 16, 4)),
)
