"""From logits to a token: greedy, temperature, top-k, top-p, and the random numbers behind them.

Every random number is a function of seed, request, position and purpose, so a request draws the
same tokens whatever runs beside it and in whatever order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.errors import LingcError, UsageError

Row = NDArray[np.float32]  # [vocab]
Probabilities = NDArray[np.float64]  # [vocab], sums to 1

Draws = dict[str, NDArray[Any]]
"""What the op `sample` takes beside logits."""

DRAW, DRAFT, ACCEPT = range(3)
"""Purposes of a random number at one position: the token, a drafted token, its acceptance."""

_WORD, _MOST = (1 << 32) - 1, (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the largest one, whatever the other settings.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        top_p: Then keep the fewest of the likeliest whose share reaches this.
        seed: Of the random numbers, from 0 to 2**64 - 1.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}, it must be 0 or more")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}, it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}, it must be above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed is {self.seed}, it must be from 0 to 2**64 - 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def probabilities(logits: Row, settings: Sampling) -> Probabilities:
    """The distribution that `settings` draw from.

    Sampling and the acceptance of drafts both use this one; that is what makes speculative
    sampling keep the distribution. Ties at the edge of top-k and top-p go to the lower token id.
    """
    best = argmax(logits)
    if settings.is_greedy:
        certain = np.zeros(logits.shape, np.float64)
        certain[best] = 1.0
        return certain
    with np.errstate(over="ignore"):  # a tiny temperature: everything but the best is 0
        scaled = (logits.astype(np.float64) - float(logits[best])) / settings.temperature
    weights = np.exp(scaled)
    if 0 < settings.top_k < weights.size:
        weights[_below_top_k(scaled, settings.top_k)] = 0.0
    weights /= weights.sum()
    if settings.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        reached = int(np.searchsorted(np.cumsum(weights[order]), settings.top_p)) + 1
        weights[order[reached:]] = 0.0
        weights /= weights.sum()
    return weights


def argmax(logits: Row) -> int:
    """The token with the largest logit; the lowest id of several."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise LingcError(
            f"the engine returned a logit of {logits[best]} for token {best}",
            hint="`lingc verify ENGINE --run` says whether the engine computes what it should",
        )
    return best


def pick(weights: Probabilities, uniform: float) -> int:
    """The token at `uniform` (in [0, 1)) of the cumulated weights, which need not sum to 1."""
    cumulated = np.cumsum(weights)
    token = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    # The product may round up to the whole sum.
    return token if token < weights.size else int(np.flatnonzero(weights)[-1])


def uniform(settings: Sampling, *, request: int, position: int, purpose: int) -> float:
    """A number in [0, 1) that belongs to this use alone."""
    # uint64 by name: from a list, a large seed beside a small number would become a float.
    key = np.array([settings.seed, request], np.uint64)
    counter = np.array([0, 0, purpose, position], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return float(np.random.Generator(bits).random())


def draws(rows: Sequence[tuple[Sampling, int, int]], purpose: int = DRAW) -> Draws:
    """What the op `sample` takes beside logits, a row for each (settings, request, position).

    Its tokens are then those of `choose`, or of `propose` with the purpose `DRAFT`, but for
    rounding.
    """
    words = np.zeros((len(rows), 6), np.uint32)
    for row, (settings, request, position) in zip(words, rows, strict=True):
        seed = settings.seed
        row[:] = (seed & _WORD, seed >> 32, request & _WORD, request >> 32, position, purpose)
    every = [settings for settings, _, _ in rows]
    return {
        "temperature": np.array([one.temperature for one in every], np.float32),
        "top_k": np.array([min(one.top_k, _MOST) for one in every], np.int32),
        "top_p": np.array([one.top_p for one in every], np.float32),
        "draws": words.view(np.int32),
    }


def choose(logits: Row, settings: Sampling, *, request: int, position: int) -> int:
    """The token at `position`."""
    if settings.is_greedy:
        return argmax(logits)
    drawn = uniform(settings, request=request, position=position, purpose=DRAW)
    return pick(probabilities(logits, settings), drawn)


def judge(
    logits: Row, draft: int, drafted: Row, settings: Sampling, *, request: int, position: int
) -> int:
    """The draft, or the token that takes its place.

    Greedily that is the likeliest token. With the draft drawn from q, keep it with probability
    min(1, p/q), else draw from what p has above q. The outcome is distributed as p (Leviathan et
    al., 2023, theorem 3.5). A replacement is never the draft itself, as there p is below q.

    Args:
        logits: Of the model.
        drafted: Logits of the draft layer, which the draft was drawn from.
        position: Of the token.
    """
    if settings.is_greedy:
        return argmax(logits)
    wanted, given = probabilities(logits, settings), probabilities(drafted, settings)
    drawn = uniform(settings, request=request, position=position, purpose=ACCEPT)
    if drawn * given[draft] < wanted[draft]:
        return draft
    rest = np.maximum(wanted - given, 0.0)
    rest = rest if rest.any() else wanted  # equal but for rounding
    again = uniform(settings, request=request, position=position, purpose=DRAW)
    return pick(rest, again)


def propose(logits: Row, settings: Sampling, *, request: int, position: int) -> int:
    """A draft for `position`, from the draft layer's logits."""
    if settings.is_greedy:
        return argmax(logits)
    drawn = uniform(settings, request=request, position=position, purpose=DRAFT)
    return pick(probabilities(logits, settings), drawn)


def log_softmax(logits: Row) -> Probabilities:
    """Log-probabilities at temperature 1, without top-k and top-p."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: Probabilities = wide - math.log(float(np.exp(wide).sum()))
    return result


def _below_top_k(scores: Probabilities, k: int) -> NDArray[np.bool_]:
    edge = np.partition(scores, -k)[-k]
    dropped: NDArray[np.bool_] = scores < edge
    ties = np.flatnonzero(scores == edge)
    surplus = scores.size - int(np.count_nonzero(dropped)) - k
    dropped[ties[ties.size - surplus :]] = True
    return dropped
