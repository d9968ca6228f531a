"""Products with matrices as checkpoints store them, for any architecture from sm_89 on.

Rows of x are bf16 (PLAIN), E4M3 codes with a scale a row and 128 channels (CODED), or bf16 that are
quantized here to such codes (QUANTIZED). Matrices [N, K] are bf16, E4M3 with a scale a 128x128
block (FP8), or INT4 with a scale a row and group (INT4); their rows lie as the plan has them.

Codes and nibbles are multiplied as they are and scaled behind the product of a block or a group, so
that no product is rounded. WIDE widens operands, where there is no product of narrow ones.
"""

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT4 = tl.constexpr(2)

PLAIN = tl.constexpr(0)
CODED = tl.constexpr(1)
QUANTIZED = tl.constexpr(2)

E4M3_MAX = tl.constexpr(448.0)
BLOCK = tl.constexpr(128)


@triton.jit
def _weights(weight, line, has, k, FORMAT: tl.constexpr, DEPTH: tl.constexpr, STEP: tl.constexpr):
    """Numbers [rows, STEP] from channel k on, not scaled; beyond DEPTH they may be anything."""
    ROWS: tl.constexpr = line.shape[0]
    if FORMAT == INT4:
        WORDS: tl.constexpr = (DEPTH + 7) // 8
        word = k // 8 + tl.arange(0, STEP // 8)
        inside = has[:, None] & (word < WORDS)[None, :]
        packed = tl.load(weight + line[:, None] * WORDS + word[None, :], mask=inside, other=0)
        shift = 4 * tl.arange(0, 8)
        nibbles = ((packed[:, :, None] >> shift[None, None, :]) & 15) - 8
        found = tl.reshape(nibbles, [ROWS, STEP]).to(tl.float32)
    else:
        d = k + tl.arange(0, STEP)
        inside = has[:, None] & (d < DEPTH)[None, :]
        found = tl.load(weight + line[:, None] * DEPTH + d[None, :], mask=inside, other=0.0)
    return found


@triton.jit
def _scales(
    scale, line, band, has, k, FORMAT: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr
):
    """Scale of each row for the channels from k on; `band` is the row's row of 128x128 blocks."""
    if FORMAT == INT4:
        at = line * ((DEPTH + GROUP - 1) // GROUP) + k // GROUP
    else:
        at = band * ((DEPTH + 127) // 128) + k // 128
    return tl.load(scale + at, mask=has, other=0.0).to(tl.float32)


@triton.jit
def _rows(x, scales, row, live, k, ACT: tl.constexpr, DEPTH: tl.constexpr, STEP: tl.constexpr):
    """Numbers [rows, STEP] of x from channel k on, and each row's scale."""
    d = k + tl.arange(0, STEP)
    inside = live[:, None] & (d < DEPTH)[None, :]
    found = tl.load(x + row[:, None] * DEPTH + d[None, :], mask=inside, other=0.0)
    if ACT == CODED:
        PARTS: tl.constexpr = (DEPTH + 127) // 128
        made = found
        by = tl.load(scales + row * PARTS + k // 128, mask=live, other=0.0)
    elif ACT == QUANTIZED:
        wide = found.to(tl.float32)
        by = tl.div_rn(tl.max(tl.abs(wide), 1), E4M3_MAX)
        by = tl.where(by == 0.0, 1.0, by)
        # The quotient rounded to f32 as a division would: codes of ties depend on it.
        inverse = tl.div_rn(1.0, by)[:, None]
        ratio = wide * inverse
        ratio = tl.fma(tl.fma(-ratio, by[:, None], wide), inverse, ratio)
        made = tl.minimum(tl.maximum(ratio, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)
    else:
        made = found
        by = tl.full([row.shape[0]], 1.0, tl.float32)
    return made, by


@triton.jit
def _product(
    x, scales, row, live, weight, scale, line, band, has,
    FORMAT: tl.constexpr, ACT: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of x times rows `line` of the weight, f32 [rows, lines]."""
    total = tl.zeros([row.shape[0], line.shape[0]], tl.float32)
    for k in range(0, DEPTH, STEP):
        a, by = _rows(x, scales, row, live, k, ACT, DEPTH, STEP)
        w = _weights(weight, line, has, k, FORMAT, DEPTH, STEP)
        if WIDE:
            a, w = a.to(tl.float32), w.to(tl.float32)
        elif FORMAT != FP8 or ACT == PLAIN:
            w = w.to(tl.bfloat16)
        if FORMAT == BF16:
            total = tl.dot(a, tl.trans(w), total)
        else:
            s = _scales(scale, line, band, has, k, FORMAT, DEPTH, GROUP)
            total += tl.dot(a, tl.trans(w)) * s[None, :] * by[:, None]
    return total


@triton.jit
def dense_products(
    x, scales, weight, scale, y, tokens,
    OUT: tl.constexpr, DEPTH: tl.constexpr, FORMAT: tl.constexpr, ACT: tl.constexpr,
    GROUP: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Y [T, OUT] of x [T, DEPTH]. Grid: (OUT / COLS, tokens / ROWS)."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    line = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    live, has = row < tokens, line < OUT
    total = _product(
        x, scales, row, live, weight, scale, line, line // BLOCK, has,
        FORMAT, ACT, DEPTH, GROUP, STEP, WIDE,
    )  # fmt: skip
    at = y + row[:, None] * OUT + line[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=live[:, None] & has[None, :])


@triton.jit
def count_pairs(ids, counts, pairs, SPAN: tl.constexpr):
    """How many of the pairs of token and slot go to each expert. Grid: (experts)."""
    expert = tl.program_id(0)
    found = tl.zeros([SPAN], tl.int32)
    for begin in range(0, pairs, SPAN):
        at = begin + tl.arange(0, SPAN)
        found += (tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found))


@triton.jit
def list_pairs(
    ids, counts, listed, starts, pairs, EXPERTS: tl.constexpr, COUNT: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Pairs by rising expert, those of one expert by rising number, and where each begins.

    COUNT is a power of two that holds EXPERTS. Grid: (experts).
    """
    expert = tl.program_id(0)
    e = tl.arange(0, COUNT)
    base = tl.sum(tl.load(counts + e, mask=e < tl.minimum(expert, EXPERTS), other=0))
    tl.store(starts + expert, base)
    for begin in range(0, pairs, SPAN):
        at = begin + tl.arange(0, SPAN)
        mine = (tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
        place = base + tl.cumsum(mine, 0) - 1
        tl.store(listed + place, at, mask=mine > 0)
        base += tl.sum(mine)
    tl.store(starts + EXPERTS, base, mask=expert == EXPERTS - 1)


@triton.jit
def _tile(starts, index, EXPERTS: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Expert of a tile of at most ROWS pairs (EXPERTS for none), its first pair and their end."""
    e = tl.arange(0, COUNT)
    first = tl.load(starts + e, mask=e < EXPERTS, other=0)
    last = tl.load(starts + e + 1, mask=e < EXPERTS, other=0)
    tiles = (last - first + ROWS - 1) // ROWS
    after = tl.cumsum(tiles, 0)
    expert = tl.sum(((after <= index) & (e < EXPERTS)).to(tl.int32))
    here = e == expert
    begin = tl.sum(tl.where(here, first + (index - after + tiles) * ROWS, 0))
    return expert, begin, tl.sum(tl.where(here, last, 0))


@triton.jit
def expert_gates(
    x, scales, gate_up, scale, listed, starts, a,
    INNER: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, COUNT: tl.constexpr,
    SLOTS: tl.constexpr, FORMAT: tl.constexpr, ACT: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of every pair, a [T SLOTS, INNER]. Grid: (INNER / COLS, tiles)."""
    expert, begin, end = _tile(starts, tl.program_id(1), EXPERTS, COUNT, ROWS)
    if expert >= EXPERTS:
        return
    at = begin + tl.arange(0, ROWS)
    live = at < end
    pair = tl.load(listed + at, mask=live, other=0).to(tl.int64)
    token = pair // SLOTS
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    has = col < INNER
    line = expert.to(tl.int64) * (2 * INNER) + col
    BANDS: tl.constexpr = (INNER + 127) // 128
    band = expert.to(tl.int64) * (2 * BANDS) + col // BLOCK
    gate = _product(
        x, scales, token, live, gate_up, scale, line, band, has,
        FORMAT, ACT, DEPTH, GROUP, STEP, WIDE,
    )  # fmt: skip
    up = _product(
        x, scales, token, live, gate_up, scale, line + INNER, band + BANDS, has,
        FORMAT, ACT, DEPTH, GROUP, STEP, WIDE,
    )  # fmt: skip
    made = gate * tl.sigmoid(gate) * up
    to = a + pair[:, None] * INNER + col[None, :]
    tl.store(to, made.to(a.dtype.element_ty), mask=live[:, None] & has[None, :])


@triton.jit
def expert_rows(
    a, down, scale, listed, starts, parts,
    OUT: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, COUNT: tl.constexpr,
    FORMAT: tl.constexpr, ACT: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The second product of every pair, parts f32 [T SLOTS, OUT]. Grid: (OUT / COLS, tiles)."""
    expert, begin, end = _tile(starts, tl.program_id(1), EXPERTS, COUNT, ROWS)
    if expert >= EXPERTS:
        return
    at = begin + tl.arange(0, ROWS)
    live = at < end
    pair = tl.load(listed + at, mask=live, other=0).to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    has = col < OUT
    line = expert.to(tl.int64) * OUT + col
    band = expert.to(tl.int64) * ((OUT + 127) // 128) + col // BLOCK
    total = _product(
        a, a, pair, live, down, scale, line, band, has, FORMAT, ACT, DEPTH, GROUP, STEP, WIDE,
    )  # fmt: skip
    to = parts + pair[:, None] * OUT + col[None, :]
    tl.store(to, total, mask=live[:, None] & has[None, :])


@triton.jit
def add_pairs(
    parts, ids, weights, base, y, OUT: tl.constexpr, SLOTS: tl.constexpr, COLS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """The weighted sum of a token's pairs, in the order of its slots, and base.

    Grid: (tokens, OUT / COLS).
    """
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    has = col < OUT
    total = tl.zeros([COLS], tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        chosen = tl.load(ids + pair) >= 0
        part = tl.load(parts + pair * OUT + col, mask=has & chosen, other=0.0)
        total += part * tl.load(weights + pair)
    if ADD:
        total += tl.load(base + token * OUT + col, mask=has, other=0.0).to(tl.float32)
    tl.store(y + token * OUT + col, total.to(y.dtype.element_ty), mask=has)
