"""Tactics of `experts.cu`: experts of 1 to 64 tokens, weights of those that are hit read once.

Shared memory of a block is worked out here and in the CUDA file, which asserts that both agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lingc.kernel import Kernel, Launch, Tactic, Tensor, Workspace, align
from lingc.targets.spec import Target

FORMATS = ("bf16", "fp8", "int4")
MOST_TOKENS = 64

TILE_ROWS = 16
PIECE = 1024
PIECE_K = {"bf16": 32, "fp8": 64, "int4": 128}
BLOCK = 128
_BUFFERS = 4
_SM_BYTES = 228 * 1024
BLOCK_BYTES = 1024
"""Shared memory of a multiprocessor (Hopper), and what the system keeps of it for every block."""

_BUCKETS = (1, 4, 8, 16, 32, 64)

_WEIGHT = {"bf16": "*bf16", "fp8": "*f8e4m3", "int4": "*i32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a layer's experts, and how many tokens there are.

    Attributes:
        width: Channels of the residual stream, D.
        inner: Of one expert, F.
        experts: Routed ones, E.
        shared: 1 where one more serves every token.
        group: Of INT4 along K.
        pitch: Columns of x.
        most: Tokens that kernels are to be compiled for; the next of `_BUCKETS` where 0.
    """

    tokens: int
    width: int
    inner: int
    experts: int
    top_k: int
    shared: int
    format: str
    group: int
    pitch: int
    eps: float = 0.0
    most: int = 0

    @property
    def slots(self) -> int:
        return self.top_k + self.shared

    @property
    def bucket(self) -> int:
        """Tokens that a kernel is compiled for."""
        return self.most or next(n for n in _BUCKETS if n >= self.tokens)

    @property
    def x_bytes(self) -> int:
        return 1 if self.format == "fp8" else 2

    @property
    def scale_type(self) -> str:
        return "*f32" if self.format == "fp8" else "*bf16"

    @property
    def hit(self) -> float:
        """Experts that are hit, under uniform and independent routing, the shared one with them."""
        missed = (1 - self.top_k / self.experts) ** self.tokens
        return self.experts * (1 - missed) + self.shared

    def matrix_bytes(self, rows: int, columns: int) -> float:
        """Of one expert's matrix and its scales."""
        numbers = rows * columns
        if self.format == "bf16":
            return 2.0 * numbers
        if self.format == "fp8":
            return numbers + 4.0 * numbers / BLOCK**2
        return numbers / 2 + 2.0 * numbers / self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What may be chosen.

    Attributes:
        warps: Of a block; K is split among them.
        stage: Pieces of one copy.
        depth: Stages of a warp's ring.
        blocks: Blocks a multiprocessor.
        waves: Of the grid of `expert_up`; 0 for a block a tile.
        prepared: Whether rows are normed and quantized by a launch of their own.
    """

    warps: int
    stage: int
    depth: int
    blocks: int
    waves: int = 1
    prepared: bool = False

    def name(self, kind: str) -> str:
        first = "prepare." if self.prepared else ""
        name = f"{kind}.{first}w{self.warps}.s{self.stage}.d{self.depth}.b{self.blocks}"
        return name if kind == "down" else f"{name}.x{self.waves}"


def _stage_bytes(shape: Shape, config: Config) -> int:
    scales = 0
    if shape.format == "int4":
        scales = config.stage * PIECE_K["int4"] // shape.group * TILE_ROWS * 2
    return config.stage * PIECE + scales


def exclusive(shared: int, blocks: int) -> int:
    """At least so much shared memory that no more blocks fit on a multiprocessor.

    Blocks begin while those of other kernels are still there. Were there room for one more than a
    multiprocessor's share, some would get it and others too few, and all would wait for the first.
    """
    return max(shared, align(_SM_BYTES // (blocks + 1) - BLOCK_BYTES + 1, 128))


def _hits(shape: Shape) -> int:
    return min(shape.bucket * shape.top_k, shape.experts)


def _scaled(shape: Shape) -> bool:
    """Whether x has a scale for every 128 channels."""
    return shape.format == "fp8" or (shape.format == "int4" and shape.bucket == 1)


def up_shared_bytes(shape: Shape, config: Config) -> int:
    """Of one block of `expert_up`, as the CUDA file lays it out."""
    warps, tokens = config.warps, shape.bucket
    part, columns = shape.width // warps, min(tokens, 8)
    blocks = part // BLOCK if _scaled(shape) else 0
    used = warps * config.depth * _stage_bytes(shape, config)
    used += warps * part * shape.x_bytes * columns
    used += _BUFFERS * warps * (16 if tokens == 1 else 128) * 4
    used += warps * columns * blocks * 4
    used = align(used + columns * warps * 4, 8)
    used += (warps * config.depth + 2 * _BUFFERS) * 8
    if tokens == 1:
        return used + warps * shape.top_k * 4
    return used + 4 + _hits(shape) * 12 + tokens * shape.top_k * 4


def down_shared_bytes(shape: Shape, config: Config) -> int:
    """Of one block of `expert_down`, as the CUDA file lays it out."""
    warps, tokens = config.warps, shape.bucket
    part = shape.inner // warps
    blocks = part // BLOCK if shape.format == "fp8" else 0
    own = tokens == 1 or (shape.format == "fp8" and not config.prepared)
    rows = tokens * shape.slots if own else 0
    listed = shape.slots if tokens == 1 else _hits(shape) + shape.shared
    used = warps * config.depth * _stage_bytes(shape, config)
    used += warps * rows * part * shape.x_bytes
    used += warps * tokens * TILE_ROWS * 4
    used += warps * config.depth * 8
    used += warps * (rows + listed) * blocks * 4
    return used + 4 + listed * 12 + tokens * shape.slots * 8


def _constants(shape: Shape, config: Config, kind: str, shared: int) -> dict[str, int]:
    return {
        kind: 1,
        "FORMAT": FORMATS.index(shape.format),
        "GROUP": shape.group if shape.format == "int4" else BLOCK,
        "WIDTH": shape.width,
        "INNER": shape.inner,
        "EXPERTS": shape.experts,
        "TOP_K": shape.top_k,
        "SHARED": shape.shared,
        "TOKENS": shape.bucket,
        "PREPARED": int(config.prepared),
        "WARPS": config.warps,
        "BLOCKS": config.blocks,
        "STAGE": config.stage,
        "DEPTH": config.depth,
        "BYTES": shared,
    }


def _prepare(shape: Shape, rows: int, row: int, source: str, norm: bool) -> Launch:  # noqa: FBT001
    warps = min(8, max(1, row // 512))
    fp8 = shape.format == "fp8"
    kernel = Kernel(
        language="cuda",
        source="kernels/experts.cu",
        entry="prepare_rows",
        arguments=(
            ("x", "*bf16"), ("norm_weight", "*bf16"), ("rows", "*u8"), ("scales", "*f32"),
            ("pitch", "i32"), ("eps", "f32"),
        ),
        constants=(
            ("ROW", row), ("NORM", int(norm)), ("FORMAT", FORMATS.index(shape.format)),
            ("GROUP", BLOCK), ("WARPS", warps),
        ),
        warps=warps,
        features=("bulk", "fp8"),
    )  # fmt: skip
    return Launch(
        kernel=kernel,
        grid=(rows, 1, 1),
        operands=(
            Tensor(source), Tensor("norm_weight") if norm else None, Tensor("rows"),
            Tensor("row_scales") if fp8 else None, shape.pitch if norm else row, shape.eps,
        ),
        dependent=True,
        moved_bytes=rows * row * (2.0 + shape.x_bytes),
        blocks_per_sm=8,
    )  # fmt: skip


def _rows_space(shape: Shape, rows: int, row: int) -> tuple[Workspace, ...]:
    made = [Workspace(name="rows", bytes=rows * row * shape.x_bytes)]
    if shape.format == "fp8":
        made.append(Workspace(name="row_scales", bytes=rows * row // BLOCK * 4))
    return tuple(made)


def _config(config: Config) -> dict[str, int | str]:
    return {
        "warps": config.warps, "stage": config.stage, "depth": config.depth,
        "blocks": config.blocks, "waves": config.waves, "prepared": int(config.prepared),
    }  # fmt: skip


def up_tactic(shape: Shape, config: Config, sms: int) -> Tactic:
    """`expert_up`, after `prepare_rows` where the config says so."""
    shared = up_shared_bytes(shape, config)
    kernel = Kernel(
        language="cuda",
        source="kernels/experts.cu",
        entry="expert_up",
        arguments=(
            ("x", "*bf16"), ("norm_weight", "*bf16"), ("x_scales", "*f32"), ("ids", "*i32"),
            ("pairs", "*i32"), ("starts", "*i32"), ("gate_up", _WEIGHT[shape.format]),
            ("scale", shape.scale_type), ("a", "*bf16"), ("tokens", "i32"), ("pitch", "i32"),
            ("eps", "f32"),
        ),
        constants=tuple(_constants(shape, config, "UP", shared).items()),
        warps=config.warps,
        shared_bytes=exclusive(shared, config.blocks),
        features=("bulk", "fp8"),
    )  # fmt: skip
    tiles = shape.inner // 8
    most = (min(shape.tokens * shape.top_k, shape.experts) + shape.shared) * tiles
    each = shape.matrix_bytes(2 * shape.inner, shape.width)
    columns = max(8.0, shape.tokens * shape.slots / shape.hit)
    prepared = config.prepared
    launch = Launch(
        kernel=kernel,
        grid=(min(most, sms * config.blocks * config.waves or most), 1, 1),
        operands=(
            Tensor("rows" if prepared else "x"), None if prepared else Tensor("norm_weight"),
            Tensor("row_scales") if prepared and shape.format == "fp8" else None, Tensor("ids"),
            Tensor("pairs"), Tensor("starts"), Tensor("gate_up"), Tensor("scale"), Tensor("a"),
            shape.tokens, shape.pitch, shape.eps,
        ),
        dependent=True,
        moved_bytes=shape.hit * each,
        flops=2.0 * shape.hit * 2 * shape.inner * shape.width * columns,
        rate="bf16",
        blocks_per_sm=config.blocks,
        tokens=shape.tokens if shape.most else 0,
    )  # fmt: skip
    if not prepared:
        return Tactic(name=config.name("up"), launches=(launch,), config=_config(config))
    rows = _prepare(shape, shape.tokens, shape.width, "x", norm=True)
    return Tactic(
        name=config.name("up"),
        launches=(rows, launch),
        workspaces=_rows_space(shape, shape.tokens, shape.width),
        config=_config(config),
    )


def down_tactic(shape: Shape, config: Config) -> Tactic:
    """`expert_down`, after `prepare_rows` where the config says so."""
    if shape.format != "fp8":
        config = replace(config, prepared=False)
    shared = down_shared_bytes(shape, config)
    kernel = Kernel(
        language="cuda",
        source="kernels/experts.cu",
        entry="expert_down",
        arguments=(
            ("a", "*bf16"), ("a_scales", "*f32"), ("ids", "*i32"), ("weights", "*f32"),
            ("pairs", "*i32"), ("starts", "*i32"), ("down", _WEIGHT[shape.format]),
            ("scale", shape.scale_type), ("residual", "*bf16"), ("y", "*bf16"), ("tokens", "i32"),
        ),
        constants=tuple(_constants(shape, config, "DOWN", shared).items()),
        warps=config.warps,
        shared_bytes=exclusive(shared, config.blocks),
        features=("bulk", "fp8"),
    )  # fmt: skip
    each = shape.matrix_bytes(shape.width, shape.inner)
    columns = max(8.0, shape.tokens * shape.slots / shape.hit)
    prepared = config.prepared
    launch = Launch(
        kernel=kernel,
        grid=(shape.width // TILE_ROWS, 1, 1),
        operands=(
            Tensor("rows" if prepared else "a"), Tensor("row_scales") if prepared else None,
            Tensor("ids"), Tensor("weights"), Tensor("pairs"), Tensor("starts"), Tensor("down"),
            Tensor("scale"), Tensor("residual"), Tensor("y"), shape.tokens,
        ),
        dependent=True,
        moved_bytes=shape.hit * each,
        flops=2.0 * shape.hit * shape.inner * shape.width * columns,
        rate="bf16",
        blocks_per_sm=config.blocks,
        tokens=shape.tokens if shape.most else 0,
    )  # fmt: skip
    if not prepared:
        return Tactic(name=config.name("down"), launches=(launch,), config=_config(config))
    count = shape.tokens * shape.slots
    return Tactic(
        name=config.name("down"),
        launches=(_prepare(shape, count, shape.inner, "a", norm=False), launch),
        workspaces=_rows_space(shape, count, shape.inner),
        config=_config(config),
    )


# ----------------------------------------------------------------------------------------- choice

_C = Config
_UP: dict[tuple[str, bool], tuple[Config, ...]] = {
    ("fp8", True): (
        _C(warps=8, stage=4, depth=2, blocks=2),
        _C(warps=16, stage=2, depth=2, blocks=2),
        _C(warps=16, stage=4, depth=2, blocks=1),
    ),
    ("bf16", True): (
        _C(warps=8, stage=4, depth=3, blocks=2),
        _C(warps=8, stage=4, depth=2, blocks=2),
        _C(warps=16, stage=4, depth=2, blocks=1),
    ),
    ("int4", True): (
        _C(warps=8, stage=4, depth=2, blocks=2),
        _C(warps=8, stage=2, depth=5, blocks=2),
    ),
    ("fp8", False): (
        _C(warps=8, stage=2, depth=4, blocks=2),
        _C(warps=8, stage=2, depth=3, blocks=2, waves=2),
    ),
    ("bf16", False): (
        _C(warps=8, stage=2, depth=3, blocks=2),
        _C(warps=8, stage=2, depth=6, blocks=1),
    ),
    ("int4", False): (
        _C(warps=8, stage=2, depth=3, blocks=2),
        _C(warps=8, stage=2, depth=6, blocks=1),
    ),
}
"""By format and whether it is one token. So much shared memory or so many registers that exactly
`blocks` fit: a block that finds a multiprocessor with room for one more than its share makes all
wait."""

_PREPARED = (
    _C(warps=8, stage=2, depth=3, blocks=2, waves=2, prepared=True),
    _C(warps=8, stage=2, depth=3, blocks=2, waves=4, prepared=True),
    _C(warps=8, stage=2, depth=4, blocks=1, prepared=True),
)

_DOWN: dict[str, tuple[Config, ...]] = {
    "fp8": tuple(_C(warps=8, stage=2, depth=d, blocks=2) for d in (5, 4, 3, 2)),
    "bf16": tuple(_C(warps=8, stage=2, depth=d, blocks=2) for d in (5, 4, 3)),
    "int4": tuple(_C(warps=8, stage=1, depth=d, blocks=2) for d in (9, 7, 4)),
}
_PREPARE_FROM = 9
_PREPARE_DOWN_FROM = 5
"""Tokens from which on a launch that quantizes each row once costs less than blocks that all do."""


def refusal(target: Target, shape: Shape, *, lists: bool) -> str | None:
    """Why these kernels cannot run experts of few tokens, or None.

    Args:
        lists: Whether `pairs` and `starts` are there.
    """
    unit = {"bf16": 64, "fp8": BLOCK, "int4": BLOCK}[shape.format]
    rules = (
        (shape.tokens > MOST_TOKENS, f"{shape.tokens} tokens are more than {MOST_TOKENS}"),
        (
            shape.tokens > 1 and not lists,
            f"{shape.tokens} tokens without lists of their experts' pairs",
        ),
        (
            shape.width % unit or shape.inner % unit,
            f"{shape.width} and {shape.inner} channels are not multiples of {unit}",
        ),
        (
            shape.format == "int4" and shape.group not in {32, BLOCK},
            f"INT4 groups of {shape.group} are neither 32 nor {BLOCK}",
        ),
        (shape.top_k > 32, f"{shape.top_k} experts of a token are more than 32"),
        (shape.pitch % 8, f"rows of {shape.pitch} columns are not aligned to 16 bytes"),
        (
            target.smem_per_block_bytes is None,
            f"how much shared memory a block of {target.name} may have is not known",
        ),
    )
    for broken, reason in rules:
        if broken:
            return reason
    if not up_tactics(target, shape) or not down_tactics(target, shape):
        return f"{shape.width} and {shape.inner} channels do not fit in shared memory"
    return None


def up_tactics(target: Target, shape: Shape) -> tuple[Tactic, ...]:
    """Of `expert_up` for up to 64 tokens, best guess first."""
    tokens = shape.most or shape.tokens
    chosen = _PREPARED if tokens >= _PREPARE_FROM else _UP[shape.format, tokens == 1]
    if 4 < tokens < _PREPARE_FROM:
        chosen = (*chosen, *_PREPARED[1:])
    return tuple(
        up_tactic(shape, config, target.sms or 1)
        for config in _fitting(shape, chosen, shape.width)
        if up_shared_bytes(shape, config) + BLOCK_BYTES <= (target.smem_per_block_bytes or 0)
    )


def down_tactics(target: Target, shape: Shape) -> tuple[Tactic, ...]:
    """Of `expert_down` for up to 64 tokens: the deepest rings that leave room for a block more.

    Where none does, those that fit at all.
    """
    tokens = shape.most or shape.tokens
    prepared = shape.format == "fp8" and tokens >= _PREPARE_DOWN_FROM
    chosen = tuple(replace(config, prepared=prepared) for config in _DOWN[shape.format])
    fitting = list(_fitting(shape, chosen, shape.inner))
    most = target.smem_per_block_bytes or 0
    for limit in ((most + BLOCK_BYTES) // 2, most):
        good = [c for c in fitting if down_shared_bytes(shape, c) + BLOCK_BYTES <= limit]
        if good:
            wave = _one_wave(target, shape, good[0])
            return tuple(down_tactic(shape, config) for config in (*wave, *good[:3]))
    return ()


_SHORT_RINGS = {"fp8": 2, "bf16": 1, "int4": 6}


def _one_wave(target: Target, shape: Shape, config: Config) -> list[Config]:
    """As many blocks a multiprocessor as take all tiles at once, on a device with few of them.

    Their rings are shorter. For few tokens: more would not find the registers.
    """
    blocks = -(-shape.width // TILE_ROWS // (target.sms or shape.width))
    made = replace(config, depth=_SHORT_RINGS[shape.format], blocks=blocks)
    fits = blocks * (down_shared_bytes(shape, made) + BLOCK_BYTES) <= _SM_BYTES
    few = (shape.most or shape.tokens) <= 4
    return [made] if few and config.blocks < blocks <= 4 and fits else []


def _fitting(shape: Shape, chosen: tuple[Config, ...], channels: int) -> Iterator[Config]:
    """Configurations whose stages and slices divide the channels: shorter, then fewer."""
    found = list[Config]()
    for config in chosen:
        stage, warps = config.stage, config.warps
        least = 2 if shape.format == "fp8" else 1
        while stage > least and channels % (stage * PIECE_K[shape.format] * warps):
            stage //= 2
        while warps > 1 and channels % (stage * PIECE_K[shape.format] * warps):
            warps //= 2
        blocks = _scaled(shape) and channels // warps > 16 * BLOCK
        fits = channels % (stage * PIECE_K[shape.format] * warps) == 0 and not blocks
        made = replace(config, stage=stage, warps=warps)
        if fits and made not in found:
            found.append(made)
    yield from found
