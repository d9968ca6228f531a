"""Launches of the kernels that go over rows once (`triton_rows`): blocks, grids, what they move.

The kernels want bf16 activations. Rows up to MAX_WIDTH wide are held in a block's registers.
"""

from collections.abc import Sequence

from lingc.kernel import Kernel, Launch, Operand, Tactic, Tensor
from lingc.op import Cost
from lingc.plan import TensorType

MODULE = "lingc.kernels.triton_rows"
MAX_WIDTH = 16_384
"""A row beyond it would take more than 64 registers of each of 256 threads."""

PART = 128
"""Channels of one FP8 scale: a block holds whole ones."""

Shape = tuple[int, int, int]
"""Columns of a block, rows of a block, warps."""


def power(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def dtype_refusal(**given: TensorType) -> str | None:
    """Why activations are not what the kernels take."""
    for name, kind in given.items():
        if kind.dtype != "bf16":
            return f"{name} is {kind.dtype}, not bf16"
    return None


def width_refusal(width: int) -> str | None:
    """Why a row cannot be held by one block."""
    if width > MAX_WIDTH:
        return f"rows of {width} do not fit in a block, which holds {MAX_WIDTH}"
    return None


def whole_rows(width: int, warps: Sequence[int]) -> list[Shape]:
    """Blocks of whole rows: enough narrow rows to keep every thread busy."""
    block = max(power(width), PART)
    return [(block, max(1, 512 * n // block), n) for n in warps]


def tactics(  # noqa: PLR0913 (a kernel is what it is)
    function: str,
    shapes: Sequence[Shape],
    *,
    tokens: int,
    tiles: int | None,
    pointers: Sequence[tuple[str, str, Operand]],
    scalars: Sequence[tuple[str, str, int | float]],
    constants: Sequence[tuple[str, int]],
    cost: Cost,
    features: tuple[str, ...] = (),
) -> list[Tactic]:
    """One launch for each shape.

    Args:
        tiles: Channels that blocks share, for a grid (tokens / rows, channels / columns); None for
            a grid (tokens / rows) of whole rows.
        pointers: (name, type, operand) of every pointer argument, in order.
        scalars: The arguments after them.
        constants: Compile-time arguments beside BLOCK and ROWS.
    """
    found = []
    for columns, rows, warps in shapes:
        kernel = Kernel(
            language="triton",
            source=f"{MODULE}:{function}",
            entry=function,
            arguments=(
                *((name, kind) for name, kind, _ in pointers),
                *((name, kind) for name, kind, _ in scalars),
            ),
            constants=(*constants, ("BLOCK", columns), ("ROWS", rows)),
            warps=warps,
            features=features,
        )
        down = -(-tokens // rows)
        across = None if tiles is None else -(-tiles // columns)
        launch = Launch(
            kernel=kernel,
            grid=(down, 1, 1) if across is None else (down, across, 1),
            operands=(*(value for _, _, value in pointers), *(value for _, _, value in scalars)),
            moved_bytes=cost.moved_bytes,
            flops=cost.flops,
            blocks_per_sm=max(1, 48 // warps),
        )
        name = f"rows{rows}.w{warps}" if tiles is None else f"rows{rows}.cols{columns}.w{warps}"
        config: dict[str, int | str] = {"columns": columns, "rows": rows, "warps": warps}
        found.append(Tactic(name=name, launches=(launch,), config=config))
    return found


def norm(x: TensorType, cost: Cost, eps: float, *, add: bool, codes: bool) -> list[Tactic]:
    """RMS norm of x [T, D], or of x + residual, to y, h, codes and scales."""
    tokens, width = _matrix(x)
    return tactics(
        "norm_rows",
        whole_rows(width, (4, 8)),
        tokens=tokens,
        tiles=None,
        pointers=(
            ("x", "*bf16", Tensor("x")),
            ("residual", "*bf16", Tensor("residual") if add else None),
            ("weight", "*bf16", Tensor("weight")),
            ("y", "*bf16", Tensor("y" if add or codes else "out")),
            ("h", "*bf16", Tensor("h") if add else None),
            ("codes", "*f8e4m3", Tensor("codes") if codes else None),
            ("scales", "*f32", Tensor("scales") if codes else None),
        ),
        scalars=(("tokens", "i32", tokens), ("eps", "f32", eps)),
        constants=(("WIDTH", width), ("ADD", int(add)), ("CODES", int(codes))),
        cost=cost,
        features=("fp8",) if codes else (),
    )


def gated(gate_up: TensorType, cost: Cost, *, codes: bool) -> list[Tactic]:
    """silu(gate) * up of gate_up [T, 2F]."""
    tokens, width = _matrix(gate_up)
    return tactics(
        "gated_rows",
        _tiled(width // 2),
        tokens=tokens,
        tiles=width // 2,
        pointers=(
            ("gate_up", "*bf16", Tensor("gate_up")),
            ("y", "*bf16", None if codes else Tensor("out")),
            ("codes", "*f8e4m3", Tensor("codes") if codes else None),
            ("scales", "*f32", Tensor("scales") if codes else None),
        ),
        scalars=(("tokens", "i32", tokens),),
        constants=(("WIDTH", width // 2), ("CODES", int(codes))),
        cost=cost,
        features=("fp8",) if codes else (),
    )


def coded(x: TensorType, cost: Cost) -> list[Tactic]:
    """FP8 codes of x [T, D]."""
    tokens, width = _matrix(x)
    return tactics(
        "code_rows",
        [*_whole_row(width), *_tiled(width)],
        tokens=tokens,
        tiles=width,
        pointers=(
            ("x", "*bf16", Tensor("x")),
            ("codes", "*f8e4m3", Tensor("codes")),
            ("scales", "*f32", Tensor("scales")),
        ),
        scalars=(("tokens", "i32", tokens),),
        constants=(("WIDTH", width),),
        cost=cost,
        features=("fp8",),
    )


def gate_norm(
    o: TensorType, weight: TensorType, groups: int, cost: Cost, eps: float
) -> list[Tactic]:
    """Norm of groups of o [T, HV] or [T, H, V], then the gate."""
    (tokens, *_), (channels,) = o.bind({}), weight.bind({})
    width = channels // groups
    return tactics(
        "gated_norm_rows",
        [(max(power(width), PART), max(1, 512 * n // power(width)), n) for n in (4, 2)],
        tokens=tokens,
        tiles=groups * max(power(width), PART),
        pointers=(
            ("o", "*bf16", Tensor("o")),
            ("gate", "*bf16", Tensor("gate")),
            ("weight", "*bf16", Tensor("weight")),
            ("y", "*bf16", Tensor("out")),
        ),
        scalars=(("tokens", "i32", tokens), ("eps", "f32", eps)),
        constants=(("GROUPS", groups), ("WIDTH", width)),
        cost=cost,
    )


def _tiled(width: int) -> list[Shape]:
    """Blocks of some rows by some channels."""
    columns = min(1024, max(power(width), PART))
    return [(columns, max(1, rows * 1024 // columns), warps) for rows, warps in ((1, 4), (2, 4))]


def _whole_row(width: int) -> list[Shape]:
    """A block a row, where that is neither narrow nor wide."""
    columns = power(width)
    return [(columns, 1, 4)] if 2048 <= columns <= 4096 else []


def rope_heads(
    qkv: TensorType, q_weight: TensorType, cos: TensorType, heads: int, cost: Cost, eps: float,
    *, source: str = "qkv",
) -> list[Tactic]:  # fmt: skip
    """Norm and half-split rope of the heads of q and k, the first columns of `source`."""
    (tokens, pitch), (key,), (_, pairs) = (one.bind({}) for one in (qkv, q_weight, cos))
    found = []
    for rows, warps in ((16, 4), (8, 1)):
        kernel = Kernel(
            language="triton",
            source=f"{MODULE}:head_norm_rope",
            entry="head_norm_rope",
            arguments=(
                ("qkv", "*bf16"), ("q_weight", "*bf16"), ("k_weight", "*bf16"), ("cos", "*f32"),
                ("sin", "*f32"), ("q", "*bf16"), ("k", "*bf16"), ("tokens", "i32"), ("eps", "f32"),
            ),
            constants=(
                ("PITCH", pitch), ("HEADS", heads), ("K", key), ("PAIRS", pairs),
                ("TURN", power(pairs)), ("REST", power(key - 2 * pairs)), ("ROWS", rows),
            ),
            warps=warps,
        )  # fmt: skip
        names = (source, "q_weight", "k_weight", "cos", "sin", "q", "k")
        launch = Launch(
            kernel=kernel,
            grid=(-(-tokens * heads // rows), 2, 1),
            operands=(*map(Tensor, names), tokens, eps),
            moved_bytes=cost.moved_bytes,
            flops=cost.flops,
            blocks_per_sm=max(1, 48 // warps),
        )
        config: dict[str, int | str] = {"rows": rows, "warps": warps}
        found.append(Tactic(name=f"heads{rows}.w{warps}", launches=(launch,), config=config))
    return found


def rope_query(q: TensorType, cos: TensorType, heads: int, cost: Cost) -> list[Tactic]:
    """Rope of adjacent pairs at the end of each head of q [T, HK]."""
    (tokens, width), (_, pairs) = q.bind({}), cos.bind({})
    plain = width // heads - 2 * pairs
    found = []
    for rows, warps in ((16, 4), (8, 1)):
        kernel = Kernel(
            language="triton",
            source=f"{MODULE}:query_rope",
            entry="query_rope",
            arguments=(
                ("q", "*bf16"), ("cos", "*f32"), ("sin", "*f32"), ("y", "*bf16"), ("tokens", "i32"),
            ),
            constants=(
                ("HEADS", heads), ("PLAIN", plain), ("PAIRS", pairs), ("KEEP", power(plain)),
                ("TURN", power(pairs)), ("ROWS", rows),
            ),
            warps=warps,
        )  # fmt: skip
        launch = Launch(
            kernel=kernel,
            grid=(-(-tokens * heads // rows), 1, 1),
            operands=(Tensor("q"), Tensor("cos"), Tensor("sin"), Tensor("out"), tokens),
            moved_bytes=cost.moved_bytes,
            flops=cost.flops,
            blocks_per_sm=max(1, 48 // warps),
        )
        config: dict[str, int | str] = {"rows": rows, "warps": warps}
        found.append(Tactic(name=f"heads{rows}.w{warps}", launches=(launch,), config=config))
    return found


def _matrix(x: TensorType) -> tuple[int, int]:
    """Rows and width; leading axes are rows."""
    *outer, width = x.bind({})
    rows = 1
    for size in outer:
        rows *= size
    return rows, width
