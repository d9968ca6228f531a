"""Cosines and sines of the rotary embedding, once a step for all layers of one kind.

    angle[t, j] = positions[t] * inv_freq[j]
    cos[t, j] = scale * cos(angle[t, j]),  sin[t, j] = scale * sin(angle[t, j])

`scale` is 1, or YaRN's attention factor.

Shapes: positions i32 or i64 [T]; inv_freq n numbers; cos, sin f32 [T, n]. T symbolic.

Rounding: position and frequency are rounded to f32 and multiplied in f32, as in the published
modelling code: at position 100,000 the f32 angle of the first pair is off by up to 0.004. The
cosine is taken in f64 and rounded once: vectorized f32 cosines differ from machine to machine.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864, eq. 34; Peng et al., YaRN, 2023,
arXiv:2309.00071, section 3.4 for `scale`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lingc.kernel import Kernel, Launch, Tactic
from lingc.kernel import Tensor as Operand
from lingc.math import stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(positions: Tensor, inv_freq: Sequence[float], scale: float) -> tuple[Tensor, Tensor]:
    rates = torch.tensor(inv_freq, dtype=torch.float64, device=positions.device).float()
    angle = (positions.float()[:, None] * rates).double()
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def types(
    positions: TensorType, inv_freq: Sequence[float], scale: float
) -> tuple[TensorType, TensorType]:
    table = TensorType("f32", (positions.shape[0], len(inv_freq)))
    return table, table


def cost(positions: TensorType, inv_freq: Sequence[float], scale: float) -> Cost:
    made = types(positions, inv_freq, scale)
    (tokens,) = positions.bind({})
    return Cost(flops=5.0 * tokens * len(inv_freq), moved_bytes=stored_bytes(positions, *made))


def refusal(
    _target: Target, positions: TensorType, inv_freq: Sequence[float], scale: float
) -> str | None:
    if positions.dtype != "i32":
        return f"positions are {positions.dtype}, not i32"
    return None


def tactics(
    target: Target, positions: TensorType, inv_freq: Sequence[float], scale: float
) -> Sequence[Tactic]:
    if refusal(target, positions, inv_freq, scale) is not None:
        return ()
    (tokens,), count, warps = positions.bind({}), len(inv_freq), 8
    bits = np.asarray(inv_freq, np.float64).astype(np.float32).view(np.uint32)
    kernel = Kernel(
        language="cuda",
        source="kernels/rope_table.cu",
        entry="rope_table",
        arguments=(
            ("positions", "*i32"), ("cos", "*f32"), ("sin", "*f32"), ("tokens", "i32"),
            ("scale", "f32"),
        ),
        constants=(("COUNT", count), ("RATES", ",".join(f"{word:#x}" for word in bits.tolist()))),
        warps=warps,
    )  # fmt: skip
    launch = Launch(
        kernel=kernel,
        grid=(-(-tokens * count // (32 * warps)), 1, 1),
        operands=(Operand("positions"), Operand("cos"), Operand("sin"), tokens, scale),
        dependent=(target.compute_capability or (0, 0)) >= (9, 0),
        moved_bytes=cost(positions, inv_freq, scale).moved_bytes,
        blocks_per_sm=8,
    )
    return (Tactic(name="pair", launches=(launch,)),)


def inputs(
    tokens: int, pairs: int, scale: float, *, dtype: str, device: str
) -> tuple[Tensor | list[float] | float, ...]:
    some = Samples(dtype=dtype, device=device)
    return some.below(262_144, tokens), [6e6 ** (-j / pairs) for j in range(pairs)], scale


OP = define(
    "rope_table(Tensor positions, float[] inv_freq, float scale) -> (Tensor cos, Tensor sin)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 2, 1.0), (9, 5, 1.0693), (127, 32, 1.0)),
    benchmarks=(
        Benchmark(name="32 pairs", case=lambda tokens: (tokens, 32, 1.0), tokens=(1, 32, 8192)),
    ),
)
