"""Tactics of `lightning_step.cu`: decode and verify of linear attention."""

from collections.abc import Sequence

from lingc.kernel import Kernel, Launch, Tactic, Tensor
from lingc.math import number
from lingc.op import Cost
from lingc.plan import TensorType
from lingc.targets.spec import Target

WIDTH = 128
"""Channels of a head, rows and columns of its state."""

PAIRS = (4, 8, 16, 32, 64)
"""Pairs that rope may turn: partners are a power of two of lanes apart."""

MOST_TOKENS = 8
"""Of a sequence in verify: the scores among them are one tensor-core product."""

MOST_PENDING = 32
"""Tokens that wait for a commit: a block holds them in static shared memory."""

_ARGUMENTS = (
    ("qkvg", "*bf16"),
    ("q_weight", "*bf16"),
    ("k_weight", "*bf16"),
    ("cos", "*f32"),
    ("sin", "*f32"),
    ("decay", "*f32"),
    ("state", "*f32"),
    ("pending_k", "*bf16"),
    ("pending_v", "*bf16"),
    ("slots", "*i32"),
    ("accepted", "*i32"),
    ("positions", "*i32"),
    ("o", "*bf16"),
    ("pitch", "i32"),
    ("eps", "f32"),
)


def refusal(
    qkvg: TensorType, q_weight: TensorType, cos: TensorType, state: TensorType,
    pending_k: TensorType,
) -> str | None:  # fmt: skip
    """Why the kernel is not made for these."""
    _, _, rows, columns = state.shape
    if (rows, columns) != (WIDTH, WIDTH):
        return f"states of {rows}x{columns} are not {WIDTH}x{WIDTH}"
    if (pairs := number(cos.shape[1])) not in PAIRS:
        return f"rope of {pairs} pairs is not one of {', '.join(map(str, PAIRS))}"
    if (pending := number(pending_k.shape[1])) > MOST_PENDING:
        return f"{pending} pending tokens are more than {MOST_PENDING}"
    for name, kind, want in (
        ("qkvg", qkvg, "bf16"),
        ("q_weight", q_weight, "bf16"),
        ("state", state, "f32"),
        ("cos", cos, "f32"),
        ("pending_k", pending_k, "bf16"),
    ):
        if kind.dtype != want:
            return f"{name} is {kind.dtype}, not {want}"
    return None


Shapes = Sequence[tuple[int, int, int]]
"""Columns a warp, warps that share a column's rows, warps a block."""


PINNED: Shapes = ((64, 8, 8),)
"""Of batch-invariant engines, decode and verify alike: few blocks, and room for 8 drafts."""


def choice(target: Target, state: TensorType, sequences: int, few: Shapes, many: Shapes) -> Shapes:
    """`few` as long as blocks of 32 columns find room at once, two on a multiprocessor."""
    blocks = sequences * number(state.shape[1]) * (WIDTH // 32)
    return few if blocks <= 2 * (target.sms or 1) else many


def tactics(
    shapes: Shapes,
    qkvg: TensorType,
    cos: TensorType,
    state: TensorType,
    pending_k: TensorType,
    *,
    eps: float,
    draft: int | None,
    needs: Cost,
) -> list[Tactic]:
    """One launch each. With `PINNED` verify makes the bits that decode makes.

    Args:
        draft: Tokens of a sequence in verify; None for decode.
    """
    sequential = shapes == PINNED
    tokens, pitch = qkvg.bind({})
    heads = number(state.shape[1])
    found = []
    for columns, split, warps in shapes:
        blocks = WIDTH // (columns * warps // split)  # of a head
        constants = {
            "COLUMNS": columns,
            "SPLIT": split,
            "WARPS": warps,
            "PAIRS": number(cos.shape[1]),
            "PENDING": number(pending_k.shape[1]),
        }
        if draft is not None:
            constants["TOKENS"] = draft
            if sequential:
                constants["SEQUENTIAL"] = 1
        kernel = Kernel(
            language="cuda",
            source="kernels/lightning_step.cu",
            entry="lightning_decode" if draft is None else "lightning_verify",
            arguments=_ARGUMENTS,
            constants=tuple(constants.items()),
            warps=warps,
            features=("bulk",),
        )
        tensors = [Tensor(name) for name, kind in _ARGUMENTS if kind.startswith("*")]
        rows = WIDTH * columns // (128 * split)  # of a thread, four registers each
        launch = Launch(
            kernel=kernel,
            grid=(blocks, heads, tokens // (draft or 1)),
            operands=(*tensors, pitch, eps),
            # The first block writes `pending_k` when all of the head have read it.
            cluster=(1 if draft is None else blocks, 1, 1),
            dependent=True,
            moved_bytes=needs.moved_bytes,
            flops=needs.flops,
            blocks_per_sm=2048 // (32 * warps) // (2 if rows <= 8 else 4),
        )
        config = {"columns": columns, "split": split, "warps": warps}
        name = f"step.c{columns}.s{split}.w{warps}"
        sums = f"one by one, {name}" if sequential else ""
        found.append(Tactic(name=name, launches=(launch,), config=config, sums=sums))
    return found
