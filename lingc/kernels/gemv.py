"""Tactics of `gemv.cu`: one read of the weights for 1 to 16 tokens.

Shared memory of a block is worked out here and in the CUDA file, which asserts that both agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lingc.kernel import Kernel, Launch, Tactic, Tensor

FORMATS = ("bf16", "fp8", "int4")
BEFORE = ("none", "rms_norm", "group_norm_gate")
AFTER = ("none", "swiglu")

ROWS = 16
PIECE = 1024
PIECE_K = {"bf16": 32, "fp8": 64, "int4": 128}
BUFFERS = 4
MOST_TOKENS = 16


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

    @property
    def stage_k(self) -> int:
        """Channels of a stage."""
        return self.pieces * PIECE_K[self.format]

    @property
    def pieces(self) -> int:
        """Of a stage: two where K allows and enough stages remain to share among warps."""
        piece = PIECE_K[self.format]
        even = self.width % (2 * piece) == 0
        return 2 if even and (self.format == "fp8" or self.width // piece >= 8) else 1

    @property
    def stages(self) -> int:
        """Of a tile of 16 rows."""
        return self.width // self.stage_k

    @property
    def stage_bytes(self) -> int:
        """Of codes and INT4 scales."""
        codes = self.stage_k // PIECE_K[self.format] * PIECE
        scales = self.stage_k // self.group * ROWS * 2 if self.format == "int4" else 0
        return codes + scales

    @property
    def bucket(self) -> int:
        """Tokens that the kernel is compiled for."""
        return next(n for n in (1, 2, 4, 8, 16) if n >= self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What may be chosen.

    Attributes:
        warps: Of a block; K is split among them.
        depth: Stages of a warp's ring.
        ahead: Stages a warp brings into L2 beyond its ring before it waits.
        blocks: Blocks a multiprocessor.
    """

    warps: int
    depth: int
    ahead: int
    blocks: int = 1

    @property
    def name(self) -> str:
        return f"gemv.w{self.warps}.d{self.depth}.a{self.ahead}.b{self.blocks}"


def shared_bytes(shape: Shape, config: Config) -> int:
    """Of one block, as `gemv.cu` lays it out."""
    warps, tokens = config.warps, shape.bucket
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
    used = warps * config.depth * shape.stage_bytes + warps * tokens * pitch
    if shape.format == "fp8":
        used += warps * most * columns * 8 * 4
    used = -(-(used + tokens * warps * 4) // 16) * 16
    used += BUFFERS * warps * (ROWS if tokens == 1 else columns * 128) * 4
    return used + (warps * config.depth + 2 * BUFFERS) * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wide:
    """What may be chosen of `gemv_wgmma.cu`.

    Attributes:
        groups: Warpgroups of a block; K is split among them.
        slots: Stages of 4 KiB that a warpgroup holds.
        flight: Of those on their way at a time.
        buffers: Tiles whose sums are under way.
    """

    groups: int
    slots: int
    flight: int
    buffers: int = 4

    @property
    def name(self) -> str:
        return f"stream.g{self.groups}.s{self.slots}.f{self.flight}.b{self.buffers}"


STAGE = 4096


def wide_bucket(tokens: int) -> int:
    return next(n for n in (1, 2, 4, 8, 16, 24, 32) if n >= tokens)


def wide_shared_bytes(shape: Shape, config: Wide) -> int:
    """Of one block, as `gemv_wgmma.cu` lays it out."""
    tokens, warps = wide_bucket(shape.tokens), 4 * config.groups
    padded = tokens + tokens % 2
    most = -(-(shape.width // {"bf16": 128, "fp8": 256}[shape.format]) // config.groups)
    used = config.groups * (config.slots * STAGE + most * padded * 256)
    if shape.format == "fp8":
        used += config.groups * most * 2 * padded * 4
    used += tokens * warps * 4 + config.buffers * warps * padded * ROWS * 4
    return used + (2 * config.groups * config.slots + 2 * config.buffers) * 8


def wide_tactic(shape: Shape, config: Wide, sms: int) -> Tactic:
    """One launch."""
    shared = wide_shared_bytes(shape, config)
    threads = 128 * config.groups + 32
    fit = 2 if shared <= 113 * 1024 and threads <= 1024 and wide_bucket(shape.tokens) <= 8 else 1
    constants = {
        "FORMAT": FORMATS.index(shape.format),
        "K": shape.width,
        "BEFORE": BEFORE.index(shape.before),
        "GROUPS": shape.groups if shape.before == "group_norm_gate" else 1,
        "AFTER": AFTER.index(shape.after),
        "RESIDUAL": int(shape.residual),
        "WIDE": int(shape.wide),
        "TOKENS": wide_bucket(shape.tokens),
        "WGS": config.groups,
        "SLOTS": config.slots,
        "FLIGHT": config.flight,
        "BUFFERS": config.buffers,
        "FIT": fit,
        "SHARED": shared,
    }
    return _tactic(
        shape, "kernels/gemv_wgmma.cu", constants, 4 * config.groups + 1, shared,
        ("bulk", "fp8", "wgmma"), sms, fit, config.name,
    )  # fmt: skip


def tactic(shape: Shape, config: Config, sms: int) -> Tactic:
    """One launch."""
    shared = shared_bytes(shape, config)
    constants = {
        "FORMAT": FORMATS.index(shape.format),
        "K": shape.width,
        "PIECES": shape.pieces,
        "GROUP": shape.group if shape.format == "int4" else 128,
        "BEFORE": BEFORE.index(shape.before),
        "GROUPS": shape.groups if shape.before == "group_norm_gate" else 1,
        "AFTER": AFTER.index(shape.after),
        "RESIDUAL": int(shape.residual),
        "WIDE": int(shape.wide),
        "TOKENS": shape.bucket,
        "WARPS": config.warps,
        "DEPTH": config.depth,
        "AHEAD": config.ahead,
        "SHARED": shared,
    }
    return _tactic(
        shape, "kernels/gemv.cu", constants, config.warps, shared, ("bulk", "fp8"),
        sms * config.blocks, config.blocks, config.name,
    )  # fmt: skip


def _tactic(
    shape: Shape, source: str, constants: dict[str, int], warps: int, shared: int,
    features: tuple[str, ...], blocks: int, fit: int, name: str,
) -> Tactic:  # fmt: skip
    kernel = Kernel(
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
        features=features,
    )
    tiles = shape.rows // ROWS
    launch = Launch(
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
    )  # fmt: skip
    return Tactic(name=name, launches=(launch,))
