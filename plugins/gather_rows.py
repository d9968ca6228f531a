"""Some rows of a tensor, in any order: those whose logits somebody reads.

    y[n, d] = x[rows[n], d]

Shapes: x [T, D]; rows i32 [N]; y [N, D]. A row that x does not have is padding and gives zeros. T
and N symbolic.

Rounding: none.

Source: `torch.index_select`, but for the padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lingc.kernel import Kernel, Launch, Tactic
from lingc.kernel import Tensor as Operand
from lingc.math import number, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(x: Tensor, rows: Tensor) -> Tensor:
    last = x.shape[0] - 1
    found = x.index_select(0, rows.clamp(0, last))
    return torch.where(((rows < 0) | (rows > last))[:, None], 0, found)


def types(x: TensorType, rows: TensorType) -> TensorType:
    return TensorType(x.dtype, (rows.shape[0], x.shape[1]))


def cost(x: TensorType, rows: TensorType) -> Cost:
    made = types(x, rows)
    return Cost(flops=0.0, moved_bytes=stored_bytes(rows, made, made))


def refusal(_target: Target, x: TensorType, _rows: TensorType) -> str | None:
    if x.dtype != "bf16":
        return f"x is {x.dtype}, not bf16"
    width = number(x.shape[1])
    return None if width % 8 == 0 else f"rows of {width} elements are not a multiple of 8"


def tactics(target: Target, x: TensorType, rows: TensorType) -> Sequence[Tactic]:
    if refusal(target, x, rows) is not None:
        return ()
    (count,), (tokens, width) = rows.bind({}), x.bind({})
    warps = min(8, -(-width // 256))
    kernel = Kernel(
        language="cuda",
        source="kernels/gather_rows.cu",
        entry="gather_rows",
        arguments=(("x", "*bf16"), ("rows", "*i32"), ("y", "*bf16"), ("tokens", "i32")),
        constants=(("WIDTH", width), ("THREADS", 32 * warps)),
        warps=warps,
    )
    launch = Launch(
        kernel=kernel,
        grid=(count, 1, 1),
        operands=(Operand("x"), Operand("rows"), Operand("y"), tokens),
        dependent=(target.compute_capability or (0, 0)) >= (9, 0),
        moved_bytes=cost(x, rows).moved_bytes,
        blocks_per_sm=8,
    )
    return (Tactic(name=f"row.warps{warps}", launches=(launch,), config={"warps": warps}),)


def inputs(tokens: int, count: int, width: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    """Arguments; the last two of four rows and more are padding."""
    some = Samples(dtype=dtype, device=device)
    rows = some.below(tokens, count)
    if count > 3:
        rows[-2], rows[-1] = tokens, -1
    return some.normal(tokens, width), rows


OP = define(
    "gather_rows(Tensor x, Tensor rows) -> Tensor y",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((2, 1, 3), (5, 4, 33), (3, 1, 8), (4, 7, 40), (20, 17, 1000), (130, 127, 4096)),
    benchmarks=(
        Benchmark(
            name="hidden 4096, of 8192 tokens",
            case=lambda rows: (8192, rows, 4096),
            tokens=(1, 64),
        ),
    ),
)
