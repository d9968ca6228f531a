"""Decode steps whose tokens are chosen on the device, begun one step ahead of the host.

What a step takes beside its tokens is known before the tokens of the step ahead of it are:
positions, cache rows, pages. So the next step is queued first, and then the tokens of this one are
read, while that one runs. Where a token turns out to be the last of its sequence, what the queued
step makes for it is dropped: it wrote a row and a state that nobody reads, since whoever gets the
slot or the page next writes them anew, and later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lingc.errors import LingcError
from lingc.runtime.backend import Drawing, Ticket
from lingc.runtime.sampling import Draws, draws
from lingc.runtime.sequence import Sequence as Running
from lingc.runtime.slots import Piece
from lingc.runtime.steps import Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step on its way: a token for each of these, at the position that it was fed up to."""

    sequences: list[Running]
    ticket: Ticket


class Ahead:
    """The decode steps of one run.

    Args:
        steps: Of `backend`.
    """

    def __init__(self, steps: Steps, backend: Drawing) -> None:
        self._steps = steps
        self._backend = backend
        self._queued: _Step | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a step was begun whose tokens were not read."""
        return self._queued is not None

    def step(
        self, ready: list[Running], *, follow: bool, disturbed: bool
    ) -> list[tuple[Running, int]]:
        """The next token of each sequence; those that joined after the step began have none yet.

        Args:
            ready: Every sequence whose prompt is done.
            follow: Whether to begin the step after this one.
            disturbed: Whether something else was run since the last call: what the next step would
                take over from this one is overwritten then.
        """
        follow = follow and not (disturbed and self.is_under_way)
        now = self._queued or self._queue(ready)
        self._queued = None
        goes_on = all(len(s.tokens) + 1 < s.limit for s in ready)
        same = [*map(id, now.sequences)] == [*map(id, ready)]
        if follow and goes_on and same:
            self._queued = self._queue(ready, ahead=1)
        found = []
        for s, token in zip(now.sequences, self._backend.take(now.ticket).tolist(), strict=True):
            if s.finish is None:
                s.fed += 1
                found.append((s, checked(token)))
        return found

    def drop(self) -> None:
        """Forget a step that is under way."""
        if self._queued is not None:
            self._backend.take(self._queued.ticket)
            self._queued = None

    def _queue(self, ready: list[Running], ahead: int = 0) -> _Step:
        """Begin a step; `ahead` of tokens that are drawn but not read."""
        pieces = [
            Piece(lease=s.lease, position=s.fed + ahead, tokens=[0] if ahead else s.tokens[s.fed :])
            for s in ready
        ]
        ticket = self._steps.queue(pieces, wanted(ready, ahead), chained=ahead > 0)
        return _Step(sequences=ready, ticket=ticket)


def wanted(sequences: Sequence[Running], ahead: int = 0) -> Draws:
    """How the next token of each is chosen, or the one `ahead` of it."""
    return draws([(s.request.sampling, s.draws, len(s.tokens) + ahead) for s in sequences])


def checked(token: int) -> int:
    """A token that the device drew.

    Raises:
        LingcError: There was none.
    """
    if token < 0:
        raise LingcError(
            "the engine returned logits that are not finite",
            hint="`lingc verify ENGINE --run` says whether the engine computes what it should",
        )
    return token
