"""Lightning linear attention: whole sequences, one token each, or a few tokens that stay pending.

State is read from a slot and written back as one row, which depends on what was read: an engine
that puts the new state where the old one lies cannot do so too early.
"""

# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lingc.targets.onnx.body import LAST, Body, Value
from lingc.targets.onnx.library_standard import Standard
from lingc.targets.onnx.packing import Padding
from lingc.targets.onnx.rows import normed_and_roped

_ZERO = np.array(0, np.int32)

_New = tuple[Value, Value, Value]
"""q, k and v of the step's tokens, [B, n, ...], heads joined."""

_Held = tuple[Value, Value, Value]
"""The linear state, pending k and pending v of all slots."""


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
    heads, key, value = (state.size(axis) for axis in (1, 2, 3))
    if slots.shape[0] == 1:
        live = _live(body, slots, positions.slice(0, 0, 1))
        new_q, new_k = (x.reshape(1, -1, heads * key) for x in (q, k))
        o, end = library.recur(
            new_q,
            new_k,
            v.reshape(1, -1, heads * value),
            decay,
            _started(body, state, slots, live),
            span=body.sizes([1, positions.length(0)]),
        )
        return o.reshape(-1, heads, value), _stored(body, state, slots, end)
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
    heads, key, value = (state.size(axis) for axis in (1, 2, 3))
    new_q, new_k = (x.reshape(-1, 1, heads * key) for x in (q, k))
    new = (new_q, new_k, v.reshape(-1, 1, heads * value))
    held = (state, pending_k, pending_v)
    o, after = _decoded(library, new, decay, held, slots, accepted, positions)
    return o.reshape(-1, heads, value), after


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
    heads, key, value = (state.size(axis) for axis in (1, 2, 3))
    count = slots.length(0)
    new_q, new_k = (x.reshape(count, -1, heads * key) for x in (q, k))
    new = (new_q, new_k, v.reshape(count, -1, heads * value))
    held = (state, pending_k, pending_v)
    o, *after = _verified(library, new, decay, held, slots, accepted, offsets, positions)
    return (o.reshape(-1, heads, value), after[0], after[1], after[2])


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
    weights, angles = (q_weight, k_weight), (cos, sin)
    mixed = _Mixed(library=library, qkvg=qkvg, weights=weights, angles=angles, heads=heads)
    new, gate = mixed.inputs(lambda x: x.unsqueeze(1), eps)
    held = (state, pending_k, pending_v)
    o, after = _decoded(library, new, decay, held, slots, accepted, positions)
    return mixed.output(o, gate, norm_weight, groups, eps), after


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
    weights, angles = (q_weight, k_weight), (cos, sin)
    mixed = _Mixed(library=library, qkvg=qkvg, weights=weights, angles=angles, heads=heads)
    count = slots.length(0)
    new, gate = mixed.inputs(lambda x: x.reshape(count, -1, x.size(1)), eps)
    held = (state, pending_k, pending_v)
    o, *after = _verified(library, new, decay, held, slots, accepted, offsets, positions)
    return (mixed.output(o, gate, norm_weight, groups, eps), after[0], after[1], after[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixed:
    """What surrounds the recurrence in a mixer: norm and rope before it, norm and gate behind."""

    library: Standard
    qkvg: Value
    weights: tuple[Value, Value]
    angles: tuple[Value, Value]
    heads: int

    def inputs(self, by_sequence: Callable[[Value], Value], eps: float) -> tuple[_New, Value]:
        """Normed and roped q and k, v, and the gate's logits, as [B, n, ...].

        Args:
            by_sequence: Makes [B, n, ...] of [T, ...].
            eps: Of the norm.
        """
        key, pairs = self.weights[0].size(0), self.angles[0].size(1)
        width = self.heads * key
        value = self.qkvg.size(1) // 2 - width
        qk, v, gate = by_sequence(self.qkvg).split(2, [2 * width, value, value])
        cos, sin = (by_sequence(x) for x in self.angles)
        turned = normed_and_roped(
            self.library, qk, self.weights, (cos, sin), pairs=pairs, heads=self.heads, eps=eps
        )
        q, k = turned.split(2, [width, width])
        return (q, k, v), gate

    def output(self, o: Value, gate: Value, weight: Value, groups: int, eps: float) -> Value:
        """Normed by groups and gated o [B, n, H V], as [T, H V]."""
        width, each = weight.size(0), weight.size(0) // groups
        by_group, weights = o.reshape(0, 0, groups, each), weight.reshape(groups, each)
        normed = self.library.rms_norm_of_parts(by_group, weights, eps, width=each)
        gated = normed.reshape(0, 0, width) * self.library.body.op("Sigmoid", gate)
        return gated.reshape(-1, width)


def _decoded(
    library: Standard,
    new: _New,
    decay: Value,
    held: _Held,
    slots: Value,
    accepted: Value,
    positions: Value,
) -> tuple[Value, Value]:
    """One more token of each sequence behind its accepted ones: o [B, 1, H V], state."""
    body, (state, pending_k, pending_v) = library.body, held
    if library.settled:
        return library.recur(*new, decay, state, span=body.sizes([slots.length(0), 1]))
    pending = pending_k.size(1)
    live = _live(body, slots, positions)
    # The new token stands behind the pending ones and counts always.
    counts = _accepted(body, accepted, live, [*range(pending), -1])
    before = counts.slice(1, 0, pending)
    old_k, old_v = (_kept(body, before, x.gather(slots), x) for x in (pending_k, pending_v))
    o, end = library.recur(
        body.concat([old_k, new[0]], 1),
        body.concat([old_k, new[1]], 1),
        body.concat([old_v, new[2]], 1),
        decay,
        _started(body, state, slots, live),
        counts=counts.cast("f32"),
    )
    return o.slice(1, -1), _stored(body, state, slots, end)


def _verified(
    library: Standard,
    new: _New,
    decay: Value,
    held: _Held,
    slots: Value,
    accepted: Value,
    offsets: Value,
    positions: Value,
) -> tuple[Value, Value, Value, Value]:
    """A few more tokens that stay pending: o [B, n, H V], state, pending k and v."""
    body, (state, pending_k, pending_v) = library.body, held
    live = _live(body, slots, positions.gather(offsets.slice(0, 0, -1)))
    # From what all layers share, so that it is computed once.
    sequences = slots.length(0)
    span = body.sizes([sequences, positions.length(0) / sequences])
    counts = _accepted(body, accepted, live, range(pending_k.size(1)))
    old_k, old_v = pending_k.gather(slots), pending_v.gather(slots)
    _, before = library.recur(
        None,
        _kept(body, counts, old_k, pending_k),
        _kept(body, counts, old_v, pending_v),
        decay,
        _started(body, state, slots, live),
        counts=counts.cast("f32"),
    )
    before = Value(before.name, body, shape=state.shape)
    o, _ = library.recur(*new, decay, before, span=span)
    return (
        o,
        _stored(body, state, slots, before),
        _stored(body, pending_k, slots, _front(body, old_k, new[1], pending_k)),
        _stored(body, pending_v, slots, _front(body, old_v, new[2], pending_v)),
    )


def _kept(body: Body, counts: Value, rows: Value, like: Value) -> Value:
    """Pending rows [B, M, H, K] as [B, M, H K], zero where they do not count."""
    flat = rows.reshape(0, 0, like.size(2) * like.size(3))
    return body.where(counts.unsqueeze(2), flat, 0.0)


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


def _accepted(body: Body, accepted: Value, live: Value, places: Sequence[int]) -> Value:
    """Which of the pending tokens count, [B, len(places)]."""
    count = body.where(live, accepted, _ZERO)
    return body.op("Less", np.asarray(places, np.int32), count.unsqueeze(1))


def _front(body: Body, old: Value, new: Value, like: Value) -> Value:
    """`new` [B, n, H K] before what `old` [B, M, H, K] has from place n on."""
    by_head = new.reshape(0, 0, like.size(2), like.size(3))
    rest = body.op("Slice", old, new.length(1), body.ints([LAST]), body.ints([1]))
    return body.concat([by_head, rest], 1)


def _stored(body: Body, table: Value, slots: Value, rows: Value) -> Value:
    return body.op("ScatterND", table, slots.cast("i64").unsqueeze(1), rows)
