"""Tactics of `expert_down_one.cu`: the experts' way down for one token in INT4."""

from dataclasses import asdict, dataclass, replace

from lingc.kernel import Kernel, Launch, Tactic, Tensor, align
from lingc.kernels.experts import BLOCK, BLOCK_BYTES, TILE_ROWS, Shape, exclusive
from lingc.targets.spec import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class One:
    """What may be chosen of `expert_down_one.cu`.

    Attributes:
        tiles: Of 16 rows that a block makes.
        warps: That multiply; K of a tile is split among those of a tile.
        depth: Experts in shared memory at a time.
        blocks: Blocks a multiprocessor.
    """

    tiles: int
    warps: int
    depth: int
    blocks: int = 1

    @property
    def name(self) -> str:
        more = f".b{self.blocks}" if self.blocks > 1 else ""
        return f"down.one.t{self.tiles}.w{self.warps}.d{self.depth}{more}"

    def suits(self, shape: Shape) -> bool:
        """Whether the experts' sizes can be split so."""
        channels, rows = self.warps // self.tiles * BLOCK, self.tiles * TILE_ROWS
        return shape.inner % channels == 0 and shape.width % rows == 0

    def shared_bytes(self, shape: Shape) -> int:
        """Of one block, as the CUDA file lays it out."""
        used = self.depth * self.tiles * int(shape.matrix_bytes(TILE_ROWS, shape.inner))
        used += shape.slots * (2 * shape.inner + shape.inner // BLOCK * 4)
        return align(used + self.warps * TILE_ROWS * 4, 8) + 2 * self.depth * 8


def tactic(shape: Shape, config: One) -> Tactic:
    """One launch."""
    shared = config.shared_bytes(shape)
    kernel = Kernel(
        language="cuda",
        source="kernels/expert_down_one.cu",
        entry="expert_down_one",
        arguments=(
            ("a", "*bf16"), ("ids", "*i32"), ("weights", "*f32"), ("down", "*i32"),
            ("scale", "*bf16"), ("residual", "*bf16"), ("y", "*bf16"),
        ),
        constants=(
            ("GROUP", shape.group), ("WIDTH", shape.width), ("INNER", shape.inner),
            ("EXPERTS", shape.experts), ("TOP_K", shape.top_k), ("SHARED", shape.shared),
            ("TILES", config.tiles), ("WARPS", config.warps), ("DEPTH", config.depth),
            ("BYTES", shared),
        ),
        warps=config.warps + 1,
        shared_bytes=exclusive(shared, config.blocks),
        features=("bulk",),
    )  # fmt: skip
    names = ("a", "ids", "weights", "down", "scale", "residual", "y")
    launch = Launch(
        kernel=kernel,
        grid=(shape.width // TILE_ROWS // config.tiles, 1, 1),
        operands=tuple(Tensor(name) for name in names),
        dependent=True,
        moved_bytes=shape.hit * shape.matrix_bytes(shape.width, shape.inner),
        flops=2.0 * shape.hit * shape.inner * shape.width * 8,
        rate="bf16",
        blocks_per_sm=config.blocks,
    )
    return Tactic(name=config.name, launches=(launch,), config=asdict(config))


_CONFIGS = (
    One(tiles=2, warps=16, depth=5), One(tiles=2, warps=16, depth=3),
    One(tiles=2, warps=4, depth=5), One(tiles=2, warps=2, depth=5), One(tiles=1, warps=1, depth=3),
)  # fmt: skip


def tactics(target: Target, shape: Shape) -> tuple[Tactic, ...]:
    """Best guess first; none for other formats, for more tokens, or where nothing fits."""
    if shape.tokens != 1 or shape.format != "int4":
        return ()
    most = (target.smem_per_block_bytes or 0) - BLOCK_BYTES
    fit = [one for one in _CONFIGS if one.suits(shape) and one.shared_bytes(shape) <= most]
    if fit and shape.width // TILE_ROWS // fit[0].tiles > (target.sms or shape.width):
        pair = replace(fit[0], depth=3, blocks=2)  # all tiles at once, on few multiprocessors
        fit = [pair, *fit] if 2 * (pair.shared_bytes(shape) + BLOCK_BYTES) <= most else fit
    return tuple(tactic(shape, config) for config in fit[: 3 if fit and fit[0].blocks > 1 else 2])
