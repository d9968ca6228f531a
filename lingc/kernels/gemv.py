"""Tactics of `gemv.cu` and its like: one read of the weights for 1 to 64 tokens.

`gemv.cu` multiplies with each warp by itself, on every architecture with bulk copies and for every
format; `gemv_wgmma.cu` with warpgroups, on Hopper, for BF16 and FP8; `gemv_int4.cu` as integers,
INT4 by up to 4 tokens. All hold their tokens in shared memory. Where there is no room for all of
them, a tactic launches once for every few tokens and reads the weights as often.

Shared memory of a block is worked out here and in the CUDA files, which assert that both agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lingc.kernel import Kernel, Launch, Tactic, Tensor
from lingc.targets.spec import KIB, Target

FORMATS = ("bf16", "fp8", "int4")
BEFORE = ("none", "rms_norm", "group_norm_gate")
AFTER = ("none", "swiglu")
INT4_GROUPS = (32, 128)

ROWS = 16
PIECE = 1024
PIECE_K = {"bf16": 32, "fp8": 64, "int4": 128}
BUFFERS = 4
STAGE = 4096
MOST_TOKENS = 64
MOST_WHOLE = 4
"""Tokens of which high and low bytes are the eight columns of a product."""
MOST_TACTICS = 4
BUCKETS = (1, 2, 4, 8, 16)
"""Numbers of tokens that kernels are compiled for."""

_SMALL_SHARED = 99 * KIB
"""Shared memory of a block where a target does not say: what every architecture here has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is asked for: sizes and kinds of a fused linear.

    Attributes:
        rows: N, of the weight.
        width: K.
        group: Of INT4 along K.
        groups: Of the group norm.
        x_pitch: Columns of x.
        gate_pitch: Columns of the gate's tensor; 0 where there is none.
        wide: Whether y is f32.
        most: Tokens that the kernel is to be compiled for; the next of `BUCKETS` where 0.
    """

    tokens: int
    rows: int
    width: int
    format: str
    group: int
    before: str
    after: str
    groups: int
    residual: bool
    wide: bool
    x_pitch: int
    gate_pitch: int
    eps: float
    most: int = 0

    @property
    def pieces(self) -> int:
        """Of a stage: two where K allows and enough stages remain to share among warps."""
        piece = PIECE_K[self.format]
        even = self.width % (2 * piece) == 0
        return 2 if even and (self.format == "fp8" or self.width // piece >= 8) else 1

    @property
    def stage_k(self) -> int:
        """Channels of a stage of `gemv.cu`."""
        return self.pieces * PIECE_K[self.format]

    @property
    def stages(self) -> int:
        """Of a tile of 16 rows."""
        return self.width // self.stage_k

    @property
    def stage_bytes(self) -> int:
        """Of codes and INT4 scales."""
        scales = self.stage_k // self.group * ROWS * 2 if self.format == "int4" else 0
        return self.pieces * PIECE + scales

    @property
    def bucket(self) -> int:
        """Tokens that the kernel is compiled for."""
        return self.most or next(n for n in BUCKETS if n >= self.tokens)

    @property
    def norms(self) -> int:
        """Groups of channels that are normed each by itself."""
        return self.groups if self.before == "group_norm_gate" else 1

    @property
    def outputs(self) -> int:
        """Columns of y."""
        return self.rows // 2 if self.after == "swiglu" else self.rows

    @property
    def wide_stages(self) -> int:
        """Stages of a tile in `gemv_wgmma.cu`; 0 where K is no multiple of one."""
        channels = 4 * PIECE_K[self.format]
        return 0 if self.width % channels else self.width // channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrow:
    """What may be chosen of `gemv.cu`.

    Attributes:
        warps: Of a block; K is split among them.
        depth: Stages of a warp's ring.
        ahead: Stages a warp brings into L2 beyond its ring before it waits.
        blocks: Blocks a multiprocessor.
        beside: Whether a block takes no more shared memory than it needs, so that one of the next
            launch begins beside it.
    """

    warps: int
    depth: int
    ahead: int = 0
    blocks: int = 1
    beside: bool = False

    @property
    def name(self) -> str:
        more = f".blocks{self.blocks}" if self.blocks > 1 else ".beside" if self.beside else ""
        return f"gemv.warps{self.warps}.depth{self.depth}{more}"

    def shared_bytes(self, shape: Shape) -> int:
        """Of one block, as `gemv.cu` lays it out."""
        warps, tokens = self.warps, shape.bucket
        most = -(-shape.stages // warps)
        columns = -(-tokens // 8)
        codes = shape.format == "fp8" and tokens > 8
        if codes:
            pad = 64
        elif shape.format == "fp8":
            pad = 16
        else:
            pad = 64 if shape.format == "bf16" or shape.group == 32 else 32
        pitch = most * shape.stage_k * (1 if codes else 2) + (pad if tokens > 1 else 0)
        used = warps * self.depth * shape.stage_bytes + warps * tokens * pitch
        if shape.format == "fp8":
            used += warps * most * columns * 8 * 4
        used = -(-(used + tokens * warps * 4) // 16) * 16
        used += BUFFERS * warps * (ROWS if tokens == 1 else columns * 128) * 4
        return used + (warps * self.depth + 2 * BUFFERS) * 8

    def suits(self, shape: Shape) -> bool:
        """Whether K can be split so."""
        most = -(-shape.stages // self.warps)
        columns = -(-shape.bucket // 8)
        split = shape.stages >= self.warps >= columns and most <= 32
        return split and self.warps % shape.norms == 0 and shape.stages % shape.norms == 0

    def launch(self, shape: Shape, sms: int, room: int) -> Launch:
        """Of all tokens of a shape."""
        shared = self.shared_bytes(shape)
        if self.blocks == 1 and not self.beside:
            shared = max(shared, _alone(room))
        constants = {
            **_constants(shape),
            "PIECES": shape.pieces,
            "GROUP": shape.group if shape.format == "int4" else 128,
            "WARPS": self.warps,
            "DEPTH": self.depth,
            "AHEAD": self.ahead,
            "SHARED": shared,
        }
        kernel = _kernel(shape, "kernels/gemv.cu", constants, self.warps, shared, ())
        return _launch(shape, kernel, sms * self.blocks, self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wide:
    """What may be chosen of `gemv_wgmma.cu`.

    Attributes:
        groups: Warpgroups of a block; K is split among them.
        slots: Stages of 4 KiB that a warpgroup holds.
        buffers: Tiles whose sums are under way.
    """

    groups: int
    slots: int
    buffers: int = BUFFERS

    @property
    def name(self) -> str:
        return f"gemv.wgmma{self.groups}.slots{self.slots}"

    def shared_bytes(self, shape: Shape) -> int:
        """Of one block, as `gemv_wgmma.cu` lays it out."""
        tokens, warps = shape.bucket, 4 * self.groups
        padded = tokens + tokens % 2
        most = -(-shape.wide_stages // self.groups)
        used = self.groups * (self.slots * STAGE + most * padded * 256)
        if shape.format == "fp8":
            used += self.groups * most * 2 * padded * 4
        used += tokens * warps * 4 + self.buffers * warps * padded * ROWS * 4
        return used + (2 * self.groups * self.slots + 2 * self.buffers) * 8

    def suits(self, shape: Shape) -> bool:
        """Whether K can be split so."""
        stages = shape.wide_stages
        if shape.format == "int4" or stages < self.groups or -(-stages // self.groups) > 16:
            return False
        return self.groups % shape.norms == 0 and stages % shape.norms == 0

    def launch(self, shape: Shape, sms: int, room: int) -> Launch:
        """Of all tokens of a shape."""
        shared = max(self.shared_bytes(shape), _alone(room))
        fit = 2 if shape.bucket <= 8 else 1  # by registers, for the kernels before and after
        constants = {
            **_constants(shape),
            "WGS": self.groups,
            "SLOTS": self.slots,
            "BUFFERS": self.buffers,
            "FIT": fit,
            "SHARED": shared,
        }
        warps = 4 * self.groups + 1
        kernel = _kernel(shape, "kernels/gemv_wgmma.cu", constants, warps, shared, ("wgmma",))
        return _launch(shape, kernel, sms, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What may be chosen of `gemv_int4.cu`.

    Attributes:
        tiles: Of 16 rows that one copy brings, with all of K.
        warps: That multiply; K of a tile is split among those of a tile.
        depth: Stages in shared memory.
        blocks: Blocks a multiprocessor.
    """

    tiles: int
    warps: int
    depth: int
    blocks: int = 1

    @property
    def name(self) -> str:
        more = f".blocks{self.blocks}" if self.blocks > 1 else ""
        return f"gemv.int4.tiles{self.tiles}.warps{self.warps}.depth{self.depth}{more}"

    def shared_bytes(self, shape: Shape) -> int:
        """Of one block, as `gemv_int4.cu` lays it out."""
        tokens, pieces = shape.bucket, shape.width // PIECE_K["int4"]
        scales = shape.width // shape.group * ROWS * 2
        used = self.depth * self.tiles * (pieces * PIECE + scales)
        used += tokens * (2 * shape.width + 2 * pieces * 4)
        used += BUFFERS * self.warps * tokens * ROWS * 4
        return -(-used // 8) * 8 + (2 * self.depth + 2 * BUFFERS) * 8

    def suits(self, shape: Shape) -> bool:
        """Whether K and the rows can be split so."""
        pieces, slices = shape.width // PIECE_K["int4"], self.warps // self.tiles
        if shape.format != "int4" or shape.bucket > MOST_WHOLE or pieces % slices:
            return False
        even = shape.rows % (ROWS * self.tiles) == 0 and pieces % shape.norms == 0
        return even and pieces // shape.norms % (pieces // slices) == 0

    def launch(self, shape: Shape, sms: int, room: int) -> Launch:
        """Of all tokens of a shape."""
        shared = max(self.shared_bytes(shape), _alone(room, self.blocks))
        constants = {
            **_constants(shape),
            "GROUP": shape.group,
            "TILES": self.tiles,
            "WARPS": self.warps,
            "DEPTH": self.depth,
            "SHARED": shared,
        }
        kernel = _kernel(shape, "kernels/gemv_int4.cu", constants, self.warps + 1, shared, ())
        blocks = min(shape.rows // ROWS // self.tiles, sms * self.blocks)
        return _launch(shape, kernel, blocks, self.blocks)


Config = Narrow | Wide | Whole


def _alone(room: int, blocks: int = 1) -> int:
    """Shared memory of which no more than so many blocks fit on a multiprocessor.

    Launched early, while other kernels' blocks lie unevenly, one block more of a launch would else
    land on one multiprocessor and one too few on another.
    """
    return (room + KIB) // (blocks + 1) // KIB * KIB


def refusal(target: Target, shape: Shape) -> str | None:
    """Why these kernels cannot run a fused linear, or None."""
    piece = 128 if shape.format == "fp8" else PIECE_K[shape.format]
    reasons = (
        (target.arch == "sm_89", f"{target.arch} has no bulk copies"),
        (shape.tokens > MOST_TOKENS, f"{shape.tokens} tokens > {MOST_TOKENS}"),
        (bool(shape.width % piece), f"K = {shape.width} is not a multiple of {piece}"),
        (
            shape.format == "int4" and shape.group not in INT4_GROUPS,
            f"INT4 groups of {shape.group} are none of {INT4_GROUPS}",
        ),
        (bool(shape.rows % ROWS), f"{shape.rows} rows of the weight are not a multiple of {ROWS}"),
        (
            shape.format == "fp8" and shape.after == "swiglu" and bool(shape.rows % 256),
            f"{shape.rows // 2} rows of a gate are not a multiple of 128",
        ),
        (
            bool(shape.x_pitch % 8 or shape.gate_pitch % 8),
            f"rows of {shape.x_pitch} and {shape.gate_pitch} columns are not aligned to 16 bytes",
        ),
    )
    for refused, reason in reasons:
        if refused:
            return reason
    if not any(
        config.suits(replace(shape, tokens=1))
        for config in (*_candidates(target, shape), *_small())
    ):
        return f"{shape.groups} groups of K = {shape.width} channels share a block of {piece}"
    return None


def tactics(target: Target, shape: Shape) -> tuple[Tactic, ...]:
    """Those worth choosing between, best guess first."""
    room = target.smem_per_block_bytes or _SMALL_SHARED
    fits = {config: _at_once(shape, config, room) for config in _candidates(target, shape)}
    if max(fits.values(), default=0) < min(BUCKETS[-1], shape.tokens):
        fits |= {config: _at_once(shape, config, room) for config in _small()}
    most = max(fits.values(), default=0)
    best = [config for config, tokens in fits.items() if tokens == most > 0]
    sms = target.sms or 1
    return tuple(tactic(shape, config, sms, room, most) for config in best[:MOST_TACTICS])


def pinned(target: Target, shape: Shape) -> tuple[Tactic, ...]:
    """The kernels of most tokens, whatever the number of tokens: for batch-invariant engines."""
    room, whole = target.smem_per_block_bytes or _SMALL_SHARED, replace(shape, tokens=BUCKETS[-1])
    fits = {
        config: _at_once(whole, config, room) for config in (*_candidates(target, whole), *_small())
    }
    most = max(fits.values())
    best = [config for config, tokens in fits.items() if tokens == most > 0]
    some = replace(shape, most=most)
    return tuple(
        tactic(some, config, target.sms or 1, room, most) for config in best[:MOST_TACTICS]
    )


def tactic(shape: Shape, config: Config, sms: int, room: int, at_once: int) -> Tactic:
    """One launch for every `at_once` tokens."""
    launches = []
    for start in range(0, shape.tokens, at_once):
        some = replace(shape, tokens=min(at_once, shape.tokens - start))
        launch = config.launch(some, sms, room)
        launches.append(replace(launch, operands=_past(launch, shape, start)))
    return Tactic(name=config.name, launches=tuple(launches))


def _past(launch: Launch, shape: Shape, start: int) -> tuple[Tensor | int | float | None, ...]:
    """Operands that begin at a token."""
    row_bytes = {
        "x": 2 * shape.x_pitch,
        "gate": 2 * shape.gate_pitch,
        "residual": 2 * shape.outputs,
        "y": (4 if shape.wide else 2) * shape.outputs,
    }
    return tuple(
        Tensor(one.name, start * row_bytes[one.name])
        if isinstance(one, Tensor) and one.name in row_bytes
        else one
        for one in launch.operands
    )


def _at_once(shape: Shape, config: Config, room: int) -> int:
    """Tokens of one launch: as many as shared memory holds; 0 where K cannot be split so."""
    for tokens in sorted({min(n, shape.tokens) for n in BUCKETS}, reverse=True):
        some = replace(shape, tokens=tokens)
        if config.suits(some) and config.shared_bytes(some) <= room:
            return tokens
    return 0


def _candidates(target: Target, shape: Shape) -> Iterator[Config]:
    """In the order of what was measured on one H200."""
    hopper = target.arch == "sm_90a"
    if shape.format == "int4":
        yield from _whole(target, shape)
    if shape.format == "fp8" and shape.tokens > 4:
        yield Narrow(warps=16, depth=2)
    if hopper and shape.before == "group_norm_gate" and shape.format == "fp8":
        yield from (Wide(groups=4, slots=6), Wide(groups=4, slots=8))
        if shape.tokens == 1:  # faster among its like, slower in a whole step
            yield Narrow(warps=16, depth=2, beside=True)
    if hopper and shape.width > 8192:
        yield from (Wide(groups=3, slots=8), Wide(groups=4, slots=6))
    if shape.format == "fp8" or shape.rows >= 1 << 16 or shape.width >= 8192:
        yield Narrow(warps=16, depth=3)
        if hopper:
            yield from (Wide(groups=2, slots=12), Wide(groups=4, slots=6))
        yield Narrow(warps=16, depth=2)
    elif shape.format == "int4":
        pair = (Narrow(warps=16, depth=3), Narrow(warps=8, depth=6))
        yield from pair if shape.rows > 4096 else reversed(pair)
        yield Narrow(warps=8, depth=4, blocks=2)
    else:
        yield from (Narrow(warps=8, depth=6), Narrow(warps=16, depth=3), Narrow(warps=12, depth=3))
        if hopper:
            yield Wide(groups=4, slots=4)
    yield from (Narrow(warps=12, depth=4), Narrow(warps=8, depth=4), Narrow(warps=16, depth=2))
    yield from (Narrow(warps=8, depth=3), Narrow(warps=8, depth=2))


def _whole(target: Target, shape: Shape) -> Iterator[Config]:
    """For INT4: all of a block's rows in one copy, or one after the other."""
    many = Whole(tiles=1, warps=16, depth=3)
    few = Whole(tiles=2, warps=16, depth=1)
    yield from (many, few) if shape.rows > 2 * ROWS * (target.sms or 1) else (few, many)
    two = Whole(tiles=1, warps=8, depth=2, blocks=2)
    if shape.tokens == 1 and 2 * two.shared_bytes(shape) <= (target.smem_per_block_bytes or 0):
        yield two
    yield from (Whole(tiles=1, warps=8, depth=3), Whole(tiles=2, warps=2, depth=2))


def _small() -> Iterator[Config]:
    """For K or shared memory that is small."""
    yield from (Narrow(warps=warps, depth=3) for warps in (6, 4, 3, 2, 1))


def _constants(shape: Shape) -> dict[str, int]:
    return {
        "FORMAT": FORMATS.index(shape.format),
        "K": shape.width,
        "BEFORE": BEFORE.index(shape.before),
        "GROUPS": shape.norms,
        "AFTER": AFTER.index(shape.after),
        "RESIDUAL": int(shape.residual),
        "WIDE": int(shape.wide),
        "TOKENS": shape.bucket,
    }


def _kernel(
    shape: Shape, source: str, constants: dict[str, int], warps: int, shared: int,
    features: tuple[str, ...],
) -> Kernel:  # fmt: skip
    return Kernel(
        language="cuda",
        source=source,
        entry="gemv",
        arguments=(
            ("weight", {"bf16": "*bf16", "fp8": "*f8e4m3", "int4": "*i32"}[shape.format]),
            ("scale", "*f32" if shape.format == "fp8" else "*bf16"),
            ("x", "*bf16"),
            ("gate", "*bf16"),
            ("norm_weight", "*bf16"),
            ("residual", "*bf16"),
            ("y", "*f32" if shape.wide else "*bf16"),
            ("tokens", "i32"),
            ("tiles", "i32"),
            ("x_pitch", "i32"),
            ("gate_pitch", "i32"),
            ("eps", "f32"),
        ),
        constants=tuple(constants.items()),
        warps=warps,
        shared_bytes=shared,
        features=("bulk", "fp8", *features),
    )


def _launch(shape: Shape, kernel: Kernel, blocks: int, fit: int) -> Launch:
    tiles = shape.rows // ROWS
    return Launch(
        kernel=kernel,
        grid=(min(tiles, blocks), 1, 1),
        operands=(
            Tensor("weight"), Tensor("scale"), Tensor("x"), Tensor("gate"),
            Tensor("norm_weight"), Tensor("residual"), Tensor("y"),
            shape.tokens, tiles, shape.x_pitch, shape.gate_pitch, shape.eps,
        ),
        dependent=True,
        moved_bytes=float(tiles * shape.stages * shape.stage_bytes),
        flops=2.0 * shape.rows * shape.width * -(-shape.tokens // 8) * 8,
        rate="bf16",
        blocks_per_sm=fit,
        tokens=shape.tokens if shape.most else 0,
    )  # fmt: skip
