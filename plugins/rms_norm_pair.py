"""RMS norms of two tensors, side by side: what a draft layer makes of a token and a hidden state.

    y[t, d]     = x[t, d] * rsqrt(mean_d(x[t, :]^2) + eps) * x_weight[d]
    y[t, D + d] = hidden[t, d] * rsqrt(mean_d(hidden[t, :]^2) + eps) * hidden_weight[d]

Shapes: x, hidden [T, D]; x_weight, hidden_weight [D]; y [T, 2 D]. T symbolic.

Rounding: as `rms_norm`: everything in f32 (f64 for f64 x), and y once, to x's dtype.

Source: DeepSeek-V3 technical report, 2024, arXiv:2412.19437, eq. 21, where the hidden state stands
first; inclusionAI/Ling-V2.5:models/modeling_bailing_moe_v2_5.py for the order here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lingc.kernel import Kernel, Launch, Tactic
from lingc.kernel import Tensor as Operand
from lingc.math import elements, number, rms, stored_bytes, times
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target

MAX_WIDTH = 16_384
"""A wider row would take more than 64 registers of each of 256 threads."""


def reference(
    x: Tensor, x_weight: Tensor, hidden: Tensor, hidden_weight: Tensor, eps: float
) -> Tensor:
    both = (rms(x, x_weight, eps), rms(hidden, hidden_weight, eps))
    return torch.cat(both, -1).to(x.dtype)


def types(
    x: TensorType, x_weight: TensorType, hidden: TensorType, hidden_weight: TensorType, eps: float
) -> TensorType:
    return TensorType(x.dtype, (x.shape[0], times(x.shape[1], 2)))


def cost(
    x: TensorType, x_weight: TensorType, hidden: TensorType, hidden_weight: TensorType, eps: float
) -> Cost:
    made = types(x, x_weight, hidden, hidden_weight, eps)
    return Cost(
        flops=4.0 * elements(made),
        moved_bytes=stored_bytes(x, hidden, made, x_weight, hidden_weight),
    )


def refusal(
    _target: Target, x: TensorType, x_weight: TensorType, hidden: TensorType,
    hidden_weight: TensorType, _eps: float,
) -> str | None:  # fmt: skip
    given = {"x": x, "x_weight": x_weight, "hidden": hidden, "hidden_weight": hidden_weight}
    for name, kind in given.items():
        if kind.dtype != "bf16":
            return f"{name} is {kind.dtype}, not bf16"
    width = number(x.shape[1])
    if width % 8:
        return f"rows of {width} channels are not a multiple of 8"
    if width > MAX_WIDTH:
        return f"rows of {width} channels do not fit in a block, which holds {MAX_WIDTH}"
    return None


def tactics(
    target: Target, x: TensorType, x_weight: TensorType, hidden: TensorType,
    hidden_weight: TensorType, eps: float,
) -> Sequence[Tactic]:  # fmt: skip
    given = (x, x_weight, hidden, hidden_weight, eps)
    if refusal(target, *given) is not None:
        return ()
    tokens, width = x.bind({})
    warps = min(8, -(-width // 256))
    kernel = Kernel(
        language="cuda",
        source="kernels/rms_norm_pair.cu",
        entry="rms_norm_pair",
        arguments=(
            ("x", "*bf16"), ("x_weight", "*bf16"), ("hidden", "*bf16"), ("hidden_weight", "*bf16"),
            ("y", "*bf16"), ("eps", "f32"),
        ),
        constants=(("WIDTH", width), ("THREADS", 32 * warps)),
        warps=warps,
    )  # fmt: skip
    names = ("x", "x_weight", "hidden", "hidden_weight", "y")
    launch = Launch(
        kernel=kernel,
        grid=(tokens, 2, 1),
        operands=(*map(Operand, names), eps),
        dependent=(target.compute_capability or (0, 0)) >= (9, 0),
        moved_bytes=cost(*given).moved_bytes,
        blocks_per_sm=8,
    )
    return (Tactic(name=f"row.warps{warps}", launches=(launch,), config={"warps": warps}),)


def inputs(tokens: int, width: int, *, dtype: str, device: str) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    x, x_weight = some.normal(tokens, width), some.norm_weight(width)
    return x, x_weight, 3 * some.normal(tokens, width), some.norm_weight(width), 1e-6


OP = define(
    "rms_norm_pair(Tensor x, Tensor x_weight, Tensor hidden, Tensor hidden_weight, float eps) -> "
    "Tensor y",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 4), (3, 33), (1, 8), (3, 256), (17, 1000), (5, 4096), (127, 2056)),
    benchmarks=(
        Benchmark(name="hidden 4096", case=lambda tokens: (tokens, 4096), tokens=(1, 8, 8192)),
    ),
)
