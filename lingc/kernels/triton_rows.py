"""Kernels that go over rows once: norms, gates, rotary embedding and FP8 codes.

Their ops in `plugins/` have the maths; `lingc/kernels/rows.py` chooses blocks and launches them.
A program holds whole rows, or whole groups of them, in registers; so that what a row becomes
depends on nothing but the row. Everything is widened to f32.
"""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
SCALED = tl.constexpr(128)
"""Channels of one scale."""


@triton.jit
def _put_codes(y, codes, scales, rows, live, WIDTH: tl.constexpr, FIRST, BLOCK: tl.constexpr):
    """E4M3 codes and scales of y f32 [R, BLOCK], channels FIRST… of rows of WIDTH.

    Channels beyond WIDTH are zero in y.
    """
    R: tl.constexpr = y.shape[0]
    PARTS: tl.constexpr = BLOCK // SCALED
    parts = tl.reshape(y, [R, PARTS, SCALED])
    scale = tl.div_rn(tl.max(tl.abs(parts), 2), E4M3_MAX)
    scale = tl.where(scale == 0.0, 1.0, scale)
    # The quotient rounded to f32 as a division would: codes of ties depend on it.
    inverse = tl.div_rn(1.0, scale)[:, :, None]
    made = parts * inverse
    made = tl.fma(tl.fma(-made, scale[:, :, None], parts), inverse, made)
    made = tl.reshape(made, [R, BLOCK])
    made = tl.minimum(tl.maximum(made, -E4M3_MAX), E4M3_MAX)
    cols = FIRST + tl.arange(0, BLOCK)
    part = FIRST // SCALED + tl.arange(0, PARTS)
    COUNT: tl.constexpr = (WIDTH + SCALED - 1) // SCALED
    tl.store(
        codes + rows[:, None] * WIDTH + cols[None, :],
        made.to(tl.float8e4nv),
        mask=live[:, None] & (cols < WIDTH)[None, :],
    )
    tl.store(
        scales + rows[:, None] * COUNT + part[None, :],
        scale,
        mask=live[:, None] & (part < COUNT)[None, :],
    )


@triton.jit
def norm_rows(
    x,
    residual,
    weight,
    y,
    h,
    codes,
    scales,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    CODES: tl.constexpr,
):
    """RMS norm of x, or of h = x + residual, with FP8 codes of it. Grid: (tokens / ROWS)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    live, inside = rows < tokens, cols < WIDTH
    at = rows[:, None] * WIDTH + cols[None, :]
    mask = live[:, None] & inside[None, :]
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        total = wide.to(h.dtype.element_ty)
        tl.store(h + at, total, mask=mask)
        wide = total.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    scale = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    made = (wide * root[:, None] * scale[None, :]).to(y.dtype.element_ty)
    tl.store(y + at, made, mask=mask)
    if CODES:
        _put_codes(made.to(tl.float32), codes, scales, rows, live, WIDTH, 0, BLOCK)


@triton.jit
def gated_rows(
    gate_up,
    y,
    codes,
    scales,
    tokens,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
):
    """silu(gate) * up of rows gate | up, each WIDTH wide: y, or its FP8 codes alone.

    Grid: (tokens / ROWS, WIDTH / BLOCK).
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    live, inside = rows < tokens, cols < WIDTH
    mask = live[:, None] & inside[None, :]
    at = gate_up + rows[:, None] * (2 * WIDTH) + cols[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    made = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)
    if CODES:
        _put_codes(made.to(tl.float32), codes, scales, rows, live, WIDTH, first, BLOCK)
    else:
        tl.store(y + rows[:, None] * WIDTH + cols[None, :], made, mask=mask)


@triton.jit
def code_rows(
    x,
    codes,
    scales,
    tokens,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """FP8 codes of x. Grid: (tokens / ROWS, WIDTH / BLOCK)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    live, inside = rows < tokens, cols < WIDTH
    mask = live[:, None] & inside[None, :]
    wide = tl.load(x + rows[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    _put_codes(wide, codes, scales, rows, live, WIDTH, first, BLOCK)


@triton.jit
def gated_norm_rows(
    o,
    gate,
    weight,
    y,
    tokens,
    eps,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Norm of groups of WIDTH channels times sigmoid(gate). Grid: (tokens / ROWS, GROUPS)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    live, inside = rows < tokens, cols < WIDTH
    mask = live[:, None] & inside[None, :]
    at = rows[:, None] * (GROUPS * WIDTH) + group * WIDTH + cols[None, :]
    wide = tl.load(o + at, mask=mask, other=0.0).to(tl.float32)
    logits = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + group * WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    made = wide * root[:, None] * scale[None, :] * tl.sigmoid(logits)
    tl.store(y + at, made.to(y.dtype.element_ty), mask=mask)


@triton.jit
def head_norm_rope(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    q,
    k,
    tokens,
    eps,
    PITCH: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    TURN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """RMS norm of each head of q and k, then half-split rope of its first 2 PAIRS channels.

    A row is a head of a token. The halves that a pair is of and the channels that are not turned
    are loaded apart, so that both of a pair are in one thread. TURN and REST are powers of two that
    hold PAIRS and K - 2 PAIRS. Grid: (tokens HEADS / ROWS, 2), q and k.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1)
    token, head = row // HEADS, row % HEADS
    live = token < tokens
    source = qkv + token * PITCH + which * (HEADS * K) + head * K
    turn, rest = tl.arange(0, TURN), tl.arange(0, REST)
    has_turn = live[:, None] & (turn < PAIRS)[None, :]
    has_rest = live[:, None] & (rest < K - 2 * PAIRS)[None, :]
    a = tl.load(source[:, None] + turn[None, :], mask=has_turn, other=0.0).to(tl.float32)
    b = tl.load(source[:, None] + PAIRS + turn[None, :], mask=has_turn, other=0.0).to(tl.float32)
    c = tl.load(source[:, None] + 2 * PAIRS + rest[None, :], mask=has_rest, other=0.0)
    c = c.to(tl.float32)
    root = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(c * c, 1)) / K + eps)[:, None]
    weight = q_weight if which == 0 else k_weight
    a_scale = tl.load(weight + turn, mask=turn < PAIRS, other=0.0).to(tl.float32)
    b_scale = tl.load(weight + PAIRS + turn, mask=turn < PAIRS, other=0.0).to(tl.float32)
    c_scale = tl.load(weight + 2 * PAIRS + rest, mask=rest < K - 2 * PAIRS, other=0.0)
    a, b = a * root * a_scale[None, :], b * root * b_scale[None, :]
    c = c * root * c_scale.to(tl.float32)[None, :]
    angle = token[:, None] * PAIRS + turn[None, :]
    cosine = tl.load(cos + angle, mask=has_turn, other=0.0)
    sine = tl.load(sin + angle, mask=has_turn, other=0.0)
    to = (q if which == 0 else k) + row * K
    kind = q.dtype.element_ty
    tl.store(to[:, None] + turn[None, :], (a * cosine - b * sine).to(kind), mask=has_turn)
    tl.store(to[:, None] + PAIRS + turn[None, :], (b * cosine + a * sine).to(kind), mask=has_turn)
    tl.store(to[:, None] + 2 * PAIRS + rest[None, :], c.to(kind), mask=has_rest)


@triton.jit
def query_rope(
    q,
    cos,
    sin,
    y,
    tokens,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    PAIRS: tl.constexpr,
    KEEP: tl.constexpr,
    TURN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rope of adjacent pairs, the last 2 PAIRS channels of each head; PLAIN before them are copied.

    KEEP and TURN are powers of two that hold PLAIN and PAIRS. Grid: (tokens HEADS / ROWS).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    live = token < tokens
    at = row * (PLAIN + 2 * PAIRS)
    keep, turn, both = tl.arange(0, KEEP), tl.arange(0, TURN), tl.arange(0, 2 * TURN)
    has_keep = live[:, None] & (keep < PLAIN)[None, :]
    has_turn = live[:, None] & (turn < PAIRS)[None, :]
    has_both = live[:, None] & (both < 2 * PAIRS)[None, :]
    plain = tl.load(q + at[:, None] + keep[None, :], mask=has_keep, other=0.0)
    tl.store(y + at[:, None] + keep[None, :], plain, mask=has_keep)
    pair = tl.load(q + at[:, None] + PLAIN + both[None, :], mask=has_both, other=0.0)
    a, b = tl.split(tl.reshape(pair.to(tl.float32), [ROWS, TURN, 2]))
    angle = token[:, None] * PAIRS + turn[None, :]
    cosine = tl.load(cos + angle, mask=has_turn, other=0.0)
    sine = tl.load(sin + angle, mask=has_turn, other=0.0)
    made = tl.reshape(tl.join(a * cosine - b * sine, b * cosine + a * sine), [ROWS, 2 * TURN])
    tl.store(y + at[:, None] + PLAIN + both[None, :], made.to(y.dtype.element_ty), mask=has_both)
