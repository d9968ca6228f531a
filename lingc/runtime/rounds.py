"""Speculative rounds that run on the device, begun one round ahead of the host.

The device knows by itself where the next round begins: what the host reads of a round is needed for
nothing but its caller. So the next round is queued first, and then this one is read while that one
runs. Where a sequence turns out to have ended, what the queued round makes for it is dropped, as
`lingc.runtime.ahead` says.

A sequence is taken over from `lingc.runtime.speculative` as it is, and handed back so: the host
knows every token that counts, and reads what the next draft starts from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lingc.runtime import sampling
from lingc.runtime.ahead import checked
from lingc.runtime.backend import Array, DeviceRounds, RoundStart, Ticket
from lingc.runtime.sequence import Lead
from lingc.runtime.sequence import Sequence as Running
from lingc.runtime.slots import SlotTable
from lingc.runtime.speculative import Forced


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """A round on its way."""

    sequences: list[Running]
    ticket: Ticket


class Rounds:
    """The rounds of one run.

    Args:
        force_reject, force_keep: As for `lingc.runtime.speculative.Speculator`.
    """

    def __init__(
        self,
        table: SlotTable,
        device: DeviceRounds,
        drafts: int,
        *,
        force_reject: Forced | None = None,
        force_keep: Forced | None = None,
    ) -> None:
        self._table, self._device, self._each = table, device, drafts + 1
        self._force_reject, self._force_keep = force_reject, force_keep
        self._queued: _Round | None = None
        self._held: list[Running] = []
        """Sequences that the device goes on with, in its order."""

    @property
    def is_under_way(self) -> bool:
        """Whether a round was begun that was not read."""
        return self._queued is not None

    def fits(self, sequences: list[Running]) -> bool:
        """Whether the device has code for so many, of any length that they may grow to."""
        return self._device.fits(len(sequences), _pages(sequences))

    def step(self, ready: list[Running], *, follow: bool) -> list[tuple[Running, list[int]]]:
        """The next tokens of each sequence; those that joined after the round began have none yet.

        Args:
            ready: Every sequence whose prompt is done.
            follow: Whether to begin the round after this one.
        """
        now = self._queued or self._first(ready)
        self._queued = None
        # A round gives each sequence a token at least.
        goes_on = all(len(s.tokens) + 1 < s.limit for s in ready)
        if follow and goes_on and _same(now.sequences, ready):
            self._queued = self._queue(ready, ahead=1)
        tokens, accepted = self._device.take(now.ticket)
        found = []
        for s, row, count in zip(now.sequences, tokens.tolist(), accepted.tolist(), strict=True):
            if s.finish is None:
                s.fed += count
                s.accepted = count
                s.histogram[count - 1] += 1
                found.append((s, [checked(token) for token in row[:count]]))
        return found

    def hand_back(self, *, has_logits: bool = True) -> None:
        """Give the sequences back to the host, once every round is read.

        Args:
            has_logits: Whether the host will draw drafts of them.
        """
        assert self._queued is None, "a round is under way"
        if any(s.finish is None for s in self._held):
            drafts, logits, hidden = self._device.leads(has_logits=has_logits)
            for b, s in enumerate(self._held):
                row = None if logits is None else logits[b]
                s.lead = Lead(logits=row, hidden=hidden[b], draft=int(drafts[b]))
        self._held = []

    def drop(self) -> None:
        """Forget a round that is under way, and what the device holds."""
        if self._queued is not None:
            self._device.take(self._queued.ticket)
            self._queued = None
        self._held = []

    def _first(self, ready: list[Running]) -> _Round:
        """Begin a round behind those that were all read."""
        if not _same(self._held, ready):
            self.hand_back(has_logits=not _is_greedy(self._held))
            self._begin(ready)
        return self._queue(ready)

    def _begin(self, sequences: list[Running]) -> None:
        each, table = self._each, self._table
        self._grow(sequences)
        firsts = np.array([s.fed for s in sequences])
        positions = firsts[:, None] + np.arange(each)
        rows = [table.rows(s.lease, span) for s, span in zip(sequences, positions, strict=True)]
        rooms = self._rooms(sequences)
        leads = [s.lead for s in sequences]
        kept = [lead for lead in leads if lead is not None]
        assert len(kept) == len(sequences), "feed comes before a round"
        drafts = [_draft(s, lead) for s, lead in zip(sequences, kept, strict=True)]
        draws = [
            (s.request.sampling, s.draws, s.fed + place + 1)
            for s in sequences
            for place in range(each)
        ]
        start = RoundStart(
            tokens=_ints(s.tokens[s.fed] for s in sequences),
            slots=_ints(s.lease.slot for s in sequences),
            accepted=_ints(s.accepted for s in sequences),
            positions=np.minimum(positions, rooms[:, None] - 1).astype(np.int32),
            cache_rows=np.stack(rows).astype(np.int32),
            drafts=_ints(drafts),
            logits=None if _is_greedy(sequences) else _logits(kept),
            hidden=np.stack([lead.hidden for lead in kept]),
            draws=sampling.draws(draws, sampling.DRAFT),
            pages=_pages(sequences),
        )
        self._device.begin(start)
        for s in sequences:
            s.lead = None  # the device has it
        self._held = [*sequences]

    def _queue(self, sequences: list[Running], ahead: int = 0) -> _Round:
        """Begin a round; `ahead` of rounds that are not read."""
        self._grow(sequences, ahead)
        leases = [s.lease for s in sequences]
        table = self._table.page_table(leases, max(len(lease.pages) for lease in leases))
        forced = _ints(self._marks(s, ahead) for s in sequences)
        ticket = self._device.queue(table, self._rooms(sequences), forced)
        return _Round(sequences=[*sequences], ticket=ticket)

    def _grow(self, sequences: list[Running], ahead: int = 0) -> None:
        """Hand out pages for a round and the drafts of the next, as far as they are set aside.

        What lies beyond is of tokens that nobody will read.
        """
        for s in sequences:
            most = s.lease.reserved * self._table.page_size
            self._table.grow(s.lease, min(s.fed + (ahead + 2) * self._each, most))

    def _rooms(self, sequences: list[Running]) -> Array:
        return _ints(len(s.lease.pages) * self._table.page_size for s in sequences)

    def _marks(self, s: Running, ahead: int) -> int:
        """The bits of `forced` for the positions that the round may come to."""
        found = 0
        first, last = s.fed + ahead + 1, s.fed + ahead * self._each + self._each - 1
        for position in range(first, last + 1):
            for forced, shift in ((self._force_reject, 0), (self._force_keep, 16)):
                if forced is not None and forced(s.index, position):
                    found |= 1 << (shift + position % 16)
        return found - (1 << 32) if found >> 31 else found


def _is_greedy(sequences: Sequence[Running]) -> bool:
    return all(s.request.sampling.is_greedy for s in sequences)


def _logits(leads: Sequence[Lead]) -> Array:
    """What drafts were drawn from; zeros for greedy ones whose logits nobody fetched."""
    known = next(lead.logits for lead in leads if lead.logits is not None)
    rows = [np.zeros_like(known) if lead.logits is None else lead.logits for lead in leads]
    return np.stack(rows)


def _draft(s: Running, lead: Lead) -> int:
    """The first draft of a round."""
    if lead.draft is not None:
        return lead.draft
    assert lead.logits is not None, "one of the two is known"
    return sampling.propose(lead.logits, s.request.sampling, request=s.draws, position=s.fed + 1)


def _same(some: Sequence[Running], others: Sequence[Running]) -> bool:
    return [*map(id, some)] == [*map(id, others)]


def _pages(sequences: Sequence[Running]) -> int:
    return max(s.lease.reserved for s in sequences)


def _ints(values: Iterable[int]) -> Array:
    return np.array([*values], np.int32)
