"""Launches of the kernels of MLA that are written in Triton (`triton_mla`).

For many tokens, keys and values are made from the cached latents; for few, queries go to the space
of the latents. CUDA C++ does either faster where it can: `mla_many`, and `mla_few` by way of
`plugins/mla_latent_attention.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lingc.kernel import Kernel, Launch, Tactic, Tensor, Workspace
from lingc.kernels.rows import power, rope_query
from lingc.op import Cost
from lingc.plan import TensorType
from lingc.targets.spec import KIB, Target

MODULE = "lingc.kernels.triton_mla"
LOG2_E = 1.4426950408889634
DEPTH = 64
"""Latent channels of one step of the products that make keys and values."""

EXPANDED_ROWS = 128
SPACE = 1 << 30
"""Bytes of keys and values of one pass; heads beyond go to more passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of one call of attention over packed sequences.

    Attributes:
        pages: Pages of a sequence, at the most.
        head_pitch: From the matrix of one head to the next, in rows.
    """

    tokens: int
    sequences: int
    pages: int
    page_size: int
    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    head_pitch: int
    scale: float

    @property
    def room(self) -> int:
        """Rows of a sequence, at the most."""
        return self.pages * self.page_size

    @property
    def row_bytes(self) -> int:
        """Keys and values of one head and row."""
        return 2 * (self.nope + self.value)


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens, keys, warps and pipeline stages of a block of attention."""

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"rows{self.rows}.keys{self.keys}.w{self.warps}.s{self.stages}"


TILES = (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3))
SMALL_TILES = (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2))
"""Where a block has less than 200 KiB of shared memory."""


def size_refusal(nope: int, rope: int, value: int, latent: int) -> str | None:
    """Why the kernels do not take heads of these widths."""
    for name, size in (("plain key", nope), ("rope key", rope), ("value", value)):
        if size < 16 or size != power(size):
            return f"{name}s have {size} channels, not a power of two from 16 on"
    if latent % min(DEPTH, power(latent)):
        return f"{latent} latent channels are not a multiple of {DEPTH}, or a power of two below"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Of one call that writes rows of the cache.

    Attributes:
        pitch: Columns of a.
    """

    tokens: int
    pitch: int
    latent: int
    pairs: int
    eps: float


def latent_tactics(sizes: Rows) -> list[Tactic]:
    """Rows of the cache from the last columns of a."""
    return [
        Tactic(name=f"rows{rows}.w{warps}", launches=(_latents(sizes, rows, warps),))
        for rows, warps in ((4, 4), (1, 1))
    ]


def _latents(sizes: Rows, rows: int, warps: int) -> Launch:
    return Launch(
        kernel=Kernel(
            language="triton",
            source=f"{MODULE}:latent_rows",
            entry="latent_rows",
            arguments=(
                ("a", "*bf16"), ("kv_weight", "*bf16"), ("cos", "*f32"), ("sin", "*f32"),
                ("cache", "*bf16"), ("rows", "*i32"), ("tokens", "i32"), ("eps", "f32"),
            ),
            constants=(
                ("PITCH", sizes.pitch), ("LATENT", sizes.latent), ("PAIRS", sizes.pairs),
                ("BLOCK", power(sizes.latent)), ("TURN", power(sizes.pairs)), ("ROWS", rows),
            ),
            warps=warps,
        ),
        grid=(-(-sizes.tokens // rows), 1, 1),
        operands=(
            *map(Tensor, ("a", "kv_weight", "cos", "sin", "cache", "rows")), sizes.tokens,
            sizes.eps,
        ),
        moved_bytes=4.0 * sizes.tokens * (sizes.latent + 2 * sizes.pairs),
        blocks_per_sm=48 // warps,
    )  # fmt: skip


def divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`, or 1."""
    return next(n for n in range(number, 0, -1) if number % n == 0 and n <= max(most, 1))


def heads_of_a_pass(sizes: Sizes) -> int:
    """Heads whose keys and values fit in the workspace, a divisor of all."""
    return divisor(sizes.heads, SPACE // (sizes.row_bytes * sizes.sequences * sizes.room))


def tiles_of(target: Target) -> Sequence[Tile]:
    """What is worth choosing between on a target."""
    return TILES if (target.smem_per_block_bytes or 0) > 200 * KIB else SMALL_TILES


def attention_tactics(
    target: Target, sizes: Sizes, w_k: Tensor, w_v: Tensor, q: str, y: str
) -> list[Tactic]:
    """Keys and values of some heads, then attention of these heads, until all are done."""
    return [
        Tactic(
            name=tile.name,
            launches=_attention(sizes, w_k, w_v, q, y, tile),
            workspaces=_expanded(sizes),
            config={
                "rows": tile.rows, "keys": tile.keys, "warps": tile.warps, "stages": tile.stages,
            },
            sums=tile.name,
        )
        for tile in tiles_of(target)
    ]  # fmt: skip


def whole_tactics(sizes: Sizes, rows: Rows, ways: Sequence[Tactic]) -> list[Tactic]:
    """`mla_latent_attention` of many tokens, as in prefill.

    Args:
        ways: Of attention, whose queries are in `turned`.
    """
    turned = Workspace(
        name="turned", bytes=2 * sizes.tokens * sizes.heads * (sizes.nope + sizes.rope)
    )
    width = sizes.heads * (sizes.nope + sizes.rope)
    q = TensorType("bf16", (sizes.tokens, width))
    cos = TensorType("f32", (sizes.tokens, sizes.rope // 2))
    rope = rope_query(q, cos, sizes.heads, Cost(flops=0, moved_bytes=4.0 * sizes.tokens * width))
    (one,) = rope[0].launches
    outputs = tuple(
        Tensor("turned") if operand == Tensor("out") else operand for operand in one.operands
    )
    before = (_latents(rows, 4, 4), replace(one, operands=outputs))
    return [
        replace(
            way,
            name=f"expanded.{way.name}",
            launches=(*before, *way.launches),
            workspaces=(turned, *way.workspaces),
        )
        for way in ways
    ]


def _expanded(sizes: Sizes) -> tuple[Workspace, ...]:
    heads, rows = heads_of_a_pass(sizes), sizes.sequences * sizes.room
    return (
        Workspace(name="keys", bytes=2 * heads * rows * sizes.nope),
        Workspace(name="values", bytes=2 * heads * rows * sizes.value),
        Workspace(name="rope_keys", bytes=2 * rows * sizes.rope),
    )


def _attention(
    sizes: Sizes, w_k: Tensor, w_v: Tensor, q: str, y: str, tile: Tile
) -> tuple[Launch, ...]:
    heads = heads_of_a_pass(sizes)
    launches: list[Launch] = []
    for first in range(0, sizes.heads, heads):
        launches += [
            _expand(sizes, w_k, w_v, first, heads),
            _attend(sizes, q, y, tile, first, heads),
        ]
    return tuple(launches)


def _expand(sizes: Sizes, w_k: Tensor, w_v: Tensor, first: int, heads: int) -> Launch:
    rows = sizes.sequences * sizes.room
    return Launch(
        kernel=Kernel(
            language="triton",
            source=f"{MODULE}:expand_rows",
            entry="expand_rows",
            arguments=(
                ("cache", "*bf16"), ("page_table", "*i32"), ("offsets", "*i32"),
                ("positions", "*i32"), ("w_k", "*bf16"), ("w_v", "*bf16"), ("k", "*bf16"),
                ("v", "*bf16"), ("rope", "*bf16"), ("pages", "i32"), ("first_head", "i32"),
            ),
            constants=(
                ("HEAD_PITCH", sizes.head_pitch * sizes.latent),
                ("PAGE", sizes.page_size), ("LATENT", sizes.latent), ("NOPE", sizes.nope),
                ("VALUE", sizes.value), ("ROPE", sizes.rope), ("ROWS", EXPANDED_ROWS),
                ("DEPTH", min(DEPTH, sizes.latent)), ("WIDE", 0),
            ),
            warps=8,
            stages=3,
        ),
        grid=(2 * heads, -(-sizes.room // EXPANDED_ROWS), sizes.sequences),
        operands=(
            *map(Tensor, ("cache", "page_table", "offsets", "positions")), w_k, w_v,
            *map(Tensor, ("keys", "values", "rope_keys")), sizes.pages, first,
        ),
        moved_bytes=rows * (2 * (sizes.latent + sizes.rope) + heads * sizes.row_bytes),
        flops=rows * heads * sizes.row_bytes * sizes.latent,
        rate="bf16",
    )  # fmt: skip


def _attend(sizes: Sizes, q: str, y: str, tile: Tile, first: int, heads: int) -> Launch:
    pairs = sizes.tokens * (sizes.room - sizes.tokens / sizes.sequences / 2)
    rows = sizes.sequences * sizes.room
    return Launch(
        kernel=Kernel(
            language="triton",
            source=f"{MODULE}:attend_rows",
            entry="attend_rows",
            arguments=(
                ("q", "*bf16"), ("k", "*bf16"), ("v", "*bf16"), ("rope", "*bf16"),
                ("offsets", "*i32"), ("positions", "*i32"), ("y", "*bf16"), ("tokens", "i32"),
                ("sequences", "i32"), ("room", "i32"), ("first_head", "i32"),
            ),
            constants=(
                ("SCALE", sizes.scale * LOG2_E), ("HEADS", sizes.heads), ("NOPE", sizes.nope),
                ("ROPE", sizes.rope), ("VALUE", sizes.value), ("ROWS", tile.rows),
                ("KEYS", tile.keys), ("COUNT", power(sizes.sequences + 1)), ("WIDE", 0),
            ),
            warps=tile.warps,
            stages=tile.stages,
        ),
        grid=(sizes.tokens // tile.rows + sizes.sequences + 1, heads, 1),
        operands=(
            *map(Tensor, (q, "keys", "values", "rope_keys", "offsets", "positions", y)),
            sizes.tokens, sizes.sequences, sizes.room, first,
        ),
        moved_bytes=rows * heads * sizes.row_bytes
        + 2 * sizes.tokens * heads * (sizes.nope + sizes.rope + sizes.value),
        flops=2.0 * pairs * heads * (sizes.nope + sizes.rope + sizes.value),
        rate="bf16",
    )  # fmt: skip


def absorbed_tactics(sizes: Sizes, rows: Rows, splits: int) -> list[Tactic]:
    """`mla_latent_attention` of few tokens."""
    columns, width = sizes.tokens * sizes.heads, sizes.latent + sizes.rope
    return [
        Tactic(
            name=f"absorbed.splits{splits}.keys{keys}.w{warps}",
            launches=(
                _latents(rows, 1, 1),
                _absorb(sizes),
                _attend_latents(sizes, splits, keys, warps),
                _combine(sizes, splits),
            ),
            workspaces=(
                Workspace(name="queries", bytes=2 * columns * width),
                Workspace(name="partial", bytes=4 * splits * columns * sizes.latent),
                Workspace(name="stats", bytes=8 * splits * columns),
            ),
            config={"splits": splits, "keys": keys, "warps": warps},
            sums=None,
        )
        for keys, warps in ((32, 8), (16, 4))
    ]


def _absorb(sizes: Sizes) -> Launch:
    tokens, block = 16, min(sizes.latent, 128)
    weights = sizes.heads * sizes.nope * sizes.latent
    runs = -(-sizes.tokens // tokens)
    return Launch(
        kernel=Kernel(
            language="triton",
            source=f"{MODULE}:absorb_queries",
            entry="absorb_queries",
            arguments=(
                ("q", "*bf16"), ("cos", "*f32"), ("sin", "*f32"), ("w_k", "*bf16"),
                ("queries", "*bf16"), ("tokens", "i32"),
            ),
            constants=(
                ("SCALE", sizes.scale * LOG2_E), ("HEADS", sizes.heads), ("NOPE", sizes.nope),
                ("PAIRS", sizes.rope // 2), ("LATENT", sizes.latent), ("TOKENS", tokens),
                ("BLOCK", block), ("WIDE", 0),
            ),
            warps=4,
        ),
        grid=(sizes.heads, sizes.latent // block, runs),
        operands=(*map(Tensor, ("q", "cos", "sin", "w_k", "queries")), sizes.tokens),
        moved_bytes=2.0 * weights,
        flops=2.0 * weights * runs * tokens,
        rate="bf16",
        blocks_per_sm=4,
    )  # fmt: skip


def _attend_latents(sizes: Sizes, splits: int, keys: int, warps: int) -> Launch:
    width, blocks = sizes.latent + sizes.rope, -(-sizes.heads // 16)
    pairs = sizes.tokens * sizes.room * blocks
    return Launch(
        kernel=Kernel(
            language="triton",
            source=f"{MODULE}:attend_latents",
            entry="attend_latents",
            arguments=(
                ("queries", "*bf16"), ("cache", "*bf16"), ("page_table", "*i32"),
                ("offsets", "*i32"), ("positions", "*i32"), ("partial", "*f32"),
                ("stats", "*f32"), ("tokens", "i32"), ("sequences", "i32"), ("pages", "i32"),
            ),
            constants=(
                ("HEADS", sizes.heads), ("LATENT", sizes.latent), ("ROPE", sizes.rope),
                ("PAGE", sizes.page_size), ("COLUMNS", 16), ("KEYS", keys),
                ("COUNT", power(sizes.sequences)), ("WIDE", 0),
            ),
            warps=warps,
            stages=2,
        ),
        grid=(splits, sizes.tokens, blocks),
        operands=(
            *map(Tensor, ("queries", "cache", "page_table", "offsets", "positions", "partial")),
            Tensor("stats"), sizes.tokens, sizes.sequences, sizes.pages,
        ),
        moved_bytes=2.0 * pairs * width + 4.0 * splits * sizes.tokens * sizes.heads * sizes.latent,
        flops=2.0 * pairs * 16 * (width + sizes.latent),
        rate="bf16",
    )  # fmt: skip


def _combine(sizes: Sizes, splits: int) -> Launch:
    weights = sizes.heads * sizes.value * sizes.latent
    return Launch(
        kernel=Kernel(
            language="triton",
            source=f"{MODULE}:combine_latents",
            entry="combine_latents",
            arguments=(
                ("partial", "*f32"), ("stats", "*f32"), ("w_v", "*bf16"), ("y", "*bf16"),
                ("tokens", "i32"),
            ),
            constants=(
                ("HEADS", sizes.heads), ("LATENT", sizes.latent), ("VALUE", sizes.value),
                ("SPLITS", splits), ("BLOCK", min(sizes.value, 16)),
            ),
            warps=8,
        ),
        grid=(sizes.heads, sizes.tokens, 1),
        operands=(*map(Tensor, ("partial", "stats", "w_v", "y")), sizes.tokens),
        moved_bytes=2.0 * weights + 4.0 * splits * sizes.tokens * sizes.heads * sizes.latent,
        flops=2.0 * weights * sizes.tokens,
        blocks_per_sm=4,
    )  # fmt: skip
