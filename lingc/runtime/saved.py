"""The state of a sequence apart from its slot and pages: to be put back later, or more than once.

A sequence is what its slot holds, its rows of the caches, and what the host knows of it. Parked, it
takes no room on the device until it goes on. A prefix is the state behind tokens that several
prompts begin with: they are computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lingc.errors import UsageError
from lingc.runtime.backend import Array, Backend, Keeping, SlotState
from lingc.runtime.slots import Lease, SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a backend holds of a sequence.

    Attributes:
        slot: Its linear state and pending tokens.
        rows: Of each cache, for positions 0 to `count` - 1.
        count: Tokens that the model has seen.
    """

    slot: SlotState
    rows: SlotState
    count: int

    @property
    def bytes(self) -> int:
        return sum(one.nbytes for part in (self.slot, self.rows) for one in part.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The state behind tokens that prompts begin with; `Generator.prefix` makes it.

    Attributes:
        hidden: Of the last token, f32 or bf16 bits [D], for the draft layer; None where nothing
            drafts.
    """

    tokens: tuple[int, ...]
    saved: Saved
    hidden: Array | None = None

    def check(self, prompt: Sequence[int], *, index: int, has_drafts: bool) -> None:
        """Refuse a prompt that does not go on where this ends.

        Raises:
            UsageError: With the first token that is another, or what is lacking.
        """
        count = len(self.tokens)
        if tuple(prompt[:count]) != self.tokens:
            pairs = zip(prompt, self.tokens, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt))
            raise UsageError(
                f"prompt {index} does not begin with the {count} tokens of its prefix: it differs "
                f"at position {at}",
                hint="give it the prefix of these tokens, or none",
            )
        if len(prompt) == count:
            raise UsageError(
                f"prompt {index} ends where its prefix does, at {count} tokens: its logits were "
                f"not kept",
                hint="make the prefix a token shorter",
            )
        if has_drafts and self.hidden is None:
            raise UsageError(
                f"the prefix of prompt {index} was made without drafts",
                hint="make it with a generator that drafts as well",
            )


def save(backend: Backend, table: SlotTable, lease: Lease, count: int) -> Saved:
    """Copy what a lease holds of its first `count` tokens."""
    keeping = _keeping(backend)
    return Saved(
        slot=backend.save_slot(lease.slot),
        rows=keeping.save_rows(table.rows(lease, np.arange(count))),
        count=count,
    )


def restore(backend: Backend, table: SlotTable, lease: Lease, saved: Saved) -> None:
    """Put back what `save` gave, for a lease of any slot and pages; grows the lease."""
    keeping = _keeping(backend)
    table.grow(lease, saved.count)
    keeping.load_rows(table.rows(lease, np.arange(saved.count)), saved.rows)
    backend.load_slot(lease.slot, saved.slot)


def _keeping(backend: Backend) -> Keeping:
    if not isinstance(backend, Keeping):
        raise UsageError(
            "this kind of engine cannot save rows of its caches",
            hint="let the request end, or run it anew",
        )
    return backend
