"""Lightning attention over whole sequences, by chunks; its op has the maths.

A sequence is cut into segments, so that one long sequence fills a device: `segment_ends` adds up
what each segment but a sequence's last contributes to the state, `outputs` starts each segment from
the decayed sum of the ends before it. Everything is kept transposed, states [V, K] and outputs
[V, tokens]: then the state is the tensor cores' operand in registers and never goes through shared
memory.

Operands of the products are bf16, in which q, k and v are exact. What is not exact in it (state,
decayed scores, decayed values) goes in two parts, high and low, which leaves an error of 2^-18.
"""
# ruff: noqa: PLR0912, PLR0915 (one kernel is one function)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(index, offsets, sequences, tokens, span, COUNT: tl.constexpr):
    """Where segment `index` lies.

    Returns:
        Sequence (`sequences` for the tail of tokens that no sequence has, more for no segment),
        number of the segment in it, where its states are in `starts`, first token of the sequence,
        begin and end of the segment and end of the sequence.
    """
    b = tl.arange(0, COUNT)
    first = tl.load(offsets + b, mask=b <= sequences, other=0)
    last = tl.load(offsets + b + 1, mask=b < sequences, other=0)
    last = tl.where(b == sequences, tokens, last)
    count = tl.where(b <= sequences, (last - first + span - 1) // span, 0)
    after = tl.cumsum(count, 0)
    mine = tl.sum(((after <= index) & (b <= sequences)).to(tl.int32))
    here = b == mine
    number = index - tl.sum(tl.where(here, after - count, 0))
    states = tl.where(count > 1, count, 0)
    base = tl.sum(tl.where(here, tl.cumsum(states, 0) - states, 0))
    start = tl.sum(tl.where(here, first, 0))
    stop = tl.sum(tl.where(here, last, 0))
    begin = start + number * span
    return mine, number, base, start, begin, tl.minimum(begin + span, stop), stop


@triton.jit
def _decay_steps(rate, steps):
    """exp(-rate * steps) as a sum of two f32, from an exponential in f64.

    It is multiplied in once a chunk for thousands of chunks: rounded to f32 alone, its error would
    add up to more than the state's tolerance.
    """
    exact = tl.exp(-rate.to(tl.float64) * steps)
    high = exact.to(tl.float32)
    return high, (exact - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _halves(x, WIDE: tl.constexpr):
    """Two bf16 numbers whose sum is x; WIDE keeps them in f32, for want of a bf16 product."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    if WIDE:
        return high.to(tl.float32), low.to(tl.float32)
    return high, low


@triton.jit
def segment_ends(
    k,
    v,
    decay,
    state,
    slots,
    offsets,
    positions,
    starts,
    tokens,
    sequences,
    span,
    pitch,
    v_pitch,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BV: tl.constexpr,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Each segment's end state, if another segment follows it, to `starts` of that one.

    The first segment of a sequence starts from the sequence's state, and leaves a copy of it in
    `starts` of its own: `outputs` may be done with the sequence and write the slot before it reads
    it for the first segment.

    starts f32 [segments, HEADS, V, K], of sequences of several segments alone. Grid: (V / BV,
    HEADS, segments).
    """
    column, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    mine, number, base, start, begin, end, stop = _locate(
        index, offsets, sequences, tokens, span, COUNT
    )
    if (mine >= sequences) | (end >= stop):
        return
    rate = tl.load(decay + head)
    fast = rate * LOG2E
    dv, dk = column * BV + tl.arange(0, BV), tl.arange(0, K)
    step = tl.arange(0, CHUNK)
    here = head.to(tl.int64) * (V * K) + dv[:, None] * K + dk[None, :]
    row = (base + number).to(tl.int64) * (HEADS * V * K)
    total = tl.zeros([BV, K], tl.float32)
    if number == 0:
        slot = tl.load(slots + mine).to(tl.int64)
        known = (slot >= 0) & (tl.load(positions + start) != 0)
        old = state + (slot * HEADS + head) * (K * V) + dk[None, :] * V + dv[:, None]
        total = tl.load(old, mask=known & (dv[:, None] < V), other=0.0)
        tl.store(starts + row + here, total)
    kept, rest = _decay_steps(rate, CHUNK)
    weight = tl.exp2(-fast * (CHUNK - 1 - step))
    at = begin.to(tl.int64) + step
    k_rows = k + at[:, None] * pitch + head * K + dk[None, :]
    v_rows = v + at[:, None] * v_pitch + head * V + dv[None, :]
    # All chunks are whole: a segment that is not its sequence's last is `span` long.
    for _ in range(0, span, CHUNK):
        keys = tl.load(k_rows)
        values = tl.load(v_rows)
        if WIDE:
            keys = keys.to(tl.float32)
        high, low = _halves(tl.trans(values).to(tl.float32) * weight[None, :], WIDE)
        added = tl.dot(high, keys)
        added = tl.dot(low, keys, added)
        total = kept * total + (rest * total + added)
        k_rows += CHUNK * pitch
        v_rows += CHUNK * v_pitch
    tl.store(starts + row + HEADS * V * K + here, total)


@triton.jit
def outputs(
    q,
    k,
    v,
    decay,
    state,
    slots,
    offsets,
    positions,
    starts,
    o,
    tokens,
    sequences,
    span,
    pitch,
    v_pitch,
    scale,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BV: tl.constexpr,
    COUNT: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Outputs of every segment, and the state after a sequence's last.

    Tokens beyond the last sequence get zeros. Grid: (V / BV, HEADS, segments).
    """
    column, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    mine, number, base, start, begin, end, stop = _locate(
        index, offsets, sequences, tokens, span, COUNT
    )
    if mine > sequences:
        return
    dv, dk = column * BV + tl.arange(0, BV), tl.arange(0, K)
    step = tl.arange(0, CHUNK)
    at = begin.to(tl.int64) + step
    o_rows = o + at[:, None] * (HEADS * V) + head * V + dv[None, :]
    if mine == sequences:
        nothing = tl.zeros([CHUNK, BV], o.dtype.element_ty)
        for done in range(begin, end, CHUNK):
            tl.store(o_rows, nothing, mask=(done + step < end)[:, None])
            o_rows += CHUNK * HEADS * V
        return
    rate = tl.load(decay + head)
    fast = rate * LOG2E
    slot = tl.load(slots + mine).to(tl.int64)
    place = state + (slot * HEADS + head) * (K * V) + dk[None, :] * V + dv[:, None]
    known = (slot >= 0) & (tl.load(positions + start) != 0)
    if SPLIT:
        total = tl.zeros([BV, K], tl.float32)
        here = head.to(tl.int64) * (V * K) + dv[:, None] * K + dk[None, :]
        held = starts + base.to(tl.int64) * (HEADS * V * K) + here
        if end - start <= span and stop == end:
            total = tl.load(place, mask=known & (dv[:, None] < V), other=0.0)
        elif number == 0:
            total = tl.load(held)
        else:
            kept, rest = _decay_steps(rate, span)
            for _ in range(number):
                held += HEADS * V * K
                total = kept * total + (rest * total + tl.load(held))
    else:
        total = tl.load(place, mask=known & (dv[:, None] < V), other=0.0)
    kept, rest = _decay_steps(rate, CHUNK)
    since = scale * tl.exp2(-fast * (step + 1))
    lag = step[None, :] - step[:, None]  # of query i behind key j, [j, i]
    within = tl.where(lag >= 0, scale * tl.exp2(-fast * tl.maximum(lag, 0)), 0.0)
    q_rows = q + at[:, None] * pitch + head * K + dk[None, :]
    k_rows = k + at[:, None] * pitch + head * K + dk[None, :]
    v_rows = v + at[:, None] * v_pitch + head * V + dv[None, :]
    for done in range(begin, end, CHUNK):
        live = (done + step < end)[:, None]
        queries = tl.load(q_rows, mask=live, other=0.0)
        keys = tl.load(k_rows, mask=live, other=0.0)
        values = tl.load(v_rows, mask=live, other=0.0)
        if WIDE:
            queries, keys, values = (
                queries.to(tl.float32),
                keys.to(tl.float32),
                values.to(tl.float32),
            )
        scores = tl.dot(keys, tl.trans(queries)) * within
        score_high, score_low = _halves(scores, WIDE)
        state_high, state_low = _halves(total, WIDE)
        made = tl.dot(state_high, tl.trans(queries))
        made = tl.dot(state_low, tl.trans(queries), made)
        made = made * since[None, :]
        made = tl.dot(tl.trans(values), score_high, made)
        made = tl.dot(tl.trans(values), score_low, made)
        tl.store(o_rows, tl.trans(made).to(o.dtype.element_ty), mask=live)
        count = tl.minimum(end - done, CHUNK)
        weight = tl.exp2(-fast * tl.maximum(count - 1 - step, 0))
        high, low = _halves(tl.trans(values).to(tl.float32) * weight[None, :], WIDE)
        added = tl.dot(high, keys)
        added = tl.dot(low, keys, added)
        if count < CHUNK:
            kept, rest = _decay_steps(rate, count)
        total = kept * total + (rest * total + added)
        q_rows += CHUNK * pitch
        k_rows += CHUNK * pitch
        v_rows += CHUNK * v_pitch
        o_rows += CHUNK * HEADS * V
    if (end == stop) & (slot >= 0):
        tl.store(place, total)
