"""The same requests in different company: what became of each, and how far two runs are apart."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lingc import math
from lingc.interpret import InterpreterBackend
from lingc.plan import Plan
from lingc.runtime import Completion, Generator, Request
from lingc.runtime.backend import Array, Backend, Limits
from lingc.runtime.slots import Piece, SlotTable

F64 = NDArray[np.float64]

LENGTHS = (3, 17, 40, 64, 65, 130, 257, 300, 700, 1100)
"""Of prompts: within a bucket, at the border of one, and longer than a chunk."""

CHUNK = 512
"""Tokens of a prefill step, so that the longest prompts come in several."""

ORDERS = (16, 32, 128)
"""Tokens of a block of linear attention by which sums are made in other orders than by default."""

TOP = 32
"""Log-probabilities that are compared at each position, beside the chosen token's."""


def requests(vocab: int, *, tokens: int = 40, seed: int = 0) -> list[Request]:
    """Prompts of random tokens, continued greedily: where nothing is likely, little decides."""
    some = np.random.default_rng(seed)
    return [
        Request(
            tokens=tuple(map(int, some.integers(0, vocab, length))),
            max_tokens=tokens,
            stop_ids=frozenset(),
            logprobs=TOP,
        )
        for length in LENGTHS
    ]


def alone(backend: Backend, asked: Sequence[Request], *, drafts: int = 0) -> list[Completion]:
    """Each request in a run of its own."""
    generator = Generator(backend, drafts=drafts, prefill_tokens=CHUNK)
    return [generator.generate([one])[0] for one in asked]


def together(
    backend: Backend, asked: Sequence[Request], *, copies: int = 1, drafts: int = 0
) -> list[Completion]:
    """All requests in one run, `copies` of the whole list one behind the other."""
    generator = Generator(backend, drafts=drafts, prefill_tokens=CHUNK)
    return generator.generate([*asked] * copies)


def without_logprobs(asked: Sequence[Request]) -> list[Request]:
    """The same requests, whose tokens the device then chooses by itself."""
    return [replace(one, logprobs=None) for one in asked]


def differences(want: Sequence[Completion], got: Sequence[Completion]) -> list[str]:
    """Where completions are not the same to the last bit of a log-probability.

    Args:
        want: One of each request.
        got: The same requests in the same order, over and over.
    """
    found = []
    for index, other in enumerate(got):
        one = want[index % len(want)]
        if one.tokens != other.tokens:
            at = _first(one.tokens, other.tokens)
            found.append(f"request {index}: token {at} is {other.tokens[at:at + 1]}, not "
                         f"{one.tokens[at:at + 1]}")  # fmt: skip
        elif one.logprobs and other.logprobs:
            pairs = zip(one.logprobs, other.logprobs, strict=True)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
            if at >= 0:
                found.append(f"request {index}: log-probabilities of token {at} differ")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """How far two runs of the same requests are apart.

    Attributes:
        largest: Difference of a log-probability of one token after the same tokens, positions at
            which the choice differs left out.
        margins: Request -> by how much its first other token was behind in the first run.
        positions: That were compared.
    """

    largest: float
    margins: Mapping[int, float]
    positions: int


def apart(want: Sequence[Completion], got: Sequence[Completion]) -> Apart:
    """Compare up to the first other token of each request; log-probabilities must be there."""
    largest, positions, margins = 0.0, 0, {}
    for index, other in enumerate(got):
        one = want[index % len(want)]
        assert one.logprobs, "they were asked for"
        assert other.logprobs, "they were asked for"
        first = _first(one.tokens, other.tokens)
        for a, b in zip(one.logprobs[:first], other.logprobs[:first], strict=True):
            mine, theirs = dict(a.top), dict(b.top)
            both = mine.keys() & theirs.keys()
            largest = max(largest, *(abs(mine[token] - theirs[token]) for token in both))
            positions += 1
        if first < len(one.tokens):
            likely = dict(one.logprobs[first].top)
            # What is not among the likeliest is behind all of them.
            behind = likely.get(other.tokens[first], min(likely.values()))
            margins[index] = one.logprobs[first].logprob - behind
    return Apart(largest=largest, margins=margins, positions=positions)


def order_noise(
    plan: Plan, weights: Mapping[str, Array], rows: Sequence[Sequence[int]], *, device: str = "cpu"
) -> F64:
    """By how much a margin changes where nothing but the order of sums does.

    The plan's references run each row by itself, in blocks of the default size and of `ORDERS`,
    all of which are right. What is left is what rounding makes of a last bit on its way through a
    model: codes and experts that fall the other way.

    Returns:
        For each token and order by how much the lead of the likeliest token over the next differs.
    """
    pages = -(-(max(map(len, rows)) + 1) // plan.page_size)
    backend = InterpreterBackend(plan, weights, Limits(slots=1, pages=pages), device=device)
    found = []
    for row in rows:
        usual = _logits(backend, row)
        order = np.argsort(-usual, axis=1)[:, :2]
        for block in ORDERS:
            with _blocks(block):
                gap = np.take_along_axis(_logits(backend, row) - usual, order, axis=1)
            found.append(np.abs(gap[:, 0] - gap[:, 1]))
    backend.close()
    return np.concatenate(found).astype(np.float64)


def _logits(backend: Backend, row: Sequence[int]) -> Array:
    """Of every token of a row [T, V]."""
    table = SlotTable(backend.limits, backend.plan.page_size)
    given = table.pack([Piece(lease=table.admit(len(row) + 1), position=0, tokens=tuple(row))])
    given["logit_rows"] = np.arange(len(row), dtype=np.int32)
    inputs = {name: given[name] for name in backend.plan.programs["prefill"].inputs}
    return backend.run("prefill", inputs)["logits"]


@contextmanager
def _blocks(tokens: int) -> Iterator[None]:
    before = math.lightning_sequence
    math.lightning_sequence = partial(before, chunk=tokens)
    try:
        yield
    finally:
        math.lightning_sequence = before


def _first(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place at which two lists differ."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
