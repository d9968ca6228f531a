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

    def by_each(self, x: Value, weights: Value, *, rank: int) -> Value: ...

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
    hidden = library.by_each(x.unsqueeze(1, 2), gate_up.fetched(library, ids), rank=4)
    inside = _activated(library, hidden, (1, inner))  # [T, k, 1, F]
    if rounding is not None:
        flat = rounding(library, inside.reshape(-1, inner), inner)
        inside = flat.reshape(-1, ids.size(1), 1, inner)
    each = library.by_each(inside, down.fetched(library, ids), rank=4)  # [T, k, 1, D]
    return (each * weights.unsqueeze(2, 3)).sum(1, 2)


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
    hidden = library.by_each(by_expert, gate_up.whole(library, x), rank=3)
    inside = _activated(library, hidden, (inner,))  # [E, c, F]
    if rounding is not None:
        flat = rounding(library, inside.reshape(-1, inner), inner)
        inside = flat.reshape(experts, -1, inner)
    each = library.by_each(inside, down.whole(library, inside), rank=3)  # [E, c, D]
    per_token = each.reshape(-1, down.rows).gather(seat).reshape(-1, top_k, down.rows)
    return (per_token * weights.unsqueeze(2)).sum(1)


def _activated(library: Maths, hidden: Value, inner: tuple[int, ...]) -> Value:
    """The inner activation [a, b, *inner] of gate and up, which lie along the last axis."""
    width = inner[-1]
    if not library.interleaved:
        gate, up = hidden.split(-1, [width, width])
        return library.silu_mul(gate, up)
    gate, up = hidden.reshape(0, 0, width, 2).split(3, [1, 1])
    return library.silu_mul(gate, up).reshape(0, 0, *inner)
