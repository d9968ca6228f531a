"""MLA of a few new tokens over the paged cache: the tokens' own rows, then attention on latents.

    cache[rows[t]] = rms(latent; kv_weight) | rope_pairs(rope key)      last c + r columns of a[t]
    z[t, h] = q_n[t, h] @ w_k[h]
    score[t, h, x] = scale * (z[t, h] . c[x] + rope_pairs(q_r[t, h]) . k_r[x])
    y[t, h] = w_v[h] @ sum_x softmax_x(score[t, h, :])[x] c[x]

over every position x <= positions[t] of the token's sequence b, with c[x] | k_r[x] the cache's row
page_table[b, x // page_size] * page_size + x % page_size, the new rows included. That is
`mla_latent_kv`, `mla_query_rope` and `mla_absorbed_attention` in one op: rms and rope_pairs as
there. Row -1 is not written. Other rows are not read.

Shapes: a [T, >= c + r]; q [T, H (nope + r)] before rope; kv_weight [c]; cos, sin [T, r / 2]; cache
[R, c + r]; rows [T]; page_table [B, P]; offsets [B + 1]; positions [T]; w_k [H, nope, c]; w_v
[H, V, c]; y [T, HV]. T, B, P, R symbolic.

Rounding: everything in f32 (f64 for f64 q); rows are rounded once to the cache's dtype, y once to
the dtype of q. Kernels multiply z, the shares and the sum of latents rounded to bf16.

Source: DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1.2 and appendix C.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingc.kernel import Kernel, Launch, Tactic, Workspace
from lingc.kernel import Tensor as Operand
from lingc.math import (
    absorbed_attention,
    elements,
    latent_rows,
    number,
    rope_pairs,
    stored,
    stored_bytes,
    wide,
)
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import KIB, Target

NOPE, ROPE, LATENT, VALUE = 128, 64, 512, 128
"""Widths that the kernels are written for."""

WIDTH = LATENT + ROPE
TILE = 64
"""Cached rows that one product takes."""

LOG2_E = 1.4426950408889634


def reference(
    a: Tensor, q: Tensor, kv_weight: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor,
    page_table: Tensor, offsets: Tensor, positions: Tensor, w_k: Tensor, w_v: Tensor,
    page_size: int, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads, nope, _ = w_k.shape
    own = a[:, a.shape[1] - cache.shape[1] :]
    after = stored(cache, rows, latent_rows(own, kv_weight, cos, sin, eps))
    by_head = wide(q).unflatten(1, (heads, -1))
    turned = rope_pairs(by_head[..., nope:], cos[:, None], sin[:, None])
    query = torch.cat((by_head[..., :nope], turned), -1)
    y = absorbed_attention(
        query, after, page_table, offsets, positions, (w_k, w_v), page_size, scale
    )
    return y.to(q.dtype), after


def types(
    a: TensorType, q: TensorType, kv_weight: TensorType, cos: TensorType, sin: TensorType,
    cache: TensorType, rows: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, eps: float,
    scale: float,
) -> tuple[TensorType, TensorType]:  # fmt: skip
    return TensorType(q.dtype, (q.shape[0], number(w_v.shape[0]) * number(w_v.shape[1]))), cache


def cost(
    a: TensorType, q: TensorType, kv_weight: TensorType, cos: TensorType, sin: TensorType,
    cache: TensorType, rows: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, eps: float,
    scale: float,
) -> Cost:  # fmt: skip
    # Every sequence fills its pages, and a token reads half of the step's own tokens.
    (tokens, _), (sequences, pages) = q.bind({}), page_table.bind({})
    heads, width, latent = number(w_k.shape[0]), number(cache.shape[1]), number(w_k.shape[2])
    y = TensorType(q.dtype, (tokens, heads * number(w_v.shape[1])))
    pairs = tokens * (pages * page_size - tokens / sequences / 2)
    own = TensorType(a.dtype, (tokens, width))
    read = TensorType(cache.dtype, (sequences * pages * page_size, width))
    written = TensorType(cache.dtype, (tokens, width))
    return Cost(
        flops=2.0 * tokens * (elements(w_k) + elements(w_v))
        + 2.0 * pairs * heads * (width + latent),
        moved_bytes=stored_bytes(
            own, q, kv_weight, cos, sin, rows, page_table, w_k, w_v, y, read, written
        ),
    )


def inputs(
    lengths: tuple[int, ...], past: tuple[int, ...], heads: int, nope: int, pairs: int, value: int,
    latent: int, page_size: int, *, dtype: str, device: str,
) -> tuple[Tensor | float, ...]:  # fmt: skip
    """Arguments for sequences of `lengths` new tokens, each after `past` cached ones."""
    some = Samples(dtype=dtype, device=device)
    offsets, positions, rows, pages, count = some.histories(lengths, past, page_size)
    tokens, key, width = sum(lengths), nope + 2 * pairs, latent + 2 * pairs
    at = [p + i for n, p in zip(lengths, past, strict=True) for i in range(n)]
    cos, sin = some.rope(torch.tensor(at), pairs)
    return (
        some.normal(tokens, width + 3 * 8),
        some.normal(tokens, heads * key),
        some.norm_weight(latent),
        cos,
        sin,
        some.normal(count, width),
        rows,
        pages,
        offsets,
        positions,
        some.weight(heads, nope, latent),
        some.weight(heads, value, latent),
        page_size,
        1e-6,
        key**-0.5,
    )


# ------------------------------------------------------------------------------------ kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of one call."""

    tokens: int
    sequences: int
    pages: int
    page_count: int
    page_size: int
    pitch: int
    heads: int
    eps: float
    scale: float

    @property
    def columns(self) -> int:
        """Heads of a token that one operand tile holds; padding included."""
        return 8 if self.heads <= 8 else 16 if self.heads <= 16 else 32

    @property
    def blocks(self) -> int:
        """Operand tiles of a token."""
        return -(-self.heads // self.columns)

    @property
    def context(self) -> int:
        """Rows that a sequence may have."""
        return self.pages * self.page_size

    @property
    def all_columns(self) -> int:
        return self.tokens * self.blocks * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the cached rows are shared out.

    Attributes:
        paired: Whether a block has two tokens (or two halves of one's heads), and reads rows once
            for both.
        splits: What a sequence's rows are split into, at the most.
        cluster: Blocks that a split is split into.
        early: Tiles that are announced to L2 before the launches before have ended.
        ahead: Tiles that are announced to L2 ahead of their copies.
        smallest: Rows below which a run is not split.
    """

    paired: int = 0
    splits: int
    cluster: int = 4
    early: int = 3
    ahead: int = 0
    smallest: int = TILE

    @property
    def name(self) -> str:
        kind = "paired" if self.paired else "single"
        runs = f"splits{self.splits}.cluster{self.cluster}.rows{self.smallest}"
        return f"{kind}.{runs}.early{self.early}.ahead{self.ahead}"


def shape_of(
    a: TensorType, q: TensorType, kv_weight: TensorType, cos: TensorType, sin: TensorType,
    cache: TensorType, rows: TensorType, page_table: TensorType, offsets: TensorType,
    positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int, eps: float,
    scale: float,
) -> Shape:  # fmt: skip
    sequences, pages = page_table.bind({})
    return Shape(
        tokens=number(q.shape[0]),
        sequences=sequences,
        pages=pages,
        page_count=(number(cache.shape[0]) - 1) // page_size,
        page_size=page_size,
        pitch=number(a.shape[1]),
        heads=number(w_k.shape[0]),
        eps=eps,
        scale=scale,
    )


def refusal(
    target: Target, a: TensorType, q: TensorType, kv_weight: TensorType, cos: TensorType,
    sin: TensorType, cache: TensorType, rows: TensorType, page_table: TensorType,
    offsets: TensorType, positions: TensorType, w_k: TensorType, w_v: TensorType, page_size: int,
    eps: float, scale: float,
) -> str | None:  # fmt: skip
    heads, nope, latent = (number(size) for size in w_k.shape)
    found = (latent, nope, number(w_v.shape[1]), 2 * number(cos.shape[1]))
    if found != (LATENT, NOPE, VALUE, ROPE):
        return (
            f"latent, key, value and rope widths are {found}, the kernels' are "
            f"{(LATENT, NOPE, VALUE, ROPE)}"
        )
    if heads > 32 and heads % 32:
        return f"{heads} heads are neither 32 at the most nor a multiple of 32"
    if page_size % 8:
        return f"pages of {page_size} rows are not a multiple of 8, which one copy moves"
    if number(a.shape[1]) % 8:
        return f"rows of {a.shape[1]} values are not a multiple of 16 bytes"
    if {a.dtype, q.dtype, cache.dtype, w_k.dtype, w_v.dtype} != {"bf16"}:
        return "activations, cache and weights are not all bf16"
    if target.arch != "sm_90a":
        return f"the kernels use wgmma of sm_90a, and {target.name} is {target.arch}"
    return None


def tactics(target: Target, *args: Any) -> Sequence[Tactic]:
    if refusal(target, *args) is not None:
        return ()
    shape = shape_of(*args)
    return [tactic(shape, config) for config in configs(target, shape)]


def configs(target: Target, shape: Shape) -> list[Config]:
    """What is worth choosing between: splits that fill the device once, two tokens a block."""
    sms = target.sms or 1
    found = []
    for paired in (0, 1):
        if paired and shape.tokens * shape.blocks == shape.sequences:
            continue
        units = shape.tokens * shape.blocks
        groups = -(-units // 2) if paired else units
        for cluster in (4, 1):
            splits = max(1, min(sms // groups, -(-shape.context // TILE)) // cluster)
            found.append(Config(paired=paired, splits=splits, cluster=cluster))
    return found


def tactic(shape: Shape, config: Config) -> Tactic:
    columns = shape.all_columns
    partial = config.splits * columns * LATENT * 4
    return Tactic(
        name=config.name,
        launches=(_absorb(shape), _attend(shape, config), _combine(shape, config)),
        workspaces=(
            Workspace(name="queries", bytes=columns * WIDTH * 2),
            Workspace(name="partial", bytes=partial),
            Workspace(name="stats", bytes=config.splits * columns * 8),
        ),
        config={"splits": config.splits, "cluster": config.cluster, "paired": config.paired},
    )


def _groups(shape: Shape, paired: int) -> int:
    """Blocks along the first axis: units, or pairs of them, each of one sequence."""
    units = shape.tokens * shape.blocks
    return max(1, (units + shape.sequences) // 2 if paired else units)


def _absorb(shape: Shape) -> Launch:
    run = 16 if shape.tokens <= 64 else 64
    runs = -(-shape.tokens // run)
    padded = shape.blocks * shape.columns
    weights = shape.heads * NOPE * LATENT * 2
    return Launch(
        kernel=Kernel(
            language="cuda",
            source="kernels/mla_absorb.cu",
            entry="mla_absorb",
            arguments=(
                ("a", "*bf16"), ("q", "*bf16"), ("kv_weight", "*bf16"), ("cos", "*f32"),
                ("sin", "*f32"), ("cache", "*bf16"), ("rows", "*i32"), ("w_k", "*bf16"),
                ("queries", "*u8"), ("tokens", "i32"), ("pitch", "i32"), ("run", "i32"),
                ("runs", "i32"), ("eps", "f32"), ("scale", "f32"),
            ),
            constants=(("HEADS", shape.heads), ("COLUMNS", shape.columns)),
            warps=5,
            features=("bulk",),
        ),
        grid=(4 * padded * runs + -(-shape.tokens // 5), 1, 1),
        operands=(
            *map(Operand, ("a", "q", "kv_weight", "cos", "sin", "cache", "rows", "w_k", "queries")),
            shape.tokens, shape.pitch, run, runs, shape.eps, shape.scale * LOG2_E,
        ),
        dependent=True,
        moved_bytes=weights + shape.all_columns * (NOPE + ROPE + WIDTH) * 2,
        flops=2.0 * max(8, shape.tokens) * weights / 2,
        rate="bf16",
        blocks_per_sm=6,
    )  # fmt: skip


def _attend(shape: Shape, config: Config) -> Launch:
    units = 2 if config.paired else 1
    shared = 2 * TILE * WIDTH * 2 + shape.columns * units * (WIDTH * 2 + 128) + 2 * KIB
    groups = _groups(shape, config.paired)
    read = groups * shape.context * WIDTH * 2
    return Launch(
        kernel=Kernel(
            language="cuda",
            source="kernels/mla_attend.cu",
            entry="mla_attend",
            arguments=(
                ("queries", "*u8"), ("cache", "*u8"), ("page_table", "*i32"), ("offsets", "*i32"),
                ("positions", "*i32"), ("partial", "*f32"), ("stats", "*f32"), ("tokens", "i32"),
                ("sequences", "i32"), ("pages", "i32"), ("page_count", "i32"),
            ),
            constants=(
                ("AHEAD", config.ahead), ("CLUSTER", config.cluster), ("COLUMNS", shape.columns),
                ("EARLY", config.early), ("HEAD_BLOCKS", shape.blocks), ("PAGE", shape.page_size),
                ("PAIRED", config.paired), ("SMALLEST", config.smallest),
            ),
            warps=4 * (units + 1),
            shared_bytes=shared,
            features=("bulk", "wgmma"),
        ),
        grid=(groups, config.splits * config.cluster, 1),
        cluster=(1, config.cluster, 1),
        operands=(
            *map(Operand, ("queries", "cache", "page_table", "offsets", "positions", "partial")),
            Operand("stats"), shape.tokens, shape.sequences, shape.pages, shape.page_count,
        ),
        dependent=True,
        moved_bytes=read + config.splits * shape.all_columns * LATENT * 4,
        flops=2.0 * groups * units * shape.columns * shape.context * (WIDTH + LATENT),
        rate="bf16",
    )  # fmt: skip


def _combine(shape: Shape, config: Config) -> Launch:
    weights = shape.heads * VALUE * LATENT * 2
    return Launch(
        kernel=Kernel(
            language="cuda",
            source="kernels/mla_combine.cu",
            entry="mla_combine",
            arguments=(
                ("partial", "*f32"), ("stats", "*f32"), ("w_v", "*bf16"), ("y", "*bf16"),
                ("tokens", "i32"),
            ),
            constants=(
                ("COLUMNS", shape.columns), ("HEADS", shape.heads), ("SPLITS", config.splits),
            ),
            warps=8,
            features=("bulk",),
        ),
        grid=(4 * shape.heads, -(-shape.tokens // 8), 1),
        cluster=(4, 1, 1),
        operands=(*map(Operand, ("partial", "stats", "w_v", "y")), shape.tokens),
        dependent=True,
        moved_bytes=weights + config.splits * shape.all_columns * LATENT * 4,
        flops=2.0 * max(8, shape.tokens) * weights / 2,
        rate="bf16",
        blocks_per_sm=4,
    )  # fmt: skip


def _benchmark(name: str, new: int, context: int, tokens: tuple[int, ...]) -> Benchmark:
    """`new` tokens of each sequence, the last at the end of `context`."""
    return Benchmark(
        name=f"{name}, {context} cached",
        case=lambda count: (
            (new,) * (count // new), (context - new,) * (count // new), 32, NOPE, ROPE // 2, VALUE,
            LATENT, 64,
        ),
        tokens=tokens,
        context=context,
    )  # fmt: skip


OP = define(
    "mla_latent_attention(Tensor a, Tensor q, Tensor kv_weight, Tensor cos, Tensor sin, "
    "Tensor cache, Tensor rows, Tensor page_table, Tensor offsets, Tensor positions, Tensor w_k, "
    "Tensor w_v, int page_size, float eps, float scale) -> (Tensor y, Tensor cache)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=(
        ((1,), (0,), 1, 2, 1, 2, 4, 4),
        ((1, 1, 1), (0, 5, 11), 3, 10, 2, 6, 12, 4),
        ((3, 0, 3), (2, 4, 0), 2, 16, 4, 12, 20, 2),
        ((1,), (0,), 2, 128, 32, 128, 512, 64),
        ((1, 1, 1), (126, 0, 63), 4, 128, 32, 128, 512, 64),
        ((3, 0, 4), (500, 2, 61), 8, 128, 32, 128, 512, 64),
    ),
    refusal=refusal,
    tactics=tactics,
    mechanism="attention",
    benchmarks=(
        _benchmark("absorbed MLA", 1, 512, (1, 8, 64)),
        _benchmark("absorbed MLA", 1, 4096, (1, 8, 32)),
        _benchmark("absorbed MLA", 1, 65536, (1,)),
        _benchmark("absorbed MLA of 4 drafts", 4, 4096, (4, 16)),
        _benchmark("absorbed MLA of 4 drafts", 4, 65536, (4,)),
    ),
)
