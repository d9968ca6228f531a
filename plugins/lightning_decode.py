"""Lightning linear attention of one token of each sequence, after a commit of verified ones.

For sequence b, in slot slots[b], with S its state:

    for i < accepted[b]:  S = exp(-s) S + pending_k[slot, i] (outer) pending_v[slot, i]
    S = exp(-s) S + k[b] (outer) v[b]
    o[b] = K^-0.5 q[b] @ S

Position 0 starts from S = 0 and commits nothing; so does slot -1, which also writes nothing.

Shapes: q, k [B, H, K] after norm and rope, q not scaled; v, o [B, H, V]; decay [H]; state
[S, H, K, V]; pending_k [S, M, H, K], pending_v [S, M, H, V] for M pending tokens at the most;
slots, accepted, positions [B]. B and S symbolic.

Rounding: everything in f32 (f64 where q or the state is f64); o is rounded to the dtype of q.

Source: as `lightning_prefill`, in recurrent form.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from torch import Tensor

from lingc.math import Held, elements, lightning_decode, stored_bytes
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, pending_k: Tensor,
    pending_v: Tensor, slots: Tensor, accepted: Tensor, positions: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    held = Held(
        decay=decay,
        state=state,
        pending_k=pending_k,
        pending_v=pending_v,
        slots=slots,
        accepted=accepted,
    )
    return lightning_decode(q, k, v, held, positions)


def types(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    decay: TensorType,
    state: TensorType,
    *_: TensorType,
) -> tuple[TensorType, TensorType]:
    return TensorType(q.dtype, v.shape), state


def cost(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    decay: TensorType,
    state: TensorType,
    *_: TensorType,
) -> Cost:
    # Nothing pending, which is the least: one update and one read of each live state.
    live = TensorType(state.dtype, (*k.shape[:1], *state.shape[1:]))
    return Cost(
        flops=4.0 * elements(v) * k.bind({})[-1],
        moved_bytes=stored_bytes(q, k, v, v) + 2 * stored_bytes(live),
    )


def inputs(
    sequences: int, heads: int, key: int, value: int, pending: int, *, dtype: str, device: str
) -> tuple[Tensor, ...]:
    some = Samples(dtype=dtype, device=device)
    slots, _, positions = some.sequences((1,) * sequences)
    held = sequences + 2
    return (
        some.normal(sequences, heads, key),
        some.normal(sequences, heads, key),
        some.normal(sequences, heads, value),
        some.decay(heads),
        some.state(held, heads, key, value),
        some.normal(held, pending, heads, key),
        some.normal(held, pending, heads, value),
        slots,
        some.below(pending + 1, sequences),
        positions,
    )


OP = define(
    "lightning_decode(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor state, Tensor pending_k, "
    "Tensor pending_v, Tensor slots, Tensor accepted, Tensor positions) "
    "-> (Tensor o, Tensor state)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 1, 4, 4, 1), (5, 3, 6, 10, 4), (2, 2, 128, 128, 2)),
)
