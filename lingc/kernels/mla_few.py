"""Launches of the CUDA kernels of MLA for few tokens (`mla_*.cu`).

Either one launch does all (`mla_short`), or three do it: queries into the space of the latents
beside the tokens' own rows (`mla_absorb`), attention over splits of the cached rows (`mla_attend`),
the splits' sum through w_v (`mla_combine`).
"""

from dataclasses import dataclass

from lingc.kernel import Kernel, Launch, Tactic, Workspace
from lingc.kernel import Tensor as Operand
from lingc.kernels import mla
from lingc.targets.spec import KIB, Target

NOPE, ROPE, LATENT, VALUE = 128, 64, 512, 128
"""Widths that the kernels are written for."""

WIDTH = LATENT + ROPE
TILE = 64
"""Cached rows that one product takes."""

FOURS = 16
"""Tokens up to which four blocks add up a head's splits, not two."""

LOG2_E = 1.4426950408889634


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
    nope: int
    rope: int
    value: int
    latent: int
    eps: float
    scale: float

    @property
    def has_own_kernels(self) -> bool:
        """Whether the CUDA kernels take these sizes; those in Triton take others too."""
        widths = (self.nope, self.rope, self.value, self.latent) == (NOPE, ROPE, VALUE, LATENT)
        fits = (self.heads <= 32 or self.heads % 32 == 0) and self.page_size % 8 == 0
        return widths and fits and self.pitch % 8 == 0

    @property
    def sizes(self) -> mla.Sizes:
        return mla.Sizes(
            tokens=self.tokens,
            sequences=self.sequences,
            pages=self.pages,
            page_size=self.page_size,
            heads=self.heads,
            nope=self.nope,
            rope=self.rope,
            value=self.value,
            latent=self.latent,
            head_pitch=self.nope,
            scale=self.scale,
        )

    @property
    def rows(self) -> mla.Rows:
        return mla.Rows(
            tokens=self.tokens,
            pitch=self.pitch,
            latent=self.latent,
            pairs=self.rope // 2,
            eps=self.eps,
        )

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
        early: Tiles that are announced to L2, beyond those that shared memory takes, before the
            launches before have ended.
        smallest: Rows below which a run is not split.
        even: Whether runs are of `smallest` rows each, however many there are, and a token's are
            added up in one order, however many tokens there are.
    """

    paired: int = 0
    splits: int
    early: int = 0
    smallest: int = TILE
    even: bool = False

    @property
    def name(self) -> str:
        kind = "even" if self.even else "paired" if self.paired else "single"
        return f"{kind}.splits{self.splits}.rows{self.smallest}.early{self.early}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """How one launch does all of it.

    Attributes:
        tile: Cached rows that a block takes at a time.
        buffers: Tiles that it holds.
    """

    tile: int
    buffers: int

    @property
    def name(self) -> str:
        return f"short.tile{self.tile}.buffers{self.buffers}"


def tactics(target: Target, shape: Shape) -> list[Tactic]:
    """Best guess first."""
    short = [short_tactic(shape, config) for config in short_configs(shape)]
    return [*short, *(tactic(target, shape, config) for config in configs(target, shape))]


RUN = 512
"""Rows of a run in batch-invariant engines: as few as leave the longest contexts' sums small."""


def pinned(target: Target, shape: Shape) -> list[Tactic]:
    """Runs of as many rows whatever the batch and the context: for batch-invariant engines."""
    splits = max(1, -(-shape.context // RUN))
    return [tactic(target, shape, Config(splits=splits, smallest=RUN, even=True))]


def configs(target: Target, shape: Shape) -> list[Config]:
    """What is worth choosing between: splits that fill the device once, two tokens a block."""
    sms = target.sms or 1
    found = []
    for paired in (0, 1):
        if paired and shape.tokens * shape.blocks == shape.sequences:
            continue
        units = shape.tokens * shape.blocks
        groups = -(-units // 2) if paired else units
        splits = max(1, min(sms // groups, -(-shape.context // TILE)))
        found.append(Config(paired=paired, splits=_level(shape, splits)))
    return found


def _level(shape: Shape, most: int) -> int:
    """At the most so many splits: fewer of whole tiles, where these are hardly longer."""
    tiles = -(-shape.context // TILE)
    each = -(-tiles // most)
    return -(-tiles // each) if each * most <= 1.04 * tiles else most


def short_configs(shape: Shape) -> list[Short]:
    """One launch where few blocks read few rows: every two heads read all of them."""
    if _quads(shape) > 4 or shape.context > 8 * TILE:
        return []
    return [Short(tile=64, buffers=1)]


def _quads(shape: Shape) -> int:
    """Up to four tokens of one sequence, at the most."""
    return max(1, (shape.tokens + 3 * shape.sequences) // 4)


def short_tactic(shape: Shape, config: Short) -> Tactic:
    heads, tile = -(-shape.heads // 2), config.tile
    small = 8 * (WIDTH * 2 + 16) + 16 * KIB + KIB + 8 * 144 + 8 * 68
    shares = 128 // tile * 8 * (tile + 4) * 4 + 8 * (2 * tile + 16)
    shared = config.buffers * tile * WIDTH * 2 + small + shares
    weights = shape.heads * (NOPE + VALUE) * LATENT * 2
    launch = Launch(
        kernel=Kernel(
            language="cuda",
            source="kernels/mla_short.cu",
            entry="mla_short",
            arguments=(
                ("a", "*bf16"), ("q", "*bf16"), ("kv_weight", "*bf16"), ("cos", "*f32"),
                ("sin", "*f32"), ("cache", "*bf16"), ("rows", "*i32"), ("page_table", "*i32"),
                ("offsets", "*i32"), ("positions", "*i32"), ("w_k", "*bf16"), ("w_v", "*bf16"),
                ("y", "*bf16"), ("tokens", "i32"), ("sequences", "i32"), ("pages", "i32"),
                ("page_count", "i32"), ("pitch", "i32"), ("eps", "f32"), ("scale", "f32"),
            ),
            constants=(
                ("BUFFERS", config.buffers), ("HEADS", shape.heads), ("PAGE", shape.page_size),
                ("SHARED_BYTES", shared), ("TILE", tile),
            ),
            warps=8,
            shared_bytes=shared,
            features=("bulk",),
        ),
        grid=(8 * heads, _quads(shape), 1),
        cluster=(8, 1, 1),
        operands=(
            *map(Operand, ("a", "q", "kv_weight", "cos", "sin", "cache", "rows", "page_table")),
            *map(Operand, ("offsets", "positions", "w_k", "w_v", "y")), shape.tokens,
            shape.sequences, shape.pages, shape.page_count, shape.pitch, shape.eps,
            shape.scale * LOG2_E,
        ),
        dependent=True,
        moved_bytes=weights + _quads(shape) * heads * shape.context * WIDTH * 2,
        flops=2.0 * _quads(shape) * heads * 8 * shape.context * (WIDTH + LATENT),
        rate="bf16",
        blocks_per_sm=2,
    )  # fmt: skip
    return Tactic(
        name=config.name,
        launches=(launch,),
        config={"tile": tile, "buffers": config.buffers},
        sums=None,
    )


def tactic(target: Target, shape: Shape, config: Config) -> Tactic:
    columns = shape.all_columns
    partial = config.splits * columns * LATENT * 2
    return Tactic(
        name=config.name,
        launches=(_absorb(shape), _attend(shape, config), _combine(target, shape, config)),
        workspaces=(
            Workspace(name="queries", bytes=columns * WIDTH * 2),
            Workspace(name="partial", bytes=partial),
            Workspace(name="stats", bytes=config.splits * columns * 8),
        ),
        config={"splits": config.splits, "paired": config.paired, "early": config.early},
        sums=f"runs of {config.smallest}" if config.even else None,
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
            warps=2,
            features=("bulk",),
        ),
        grid=(4 * padded * runs + -(-shape.tokens // 2), 1, 1),
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
    needed = 2 * TILE * WIDTH * 2 + shape.columns * units * (WIDTH * 2 + 128) + 2 * KIB
    groups = _groups(shape, config.paired)
    read = groups * shape.context * WIDTH * 2
    return Launch(
        kernel=Kernel(
            language="cuda",
            source="kernels/mla_attend.cu",
            entry="mla_attend",
            arguments=(
                ("queries", "*u8"), ("cache", "*u8"), ("page_table", "*i32"), ("offsets", "*i32"),
                ("positions", "*i32"), ("partial", "*u8"), ("stats", "*f32"), ("tokens", "i32"),
                ("sequences", "i32"), ("pages", "i32"), ("page_count", "i32"),
            ),
            constants=(
                ("COLUMNS", shape.columns), ("EARLY", config.early), ("HEAD_BLOCKS", shape.blocks),
                ("PAGE", shape.page_size), ("PAIRED", config.paired), ("SMALLEST", config.smallest),
            ),
            warps=4 * (units + 1),
            shared_bytes=needed,
            features=("bulk", "wgmma"),
        ),
        grid=(groups, config.splits, 1),
        operands=(
            *map(Operand, ("queries", "cache", "page_table", "offsets", "positions", "partial")),
            Operand("stats"), shape.tokens, shape.sequences, shape.pages, shape.page_count,
        ),
        dependent=True,
        moved_bytes=read + config.splits * shape.all_columns * LATENT * 2,
        flops=2.0 * groups * units * shape.columns * shape.context * (WIDTH + LATENT),
        rate="bf16",
    )  # fmt: skip


def _combine(target: Target, shape: Shape, config: Config) -> Launch:
    weights = shape.heads * VALUE * LATENT * 2
    parts = 4 if shape.tokens <= FOURS and not config.even else 2
    # Blocks that fit at once; each goes on to further tokens.
    lines = max(1, 3 * (target.sms or 1) // (4 * shape.heads))
    return Launch(
        kernel=Kernel(
            language="cuda",
            source="kernels/mla_combine.cu",
            entry="mla_combine",
            arguments=(
                ("partial", "*u8"), ("stats", "*f32"), ("w_v", "*bf16"), ("y", "*bf16"),
                ("tokens", "i32"),
            ),
            constants=(
                ("COLUMNS", shape.columns), ("HEADS", shape.heads), ("PARTS", parts),
                ("SPLITS", config.splits), *((("EVEN", 1),) if config.even else ()),
            ),
            warps=8,
            features=("bulk",),
        ),
        grid=(4 * shape.heads, min(lines, -(-shape.tokens // 8)), 1),
        cluster=(parts, 1, 1),
        operands=(*map(Operand, ("partial", "stats", "w_v", "y")), shape.tokens),
        dependent=True,
        moved_bytes=weights + config.splits * shape.all_columns * LATENT * 2,
        flops=2.0 * max(8, shape.tokens) * weights / 2,
        rate="bf16",
        blocks_per_sm=3,
    )  # fmt: skip
