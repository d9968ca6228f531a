"""Tactics of `gemm.cu`: products of many tokens on Hopper, dense and grouped by expert.

Activations are first laid out as the tensor cores read them (`prep.cu`), in a workspace:

    codes   [K bytes / 64][padded][64 bytes]  panels; a row's 16-byte quarter c at c ^ (row / 2 % 4)
    scales  f32 [K / 128][padded]             FP8 alone

so that any 8 rows of a panel are an atom of the 64-byte swizzle and any run of rows is one copy.
Grouped, `route.cu` says where each expert's rows are and lists tiles; the sum over a token's
experts is a launch of its own, in the order of the slots.
"""

from dataclasses import dataclass

from lingc.kernel import Kernel, Launch, Operand, Rate, Tactic, Tensor, Workspace, align
from lingc.kernels import experts, gemv
from lingc.targets.spec import Target

BLOCK = 128
INT4_GROUPS = (32, 64, 128)
PREP_ROWS = 8
ROUTE_THREADS = 256
_STAGING = 2 * 8192
_SHARED = 227 * 1024
_WARPS = 12
_FEATURES = ("bulk", "fp8", "wgmma")
_WEIGHT = {"bf16": "*bf16", "fp8": "*f8e4m3", "int4": "*i32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What may be chosen.

    Attributes:
        swap: Whether weights are the rows of a tile and tokens its columns.
        waves: Rows of a tile are 128 times as many.
        columns: Of a tile.
    """

    swap: bool
    waves: int
    columns: int

    @property
    def rows(self) -> int:
        return 128 * self.waves

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
        return min(8, (_SHARED - _STAGING) // self._stage_bytes(format, group))

    def shared_bytes(self, format: str, group: int) -> int:  # noqa: A002
        """Of a block, as the CUDA file lays it out."""
        return self.stages(format, group) * self._stage_bytes(format, group) + _STAGING

    def _stage_bytes(self, format: str, group: int) -> int:  # noqa: A002
        """Operands, scales and two barriers of 8 bytes."""
        if format == "int4":
            return 64 * self.weights + 256 * self.tokens + self.weights // 16 * (4096 // group) + 16
        return 128 * (self.rows + self.columns) + (4 * self.tokens if format == "fp8" else 0) + 16


LARGE = Config(swap=False, waves=2, columns=128)
MIDDLE = Config(swap=False, waves=1, columns=128)
SWAPPED = Config(swap=True, waves=2, columns=128)
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
        chosen: tuple[Config, ...] = (SWAPPED,) if shape.format == "int4" else (LARGE,)
        chosen = (*chosen, MIDDLE, SMALL[0]) if shape.tokens <= 2048 else chosen
    else:
        chosen = (*fewer, MIDDLE) if shape.tokens > 64 else fewer
    return tuple(_dense(target.sms or 1, shape, c) for c in chosen if _runs(c, shape.format))


def _runs(config: Config, format: str) -> bool:  # noqa: A002 (as the ops name it)
    """INT4 becomes BF16 in registers, where only a tile's rows may be."""
    return config.swap or format != "int4"


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
    chosen = (c for c in (SWAPPED, LARGE) if _runs(c, shape.format))
    return tuple(_expert_up(target.sms or 1, shape, config) for config in chosen)


def expert_down_tactics(target: Target, shape: experts.Shape) -> tuple[Tactic, ...]:
    """Of `expert_down` with `pairs` and `starts`."""
    chosen = (c for c in (SWAPPED, LARGE) if _runs(c, shape.format))
    return tuple(_expert_down(target.sms or 1, shape, config) for config in chosen)


def _bytes(format: str) -> int:  # noqa: A002 (as the ops name it)
    return 1 if format == "fp8" else 2


def _spaces(padded: int, width: int, format: str) -> tuple[Workspace, ...]:  # noqa: A002
    codes = Workspace(name="codes", bytes=align(padded * width * _bytes(format)))
    if format != "fp8":
        return (codes,)
    return codes, Workspace(name="code_scales", bytes=align(padded * (width // BLOCK) * 4))


def _prep(  # noqa: PLR0913 (as many as the kernel has)
    *, rows: int, width: int, padded: int, format: str, x: str, x_pitch: int, before: str = "none",  # noqa: A002
    gate_pitch: int = 0, groups: int = 1, eps: float = 0.0, scatter: int = 0, slots: int = 0,
    shared: bool = False, copies: int = 1,
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
    gated, normed = before == "group_norm_gate", before != "none"
    return Launch(
        kernel=kernel,
        grid=(-(-rows // PREP_ROWS), 1, 1),
        operands=(
            Tensor(x), Tensor("gate") if gated else None,
            Tensor("norm_weight") if normed else None, Tensor("codes"),
            Tensor("code_scales") if format == "fp8" else None, Tensor("to") if scatter else None,
            rows, x_pitch, gate_pitch, padded, slots, 0 if shared else -1, eps,
        ),
        dependent=True,
        moved_bytes=float(rows) * width * (2 + 2 * gated + copies * _bytes(format)),
        blocks_per_sm=2,
    )  # fmt: skip


def _product(  # noqa: PLR0913 (as many as the kernel has)
    config: Config, *, blocks: int, tokens: int, padded: int, outputs: int, width: int,
    format: str, group: int, weight: str, y: str, wide: bool, gated: bool, residual: bool,  # noqa: A002
    grouped: bool, flops: float, moved_bytes: float,
) -> Launch:  # fmt: skip
    fp8 = format == "fp8"
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
            ("WAVES", config.waves), ("COLS", config.columns),
            ("STAGES", config.stages(format, group)),
            ("GATED", int(gated)), ("RESIDUAL", int(residual)), ("F32", int(wide)),
            ("GROUPED", int(grouped)), ("BAND", 8), ("PRODUCERS", 1),
            ("GROUP", group if format == "int4" else BLOCK),
        ),
        warps=_WARPS,
        shared_bytes=config.shared_bytes(format, group),
        features=_FEATURES,
    )  # fmt: skip
    rate: Rate = "fp8" if fp8 else "bf16"
    operands: tuple[Operand, ...] = (
        Tensor(weight), None if format == "bf16" else Tensor("scale"), Tensor("codes"),
        Tensor("code_scales") if fp8 else None, Tensor("residual") if residual else None,
        Tensor(y), Tensor("work") if grouped else None, Tensor("rows") if grouped else None,
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


def _dense(sms: int, shape: gemv.Shape, config: Config) -> Tactic:
    padded = align(shape.tokens, 256)
    tiles = -(-shape.rows // config.weights) * -(-shape.tokens // config.tokens)
    # A last wave that is not full takes as long as a full one.
    rounds = -(-tiles // sms)
    columns = shape.rows // 2 if shape.after == "swiglu" else shape.rows
    stored = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}[shape.format]
    moved = float(shape.width) * (shape.rows * stored + shape.tokens * _bytes(shape.format))
    moved += float(shape.tokens) * columns * (2 + 2 * shape.wide + 2 * shape.residual)
    first = _prep(
        rows=shape.tokens, width=shape.width, padded=padded, format=shape.format, x="x",
        x_pitch=shape.x_pitch, before=shape.before, gate_pitch=shape.gate_pitch,
        groups=shape.groups if shape.before == "group_norm_gate" else 1, eps=shape.eps,
    )  # fmt: skip
    second = _product(
        config, blocks=min(tiles, sms), tokens=shape.tokens, padded=padded, outputs=shape.rows,
        width=shape.width, format=shape.format, group=shape.group, weight="weight", y="y",
        wide=shape.wide, gated=shape.after == "swiglu", residual=shape.residual, grouped=False,
        flops=2.0 * config.rows * config.columns * shape.width * min(tiles, sms) * rounds,
        moved_bytes=moved,
    )  # fmt: skip
    return Tactic(
        name=config.name,
        launches=(first, second),
        workspaces=_spaces(padded, shape.width, shape.format),
    )


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


def _route(shape: experts.Shape, config: Config, blank: str | None, blank_bytes: int) -> Launch:
    kernel = Kernel(
        language="cuda",
        source="kernels/route.cu",
        entry="route",
        arguments=(
            ("ids", "*i32"), ("pairs", "*i32"), ("starts", "*i32"), ("to", "*i32"),
            ("rows", "*i32"), ("work", "*i32"), ("blank", "*u8"), ("tokens", "i32"),
            ("slots", "i32"), ("shared", "i32"), ("blank_bytes", "i32"),
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
            Tensor("ids"), Tensor("pairs"), Tensor("starts"), Tensor("to"), Tensor("rows"),
            Tensor("work"), None if blank is None else Tensor(blank), shape.tokens, shape.top_k,
            shape.shared, blank_bytes,
        ),
        dependent=True,
        moved_bytes=16.0 * pairs,
    )  # fmt: skip


def _grouped(
    sms: int, shape: experts.Shape, config: Config, outputs: int, width: int, **how: bool | str
) -> Launch:
    """The product of all experts; a tile of an expert is half empty as a guess."""
    rows = shape.tokens * shape.slots
    padded = rows + shape.hit * (8 if config.swap else 48)
    stored = shape.hit * shape.matrix_bytes(outputs, width)
    wide = bool(how["wide"])
    columns = outputs // 2 if how["gated"] else outputs
    return _product(
        config, blocks=sms, tokens=shape.tokens, padded=_operand_rows(shape), outputs=outputs,
        width=width, format=shape.format, group=shape.group, weight=str(how["weight"]),
        y=str(how["y"]), wide=wide, gated=bool(how["gated"]), residual=False, grouped=True,
        flops=2.0 * padded * outputs * width * (1.3 if config.swap else 1.0),
        moved_bytes=stored + rows * (width * _bytes(shape.format) + columns * (2.0 + 2 * wide)),
    )  # fmt: skip


def _expert_up(sms: int, shape: experts.Shape, config: Config) -> Tactic:
    padded = _operand_rows(shape)
    prep = _prep(
        rows=shape.tokens, width=shape.width, padded=padded, format=shape.format, x="x",
        x_pitch=shape.pitch, before="rms_norm", eps=shape.eps, scatter=1, slots=shape.top_k,
        shared=bool(shape.shared), copies=shape.slots,
    )  # fmt: skip
    product = _grouped(
        sms, shape, config, 2 * shape.inner, shape.width, weight="gate_up", y="a", wide=False,
        gated=True,
    )  # fmt: skip
    return Tactic(
        name=config.name,
        launches=(_route(shape, config, "a", shape.inner * 2), prep, product),
        workspaces=(*_lists(shape, config), *_spaces(padded, shape.width, shape.format)),
    )


def _expert_down(sms: int, shape: experts.Shape, config: Config) -> Tactic:
    padded, rows = _operand_rows(shape), shape.tokens * shape.slots
    prep = _prep(
        rows=rows, width=shape.inner, padded=padded, format=shape.format, x="a",
        x_pitch=shape.inner, scatter=2, slots=shape.top_k, shared=bool(shape.shared),
    )  # fmt: skip
    product = _grouped(
        sms, shape, config, shape.width, shape.inner, weight="down", y="z", wide=True, gated=False
    )
    space = Workspace(name="z", bytes=align(rows * shape.width * 4))
    return Tactic(
        name=config.name,
        launches=(_route(shape, config, None, 0), prep, product, _combine(shape)),
        workspaces=(*_lists(shape, config), *_spaces(padded, shape.inner, shape.format), space),
    )


def _combine(shape: experts.Shape) -> Launch:
    kernel = Kernel(
        language="cuda",
        source="kernels/route.cu",
        entry="combine",
        arguments=(
            ("z", "*f32"), ("weights", "*f32"), ("ids", "*i32"), ("residual", "*bf16"),
            ("y", "*bf16"), ("tokens", "i32"), ("slots", "i32"), ("shared", "i32"),
        ),
        constants=(
            ("EXPERTS", shape.experts), ("TOKENS", 128), ("STEP", 16), ("WIDTH", shape.width)
        ),
        warps=ROUTE_THREADS // 32,
        features=("bulk",),
    )  # fmt: skip
    numbers = shape.tokens * shape.width
    return Launch(
        kernel=kernel,
        grid=(-(-numbers // (4 * ROUTE_THREADS)), 1, 1),
        operands=(
            Tensor("z"), Tensor("weights"), Tensor("ids"), Tensor("residual"), Tensor("y"),
            shape.tokens, shape.top_k, shape.shared,
        ),
        dependent=True,
        moved_bytes=numbers * (4.0 * shape.slots + 4.0),
        blocks_per_sm=8,
    )  # fmt: skip
