"""Lightning linear attention: whole sequences, one token each, or a few tokens that stay pending.

State is read from a slot and written back as one row, which depends on what was read: an engine
that puts the new state where the old one lies cannot do so too early.
"""

import numpy as np

from lingc.targets.onnx.body import Body, Value
from lingc.targets.onnx.library_standard import Standard
from lingc.targets.onnx.packing import Padding
from lingc.targets.onnx.rows import normed_and_gated, normed_and_roped

_ZERO = np.array(0, np.int32)


def lightning_prefill(
    library: Standard,
    q: Value,
    k: Value,
    v: Value,
    decay: Value,
    state: Value,
    slots: Value,
    offsets: Value,
    positions: Value,
) -> tuple[Value, Value]:
    body = library.body
    heads, _, value = (state.size(axis) for axis in (1, 2, 3))
    padding = Padding(body, offsets)
    counts = padding.counts
    # The first row of a sequence without tokens may be one beyond the last.
    first = body.op("Min", padding.begins, positions.length(0) - 1)
    resumed = body.op("Greater", positions.gather(first), _ZERO)
    empty = body.op("Equal", padding.lengths, 0)
    # A sequence without tokens keeps its state, at whatever position it stands.
    live = body.op("And", body.op("Or", empty, resumed), _named(body, slots))
    start = _started(body, state, slots, live)
    by_sequence = [padding.spread(x.reshape(0, -1)) for x in (q, k, v)]
    kept_k = body.where(counts.unsqueeze(2), by_sequence[1], 0.0)
    o, end = library.recur(
        by_sequence[0], kept_k, by_sequence[2], decay, start, counts=counts.cast("f32")
    )
    packed = padding.gathered(o.reshape(-1, heads * value)).reshape(0, heads, value)
    return packed, _stored(body, state, slots, end)


def lightning_decode(
    library: Standard,
    q: Value,
    k: Value,
    v: Value,
    decay: Value,
    state: Value,
    pending_k: Value,
    pending_v: Value,
    slots: Value,
    accepted: Value,
    positions: Value,
) -> tuple[Value, Value]:
    body = library.body
    heads, key, value = (state.size(axis) for axis in (1, 2, 3))
    pending = pending_k.size(1)
    live = _live(body, slots, positions)
    start = _started(body, state, slots, live)
    # The new token stands behind the pending ones and counts always.
    counts = _accepted(body, accepted, live, [*range(pending), -1])
    before = counts.slice(1, 0, pending).unsqueeze(2)
    held_k = body.where(before, pending_k.gather(slots).reshape(0, 0, heads * key), 0.0)
    held_v = body.where(before, pending_v.gather(slots).reshape(0, 0, heads * value), 0.0)
    new_q, new_k = (x.reshape(-1, 1, heads * key) for x in (q, k))
    o, end = library.recur(
        body.concat([held_k, new_q], 1),
        body.concat([held_k, new_k], 1),
        body.concat([held_v, v.reshape(-1, 1, heads * value)], 1),
        decay,
        start,
        counts=counts.cast("f32"),
    )
    last = o.slice(1, -1).reshape(-1, heads, value)
    return last, _stored(body, state, slots, end)


def lightning_verify(
    library: Standard,
    q: Value,
    k: Value,
    v: Value,
    decay: Value,
    state: Value,
    pending_k: Value,
    pending_v: Value,
    slots: Value,
    accepted: Value,
    offsets: Value,
    positions: Value,
) -> tuple[Value, Value, Value, Value]:
    body = library.body
    heads, key, value = (state.size(axis) for axis in (1, 2, 3))
    live = _live(body, slots, positions.gather(offsets.slice(0, 0, -1)))
    start = _started(body, state, slots, live)
    counts = _accepted(body, accepted, live, range(pending_k.size(1)))
    old_k, old_v = pending_k.gather(slots), pending_v.gather(slots)
    held_k = body.where(counts.unsqueeze(2), old_k.reshape(0, 0, heads * key), 0.0)
    held_v = body.where(counts.unsqueeze(2), old_v.reshape(0, 0, heads * value), 0.0)
    _, before = library.recur(
        None, held_k, held_v, decay, start, counts=counts.cast("f32")
    )
    before = Value(before.name, body, shape=state.shape)
    sequences = slots.length(0)
    new_q, new_k = (x.reshape(sequences, -1, heads * key) for x in (q, k))
    new_v = v.reshape(sequences, -1, heads * value)
    o, _ = library.recur(new_q, new_k, new_v, decay, before)
    return (
        o.reshape(-1, heads, value),
        _stored(body, state, slots, before),
        _stored(body, pending_k, slots, _front(body, old_k, new_k, (heads, key))),
        _stored(body, pending_v, slots, _front(body, old_v, new_v, (heads, value))),
    )


def decode_mixer(
    library: Standard,
    qkvg: Value,
    q_weight: Value,
    k_weight: Value,
    cos: Value,
    sin: Value,
    decay: Value,
    norm_weight: Value,
    state: Value,
    pending_k: Value,
    pending_v: Value,
    slots: Value,
    accepted: Value,
    positions: Value,
    heads: int,
    groups: int,
    eps: float,
) -> tuple[Value, Value]:
    q, k, v, gate = _mixed_inputs(library, qkvg, (q_weight, k_weight), (cos, sin), heads, eps)
    held = (state, pending_k, pending_v)
    o, after = lightning_decode(library, q, k, v, decay, *held, slots, accepted, positions)
    return normed_and_gated(library, o, gate, norm_weight, groups, eps), after


def verify_mixer(
    library: Standard,
    qkvg: Value,
    q_weight: Value,
    k_weight: Value,
    cos: Value,
    sin: Value,
    decay: Value,
    norm_weight: Value,
    state: Value,
    pending_k: Value,
    pending_v: Value,
    slots: Value,
    accepted: Value,
    offsets: Value,
    positions: Value,
    heads: int,
    groups: int,
    eps: float,
) -> tuple[Value, Value, Value, Value]:
    q, k, v, gate = _mixed_inputs(library, qkvg, (q_weight, k_weight), (cos, sin), heads, eps)
    held = (state, pending_k, pending_v)
    o, *after = lightning_verify(
        library, q, k, v, decay, *held, slots, accepted, offsets, positions
    )
    y = normed_and_gated(library, o, gate, norm_weight, groups, eps)
    return (y, after[0], after[1], after[2])


def _mixed_inputs(
    library: Standard,
    qkvg: Value,
    weights: tuple[Value, Value],
    angles: tuple[Value, Value],
    heads: int,
    eps: float,
) -> tuple[Value, Value, Value, Value]:
    """q, k [T, H, K] normed and roped, v and the gate's logits [T, H V]."""
    key = weights[0].size(0)
    value = (qkvg.size(1) - 2 * heads * key) // 2
    qk, v, gate = qkvg.split(1, [2 * heads * key, value, value])
    q, k = normed_and_roped(library, qk, *weights, *angles, heads, eps).split(1, [heads, heads])
    return q, k, v, gate


def _live(body: Body, slots: Value, first_positions: Value) -> Value:
    """Which sequences go on from what their slot holds."""
    resumed = body.op("Greater", first_positions, _ZERO)
    return body.op("And", resumed, _named(body, slots))


def _named(body: Body, slots: Value) -> Value:
    return body.op("GreaterOrEqual", slots, _ZERO)


def _started(body: Body, state: Value, slots: Value, live: Value) -> Value:
    """States [B, H, K, V] of the slots, zero where the sequence is not live."""
    start = body.where(live.unsqueeze(1, 2, 3), state.gather(slots), 0.0)
    return Value(start.name, body, shape=state.shape)


def _accepted(body: Body, accepted: Value, live: Value, places: "range | list[int]") -> Value:
    """Which of the pending tokens count, [B, len(places)]."""
    count = body.where(live, accepted, _ZERO)
    return body.op("Less", np.asarray(places, np.int32), count.unsqueeze(1))


def _front(body: Body, old: Value, new: Value, width: tuple[int, int]) -> Value:
    """`new` [B, Q, …] before what `old` [B, M, …] has from place Q on."""
    by_head = new.reshape(0, 0, *width)
    rest = body.op("Slice", old, new.length(1), body.ints([1 << 62]), body.ints([1]))
    return body.concat([by_head, rest], 1)


def _stored(body: Body, table: Value, slots: Value, rows: Value) -> Value:
    return body.op("ScatterND", table, slots.cast("i64").unsqueeze(1), rows)
