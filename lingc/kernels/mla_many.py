"""Launches of `mla_expand.cu` and `mla_prefill.cu`: attention of many tokens on Hopper.

Keys and values lie in workspaces as the tensor cores read them, 128 rows of a sequence together:

    keys       [heads, sequences, tiles][nope / 32][128 rows][64 bytes]
    values     [heads, sequences, tiles][4 runs of 32 rows][value channels][64 bytes]
    rope_keys  [sequences, tiles][rope / 32][128 rows][64 bytes]
"""

from lingc.kernel import Kernel, Launch, Tactic, Tensor, Workspace, align
from lingc.kernels import mla
from lingc.kernels.mla import LOG2_E, SPACE, Sizes, divisor
from lingc.targets.spec import KIB, Target

ROWS = 128
FEW = 1024
EACH = 8
"""Heads whose keys and values a block makes, at most."""

_FEATURES = ("bulk", "wgmma")
_BARRIERS = 128
_WARPS = {"mla_expand": 16, "mla_prefill": 12}


def attention_tactics(
    target: Target, sizes: Sizes, w_k: Tensor, w_v: Tensor, q: str, y: str
) -> list[Tactic]:
    """Ways to attend, best guess first: beyond a few tokens these kernels alone, if they can.

    Of few tokens after many rows most of the time goes into keys and values, which Triton's kernel
    makes as fast.
    """
    own = _tactics(target, sizes, w_k, w_v, q, y)
    if own and sizes.tokens > FEW:
        return own
    return own + mla.attention_tactics(target, sizes, w_k, w_v, q, y)


def _tactics(
    target: Target, sizes: Sizes, w_k: Tensor, w_v: Tensor, q: str, y: str
) -> list[Tactic]:
    """Keys and values of some heads, then attention of these heads, until all are done.

    None where the kernels do not take the sizes.
    """
    takes = (
        target.arch == "sm_90a"
        and sizes.nope == sizes.value == ROWS
        and sizes.rope == 64
        and sizes.latent % 128 == 0
        and _expand_bytes(sizes) <= (target.smem_per_block_bytes or 0)
    )
    if not takes:
        return []
    tiles = -(-sizes.room // ROWS)
    lines = sizes.sequences * tiles * ROWS
    heads = divisor(sizes.heads, SPACE // (sizes.row_bytes * lines))
    launches: list[Launch] = []
    for first in range(0, sizes.heads, heads):
        launches += [
            _expand(sizes, w_k, w_v, first, heads, tiles),
            _attend(sizes, q, y, first, heads),
        ]
    return [
        Tactic(
            name="wgmma.rows128.keys128",
            launches=tuple(launches),
            workspaces=(
                Workspace(name="keys", bytes=2 * heads * lines * sizes.nope),
                Workspace(name="values", bytes=2 * heads * lines * sizes.value),
                Workspace(name="rope_keys", bytes=2 * lines * sizes.rope),
            ),
            config={"rows": ROWS, "keys": ROWS, "heads": heads},
            sums="wgmma.rows128.keys128",
        )
    ]


def _meant(sizes: Sizes) -> int:
    """Sequences that have tokens: one more is padding."""
    return max(sizes.sequences - 1, 1)


def _expand_bytes(sizes: Sizes) -> int:
    """Shared memory of `mla_expand`: latents, two stages of a matrix, what goes out, barriers."""
    return 2 * ROWS * sizes.latent + 3 * 32 * KIB + _BARRIERS


def _expand(
    sizes: Sizes, w_k: Tensor, w_v: Tensor, first: int, heads: int, tiles: int
) -> Launch:  # fmt: skip
    rows = _meant(sizes) * sizes.room
    return Launch(
        kernel=Kernel(
            language="cuda",
            source="kernels/mla_expand.cu",
            entry="mla_expand",
            arguments=(
                ("cache", "*bf16"), ("page_table", "*i32"), ("offsets", "*i32"),
                ("positions", "*i32"), ("w_k", "*bf16"), ("w_v", "*bf16"), ("k", "*u8"),
                ("v", "*u8"), ("rope", "*u8"), ("pages", "i32"), ("first_head", "i32"),
                ("heads", "i32"),
            ),
            constants=(
                ("PAGE", sizes.page_size), ("LATENT", sizes.latent), ("NOPE", sizes.nope),
                ("VALUE", sizes.value), ("ROPE", sizes.rope),
                ("HEAD_PITCH", sizes.head_pitch * sizes.latent), ("EACH", EACH),
            ),
            warps=_WARPS["mla_expand"],
            shared_bytes=_expand_bytes(sizes),
            features=_FEATURES,
        ),
        grid=(tiles, sizes.sequences, -(-heads // EACH)),
        operands=(
            *map(Tensor, ("cache", "page_table", "offsets", "positions")), w_k, w_v,
            *map(Tensor, ("keys", "values", "rope_keys")), sizes.pages, first, heads,
        ),
        dependent=True,
        moved_bytes=rows * (2 * (sizes.latent + sizes.rope) + heads * sizes.row_bytes),
        flops=rows * heads * sizes.row_bytes * sizes.latent,
        rate="bf16",
    )  # fmt: skip


def _attend(sizes: Sizes, q: str, y: str, first: int, heads: int) -> Launch:
    pairs = sizes.tokens * (sizes.room - min(sizes.tokens / _meant(sizes), sizes.room) / 2)
    channels = sizes.nope + sizes.rope + sizes.value
    operands = 2 * ROWS * (3 * (sizes.nope + sizes.rope) + 2 * sizes.value)
    return Launch(
        kernel=Kernel(
            language="cuda",
            source="kernels/mla_prefill.cu",
            entry="mla_prefill",
            arguments=(
                ("q", "*bf16"), ("k", "*u8"), ("v", "*u8"), ("rope", "*u8"), ("offsets", "*i32"),
                ("positions", "*i32"), ("y", "*bf16"), ("tokens", "i32"), ("sequences", "i32"),
                ("room", "i32"), ("first_head", "i32"), ("scale", "f32"),
            ),
            constants=(
                ("HEADS", sizes.heads), ("NOPE", sizes.nope), ("ROPE", sizes.rope),
                ("VALUE", sizes.value),
            ),
            warps=_WARPS["mla_prefill"],
            shared_bytes=operands + _BARRIERS + align(4 * (sizes.sequences + 2), KIB),
            features=_FEATURES,
        ),
        grid=(sizes.tokens // ROWS + sizes.sequences + 1, heads, 1),
        operands=(
            *map(Tensor, (q, "keys", "values", "rope_keys", "offsets", "positions", y)),
            sizes.tokens, sizes.sequences, sizes.room, first, sizes.scale * LOG2_E,
        ),
        dependent=True,
        moved_bytes=_meant(sizes) * sizes.room * heads * sizes.row_bytes
        + 2 * sizes.tokens * heads * channels,
        flops=2.0 * pairs * heads * channels,
        rate="bf16",
    )  # fmt: skip
