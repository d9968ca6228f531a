"""Sides made by hand: logits and experts that a test writes down."""

from collections.abc import Mapping, Sequence

import numpy as np

from lingc.parity.data import Row
from lingc.parity.experts import Routing
from lingc.parity.side import F32, Choice, Mode, Scores, Tokens

VOCAB = 12
LAYERS = (1, 2, 3)
EXPERTS = 8
ROUTING = Routing(groups=4, kept_groups=2, top_k=2, experts=EXPERTS)


def rows(*lengths: int) -> list[Row]:
    """Rows of those lengths, each on a line of its own."""
    return [
        Row(line=i + 1, ids=tuple((7 * i + 3 * t) % VOCAB for t in range(length)))
        for i, length in enumerate(lengths)
    ]


def logits(tokens: Tokens) -> F32:
    """The same for the same row, with a clear winner at every position."""
    rng = np.random.default_rng(list(tokens))
    made = rng.standard_normal((len(tokens), VOCAB)).astype(np.float32)
    made[np.arange(len(tokens)), rng.integers(VOCAB, size=len(tokens))] += 8
    return made


def choose(biased: F32) -> Choice:
    """Experts by the rule, from scores [N, EXPERTS]."""
    grouped = biased.reshape(len(biased), ROUTING.groups, -1)
    sums = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    kept = np.argsort(-sums, axis=1, kind="stable")[:, : ROUTING.kept_groups]
    masked = np.full_like(grouped, -np.inf)
    for t, groups in enumerate(kept):
        masked[t, groups] = grouped[t, groups]
    ids = np.argsort(-masked.reshape(biased.shape), axis=1, kind="stable")[:, : ROUTING.top_k]
    return Choice(ids=ids.astype(np.int32), biased=biased)


def experts(tokens: Tokens) -> dict[int, Choice]:
    rng = np.random.default_rng([99, *tokens])
    return {layer: choose(rng.random((len(tokens), EXPERTS), dtype=np.float32)) for layer in LAYERS}


class HandSide:
    """Implements `lingc.parity.side.Side`.

    Args:
        name: What to call it.
        bumps: (line, position) -> what is added to the logits there.
        swaps: (line, position, layer) -> the experts there.
        lines: Row -> line; the rows of `rows`.
    """

    def __init__(
        self,
        name: str,
        lines: Sequence[Row],
        *,
        bumps: Mapping[tuple[int, int], F32] | None = None,
        swaps: Mapping[tuple[int, int, int], Sequence[int]] | None = None,
        vocab: int = VOCAB,
    ) -> None:
        self.name = name
        self.vocab = vocab
        self.modes: list[Mode] = []
        self._line = {row.ids: row.line for row in lines}
        self._bumps = bumps or {}
        self._swaps = swaps or {}

    def score(self, given: Sequence[Tokens], mode: Mode) -> list[Scores]:
        self.modes.append(mode)
        return [self._row(tokens) for tokens in given]

    def close(self) -> None:
        self.modes.clear()

    def _row(self, tokens: Tokens) -> Scores:
        made, chosen = logits(tokens), experts(tokens)
        for (line, position), bump in self._bumps.items():
            if line == self._line[tuple(tokens)]:
                made[position] += bump
        for (line, position, layer), ids in self._swaps.items():
            if line == self._line[tuple(tokens)]:
                chosen[layer].ids[position] = ids
        return Scores(logits=made, experts=chosen)
