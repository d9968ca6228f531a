"""MLA of many tokens: rows of the latent cache, keys and values made from them, causal attention.

Their ops have the maths, and `lingc/kernels/mla.py` launches them. Keys and values of some heads at
a time are made once, in a workspace by head: k [heads, sequences, rows, NOPE], v [heads, sequences,
rows, VALUE], and the rope keys, which heads share, [sequences, rows, ROPE]. Sequences have room for
as many rows as their pages hold; beyond a sequence's length nothing is written or read.

Products take bf16 and add up in f32. WIDE widens operands, where there is no product of bf16.
"""
# ruff: noqa: FBT003 (constants of a kernel)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def latent_rows(
    a,
    kv_weight,
    cos,
    sin,
    cache,
    rows,
    tokens,
    eps,
    PITCH: tl.constexpr,
    LATENT: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normed latent and turned rope key of the last columns of a, to the rows of the cache.

    BLOCK and TURN are powers of two that hold LATENT and PAIRS. Grid: (tokens / ROWS).
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    row = tl.load(rows + token, mask=live, other=-1).to(tl.int64)
    kept = row >= 0
    own = a + token * PITCH + (PITCH - LATENT - 2 * PAIRS)
    to = cache + row * (LATENT + 2 * PAIRS)
    channel, both, turn = tl.arange(0, BLOCK), tl.arange(0, 2 * TURN), tl.arange(0, TURN)
    mask = kept[:, None] & (channel < LATENT)[None, :]
    x = tl.load(own[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(kv_weight + channel, mask=channel < LATENT, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(x * x, 1) / LATENT + eps)
    made = x * root[:, None] * weight[None, :]
    tl.store(to[:, None] + channel[None, :], made.to(cache.dtype.element_ty), mask=mask)
    has_both = kept[:, None] & (both < 2 * PAIRS)[None, :]
    has_turn = kept[:, None] & (turn < PAIRS)[None, :]
    pair = tl.load(own[:, None] + LATENT + both[None, :], mask=has_both, other=0.0)
    first, second = tl.split(tl.reshape(pair.to(tl.float32), [ROWS, TURN, 2]))
    angle = token[:, None] * PAIRS + turn[None, :]
    c = tl.load(cos + angle, mask=has_turn, other=0.0)
    s = tl.load(sin + angle, mask=has_turn, other=0.0)
    turned = tl.reshape(tl.join(first * c - second * s, second * c + first * s), [ROWS, 2 * TURN])
    tl.store(to[:, None] + LATENT + both[None, :], turned.to(cache.dtype.element_ty), mask=has_both)


@triton.jit
def _length(offsets, positions, sequence, limit):
    """Rows of the cache that a sequence has, its own tokens included; 0 where it has no token."""
    first = tl.load(offsets + sequence)
    last = tl.load(offsets + sequence + 1)
    at = tl.load(positions + tl.maximum(last - 1, 0), mask=last > first, other=-1)
    return tl.minimum(at + 1, limit)


@triton.jit
def expand_rows(
    cache,
    page_table,
    offsets,
    positions,
    w_k,
    w_v,
    k,
    v,
    rope,
    pages,
    first_head,
    HEAD_PITCH: tl.constexpr,
    PAGE: tl.constexpr,
    LATENT: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Keys or values of one head and ROWS rows of one sequence; once, the rows' rope keys.

    Matrices [NOPE or VALUE, LATENT] of heads lie HEAD_PITCH apart. Grid: (keys and values of the
    heads from `first_head` on, rows / ROWS, sequences).
    """
    part, head = tl.program_id(0) % 2, tl.program_id(0) // 2
    sequence, sequences = tl.program_id(2), tl.num_programs(2)
    room = pages * PAGE
    begin = tl.program_id(1) * ROWS
    length = _length(offsets, positions, sequence, room)
    if begin >= length:
        return
    x = begin + tl.arange(0, ROWS)
    inside = x < length
    page = tl.load(page_table + sequence.to(tl.int64) * pages + x // PAGE, mask=inside, other=0)
    source = cache + (page.to(tl.int64) * PAGE + x % PAGE) * (LATENT + ROPE)
    place = (head.to(tl.int64) * sequences + sequence) * room + x
    if part == 0:
        _project(
            source, inside, w_k + (first_head + head).to(tl.int64) * HEAD_PITCH, k, place,
            LATENT, NOPE, ROWS, DEPTH, WIDE,
        )  # fmt: skip
        if head == 0:
            turned = tl.arange(0, ROPE)
            key = tl.load(
                source[:, None] + LATENT + turned[None, :], mask=inside[:, None], other=0.0
            )
            tl.store(rope + place[:, None] * ROPE + turned[None, :], key, mask=inside[:, None])
    else:
        _project(
            source, inside, w_v + (first_head + head).to(tl.int64) * HEAD_PITCH, v, place,
            LATENT, VALUE, ROWS, DEPTH, WIDE,
        )  # fmt: skip


@triton.jit
def _project(
    source, inside, weight, to, place, LATENT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Latents of rows times weight [WIDTH, LATENT] transposed."""
    depth, channel = tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    sum = tl.zeros([ROWS, WIDTH], tl.float32)  # noqa: A001
    for d in range(0, LATENT, DEPTH):
        c = tl.load(source[:, None] + d + depth[None, :], mask=inside[:, None], other=0.0)
        w = tl.load(weight + channel[:, None] * LATENT + d + depth[None, :])
        if WIDE:
            c, w = c.to(tl.float32), w.to(tl.float32)
        sum = tl.dot(c, tl.trans(w), sum)  # noqa: A001
    made = sum.to(to.dtype.element_ty)
    tl.store(to + place[:, None] * WIDTH + channel[None, :], made, mask=inside[:, None])


@triton.jit
def _step(
    total, top, o, plain, turned, keys, rope_keys, values, x, end, at,
    SCALE: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """N more keys of the running softmax: its sums, maxima and weighed values."""
    n, r, c = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, VALUE)
    x = x.to(tl.int64)
    if MASKED:
        inside = (x < end)[:, None]
        key = tl.load(keys + x[:, None] * NOPE + n[None, :], mask=inside, other=0.0)
        rope_key = tl.load(rope_keys + x[:, None] * ROPE + r[None, :], mask=inside, other=0.0)
        value = tl.load(values + x[:, None] * VALUE + c[None, :], mask=inside, other=0.0)
    else:
        key = tl.load(keys + x[:, None] * NOPE + n[None, :])
        rope_key = tl.load(rope_keys + x[:, None] * ROPE + r[None, :])
        value = tl.load(values + x[:, None] * VALUE + c[None, :])
    if WIDE:
        key, rope_key, value = key.to(tl.float32), rope_key.to(tl.float32), value.to(tl.float32)
    s = tl.dot(plain, tl.trans(key))
    s = tl.dot(turned, tl.trans(rope_key), s)
    if MASKED:
        s = tl.where(x[None, :] <= at[:, None], s, float("-inf"))
    most = tl.maximum(top, tl.max(s, 1) * SCALE)
    share = tl.math.exp2(s * SCALE - most[:, None])
    by = tl.math.exp2(top - most)
    total = total * by + tl.sum(share, 1)
    o = o * by[:, None]
    o = tl.dot(share.to(value.dtype), value, o)
    return total, most, o


@triton.jit
def attend_rows(
    q,
    k,
    v,
    rope,
    offsets,
    positions,
    y,
    tokens,
    sequences,
    room,
    first_head,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Causal attention of ROWS tokens of one sequence and one head over the sequence's rows.

    SCALE is the scores' times log2(e); of HEADS heads the grid's second axis has those from
    `first_head` on; COUNT is a power of two beyond `sequences`. Tokens that no sequence has become
    zero. Tiles that see most come first. Grid: (tiles, heads).
    """
    b = tl.arange(0, COUNT)
    first = tl.load(offsets + b, mask=b <= sequences, other=0)
    last = tl.load(offsets + b + 1, mask=b < sequences, other=0)
    last = tl.where(b == sequences, tokens, last)
    tiles = tl.where(b <= sequences, (last - first + ROWS - 1) // ROWS, 0)
    after = tl.cumsum(tiles, 0)
    index = tl.sum(tiles) - 1 - tl.program_id(0)
    if index < 0:
        return
    mine = tl.sum(((after <= index) & (b <= sequences)).to(tl.int32))
    here = b == mine
    start = tl.sum(tl.where(here, first, 0))
    stop = tl.sum(tl.where(here, last, 0))
    number = index - tl.sum(tl.where(here, after - tiles, 0))

    head = tl.program_id(1)
    token = start + number * ROWS + tl.arange(0, ROWS)
    live = token < stop
    n, r, c = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, VALUE)
    line = token.to(tl.int64) * HEADS + first_head + head
    past = tl.load(positions + start) - start
    end = tl.minimum(tl.minimum(start + (number + 1) * ROWS, stop) + past, room)
    end = tl.where(mine == sequences, 0, end)
    seen = tl.minimum(tl.maximum(start + number * ROWS + past + 1, 0), end)
    at = token + past
    source = q + line[:, None] * (NOPE + ROPE)
    plain = tl.load(source + n[None, :], mask=live[:, None], other=0.0)
    turned = tl.load(source + NOPE + r[None, :], mask=live[:, None], other=0.0)
    if WIDE:
        plain, turned = plain.to(tl.float32), turned.to(tl.float32)
    base = (head.to(tl.int64) * sequences + mine) * room
    keys, values, rope_keys = (
        k + base * NOPE,
        v + base * VALUE,
        rope + mine.to(tl.int64) * room * ROPE,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, VALUE], tl.float32)
    whole = seen // KEYS * KEYS  # keys that every token of the tile sees
    for i in range(0, whole, KEYS):
        total, top, o = _step(
            total, top, o, plain, turned, keys, rope_keys, values, i + tl.arange(0, KEYS), end, at,
            SCALE, NOPE, ROPE, VALUE, False, WIDE,
        )  # fmt: skip
    for i in range(whole, end, KEYS):
        total, top, o = _step(
            total, top, o, plain, turned, keys, rope_keys, values, i + tl.arange(0, KEYS), end, at,
            SCALE, NOPE, ROPE, VALUE, True, WIDE,
        )  # fmt: skip
    made = o / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        y + line[:, None] * VALUE + c[None, :], made.to(y.dtype.element_ty), mask=live[:, None]
    )


@triton.jit
def absorb_queries(
    q,
    cos,
    sin,
    w_k,
    queries,
    tokens,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    PAIRS: tl.constexpr,
    LATENT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Queries in the space of the latents, [tokens, HEADS, LATENT + 2 PAIRS], times SCALE.

    Grid: (HEADS, LATENT / BLOCK, tokens / TOKENS).
    """
    head, part = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = (token < tokens)[:, None]
    line = token * HEADS + head
    n, c = tl.arange(0, NOPE), part * BLOCK + tl.arange(0, BLOCK)
    source = (q + line * (NOPE + 2 * PAIRS))[:, None]
    to = (queries + line * (LATENT + 2 * PAIRS))[:, None]
    plain = tl.load(source + n[None, :], mask=live, other=0.0)
    weight = tl.load(w_k + (head * NOPE + n)[:, None] * LATENT + c[None, :])
    if WIDE:
        plain, weight = plain.to(tl.float32), weight.to(tl.float32)
    kind = queries.dtype.element_ty
    tl.store(to + c[None, :], (tl.dot(plain, weight) * SCALE).to(kind), mask=live)
    if part == 0:
        turn, both = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
        pair = tl.load(source + NOPE + both[None, :], mask=live, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pair, [TOKENS, PAIRS, 2]))
        angle = token[:, None] * PAIRS + turn[None, :]
        cosine = tl.load(cos + angle, mask=live, other=0.0) * SCALE
        sine = tl.load(sin + angle, mask=live, other=0.0) * SCALE
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        made = tl.reshape(turned, [TOKENS, 2 * PAIRS]).to(kind)
        tl.store(to + LATENT + both[None, :], made, mask=live)


@triton.jit
def attend_latents(
    queries,
    cache,
    page_table,
    offsets,
    positions,
    partial,
    stats,
    tokens,
    sequences,
    pages,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of latents of one split of a token's rows, for COLUMNS heads.

    Writes partial [splits, tokens, HEADS, LATENT] where the split has rows, and stats [splits, 2,
    tokens, HEADS], maximum and sum of shares. Grid: (splits, tokens, HEADS / COLUMNS).
    """
    split, token = tl.program_id(0), tl.program_id(1)
    b = tl.arange(0, COUNT)
    last = tl.load(offsets + b + 1, mask=b < sequences, other=0)
    sequence = tl.sum(((last <= token) & (b < sequences)).to(tl.int32))
    length = tl.minimum(tl.load(positions + token) + 1, pages * PAGE)
    length = tl.where(sequence == sequences, 0, length)
    rows = tl.cdiv(tl.cdiv(length, tl.num_programs(0)), KEYS) * KEYS
    begin = tl.minimum(split * rows, length)
    end = tl.minimum(begin + rows, length)
    head = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    has = (head < HEADS)[:, None]
    line = token.to(tl.int64) * HEADS + head
    c, r, i = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, KEYS)
    source = (queries + line * (LATENT + ROPE))[:, None]
    query = tl.load(source + c[None, :], mask=has, other=0.0)
    turned = tl.load(source + LATENT + r[None, :], mask=has, other=0.0)
    if WIDE:
        query, turned = query.to(tl.float32), turned.to(tl.float32)
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    o = tl.zeros([COLUMNS, LATENT], tl.float32)
    table = page_table + sequence.to(tl.int64) * pages
    for x in range(begin, end, KEYS):
        at = x + i
        inside = at < end
        page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
        row = (cache + (page * PAGE + at % PAGE) * (LATENT + ROPE))[:, None]
        latent = tl.load(row + c[None, :], mask=inside[:, None], other=0.0)
        key = tl.load(row + LATENT + r[None, :], mask=inside[:, None], other=0.0)
        if WIDE:
            latent, key = latent.to(tl.float32), key.to(tl.float32)
        s = tl.dot(query, tl.trans(latent))
        s = tl.dot(turned, tl.trans(key), s)
        s = tl.where(inside[None, :], s, float("-inf"))
        most = tl.maximum(top, tl.max(s, 1))
        share = tl.math.exp2(s - most[:, None])
        by = tl.math.exp2(top - most)
        total = total * by + tl.sum(share, 1)
        o = tl.dot(share.to(latent.dtype), latent, o * by[:, None])
        top = most
    every = tokens.to(tl.int64) * HEADS
    tl.store(stats + 2 * split * every + line, top, mask=head < HEADS)
    tl.store(stats + (2 * split + 1) * every + line, total, mask=head < HEADS)
    if begin < end:
        tl.store(partial + ((split * every + line) * LATENT)[:, None] + c[None, :], o, mask=has)


@triton.jit
def combine_latents(
    partial,
    stats,
    w_v,
    y,
    tokens,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    VALUE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the splits' sums of one token and head, and multiplies by w_v.

    SPLITS is a power of two, BLOCK the rows of w_v at a time. Grid: (HEADS, tokens).
    """
    head, token = tl.program_id(0), tl.program_id(1)
    every = tokens.to(tl.int64) * HEADS
    line = token.to(tl.int64) * HEADS + head
    s, c = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, LATENT)
    top = tl.load(stats + 2 * s * every + line)
    total = tl.load(stats + (2 * s + 1) * every + line)
    share = tl.where(total > 0, tl.math.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(share * total, 0)
    share = share / tl.where(total > 0, total, 1.0)
    at = partial + ((s * every + line) * LATENT)[:, None] + c[None, :]
    o = tl.sum(tl.load(at, mask=(share > 0)[:, None], other=0.0) * share[:, None], 0)
    for v in range(0, VALUE, BLOCK):
        row = v + tl.arange(0, BLOCK)
        weight = tl.load(w_v + (head * VALUE + row)[:, None] * LATENT + c[None, :]).to(tl.float32)
        made = tl.sum(weight * o[None, :], 1)
        tl.store(y + line * VALUE + row, made.to(y.dtype.element_ty))
