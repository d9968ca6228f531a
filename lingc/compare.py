"""How close is close, and how a mismatch is shown.

The one tolerance table. An entry is for a dtype and a mechanism, that is, for what makes two right
answers differ; a comparison names both. Values are compared in f64.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lingc.op import Mechanism

_PUBLISHED = "as the published linghe kernels are tested"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """A difference is allowed up to `rtol * |want| + atol + of_mean * mean|want|`.

    Attributes:
        of_row: In place of `atol` this much of the root mean square of the row (the last axis),
            where that is more: what was rounded before a sum is off by a share of its terms.
        source: Why this much: what differs, and by how much at the worst.
        stray: Share of elements that may differ by up to twice that, where inputs are quantized.
            An input within an f32 rounding of the middle between two codes has two right codes, and
            one code beside a large weight moves a sum by more than the allowance.
        stray_of_row: They may also be off by the allowance and this much of the root mean square of
            their row (the last axis): sums over a long memory are large, and so is what one factor
            that rounds the other way changes in all of them.
    """

    rtol: float
    atol: float
    source: str
    of_mean: float = 0.0
    of_row: float = 0.0
    stray: float = 0.0
    stray_of_row: float = 0.0


_EXACT = Tolerance(rtol=0, atol=0, source="integers and flags are equal or wrong")
_F64 = Tolerance(rtol=1e-12, atol=1e-12, source="f64 summation order over a few thousand terms")
_F32_SUM = Tolerance(rtol=1e-4, atol=1e-5, source="f32 summation order over a few thousand terms")
_BF16 = Tolerance(
    rtol=2**-6, atol=1e-3, source="two roundings to bf16 that fall apart, an ulp (2^-7) each"
)
_BF16_SUM = Tolerance(
    rtol=2**-6, atol=5e-3, source="as elementwise, and the sum's terms cancel near zero"
)
_STRAY = 2e-5
"""An f32 error of 3e-7 makes 5e-6 of 3-bit codes fall the other way; of the sums that hold one, a
few in a thousand leave their allowance. Up to 1e-5 were found; none may in less than 50,000."""
_FP8_SUM = Tolerance(
    rtol=2e-2, atol=0, of_mean=2e-2, stray=_STRAY,
    source=f"{_PUBLISHED}, against dequantized f32",
)  # fmt: skip

TABLE = MappingProxyType(
    {
        ("f64", "elementwise"): _F64,
        ("f32", "elementwise"): Tolerance(
            rtol=1e-5, atol=1e-6, source="f32 exp, rsqrt and a mean over one row"
        ),
        ("bf16", "elementwise"): _BF16,
        ("f8e4m3", "elementwise"): Tolerance(
            rtol=0.125, atol=2**-9, source="one code: an ulp (2^-3), or the smallest subnormal"
        ),
        ("f32", "rope"): Tolerance(
            rtol=1e-4, atol=1e-5, source="products that cancel; angles are equal, cos and sin near"
        ),
        ("bf16", "rope"): Tolerance(
            rtol=2**-6, atol=1e-2, source=f"{_PUBLISHED}: an ulp of a product that cancels"
        ),
        ("f32", "gemm"): _F32_SUM,
        ("bf16", "gemm"): _BF16_SUM,
        ("f32", "fp8_gemm"): _FP8_SUM,
        ("bf16", "fp8_gemm"): _FP8_SUM,
        ("f32", "experts"): _F32_SUM,
        ("bf16", "experts"): Tolerance(
            rtol=2e-2,
            atol=2e-2,
            stray=_STRAY,
            source="the inner activation is rounded to bf16 before a sum",
        ),
        ("f32", "attention"): _F32_SUM,
        ("bf16", "attention"): Tolerance(
            rtol=2e-2, atol=2e-2, source="probabilities may be rounded to bf16 before their sum"
        ),
        ("f32", "lightning"): Tolerance(
            rtol=1e-4,
            atol=1e-4,
            of_row=2e-5,
            source="f32 block sums against the recurrence, thousands of steps; a decayed value is "
            "two bf16, its sums off by 2.4e-6: of 1.6 million elements one by five times that",
        ),
        ("bf16", "lightning"): Tolerance(
            rtol=2**-6, atol=1e-2, source=f"{_PUBLISHED}, at the strict end: bf16 block products"
        ),
        ("bf16", "lightning_qkv"): Tolerance(
            rtol=2**-6,
            atol=1e-2,
            stray=_STRAY,
            stray_of_row=1e-2,
            source=f"{_PUBLISHED}; two q and k in 100,000 round the other way from f32 norms than "
            "from f64 ones, which moves o by up to half of 1e-2 of its row",
        ),
        ("f32", "router"): Tolerance(
            rtol=1e-4, atol=1e-6, source="f32 logits in another order, through a sigmoid"
        ),
    }
)
"""By dtype and mechanism; in f64 every mechanism is the elementwise one."""


def tolerance(dtype: str, mechanism: Mechanism = "elementwise") -> Tolerance:
    """The table's entry; integers and flags are exact whatever the mechanism.

    Raises:
        KeyError: No such entry; the table is where to add one.
    """
    if dtype in {"i32", "i64", "u8", "bool"}:
        return _EXACT
    return TABLE[dtype, "elementwise" if dtype == "f64" else mechanism]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far one tensor is from another.

    Attributes:
        problem: What makes them incomparable (shapes), or None.
        outside: How many elements differ by more than is allowed.
        far: How many of them by more than strays may.
        elements: How many there are.
        similarity_error: 1 - 2<a, b> / (<a, a> + <b, b>): 0 for equal, 1 for unrelated tensors.
        worst: Coordinate of the element that exceeds its allowance by most, () for scalars.
        got: The value there.
        want: The value that should be there.
        allowed: How far apart the two may be.
        dtype: As named in the comparison.
        mechanism: As named in the comparison.
        tolerance: The entry of the table.
    """

    problem: str | None = None
    outside: int = 0
    far: int = 0
    elements: int = 0
    similarity_error: float = 0.0
    worst: tuple[int, ...] = ()
    got: float = 0.0
    want: float = 0.0
    allowed: float = 0.0
    dtype: str
    mechanism: str
    tolerance: Tolerance

    @property
    def ok(self) -> bool:
        strays = self.far == 0 and self.outside <= self.tolerance.stray * self.elements
        return self.problem is None and (self.outside == 0 or strays)

    def __str__(self) -> str:
        if self.problem is not None:
            return self.problem
        used = self.tolerance
        terms = [f"rtol {used.rtol:.3g}", f"atol {used.atol:.3g}"]
        if used.of_row:
            terms.append(f"or {used.of_row:.3g} of the row")
        if used.of_mean:
            terms.append(f"{used.of_mean:.3g} of mean |want|")
        if used.stray:
            terms.append(f"{used.stray:.3g} of the elements up to twice that")
        if used.stray_of_row:
            terms.append(f"or {used.stray_of_row:.3g} of their row beside it")
        return (
            f"{self.outside} of {self.elements} elements differ by more than allowed; "
            f"similarity error {self.similarity_error:.3e}\n"
            f"worst at {list(self.worst)}: got {self.got!r}, want {self.want!r}, "
            f"{abs(self.got - self.want):.3e} apart, {self.allowed:.3e} allowed\n"
            f"tolerance: {', '.join(terms)} for {self.dtype} {self.mechanism} ({used.source})"
        )


def close(
    got: Tensor, want: Tensor, *, dtype: str, mechanism: Mechanism = "elementwise"
) -> Comparison:
    """Compare element by element.

    Equal infinities are close; NaN is close to nothing, not to NaN either.

    Args:
        got: What was computed.
        want: What it should be, which the allowance is relative to.
        dtype: The narrowest dtype that the results were rounded to, e.g. `bf16`, which may be
            narrower than that of the tensors.
        mechanism: What made the results.
    """
    limit = tolerance(dtype, mechanism)
    if got.shape != want.shape:
        return Comparison(
            problem=f"got shape {tuple(got.shape)}, want {tuple(want.shape)}",
            dtype=dtype,
            mechanism=mechanism,
            tolerance=limit,
        )
    if got.numel() == 0:
        return Comparison(dtype=dtype, mechanism=mechanism, tolerance=limit)
    mean = _mean(b.abs() for _, _, b in _parts(got, want)) if limit.of_mean else 0.0
    found = [_compared(*part, limit, mean) for part in _parts(got, want)]
    worst = max(found, key=lambda part: part.excess)
    whole = sum(part.squares for part in found)
    return Comparison(
        outside=sum(part.outside for part in found),
        far=sum(part.far for part in found),
        elements=got.numel(),
        similarity_error=1 - 2 * sum(part.products for part in found) / whole if whole else 0.0,
        worst=tuple(int(i) for i in torch.unravel_index(torch.tensor(worst.at), got.shape)),
        got=worst.got,
        want=worst.want,
        allowed=worst.allowed,
        dtype=dtype,
        mechanism=mechanism,
        tolerance=limit,
    )


_PART = 1 << 24
"""Elements compared at once: what is made of them in f64 takes 1.5 GB, however many there are."""


def _parts(got: Tensor, want: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some rows at a time, f64 [rows, width], behind the place of the first of their elements."""
    width = want.shape[-1] if want.dim() else 1
    place = want.device if got.device == want.device else torch.device("cpu")
    step = max(1, _PART // width)
    rows = (x.detach().reshape(-1, width).split(step) for x in (got, want))
    for index, pair in enumerate(zip(*rows, strict=True)):
        a, b = (x.to(place).double() for x in pair)
        yield index * step * width, a, b


def _mean(parts: Iterable[Tensor]) -> float:
    """Of what is finite."""
    total, count = 0.0, 0
    for part in parts:
        finite = part[part.isfinite()]
        total, count = total + float(finite.sum()), count + finite.numel()
    return total / count if count else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """Some rows: how many elements are off, the worst one, and sums for the similarity."""

    outside: int
    far: int
    excess: float
    at: int
    got: float
    want: float
    allowed: float
    squares: float
    products: float


def _compared(first: int, a: Tensor, b: Tensor, limit: Tolerance, mean: float) -> _Compared:
    row = b.where(b.isfinite(), 0.0).square().mean(-1, keepdim=True).sqrt()
    near_zero = (limit.of_row * row).clamp(min=limit.atol)
    allowed = (limit.rtol * b.abs() + near_zero + limit.of_mean * mean).nan_to_num(
        nan=0.0, posinf=0.0
    )
    # A NaN on either side, or infinities that differ, leave an excess of infinity.
    excess = torch.where(a == b, 0.0, (a - b).abs().nan_to_num(nan=torch.inf) - allowed)
    more = torch.maximum(allowed, limit.stray_of_row * row)
    at = int(excess.argmax())
    return _Compared(
        outside=int((excess > 0).sum()),
        far=int((excess > more).sum()),
        excess=float(excess.flatten()[at]),
        at=first + at,
        got=float(a.flatten()[at]),
        want=float(b.flatten()[at]),
        allowed=float(allowed.flatten()[at]),
        squares=float((a * a + b * b).sum()),
        products=float((a * b).sum()),
    )


def assert_close(
    got: Tensor, want: Tensor, *, dtype: str, mechanism: Mechanism = "elementwise"
) -> None:
    """Raise AssertionError, with what `close` found, where it is not ok."""
    found = close(got, want, dtype=dtype, mechanism=mechanism)
    if not found.ok:
        raise AssertionError(str(found))


NEAR = 5e-5
"""Scores this near may change places: f32 logits in another order, through a sigmoid."""


def routing_problem(
    scores: Tensor, bias: Tensor, groups: int, kept: int, scale: float, normalize: bool,  # noqa: FBT001
    got: Sequence[Tensor], want: Tensor,
) -> str | None:  # fmt: skip
    """Why experts and their weights are wrong, or None; experts may differ where scores nearly tie.

    Args:
        scores: f64 [T, E], before the bias.
        got: Ids and weights [T, k].
        want: Ids that are right.
    """
    ids, weights = got[:2]
    biased, chosen = scores + bias.double(), ids.long()
    if bool(((chosen < 0) | (chosen >= bias.numel())).any()):
        return "an id is of no expert"
    best = biased.unflatten(1, (groups, -1))
    worth = best.topk(min(2, best.shape[-1])).values.sum(-1)
    order = worth.sort(-1, descending=True).values
    tied = (
        order[:, kept - 1] - order[:, kept] < NEAR if kept < groups else order[:, 0] != order[:, 0]
    )
    apart = (biased.gather(1, chosen) - biased.gather(1, want.long())).abs().amax(-1)
    wrong = (apart > NEAR) & ~tied
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0])
        return f"token {t} goes to {ids[t].tolist()}, not to {want[t].tolist()}"
    if bool((chosen.sort(-1).values.diff(dim=-1) == 0).any()):
        return "a token goes to one expert twice"
    own = scores.gather(1, chosen)
    whole = own.sum(-1, keepdim=True) + 1e-20 if normalize else 1.0
    found = close(weights, scale * own / whole, dtype="f32", mechanism="router")
    return None if found.ok else f"weights: {found}"


def judge_codes(
    _arguments: Sequence[Any], got: Sequence[Tensor], want: Sequence[Tensor]
) -> str | None:
    """Judge results of which the last two are FP8 codes and scales of values rounded to bf16.

    Such a scale is as near as those values, not as near as f32; and 448 times it is their largest.
    """
    pairs = list(zip(got, want, strict=True))
    (codes, want_codes), (scales, want_scales) = pairs[-2:]
    compared = [close(one, other, dtype="bf16") for one, other in pairs[:-2]]
    compared.append(close(codes, want_codes, dtype="f8e4m3"))
    compared.append(close(448 * scales, 448 * want_scales, dtype="bf16"))
    return next((str(found) for found in compared if not found.ok), None)
