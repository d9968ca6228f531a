"""Logits of many tokens for `norm_router`: exact products of bf16, added up by the tensor cores.

The norm's weight belongs to the channels, so it is multiplied into the router's. The product of two
bf16 has 16 bits and is a sum of two bf16, exactly; `split_weight` makes both, and `add_products`
multiplies x, as it is stored, by one and the other.
"""

import triton
import triton.language as tl


@triton.jit
def split_weight(
    weight, norm_weight, parts, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Parts [2 EXPERTS, WIDTH]: the high halves of all rows, then the low ones."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < WIDTH
    value = tl.load(weight + row + d, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(norm_weight + d, mask=inside, other=0.0).to(tl.float32)
    high = value.to(tl.bfloat16)
    tl.store(parts + row + d, high, mask=inside)
    low = (value - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(parts + EXPERTS * WIDTH + row + d, low, mask=inside)


@triton.jit
def add_products(
    x,
    parts,
    logits,
    tokens,
    pitch,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PROMOTED: tl.constexpr,
):
    """Logits [T, EXPERTS], without the row's factor.

    PROMOTED: the tensor cores, whose sums are truncated, add up DEPTH channels at a time.
    """
    ACROSS: tl.constexpr = (EXPERTS + COLS - 1) // COLS
    rows = (tl.program_id(0) // ACROSS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % ACROSS * COLS + tl.arange(0, COLS)
    d = tl.arange(0, DEPTH)
    live, some = (rows < tokens)[:, None], (cols < EXPERTS)[None, :]
    xs = x + rows[:, None] * pitch + d[None, :]
    ws = parts + cols[None, :] * WIDTH + d[:, None]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, WIDTH, DEPTH):
        a = tl.load(xs + k, mask=live, other=0.0)
        high = tl.load(ws + k, mask=some, other=0.0)
        low = tl.load(ws + EXPERTS * WIDTH + k, mask=some, other=0.0)
        if PROMOTED:
            total += tl.dot(a, low, tl.dot(a, high))
        else:
            total = tl.dot(a, low, tl.dot(a, high, total))
    tl.store(logits + rows[:, None] * EXPERTS + cols[None, :], total, mask=live & some)
