"""Whether a step's result is what it should be.

A row is a token's values, a row of the cache, or the state of one head. The error of a row is

    |got - want| / max(|want|, FLOOR * the mean |want| of all rows),

with norms over the row's elements, so that what cancels to nearly nothing in one channel is not
taken for a fault, and one wrong element among thousands is. What it may be follows from the
narrowest type that the step reads or writes: two right results differ by the rounding to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lingc.parity.experts import Routing, gap
from lingc.plan import Program, Step, TensorType, refs

LIMITS: Mapping[str, float] = {
    "f64": 1e-9,
    # A thousand roundings of f32, which sums over tokens and channels stay below; a state that is
    # rounded to bf16 once is ten times as far off.
    "f32": 1e-4,
    # Two roundings to bf16 that fall apart, 2^-7.
    "bf16": 2.0**-6,
    # Codes of inputs, 2^-4 each: sums differ by a third of that, and more where terms cancel.
    "f8e4m3": 2.0**-3,
}
"""Largest error of a row, by narrowest element type."""

TIE = 1e-5
"""How far scores may be from choosing other experts for either choice to be right."""

FLOOR = 0.05

SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One wrong element: where, and the two values."""

    at: tuple[int, ...]
    got: float
    want: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One result of one step.

    Attributes:
        error: Of the worst row; infinite where a value is NaN, or experts differ without a tie.
        limit: What it may be.
        rows: Rows in all.
        bad_rows: Rows over the limit.
        elements: The first elements of the first bad row that differ by more than the limit.
    """

    error: float
    limit: float
    rows: int
    bad_rows: int
    elements: tuple[Element, ...] = ()

    @property
    def ok(self) -> bool:
        return self.bad_rows == 0


def limit_of(step: Step, program: Program, *, same_codes: bool = False) -> float:
    """The limit of a step's results.

    Weights are what they are, and a linear state is f32 whatever a plan says: what is lost in a
    narrower one is what a user must be told.

    Args:
        same_codes: Whether both sides quantize their inputs, and so multiply the same codes; else
            one multiplies what the codes are of.
    """
    states = {n for n in program.states if n.startswith("linear_state.")}
    exact = {*program.weights, *states, *(program.updates.get(n) for n in states)}
    names = [name for name in (*refs(step.args), *step.outputs) if name not in exact]
    kinds = {program.types[name].dtype for name in names}
    if same_codes:
        kinds -= {"f8e4m3"} - {program.types[name].dtype for name in step.outputs}
    elif "fp8" in step.args or step.op.startswith("lingc.fp8_static_linear"):
        kinds.add("f8e4m3")  # an op that quantizes its input inside
    return max(LIMITS.get(kind, 0.0) for kind in (*kinds, "f64"))


def judge(got: Tensor, want: Tensor, kind: TensorType, limit: float) -> Judged:
    """Hold a result against what it should be.

    Args:
        got: Of the type `kind`; a state's last row, which is scratch, is not looked at.
        want: The same values, in any floating type, in a shape of as many elements; of another
            number, it is wrong as a whole.
        kind: The plan's type.
        limit: `limit_of` its step.
    """
    want = fitted(want, got)
    if want.shape != got.shape:
        return Judged(error=float("inf"), limit=limit, rows=len(want), bad_rows=len(want))
    if kind.shape and kind.shape[0] in ("S", "R"):
        got, want = got[:-1], want[:-1]
    if not got.numel():
        return Judged(error=0.0, limit=limit, rows=0, bad_rows=0)
    if not got.is_floating_point():
        return _exact(got, want)
    whole = 2 if kind.shape and kind.shape[0] == "S" and got.dim() > 2 else 1
    a, b = (x.detach().double().reshape(*x.shape[:whole], -1) for x in (got, want))
    errors = row_errors(a, b)
    bad = errors > limit
    return Judged(
        error=float(errors.max()),
        limit=limit,
        rows=errors.numel(),
        bad_rows=int(bad.sum()),
        elements=_elements(got, want, bad, limit) if bool(bad.any()) else (),
    )


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """A value in the shape of another of as many elements, else as it is."""
    return value.reshape(like.shape) if value.numel() == like.numel() else value


def row_errors(got: Tensor, want: Tensor) -> Tensor:
    """Errors [rows...] of values [rows..., N] in f64; infinite for a row with a NaN."""
    size = want.norm(dim=-1)
    floor = FLOOR * size.mean()
    error: Tensor = (got - want).norm(dim=-1)
    scale = torch.maximum(size, floor)
    found = torch.where(error == 0, 0.0, error / scale)
    return found.nan_to_num(nan=torch.inf, posinf=torch.inf)


def judge_experts(got: Tensor, want: Tensor, biased: Tensor, routing: Routing) -> Judged:
    """Ids [T, k] against ids, where `biased` [T, E] are the scores that eager chose by."""
    left, right = got.long().sort(dim=1).values, want.long().sort(dim=1).values
    differ = (left != right).any(dim=1).nonzero()[:, 0].tolist()
    scores = biased.float().numpy()
    gaps = {t: gap(scores[t], got[t].tolist(), routing) for t in differ}
    bad = [t for t, wide in gaps.items() if not wide <= TIE]
    elements: list[Element] = []
    if bad:
        pairs = zip(left[bad[0]].tolist(), right[bad[0]].tolist(), strict=True)
        elements = [
            Element(at=(bad[0], i), got=a, want=b) for i, (a, b) in enumerate(pairs) if a != b
        ]
    return Judged(
        error=max(gaps.values(), default=0.0),
        limit=TIE,
        rows=len(got),
        bad_rows=len(bad),
        elements=tuple(elements[:SHOWN]),
    )


def judge_weights(
    got: Tensor, got_ids: Tensor, want: Tensor, want_ids: Tensor, *, limit: float
) -> Judged:
    """Weights [T, k] of experts [T, k], of tokens that both sent to the same ones in any order."""
    (a, b), (c, d) = (ids.long().sort(dim=1) for ids in (got_ids, want_ids))
    same = (a == c).all(dim=1)
    left, right = got.gather(1, b)[same], want.gather(1, d)[same]
    return judge(left, right, TensorType("f32", ()), limit)


def _exact(got: Tensor, want: Tensor) -> Judged:
    wrong = got.long() != want.long()
    bad = wrong.flatten(1).any(dim=1) if wrong.dim() > 1 else wrong
    elements = tuple(
        Element(at=tuple(at), got=float(got[tuple(at)]), want=float(want[tuple(at)]))
        for at in wrong.nonzero()[:SHOWN].tolist()
    )
    error = float("inf") if elements else 0.0
    rows, count = bad.numel(), int(bad.sum())
    return Judged(error=error, limit=0.0, rows=rows, bad_rows=count, elements=elements)


def _elements(got: Tensor, want: Tensor, bad: Tensor, limit: float) -> tuple[Element, ...]:
    row = tuple(bad.nonzero()[0].tolist())
    a, b = got[row].double(), want[row].double()
    scale = max(float(b.square().mean().sqrt()), 1e-300)
    wrong = ~((a - b).abs() <= limit * scale)  # a NaN is wrong
    places = wrong.nonzero()[:SHOWN].tolist()
    return tuple(
        Element(at=(*row, *place), got=float(a[tuple(place)]), want=float(b[tuple(place)]))
        for place in places
    )
