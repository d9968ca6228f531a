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

import torch
from torch import Tensor

from lingc.math import stored_bytes
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


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


def inputs(
    tokens: int, pairs: int, scale: float, *, dtype: str, device: str
) -> tuple[Tensor | list[float] | float, ...]:
    some = Samples(dtype=dtype, device=device)
    return some.below(100_000, tokens), [6e6 ** (-j / pairs) for j in range(pairs)], scale


OP = define(
    "rope_table(Tensor positions, float[] inv_freq, float scale) -> (Tensor cos, Tensor sin)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    cases=((1, 2, 1.0), (9, 5, 1.0693)),
)
