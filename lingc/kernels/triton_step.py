"""What surrounds the products of a step, for any architecture from sm_89 on; ops have the maths.

Each program owns what it writes, and adds up in an order that depends on nothing but sizes.
"""

import triton
import triton.language as tl


@triton.jit
def norm_columns(
    x, weight, y, tokens, eps, PITCH: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """RMS norm of the first WIDTH of PITCH columns. Grid: (tokens / ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    live, inside = row < tokens, col < WIDTH
    mask = live[:, None] & inside[None, :]
    wide = tl.load(x + row[:, None] * PITCH + col[None, :], mask=mask, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    scale = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    made = wide * root[:, None] * scale[None, :]
    tl.store(y + row[:, None] * WIDTH + col[None, :], made.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gate_columns(
    o, qkvg, weight, y, tokens, eps, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Norm of groups of WIDTH channels times the sigmoid of the last quarter of qkvg.

    Grid: (tokens / ROWS, GROUPS).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    col = tl.arange(0, BLOCK)
    live, inside = row < tokens, col < WIDTH
    mask = live[:, None] & inside[None, :]
    ALL: tl.constexpr = GROUPS * WIDTH
    channel = (group * WIDTH + col)[None, :]
    wide = tl.load(o + row[:, None] * ALL + channel, mask=mask, other=0.0).to(tl.float32)
    logits = tl.load(qkvg + row[:, None] * (4 * ALL) + 3 * ALL + channel, mask=mask, other=0.0)
    scale = tl.load(weight + group * WIDTH + col, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    made = wide * root[:, None] * scale[None, :] * tl.sigmoid(logits.to(tl.float32))
    tl.store(y + row[:, None] * ALL + channel, made.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _kept(decay, head):
    """exp(-rate), rounded once: it is multiplied in at every token."""
    return tl.exp(-tl.load(decay + head).to(tl.float64)).to(tl.float32)


@triton.jit
def step_states(
    q, k, qkvg, decay, state, pending_k, pending_v, slots, accepted, positions, o, scale, each,
    HEADS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PENDING: tl.constexpr, VERIFY: tl.constexpr,
):  # fmt: skip
    """Linear attention of `each` tokens of every sequence, after the commit of accepted ones.

    q, k [T, HEADS, K] after norm and rope; values stand in the third quarter of qkvg. Where VERIFY
    is set the state is stored as committed, else behind the last token.
    Grid: (K / BV, HEADS, sequences).
    """
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, v = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    inside, column = d < K, v < K
    both = inside[:, None] & column[None, :]
    slot = tl.load(slots + sequence).to(tl.int64)
    known = (slot >= 0) & (tl.load(positions + sequence * each) != 0)
    place = state + (slot * HEADS + head) * (K * K) + d[:, None] * K + v[None, :]
    total = tl.load(place, mask=both & known, other=0.0)
    kept = _kept(decay, head)
    count = tl.where(known, tl.load(accepted + sequence), 0)
    for i in range(tl.minimum(count, PENDING)):
        row = ((slot * PENDING + i) * HEADS + head) * K
        key = tl.load(pending_k + row + d, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(pending_v + row + v, mask=column, other=0.0).to(tl.float32)
        total = kept * total + key[:, None] * value[None, :]
    if VERIFY:
        tl.store(place, total, mask=both & (slot >= 0))
    for i in range(each):
        token = sequence * each + i
        row = (token * HEADS + head) * K
        query = tl.load(q + row + d, mask=inside, other=0.0).to(tl.float32) * scale
        key = tl.load(k + row + d, mask=inside, other=0.0).to(tl.float32)
        at = qkvg + token * (4 * HEADS * K) + (2 * HEADS + head) * K
        value = tl.load(at + v, mask=column, other=0.0).to(tl.float32)
        total = kept * total + key[:, None] * value[None, :]
        made = tl.sum(query[:, None] * total, 0)
        tl.store(o + row + v, made.to(o.dtype.element_ty), mask=column)
    if not VERIFY:
        tl.store(place, total, mask=both & (slot >= 0))


@triton.jit
def store_pending(
    k, qkvg, pending_k, pending_v, slots, each,
    HEADS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """Keys and values of this step's tokens, for the next commit. Grid: (HEADS, sequences).

    A launch of its own: every block of `step_states` reads those of the step before.
    """
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + sequence).to(tl.int64)
    if slot < 0:
        return
    d = tl.arange(0, BLOCK)
    inside = d < K
    for i in range(each):
        token = sequence * each + i
        to = ((slot * PENDING + i) * HEADS + head) * K + d
        key = tl.load(k + (token * HEADS + head) * K + d, mask=inside, other=0.0)
        at = qkvg + token * (4 * HEADS * K) + (2 * HEADS + head) * K
        value = tl.load(at + d, mask=inside, other=0.0)
        tl.store(pending_k + to, key, mask=inside)
        tl.store(pending_v + to, value, mask=inside)


@triton.jit
def absorb_turned(
    q, w_k, queries, tokens, SCALE: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr,
    ROPE: tl.constexpr, LATENT: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Turned queries in the space of the latents, [tokens, HEADS, LATENT + ROPE], times SCALE.

    Grid: (HEADS, LATENT / BLOCK, tokens / TOKENS).
    """
    head, part = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = (token < tokens)[:, None]
    line = token * HEADS + head
    n, c, r = tl.arange(0, NOPE), part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROPE)
    source = (q + line * (NOPE + ROPE))[:, None]
    to = (queries + line * (LATENT + ROPE))[:, None]
    plain = tl.load(source + n[None, :], mask=live, other=0.0)
    weight = tl.load(w_k + (head * NOPE + n)[:, None] * LATENT + c[None, :])
    if WIDE:
        plain, weight = plain.to(tl.float32), weight.to(tl.float32)
    kind = queries.dtype.element_ty
    tl.store(to + c[None, :], (tl.dot(plain, weight) * SCALE).to(kind), mask=live)
    if part == 0:
        turned = tl.load(source + NOPE + r[None, :], mask=live, other=0.0).to(tl.float32)
        tl.store(to + LATENT + r[None, :], (turned * SCALE).to(kind), mask=live)


@triton.jit
def choose_experts(
    logits, bias, ids, weights, scale, EXPERTS: tl.constexpr, COUNT: tl.constexpr,
    GROUPS: tl.constexpr, BANDS: tl.constexpr, KEPT: tl.constexpr, TOP: tl.constexpr,
    SLOTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Experts of one token from its logits; of equal numbers the first is taken.

    COUNT, BANDS and SLOTS are powers of two that hold EXPERTS, GROUPS and TOP. Grid: (tokens).
    """
    token = tl.program_id(0).to(tl.int64)
    e, g, s = tl.arange(0, COUNT), tl.arange(0, BANDS), tl.arange(0, SLOTS)
    has = e < EXPERTS
    score = tl.sigmoid(tl.load(logits + token * EXPERTS + e, mask=has, other=0.0))
    none = float("-inf")
    biased = tl.where(has, score + tl.load(bias + e, mask=has, other=0.0), none)
    EACH: tl.constexpr = EXPERTS // GROUPS
    worth = tl.full([BANDS], none, tl.float32)
    for group in range(GROUPS):
        own = tl.where(e // EACH == group, biased, none)
        first = tl.max(own, 0)
        both = first
        if EACH > 1:
            both += tl.max(tl.where(e == tl.argmax(own, 0), none, own), 0)
        worth = tl.where(g == group, both, worth)
    kept = tl.zeros([COUNT], tl.int32)
    for _ in range(KEPT):
        group = tl.argmax(worth, 0)
        worth = tl.where(g == group, none, worth)
        kept = tl.where(e // EACH == group, 1, kept)
    left = tl.where((kept > 0) & has, biased, none)
    chosen = tl.zeros([SLOTS], tl.int32)
    own = tl.zeros([SLOTS], tl.float32)
    for slot in range(TOP):
        best = tl.argmax(left, 0)
        chosen = tl.where(s == slot, best, chosen)
        own = tl.where(s == slot, tl.sum(tl.where(e == best, score, 0.0), 0), own)
        left = tl.where(e == best, none, left)
    if NORMALIZE:
        own = own / (tl.sum(own, 0) + 1e-20)
    tl.store(ids + token * TOP + s, chosen, mask=s < TOP)
    tl.store(weights + token * TOP + s, own * scale, mask=s < TOP)
