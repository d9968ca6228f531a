"""Stacked experts in standard ops: fetched for each token, or tokens gathered for each expert."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lingc.targets.onnx.body import Body, Value


class Maths(Protocol):
    """What a library gives to the experts."""

    interleaved: bool
    body: Body

    def by_blocks(
        self, values: Value, scales: Value, *, width: int, rank: int, block: int = 128
    ) -> Value: ...

    def waiting(self, weight: Value, after: Value) -> Value: ...

    def nibbles(
        self, packed: Value, scales: Value, *, width: int, group: int, rank: int
    ) -> Value: ...

    def silu_mul(self, gate: Value, up: Value) -> Value: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The same matrix of all experts, [E, rows, width], in its storage format.

    Attributes:
        values: f32, bf16, codes in f16, or bytes of two nibbles.
        scales: f32, one for each row and block of columns, for codes and nibbles.
        width: Length of a row.
        group: Columns of a scale, for nibbles; else 0.
    """

    values: Value
    scales: Value | None
    width: int
    group: int = 0

    @property
    def experts(self) -> int:
        return self.values.size(0)

    @property
    def rows(self) -> int:
        return self.values.size(1)

    def whole(self, library: Maths, after: Value) -> Value:
        """All of it in f32, [E, rows, width], not before `after` is there."""
        return self._wide(library, library.waiting(self.values, after), self.scales, rank=3)

    def fetched(self, library: Maths, ids: Value) -> Value:
        """Those of the experts `ids` [T, k] in f32, [T, k, rows, width]."""
        values = Value(self.values.gather(ids).name, self.values.body, self.values.dtype)
        scales = None if self.scales is None else self.scales.gather(ids)
        return self._wide(library, values, scales, rank=4)

    def _wide(self, library: Maths, values: Value, scales: Value | None, *, rank: int) -> Value:
        if scales is None:
            return values.cast("f32")
        if self.group:
            return library.nibbles(values, scales, width=self.width, group=self.group, rank=rank)
        return library.by_blocks(values.cast("f32"), scales, width=self.width, rank=rank)


Rounding = Callable[[Any, Value, int], Value]
"""(library, rows [n, width], width) -> the rows as the second matrix gets them."""


def few_experts(
    library: Maths,
    x: Value,
    ids: Value,
    weights: Value,
    gate_up: Stack,
    down: Stack,
    rounding: Rounding | None = None,
) -> Value:
    """For few tokens: fetches the chosen experts of each."""
    inner = gate_up.rows // 2
    hidden = gate_up.fetched(library, ids) @ x.unsqueeze(1, 3)  # [T, k, 2F, 1]
    if library.interleaved:
        gate, up = hidden.reshape(0, 0, inner, 2).split(3, [1, 1])
    else:
        gate, up = hidden.split(2, [inner, inner])
    inside = library.silu_mul(gate, up)  # [T, k, F, 1]
    if rounding is not None:
        flat = rounding(library, inside.reshape(-1, inner), inner)
        inside = flat.reshape(-1, ids.size(1), inner, 1)
    each = down.fetched(library, ids) @ inside  # [T, k, D, 1]
    return (each * weights.unsqueeze(2, 3)).sum(1).squeeze(2)


def grouped_experts(
    library: Maths,
    x: Value,
    ids: Value,
    weights: Value,
    gate_up: Stack,
    down: Stack,
    rounding: Rounding | None = None,
) -> Value:
    """For many tokens: gathers the tokens of each expert, as many as the busiest one has."""
    body, experts, inner, top_k = library.body, gate_up.experts, gate_up.rows // 2, ids.size(1)
    chosen = ids.reshape(-1)  # [n], n = T k
    all_experts = np.arange(experts, dtype=np.int32)
    member = body.op("Equal", chosen.unsqueeze(1), all_experts).cast("f32")  # [n, E]
    # Exact in f32: counts stay below 2^24.
    rank = ((body.op("CumSum", member, 0) * member).sum(1) - 1.0).cast("i64")
    seats = rank.max(0, keep=True) + 1
    seat = chosen.cast("i64") * seats + rank
    number = body.op("Div", body.count_to(chosen.length(0)), top_k)
    nobody = body.full(seats * experts, np.zeros(1, np.int64))
    seated = body.op("ScatterElements", nobody, seat, number, attrs={"axis": 0})
    by_expert = x.gather(seated).reshape(experts, -1, x.size(1))  # [E, c, D]
    hidden = gate_up.whole(library, x) @ by_expert.transpose(0, 2, 1)  # [E, 2F, c]
    if library.interleaved:
        pairs = hidden.reshape(experts, inner, 2, -1).split(2, [1, 1])
        gate, up = (half.squeeze(2) for half in pairs)
    else:
        gate, up = hidden.split(1, [inner, inner])
    inside = library.silu_mul(gate, up)  # [E, F, c]
    if rounding is not None:
        flat = rounding(library, inside.transpose(0, 2, 1).reshape(-1, inner), inner)
        inside = flat.reshape(experts, -1, inner).transpose(0, 2, 1)
    each = down.whole(library, inside) @ inside  # [E, D, c]
    by_seat = each.transpose(0, 2, 1).reshape(-1, down.rows)
    per_token = by_seat.gather(seat).reshape(-1, top_k, down.rows)
    return (per_token * weights.unsqueeze(2)).sum(1)
