"""Launches of the router's kernels: one for few tokens, five for many.

`router.cu` does all in one launch; `triton_router` and `router_many.cu` share the work of more
tokens. `docs/experiments/router.md` has what was measured.
"""

from dataclasses import dataclass

from lingc.kernel import Kernel, Launch, Tactic, Tensor, Workspace

WHOLE = 4
"""Tokens up to which a block may have whole rows of the weight."""

FEW = 512
"""Tokens that one launch serves."""

EXPERTS = 256
"""Experts that have a thread each of one block."""

UNIT = 64
"""Channels of a warp."""

BLOCK = 32
"""Tokens of a block of `choose_experts`, a bit of a word each."""

_WARPS = 8
_BANDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes and literals of a call, as in `plugins/norm_router.py`."""

    tokens: int
    pitch: int
    width: int
    experts: int
    groups: int
    kept: int
    top: int
    scale: float
    normalize: bool
    eps: float

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        return (
            ("WIDTH", self.width),
            ("EXPERTS", self.experts),
            ("GROUPS", self.groups),
            ("KEPT", self.kept),
            ("TOP", self.top),
            ("NORMALIZE", int(self.normalize)),
        )

    @property
    def weight_bytes(self) -> float:
        return 2.0 * self.experts * self.width


def refusal(shape: Shape) -> str | None:
    """Why no kernel runs these sizes, or None."""
    if shape.width % (2 * UNIT):
        return f"rows of {shape.width} channels are not a multiple of {2 * UNIT}"
    if shape.pitch % 8:
        return f"rows of x lie {shape.pitch} elements apart, not a multiple of 8"
    if shape.experts > EXPERTS or shape.experts % shape.groups or shape.groups > 32:
        return f"{shape.experts} experts in {shape.groups} groups do not fit in one block"
    offered = min(shape.experts // shape.groups, shape.top)
    if not shape.top <= shape.kept * offered <= 32:
        return (
            f"the {offered} best of {shape.kept} groups are {shape.kept * offered} candidates for "
            f"{shape.top} experts; a warp has room for 32"
        )
    if shape.tokens > FEW and not _fits_a_warp(shape):
        return (
            f"{shape.experts} experts in {shape.groups} groups do not fit in a warp, which has a "
            f"token each of more than {FEW}"
        )
    return None


def _fits_a_warp(shape: Shape) -> bool:
    each = max(1, shape.experts // 32)
    lanes, rest = divmod(shape.experts // shape.groups, each)
    whole = shape.experts < 32 or shape.experts % 32 == 0
    return whole and rest == 0 and all(n & (n - 1) == 0 for n in (each, lanes))


def tactics(shape: Shape, *, dependent: bool) -> list[Tactic]:
    """Best guess first.

    Args:
        dependent: Whether the target has dependent launches.
    """
    if shape.tokens > FEW:
        return [many(shape, promoted=promoted, dependent=dependent) for promoted in (False, True)]
    found = [tiles(shape, 1, dependent=dependent)]
    if shape.tokens <= WHOLE:
        rows = next(n for n in (4, 2, 1) if shape.experts % n == 0)
        found.append(whole_rows(shape, rows, dependent=dependent))
    elif shape.tokens <= 16:  # beyond, two units leave too few registers
        found.append(tiles(shape, 2, dependent=dependent))
    elif shape.tokens > 2 * BLOCK and _fits_a_warp(shape):
        found.append(many(shape, promoted=False, dependent=dependent))
    return found[::-1] if shape.tokens == 1 else found


def pinned(shape: Shape, *, dependent: bool) -> list[Tactic]:
    """One kernel for up to 64 tokens, and one for more: for batch-invariant engines."""
    if shape.tokens <= 2 * BLOCK:
        return [tiles(shape, 1, dependent=dependent, most=2 * BLOCK)]
    if _fits_a_warp(shape):
        return [many(shape, promoted=False, dependent=dependent)]
    return [tiles(shape, 1, dependent=dependent, most=FEW)]


def whole_rows(shape: Shape, rows: int, *, dependent: bool) -> Tactic:
    """Blocks with `rows` rows of the weight."""
    constants = (("TOKENS", shape.tokens), ("ROWS", rows))
    blocks = shape.experts // rows
    return _few(shape, f"rows{rows}", constants, (shape.tokens, 1, blocks), dependent=dependent)


def tiles(shape: Shape, depth: int, *, dependent: bool, most: int = 0) -> Tactic:
    """Blocks with 16 experts and `depth` units of channels a warp.

    Args:
        most: Tokens that the kernel is compiled for; as few as hold them where 0.
    """
    most = most or next(n for n in (8, 16, 32, 64, 128, 256, 512) if n >= shape.tokens)
    at_once = min(most // 8, 8)
    slices = -(-shape.width // (UNIT * _WARPS * depth))
    blocks = -(-shape.experts // _BANDS) * slices
    constants = (("TOKENS", most), ("TILES", at_once), ("DEPTH", depth))
    return _few(
        shape, f"tiles.depth{depth}", constants, (most, slices, blocks), dependent=dependent
    )


def _few(
    shape: Shape,
    name: str,
    constants: tuple[tuple[str, int], ...],
    sizes: tuple[int, int, int],
    *,
    dependent: bool,
) -> Tactic:
    """One launch; `sizes` are tokens at the most, parts of a logit, and blocks that score."""
    most, slices, blocks = sizes
    kernel = Kernel(
        language="cuda",
        source="kernels/router.cu",
        entry="norm_router",
        arguments=(
            ("x", "*bf16"), ("pitch", "i64"), ("norm_weight", "*bf16"), ("weight", "*bf16"),
            ("bias", "*f32"), ("words", "*u8"), ("ids", "*i32"), ("weights", "*f32"),
            ("pairs", "*i32"), ("starts", "*i32"), ("tokens", "i32"), ("scale", "f32"),
            ("eps", "f32"),
        ),
        constants=(*shape.constants, *constants),
        warps=_WARPS,
    )  # fmt: skip
    words = most * (slices * shape.experts + slices + shape.top)
    launch = Launch(
        kernel=kernel,
        grid=(blocks + shape.tokens, 1, 1),
        operands=(
            Tensor("x"), shape.pitch, Tensor("norm_weight"), Tensor("weight"), Tensor("bias"),
            Tensor("words"), Tensor("ids"), Tensor("weights"), Tensor("pairs"), Tensor("starts"),
            shape.tokens, shape.scale, shape.eps,
        ),
        dependent=dependent,
        moved_bytes=shape.weight_bytes + 2.0 * shape.tokens * shape.width,
        flops=2.0 * shape.tokens * shape.experts * shape.width,
        blocks_per_sm=2,
    )  # fmt: skip
    return Tactic(
        name=name,
        launches=(launch,),
        workspaces=(Workspace(name="words", bytes=4 * words, zeroed=True),),
        config=dict(constants),
    )


def many(shape: Shape, *, promoted: bool, dependent: bool) -> Tactic:
    """Split the weight, multiply, choose, add up counts, list."""
    blocks = -(-shape.tokens // BLOCK)
    return Tactic(
        name="many.promoted" if promoted else "many",
        launches=(
            _split(shape),
            _multiply(shape, promoted=promoted),
            *_choose(shape, blocks, dependent=dependent),
        ),
        workspaces=(
            Workspace(name="parts", bytes=2 * int(shape.weight_bytes)),
            Workspace(name="logits", bytes=4 * shape.tokens * shape.experts),
            Workspace(name="counts", bytes=4 * shape.experts * blocks),
            Workspace(name="totals", bytes=4 * shape.experts),
        ),
        config={"promoted": int(promoted)},
    )


def _split(shape: Shape) -> Launch:
    width = 1024
    kernel = Kernel(
        language="triton",
        source="lingc.kernels.triton_router:split_weight",
        entry="split_weight",
        arguments=(("weight", "*bf16"), ("norm_weight", "*bf16"), ("parts", "*bf16")),
        constants=(("WIDTH", shape.width), ("EXPERTS", shape.experts), ("BLOCK", width)),
        warps=4,
    )
    return Launch(
        kernel=kernel,
        grid=(shape.experts, -(-shape.width // width), 1),
        operands=(Tensor("weight"), Tensor("norm_weight"), Tensor("parts")),
        moved_bytes=3 * shape.weight_bytes,
        blocks_per_sm=8,
    )


def _multiply(shape: Shape, *, promoted: bool) -> Launch:
    rows, depth = 128, 64
    cols = min(128, max(16, 1 << (shape.experts - 1).bit_length()))
    kernel = Kernel(
        language="triton",
        source="lingc.kernels.triton_router:add_products",
        entry="add_products",
        arguments=(
            ("x", "*bf16"), ("parts", "*bf16"), ("logits", "*f32"), ("tokens", "i32"),
            ("pitch", "i32:16" if shape.pitch % 16 == 0 else "i32"),
        ),
        constants=(
            ("WIDTH", shape.width), ("EXPERTS", shape.experts), ("ROWS", rows), ("COLS", cols),
            ("DEPTH", depth), ("PROMOTED", int(promoted)),
        ),
        warps=8,
        stages=3,
    )  # fmt: skip
    return Launch(
        kernel=kernel,
        grid=(-(-shape.tokens // rows) * -(-shape.experts // cols), 1, 1),
        operands=(Tensor("x"), Tensor("parts"), Tensor("logits"), shape.tokens, shape.pitch),
        moved_bytes=2.0 * shape.tokens * shape.width + 2 * shape.weight_bytes,
        flops=4.0 * shape.tokens * shape.experts * shape.width,
        rate="bf16",
    )


def _choose(shape: Shape, blocks: int, *, dependent: bool) -> tuple[Launch, ...]:
    def launch(
        entry: str, grid: int, operands: tuple[tuple[str, str, Tensor | int | float], ...]
    ) -> Launch:
        kernel = Kernel(
            language="cuda",
            source="kernels/router_many.cu",
            entry=entry,
            arguments=tuple((name, kind) for name, kind, _ in operands),
            constants=shape.constants,
            warps=_WARPS,
        )
        return Launch(
            kernel=kernel,
            grid=(grid, 1, 1),
            operands=tuple(value for _, _, value in operands),
            dependent=dependent,
            moved_bytes=2.0 * shape.tokens * shape.width if entry == "choose_experts" else 0.0,
            blocks_per_sm=4,
        )

    ids, counts = ("ids", "*i32", Tensor("ids")), ("counts", "*i32", Tensor("counts"))
    totals, tokens = ("totals", "*i32", Tensor("totals")), ("tokens", "i32", shape.tokens)
    choose = launch(
        "choose_experts",
        blocks,
        (
            ("logits", "*f32", Tensor("logits")), ("x", "*bf16", Tensor("x")),
            ("pitch", "i64", shape.pitch), ("bias", "*f32", Tensor("bias")), ids,
            ("weights", "*f32", Tensor("weights")), counts, tokens,
            ("scale", "f32", shape.scale), ("eps", "f32", shape.eps),
        ),
    )  # fmt: skip
    add = launch("add_counts", shape.experts, (counts, totals, ("blocks", "i32", blocks)))
    pairs, starts = ("pairs", "*i32", Tensor("pairs")), ("starts", "*i32", Tensor("starts"))
    place = launch("list_pairs", blocks, (ids, counts, totals, pairs, starts, tokens))
    return choose, add, place
