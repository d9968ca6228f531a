"""Tactics of `gemm.cu`: products of many tokens on Hopper, dense and grouped by expert.

Activations are first laid out as the tensor cores read them (`prep.cu`), in a workspace:

    codes   [K bytes / 64][padded][64 bytes]  panels; a row's 16-byte quarter c at c ^ (row / 2 % 4)
    scales  f32 [K / 128][padded], FP8; [padded], INT4

so that any 8 rows of a panel are an atom of the 64-byte swizzle and any run of rows is one copy.
Grouped, `route.cu` says where each expert's rows are and lists tiles; the sum over a token's
experts is a launch of its own, in the order of the slots. So many tokens that this would take more
memory than `MOST_BYTES` pass in several runs, one after another.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lingc.kernel import Kernel, Launch, Operand, Rate, Tactic, Tensor, Workspace, align
from lingc.kernels import experts, gemv
from lingc.targets.spec import Target

BLOCK = 128
INT4_GROUPS = (32, 64, 128)
PREP_ROWS = 8
ROUTE_THREADS = 256
MOST_BYTES = 1536 << 20
"""Workspace of a tactic, about."""

_STAGING = 8192
_SHARED = 227 * 1024
_FEATURES = ("bulk", "fp8", "wgmma")
_WEIGHT = {"bf16": "*bf16", "fp8": "*f8e4m3", "int4": "*i32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What may be chosen.

    Attributes:
        swap: Whether weights are the rows of a tile and tokens its columns.
        waves: Of 64 rows each, that a warpgroup has.
        columns: Of a tile.
        groups: Warpgroups that multiply.
    """

    swap: bool
    waves: int
    columns: int
    groups: int = 2

    @property
    def rows(self) -> int:
        return 64 * self.waves * self.groups

    @property
    def weights(self) -> int:
        """Rows of the weight in a tile."""
        return self.rows if self.swap else self.columns

    @property
    def tokens(self) -> int:
        """Tokens in a tile, at most."""
        return self.columns if self.swap else self.rows

    @property
    def name(self) -> str:
        return f"gemm.{'swap.' if self.swap else ''}w{self.weights}.t{self.tokens}"

    def stages(self, format: str, group: int) -> int:  # noqa: A002 (as the ops name it)
        """Of the ring: as many as shared memory has room for, up to eight."""
        most = 4 if self.in_rounds(format) else 8
        return min(most, (_SHARED - self._staging) // self._stage_bytes(format, group))

    def in_rounds(self, format: str) -> bool:  # noqa: A002
        """Whether a tile begins with the first slot of the ring: its loop is unrolled over them."""
        return format == "fp8" and not self.swap

    @property
    def _staging(self) -> int:
        return self.groups * _STAGING

    def shared_bytes(self, format: str, group: int) -> int:  # noqa: A002
        """Of a block, as the CUDA file lays it out."""
        return self.stages(format, group) * self._stage_bytes(format, group) + self._staging

    def _stage_bytes(self, format: str, group: int) -> int:  # noqa: A002
        """Operands, scales, a note of 32 bytes and two barriers of 8."""
        if format == "int4":
            return 64 * self.weights + 256 * self.tokens + self.weights // 16 * (4096 // group) + 48
        return 128 * (self.rows + self.columns) + (4 * self.tokens if format == "fp8" else 0) + 48


LARGE = Config(swap=False, waves=2, columns=128)
THREE = Config(swap=False, waves=1, columns=128, groups=3)
MIDDLE = Config(swap=False, waves=1, columns=128)
SWAPPED = Config(swap=True, waves=2, columns=128)
_LARGEST = {"bf16": LARGE, "fp8": THREE, "int4": SWAPPED}
"""What suits most tokens."""
SMALL = tuple(Config(swap=True, waves=1, columns=columns) for columns in (128, 64, 32))


def refusal(shape: gemv.Shape) -> str | None:
    """Why these kernels cannot run a fused linear, or None."""
    if shape.format == "int4" and shape.group not in INT4_GROUPS:
        return f"INT4 groups of {shape.group} are none of {INT4_GROUPS}"
    if shape.width % BLOCK:
        return f"K = {shape.width} is not a multiple of {BLOCK}"
    if shape.rows % 16:
        return f"{shape.rows} rows of the weight are not a multiple of 16"
    if shape.after == "swiglu" and shape.format == "fp8" and shape.rows % (2 * BLOCK):
        return f"{shape.rows // 2} rows of a gate are not a multiple of {BLOCK}"
    if shape.x_pitch % 8 or shape.gate_pitch % 8:
        return f"rows of {shape.x_pitch} and {shape.gate_pitch} columns are not aligned to 16 bytes"
    group = shape.width // shape.groups
    if shape.before == "group_norm_gate" and group % 256 and group not in {8, 16, 32, 64, 128}:
        return f"groups of {group} channels are no multiple of 256 and no power of two up to 128"
    return None


def tactics(target: Target, shape: gemv.Shape) -> tuple[Tactic, ...]:
    """Of a fused linear; those that suit the number of tokens, best guess first."""
    fewer = tuple(c for c in SMALL if c.tokens < 2 * max(shape.tokens, 32))
    if shape.tokens > 512:
        chosen: tuple[Config, ...] = (_LARGEST[shape.format],)
        if shape.tokens <= 2048:
            chosen = (*chosen, MIDDLE, SMALL[0])
    else:
        chosen = (*fewer, MIDDLE) if shape.tokens > 64 else fewer
    return tuple(_dense(target.sms or 1, shape, c) for c in chosen if _runs(c, shape.format))


def pinned(target: Target, shape: gemv.Shape) -> tuple[Tactic, ...]:
    """Of a fused linear, what suits most tokens: for batch-invariant engines."""
    return (_dense(target.sms or 1, shape, _LARGEST[shape.format]),)


def _runs(config: Config, format: str) -> bool:  # noqa: A002 (as the ops name it)
    """INT4 becomes F16 in registers, where only a tile's rows may be."""
    return format != "int4" or config.swap


def expert_refusal(shape: experts.Shape) -> str | None:
    """Why these kernels cannot run experts of many tokens, or None."""
    if shape.format == "int4" and shape.group not in INT4_GROUPS:
        return f"INT4 groups of {shape.group} are none of {INT4_GROUPS}"
    if shape.width % BLOCK or shape.inner % BLOCK:
        return f"{shape.width} and {shape.inner} channels are not multiples of {BLOCK}"
    if shape.pitch % 8:
        return f"rows of {shape.pitch} columns are not aligned to 16 bytes"
    if shape.slots > 32:
        return f"{shape.slots} experts of a token are more than 32"
    return None


def expert_up_tactics(target: Target, shape: experts.Shape) -> tuple[Tactic, ...]:
    """Of `expert_up` with `pairs` and `starts`."""
    chosen = dict.fromkeys((_LARGEST[shape.format], SWAPPED))
    return tuple(_expert_up(target.sms or 1, shape, config) for config in chosen)


def expert_down_tactics(target: Target, shape: experts.Shape) -> tuple[Tactic, ...]:
    """Of `expert_down` with `pairs` and `starts`."""
    chosen = dict.fromkeys((_LARGEST[shape.format], SWAPPED))
    return tuple(_expert_down(target.sms or 1, shape, config) for config in chosen)


def _bytes(format: str) -> int:  # noqa: A002 (as the ops name it)
    return 1 if format == "fp8" else 2


def _spaces(padded: int, width: int, format: str) -> tuple[Workspace, ...]:  # noqa: A002
    codes = Workspace(name="codes", bytes=align(padded * width * _bytes(format)))
    if format == "bf16":
        return (codes,)
    scales = padded * (width // BLOCK if format == "fp8" else 1)
    return codes, Workspace(name="code_scales", bytes=align(scales * 4))


def _prep(  # noqa: PLR0913 (as many as the kernel has)
    *, rows: int, width: int, padded: int, format: str, x: Tensor, x_pitch: int,  # noqa: A002
    before: str = "none", gate: Tensor | None = None, gate_pitch: int = 0, groups: int = 1,
    eps: float = 0.0, scatter: int = 0, slots: int = 0, shared: bool = False, copies: int = 1,
) -> Launch:  # fmt: skip
    kernel = Kernel(
        language="cuda",
        source="kernels/prep.cu",
        entry="prep",
        arguments=(
            ("x", "*bf16"), ("gate", "*bf16"), ("norm_weight", "*bf16"), ("codes", "*u8"),
            ("scales", "*f32"), ("to", "*i32"), ("rows", "i32"), ("pitch", "i32"),
            ("gate_pitch", "i32"), ("padded", "i32"), ("slots", "i32"), ("shared", "i32"),
            ("eps", "f32"),
        ),
        constants=(
            ("WIDTH", width), ("FORMAT", gemv.FORMATS.index(format)),
            ("BEFORE", gemv.BEFORE.index(before)), ("GROUP", width // groups),
            ("SCATTER", scatter),
        ),
        warps=PREP_ROWS,
        features=("bulk", "fp8"),
    )  # fmt: skip
    normed = before != "none"
    return Launch(
        kernel=kernel,
        grid=(-(-rows // PREP_ROWS), 1, 1),
        operands=(
            x, gate,
            Tensor("norm_weight") if normed else None, Tensor("codes"),
            None if format == "bf16" else Tensor("code_scales"), Tensor("to") if scatter else None,
            rows, x_pitch, gate_pitch, padded, slots, 0 if shared else -1, eps,
        ),
        dependent=True,
        moved_bytes=float(rows) * width * (2 + 2 * (gate is not None) + copies * _bytes(format)),
        blocks_per_sm=2,
    )  # fmt: skip


def _product(  # noqa: PLR0913 (as many as the kernel has)
    config: Config, *, blocks: int, tokens: int, padded: int, outputs: int, width: int,
    format: str, group: int, weight: str, y: Tensor, wide: bool, gated: bool,  # noqa: A002
    residual: Tensor | None, grouped: bool, flops: float, moved_bytes: float,
) -> Launch:  # fmt: skip
    fp8, stages, rounds = format == "fp8", config.stages(format, group), config.in_rounds(format)
    kernel = Kernel(
        language="cuda",
        source="kernels/gemm.cu",
        entry="gemm",
        arguments=(
            ("weight", _WEIGHT[format]),
            ("weight_scale", "*bf16" if format == "int4" else "*f32"), ("codes", "*u8"),
            ("scales", "*f32"), ("residual", "*bf16"), ("y", "*f32" if wide else "*bf16"),
            ("work", "*i32"), ("rows", "*i32"), ("tokens", "i32"), ("padded", "i32"),
            ("outputs", "i32"), ("width", "i32"),
        ),
        constants=(
            ("FORMAT", gemv.FORMATS.index(format)), ("SWAP", int(config.swap)),
            ("GROUPS", config.groups), ("WAVES", config.waves), ("COLS", config.columns),
            ("STAGES", stages), ("BLANKS", int(rounds and width // BLOCK % stages > 0)),
            ("GATED", int(gated)), ("RESIDUAL", int(residual is not None)), ("F32", int(wide)),
            ("GROUPED", int(grouped)), ("BAND", 8),
            ("GROUP", group if format == "int4" else BLOCK),
        ),
        warps=4 * (config.groups + 1),
        shared_bytes=config.shared_bytes(format, group),
        features=_FEATURES,
    )  # fmt: skip
    rate: Rate = "fp8" if fp8 else "bf16"
    operands: tuple[Operand, ...] = (
        Tensor(weight), None if format == "bf16" else Tensor("scale"), Tensor("codes"),
        None if format == "bf16" else Tensor("code_scales"), residual,
        y, Tensor("work") if grouped else None, Tensor("rows") if grouped else None,
        tokens, padded, outputs, width,
    )  # fmt: skip
    return Launch(
        kernel=kernel,
        grid=(blocks, 1, 1),
        operands=operands,
        dependent=True,
        moved_bytes=moved_bytes,
        flops=flops,
        rate=rate,
    )


def _parts(tokens: int, most: int) -> Iterator[tuple[int, int]]:
    """First token and number of tokens of each run of at most `most`."""
    return ((first, min(most, tokens - first)) for first in range(0, tokens, most))


def _dense(sms: int, shape: gemv.Shape, config: Config) -> Tactic:
    most = align(shape.tokens, 256)
    while (
        most > 256 and sum(s.bytes for s in _spaces(most, shape.width, shape.format)) > MOST_BYTES
    ):
        most = align(most // 2, 256)
    launches: list[Launch] = []
    for first, tokens in _parts(shape.tokens, most):
        launches += _dense_part(sms, replace(shape, tokens=tokens), config, first, most)
    return Tactic(
        name=config.name,
        launches=tuple(launches),
        workspaces=_spaces(most, shape.width, shape.format),
    )


def _dense_part(
    sms: int, shape: gemv.Shape, config: Config, first: int, padded: int
) -> tuple[Launch, ...]:
    """Tokens from `first` on, as many as the shape has."""
    tiles = -(-shape.rows // config.weights) * -(-shape.tokens // config.tokens)
    # A last wave that is not full takes as long as a full one.
    rounds = -(-tiles // sms)
    columns = shape.rows // 2 if shape.after == "swiglu" else shape.rows
    stored = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}[shape.format]
    moved = float(shape.width) * (shape.rows * stored + shape.tokens * _bytes(shape.format))
    moved += float(shape.tokens) * columns * (2 + 2 * shape.wide + 2 * shape.residual)
    gated = shape.before == "group_norm_gate"
    prep = _prep(
        rows=shape.tokens, width=shape.width, padded=padded, format=shape.format,
        x=Tensor("x", 2 * first * shape.x_pitch), x_pitch=shape.x_pitch, before=shape.before,
        gate=Tensor("gate", 2 * first * shape.gate_pitch) if gated else None,
        gate_pitch=shape.gate_pitch, groups=shape.groups if gated else 1, eps=shape.eps,
    )  # fmt: skip
    product = _product(
        config, blocks=min(tiles, sms), tokens=shape.tokens, padded=padded, outputs=shape.rows,
        width=shape.width, format=shape.format, group=shape.group, weight="weight",
        y=Tensor("y", (2 + 2 * shape.wide) * first * columns), wide=shape.wide,
        gated=shape.after == "swiglu",
        residual=Tensor("residual", 2 * first * columns) if shape.residual else None,
        grouped=False,
        flops=2.0 * config.rows * config.columns * shape.width * min(tiles, sms) * rounds,
        moved_bytes=moved,
    )  # fmt: skip
    return prep, product


def _operand_rows(shape: experts.Shape) -> int:
    """Rows of the operand at most: each expert's begin at a multiple of 16; copies read ahead."""
    pairs = shape.tokens * shape.top_k
    hit = min(shape.experts, pairs)
    return align(align(shape.tokens, 16) * shape.shared + pairs + 15 * hit, 16) + 256


def _lists(shape: experts.Shape, config: Config) -> tuple[Workspace, ...]:
    rows = _operand_rows(shape)
    entries = rows // config.tokens + shape.experts + 2
    return (
        Workspace(name="to", bytes=align(shape.tokens * shape.top_k * 4)),
        Workspace(name="rows", bytes=align(rows * 4)),
        Workspace(name="work", bytes=align((1 + entries) * 32)),
    )


def _route(
    shape: experts.Shape, config: Config, blank: Tensor | None, blank_bytes: int, first: int,
    tokens: int,
) -> Launch:  # fmt: skip
    """Lists of the `shape.tokens` tokens from `first` on, of `tokens`."""
    kernel = Kernel(
        language="cuda",
        source="kernels/route.cu",
        entry="route",
        arguments=(
            ("ids", "*i32"), ("pairs", "*i32"), ("starts", "*i32"), ("to", "*i32"),
            ("rows", "*i32"), ("work", "*i32"), ("blank", "*u8"), ("tokens", "i32"),
            ("slots", "i32"), ("shared", "i32"), ("blank_bytes", "i32"), ("from", "i32"),
            ("all", "i32"),
        ),
        constants=(
            ("EXPERTS", shape.experts), ("TOKENS", config.tokens),
            ("STEP", 16 if config.swap else 64), ("WIDTH", shape.width),
        ),
        warps=ROUTE_THREADS // 32,
        features=("bulk",),
    )  # fmt: skip
    pairs = shape.tokens * shape.top_k
    return Launch(
        kernel=kernel,
        grid=(min(64, -(-pairs // ROUTE_THREADS)), 1, 1),
        operands=(
            Tensor("ids", 4 * first * shape.top_k), Tensor("pairs"), Tensor("starts"),
            Tensor("to"), Tensor("rows"), Tensor("work"), blank, shape.tokens, shape.top_k,
            shape.shared, blank_bytes, first, tokens,
        ),
        dependent=True,
        moved_bytes=16.0 * pairs,
    )  # fmt: skip


def _grouped(  # noqa: PLR0913 (as many as there are)
    sms: int, shape: experts.Shape, config: Config, *, padded: int, outputs: int, width: int,
    weight: str, y: Tensor, gated: bool,
) -> Launch:  # fmt: skip
    """The product of all experts; a tile of an expert is half empty as a guess."""
    rows = shape.tokens * shape.slots
    filled = rows + shape.hit * (8 if config.swap else 48)
    stored = shape.hit * shape.matrix_bytes(outputs, width)
    columns = outputs // 2 if gated else outputs
    return _product(
        config, blocks=sms, tokens=shape.tokens, padded=padded, outputs=outputs, width=width,
        format=shape.format, group=shape.group, weight=weight, y=y, wide=False, gated=gated,
        residual=None, grouped=True,
        flops=2.0 * filled * outputs * width * (1.3 if config.swap else 1.0),
        moved_bytes=stored + rows * (width * _bytes(shape.format) + columns * 2.0),
    )  # fmt: skip


def _most(shape: experts.Shape, config: Config, *, down: bool) -> experts.Shape:
    """The shape of the longest run."""
    tokens = shape.tokens
    while tokens > 256:
        spaces = _expert_spaces(replace(shape, tokens=tokens), config, down=down)
        if sum(space.bytes for space in spaces) <= MOST_BYTES:
            break
        tokens = align(tokens // 2, 256)
    return replace(shape, tokens=tokens)


def _expert_spaces(shape: experts.Shape, config: Config, *, down: bool) -> tuple[Workspace, ...]:
    padded, width = _operand_rows(shape), shape.inner if down else shape.width
    spaces = (*_lists(shape, config), *_spaces(padded, width, shape.format))
    if not down:
        return spaces
    return (*spaces, Workspace(name="z", bytes=align(shape.tokens * shape.slots * shape.width * 2)))


def _expert_up(sms: int, shape: experts.Shape, config: Config) -> Tactic:
    most = _most(shape, config, down=False)
    padded = _operand_rows(most)
    launches: list[Launch] = []
    for first, tokens in _parts(shape.tokens, most.tokens):
        part = replace(shape, tokens=tokens)
        a = Tensor("a", 2 * first * shape.slots * shape.inner)
        launches += [
            _route(part, config, a, shape.inner * 2, first, shape.tokens),
            _prep(
                rows=tokens, width=shape.width, padded=padded, format=shape.format,
                x=Tensor("x", 2 * first * shape.pitch), x_pitch=shape.pitch, before="rms_norm",
                eps=shape.eps, scatter=1, slots=shape.top_k, shared=bool(shape.shared),
                copies=shape.slots,
            ),
            _grouped(
                sms, part, config, padded=padded, outputs=2 * shape.inner, width=shape.width,
                weight="gate_up", y=a, gated=True,
            ),
        ]  # fmt: skip
    return Tactic(
        name=config.name,
        launches=tuple(launches),
        workspaces=_expert_spaces(most, config, down=False),
    )


def _expert_down(sms: int, shape: experts.Shape, config: Config) -> Tactic:
    most = _most(shape, config, down=True)
    padded = _operand_rows(most)
    launches: list[Launch] = []
    for first, tokens in _parts(shape.tokens, most.tokens):
        part = replace(shape, tokens=tokens)
        launches += [
            _route(part, config, None, 0, first, shape.tokens),
            _prep(
                rows=tokens * shape.slots, width=shape.inner, padded=padded, format=shape.format,
                x=Tensor("a", 2 * first * shape.slots * shape.inner), x_pitch=shape.inner,
                scatter=2, slots=shape.top_k, shared=bool(shape.shared),
            ),
            _grouped(
                sms, part, config, padded=padded, outputs=shape.width, width=shape.inner,
                weight="down", y=Tensor("z"), gated=False,
            ),
            _combine(part, first),
        ]  # fmt: skip
    return Tactic(
        name=config.name,
        launches=tuple(launches),
        workspaces=_expert_spaces(most, config, down=True),
    )


def _combine(shape: experts.Shape, first: int) -> Launch:
    kernel = Kernel(
        language="cuda",
        source="kernels/route.cu",
        entry="combine",
        arguments=(
            ("z", "*bf16"), ("weights", "*f32"), ("ids", "*i32"), ("residual", "*bf16"),
            ("y", "*bf16"), ("tokens", "i32"), ("slots", "i32"), ("shared", "i32"),
        ),
        constants=(
            ("EXPERTS", shape.experts), ("TOKENS", 128), ("STEP", 16), ("WIDTH", shape.width)
        ),
        warps=ROUTE_THREADS // 32,
        features=("bulk",),
    )  # fmt: skip
    numbers = shape.tokens * shape.width
    pairs, row = 4 * first * shape.top_k, 2 * first * shape.width
    return Launch(
        kernel=kernel,
        grid=(-(-numbers // (8 * ROUTE_THREADS)), 1, 1),
        operands=(
            Tensor("z"), Tensor("weights", pairs), Tensor("ids", pairs), Tensor("residual", row),
            Tensor("y", row), shape.tokens, shape.top_k, shape.shared,
        ),
        dependent=True,
        moved_bytes=numbers * (2.0 * shape.slots + 4.0),
        blocks_per_sm=8,
    )  # fmt: skip
