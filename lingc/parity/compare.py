"""Hold the scores of two sides against each other, token by token.

For token t with reference logits a and other logits b, over the vocabulary in float64:

    KL(t)     = sum_v p_v (log p_v - log q_v),  p = softmax(a), q = softmax(b)
    max|d|    = max_v |a_v - b_v|, mean|d| likewise
    margin(t) = a's largest logit less its second largest

Top-1 disagrees where the largest logit of a and of b are different tokens; where a's margin is
small that is a near tie, counted apart. The surprise of a side is -log p of the token that came;
its perplexity is the exponential of the mean over all tokens that have one behind them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from lingc.parity.experts import Flip, Routing, flips
from lingc.parity.layers import Inside, LayerError, StateError
from lingc.parity.side import F32, Scores
from lingc.parity.usage import Usage

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]

BUCKETS = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
"""First position of each bucket."""

_BLOCK = 1 << 22  # logits worked on at a time: 32 MiB of float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One scored token; `reference` and `other` are the likeliest next tokens of each side.

    `in_five` is whether the reference's is among the other's five likeliest. The surprises are NaN
    for a row's last token, which nothing follows.
    """

    row: int
    position: int
    kl: float
    max_abs: float
    mean_abs: float
    margin: float
    reference: int
    other: int
    in_five: bool
    surprise: float
    other_surprise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The columns of many tokens, in the order of rows and positions; see `Token`."""

    row: Ints
    position: Ints
    kl: F64
    max_abs: F64
    mean_abs: F64
    margin: F64
    reference: Ints
    other: Ints
    in_five: NDArray[np.bool_]
    surprise: F64
    other_surprise: F64

    def __len__(self) -> int:
        return len(self.row)

    def where(self, chosen: NDArray[np.bool_] | Ints) -> "Tokens":
        """Those that are chosen, by a mask or by their indices."""
        return Tokens(**{f.name: getattr(self, f.name)[chosen] for f in fields(Tokens)})

    def each(self) -> Iterator[Token]:
        """Token by token."""
        columns = {f.name: getattr(self, f.name).tolist() for f in fields(Tokens)}
        for values in zip(*columns.values(), strict=True):
            yield Token(**dict(zip(columns, values, strict=True)))

    @property
    def disagrees(self) -> NDArray[np.bool_]:
        different: NDArray[np.bool_] = self.reference != self.other
        return different

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        return np.isfinite(self.kl) & np.isfinite(self.max_abs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The tokens whose positions lie from `first` to `last`."""

    first: int
    last: int
    tokens: int
    mean_kl: float
    max_kl: float
    max_abs: float
    top1_above_margin: int
    top1_within_margin: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A whole comparison in numbers.

    Attributes:
        mode: How the sides were fed.
        margin: Up to which a disagreement is a near tie.
        tokens: Scored tokens.
        not_finite: Tokens with a logit that is NaN or infinite on either side.
        top1_above_margin: Tokens with another winner though the reference had a clear one.
        top1_within_margin: Tokens with another winner where the reference had a near tie.
        top5_agreement: Share of tokens whose winner is among the other's five likeliest.
        perplexity: Of the reference; None where no token follows another.
        other_perplexity: Of the other side.
        expert_layers: Layers of which both sides told the experts.
        flips: Tokens that went to other experts.
        buckets: By position.
        layers: Errors behind the layers that both sides tell of.
        states: Errors of linear states, by layer and position.
        usage: Layer -> tokens that each expert got, of the other side, or of the reference where
            the other does not tell.
    """

    mode: str
    margin: float
    rows: int
    tokens: int
    not_finite: int
    mean_kl: float
    max_kl: float
    mean_abs: float
    max_abs: float
    top1_above_margin: int
    top1_within_margin: int
    top5_agreement: float
    perplexity: float | None
    other_perplexity: float | None
    expert_layers: tuple[int, ...]
    flips: tuple[Flip, ...]
    buckets: tuple[Bucket, ...]
    layers: tuple[LayerError, ...]
    states: tuple[StateError, ...]
    usage: Mapping[int, Sequence[int]]

    @property
    def top1_agreement(self) -> float:
        """Share of tokens with the same winner."""
        differ = self.top1_above_margin + self.top1_within_margin
        return 1 - differ / self.tokens if self.tokens else 1.0


@dataclass(slots=True)
class Comparison:
    """Gathers rows; `summary` and `tokens` speak of those so far.

    Args:
        mode: How the sides were fed.
        routing: How the model chooses experts; None where it has none.
    """

    mode: str
    routing: Routing | None
    rows: int = 0
    flips: list[Flip] = field(default_factory=list)
    inside: Inside = field(default_factory=Inside)
    _usage: Usage | None = None
    _parts: list[Tokens] = field(default_factory=list)
    _layers: set[int] = field(default_factory=set)

    def add(self, row: int, reference: Scores, other: Scores, came: Sequence[int] = ()) -> None:
        """Compare one row.

        Args:
            row: Its number.
            came: What followed each scored token; shorter where nothing did.
        """
        a, b = reference.logits, other.logits
        assert a.shape == b.shape, f"scores {a.shape} and {b.shape} of row {row} cannot be compared"
        self._parts.extend(_tokens(row, a, b, came))
        self.inside.add(reference, other)
        if self.routing is not None and self.routing.experts:
            if self._usage is None:
                self._usage = Usage(self.routing.experts)
            self._usage.add(other.experts or reference.experts)
        self._layers |= reference.experts.keys() & other.experts.keys()
        if self.routing is not None:
            self.flips += flips(row, reference.experts, other.experts, self.routing)
        self.rows += 1

    @property
    def tokens(self) -> Tokens:
        """Every token compared so far."""
        columns = {
            f.name: np.concatenate([getattr(part, f.name) for part in self._parts])
            for f in fields(Tokens)
        }
        return Tokens(**columns)

    def summary(self, margin: float) -> Summary:
        """The numbers that budgets judge."""
        tokens = self.tokens
        above, within = _disagreements(tokens, margin)
        return Summary(
            mode=self.mode,
            margin=margin,
            rows=self.rows,
            tokens=len(tokens),
            not_finite=int((~tokens.is_finite).sum()),
            mean_kl=float(tokens.kl.mean()),
            max_kl=float(tokens.kl.max()),
            mean_abs=float(tokens.mean_abs.mean()),
            max_abs=float(tokens.max_abs.max()),
            top1_above_margin=above,
            top1_within_margin=within,
            top5_agreement=float(tokens.in_five.mean()),
            perplexity=_perplexity(tokens.surprise),
            other_perplexity=_perplexity(tokens.other_surprise),
            expert_layers=tuple(sorted(self._layers)),
            flips=tuple(self.flips),
            buckets=tuple(_buckets(tokens, margin)),
            layers=self.inside.layers,
            states=self.inside.states,
            usage={} if self._usage is None else self._usage.counts,
        )


def worst(tokens: Tokens, count: int) -> Tokens:
    """The tokens with the largest divergence, what is not finite first."""
    order = np.argsort(-np.where(tokens.is_finite, tokens.kl, np.inf), kind="stable")[:count]
    return tokens.where(order)


def log_softmax(logits: F32) -> F64:
    """Over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def _perplexity(surprise: F64) -> float | None:
    known = surprise[~np.isnan(surprise)]
    with np.errstate(over="ignore"):
        return float(np.exp(known.mean())) if len(known) else None


def _tokens(row: int, a: F32, b: F32, came: Sequence[int]) -> Iterator[Tokens]:
    step = max(1, _BLOCK // a.shape[1])
    for first in range(0, len(a), step):
        part = slice(first, first + step)
        yield _block(row, first, a[part], b[part], came[part])


def surprise(logarithms: F64, came: Sequence[int]) -> F64:
    """-log p of what came after each row of `log_softmax` [N, V]; NaN where nothing did.

    It is infinite where the logits are not finite.
    """
    found = np.full(len(logarithms), np.nan)
    known = np.asarray(came, np.int64)
    told = -logarithms[np.arange(len(known)), known]
    found[: len(known)] = np.where(np.isnan(told), np.inf, told)
    return found


def _block(row: int, first: int, a: F32, b: F32, came: Sequence[int]) -> Tokens:
    # Infinities and NaN are counted, not warned about.
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = log_softmax(a), log_softmax(b)
        kl = (np.exp(p) * (p - q)).sum(axis=-1)
        difference = np.abs(a.astype(np.float64) - b)
    best = np.argmax(a, axis=-1)
    top = np.take_along_axis(a, best[:, None], axis=-1)[:, 0].astype(np.float64)
    rest = a.astype(np.float64)
    np.put_along_axis(rest, best[:, None], -np.inf, axis=-1)
    with np.errstate(invalid="ignore"):
        margin = top - rest.max(axis=-1)
    won = np.take_along_axis(b, best[:, None], axis=-1)
    return Tokens(
        row=np.full(len(a), row),
        position=np.arange(first, first + len(a)),
        kl=np.maximum(kl, 0.0),  # rounding of a sum near zero
        max_abs=difference.max(axis=-1),
        mean_abs=difference.mean(axis=-1),
        margin=margin,
        reference=best.astype(np.int64),
        other=np.argmax(b, axis=-1).astype(np.int64),
        in_five=(b > won).sum(axis=-1) < 5,
        surprise=surprise(p, came),
        other_surprise=surprise(q, came),
    )


def _disagreements(tokens: Tokens, margin: float) -> tuple[int, int]:
    clear = ~(tokens.margin <= margin)  # a NaN margin excuses nothing
    return int((tokens.disagrees & clear).sum()), int((tokens.disagrees & ~clear).sum())


def _buckets(tokens: Tokens, margin: float) -> Iterator[Bucket]:
    edges: Sequence[int] = (*BUCKETS, int(tokens.position.max(initial=0)) + 1)
    for first, last in zip(BUCKETS, edges[1:], strict=True):
        part = tokens.where((tokens.position >= first) & (tokens.position < last))
        if not len(part):
            continue
        above, within = _disagreements(part, margin)
        yield Bucket(
            first=first,
            last=int(part.position.max()),
            tokens=len(part),
            mean_kl=float(part.kl.mean()),
            max_kl=float(part.kl.max()),
            max_abs=float(part.max_abs.max()),
            top1_above_margin=above,
            top1_within_margin=within,
        )
