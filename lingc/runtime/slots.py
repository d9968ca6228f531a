"""Who holds which state slot and which pages of the latent cache, and the arrays that say so.

A sequence is admitted with the number of tokens it may grow to. Pages for that many are set aside
at once, so that growth cannot fail half way, but they are handed out only as tokens arrive, so
that memory which nobody reaches is never touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lingc.errors import PromptError, ResourceError
from lingc.runtime.backend import Array, Limits

SCRATCH = -1
"""Row of the cache where tokens go that nobody will read."""


@dataclass(slots=True, kw_only=True)
class Lease:
    """What one sequence holds until it is released.

    Attributes:
        slot: Its state slot.
        reserved: Pages set aside for it, `pages` included.
        pages: Pages handed out, in the order of positions.
    """

    slot: int
    reserved: int
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A sequence's share of one step: tokens for consecutive positions from `position`."""

    lease: Lease
    position: int
    tokens: Sequence[int]


class SlotTable:
    """The slots and pages of one backend."""

    def __init__(self, limits: Limits, page_size: int) -> None:
        self.limits = limits
        self.page_size = page_size
        # Both are taken from the end: low numbers first.
        self._slots = list(reversed(range(limits.slots)))
        self._pages = list(reversed(range(limits.pages)))
        self._unreserved = limits.pages

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can hold when it is alone."""
        return self.limits.pages * self.page_size

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    @property
    def free_pages(self) -> int:
        """Pages neither handed out nor set aside."""
        return self._unreserved

    def has_room(self, tokens: int) -> bool:
        return bool(self._slots) and self._page_count(tokens) <= self._unreserved

    def admit(self, tokens: int) -> Lease:
        """Take a slot, and set pages aside for `tokens` tokens.

        Raises:
            PromptError: It would not fit if it were alone.
            ResourceError: It does not fit beside what is running.
        """
        needed = self._page_count(tokens)
        if needed > self.limits.pages:
            raise PromptError(
                f"a sequence of {tokens} tokens does not fit the cache of {self.capacity} tokens",
                hint=f"{self.limits.pages} pages of {self.page_size} tokens: load with more",
            )
        if not self.has_room(tokens):
            raise ResourceError(
                f"a sequence of {tokens} tokens needs a slot and {needed} pages, but"
                f" {self.free_slots} of {self.limits.slots} slots and"
                f" {self.free_pages} of {self.limits.pages} pages are free",
                hint="wait for a running sequence to end, or load with more slots or tokens",
            )
        self._unreserved -= needed
        return Lease(slot=self._slots.pop(), reserved=needed)

    def release(self, lease: Lease) -> None:
        """Give everything back; the lease must not be used again."""
        self._slots.append(lease.slot)
        self._pages.extend(reversed(lease.pages))
        self._unreserved += lease.reserved
        lease.pages, lease.reserved = [], 0

    def grow(self, lease: Lease, tokens: int) -> None:
        """Hand out pages for `tokens` tokens.

        Beyond what was set aside it takes only pages that nobody has a claim to, and stops short
        where there are none: those positions get the scratch row.
        """
        while len(lease.pages) < self._page_count(tokens):
            if len(lease.pages) == lease.reserved:
                if self._unreserved == 0:
                    return
                self._unreserved -= 1
                lease.reserved += 1
            lease.pages.append(self._pages.pop())

    def pack(self, pieces: Sequence[Piece]) -> dict[str, Array]:
        """The arrays of a step that name its tokens, slots and pages; grows the leases.

        A token behind the last position of all stands at that one, so that nothing looks for
        more pages than there are; nobody reads what is made of it.
        """
        for piece in pieces:
            self.grow(piece.lease, piece.position + len(piece.tokens))
        spans = [np.arange(p.position, p.position + len(p.tokens)) for p in pieces]
        rows = [self.rows(p.lease, span) for p, span in zip(pieces, spans, strict=True)]
        spans = [np.minimum(span, self.capacity - 1) for span in spans]
        width = max(int(span[-1]) // self.page_size + 1 for span in spans)
        return {
            "token_ids": np.concatenate([np.asarray(p.tokens, np.int32) for p in pieces]),
            "positions": np.concatenate(spans).astype(np.int32),
            "offsets": np.cumsum([0, *(len(p.tokens) for p in pieces)], dtype=np.int32),
            "slots": np.array([p.lease.slot for p in pieces], np.int32),
            "cache_rows": np.concatenate(rows).astype(np.int32),
            "page_table": self.page_table([piece.lease for piece in pieces], width),
        }

    def page_table(self, leases: Sequence[Lease], width: int) -> Array:
        """The first pages of each, i32; 0 where it has no more."""
        table = np.zeros((len(leases), width), np.int32)
        for row, lease in zip(table, leases, strict=True):
            held = lease.pages[:width]
            row[: len(held)] = held
        return table

    def rows(self, lease: Lease, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the cache, `SCRATCH` where the lease has no page."""
        page, within = np.divmod(positions, self.page_size)
        held = np.array([*lease.pages, SCRATCH])
        number = held[np.minimum(page, len(lease.pages))]
        return np.where(number == SCRATCH, SCRATCH, number * self.page_size + within)

    def _page_count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
