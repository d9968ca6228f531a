"""What the generation loop needs of an engine, whatever its kind.

A backend owns the weights and every state tensor; the loop owns the bookkeeping: which sequence
holds which slot and which pages. They meet in `run`, whose inputs are the packed arrays named in
the phase's program, int32 but for `hidden`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

from numpy.typing import NDArray

from lingc.errors import UsageError
from lingc.plan import Plan

Array = NDArray[Any]
"""An array whose element type the plan gives; `bf16` travels as uint16."""

MOST = (1 << 31) - 1
"""Slots, pages and rows are numbered in 32 bits."""

SlotState = Mapping[str, Array]
"""One slot's linear state and pending tokens, by state name; a copy that nothing else writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much state a backend holds.

    Attributes:
        slots: Sequences whose linear state is kept at once; the scratch slot comes on top.
        pages: Pages of the latent cache, shared by all slots; the scratch row comes on top.
    """

    slots: int
    pages: int

    def __post_init__(self) -> None:
        for name, value in (("slots", self.slots), ("pages", self.pages)):
            if value < 1:
                raise UsageError(f"{name} is {value}, at least 1 is needed")
            if value > MOST:
                raise UsageError(
                    f"{name} is {value}, at most {MOST} can be numbered",
                    hint="`lingc plan` tells what fits into how much memory",
                )

    @classmethod
    def from_tokens(cls, *, slots: int, tokens_per_sequence: int, page_size: int) -> Self:
        """Room for `slots` sequences of that many tokens each, in whole pages."""
        if tokens_per_sequence < 1:
            raise UsageError(f"the cache cannot hold {tokens_per_sequence} tokens a sequence")
        return cls(slots=slots, pages=slots * -(-tokens_per_sequence // page_size))


class Backend(Protocol):
    """A loaded engine.

    State lives inside: `run` updates it in place and returns only what the program calls its
    outputs. A backend is used from one thread.
    """

    @property
    def plan(self) -> Plan: ...

    @property
    def limits(self) -> Limits: ...

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one phase.

        Args:
            phase: A key of `plan.programs`.
            inputs: One array for each of the program's inputs, no more.

        Returns:
            The outputs by role: `logits` f32 [N, vocab], `hidden` [T, D]. They are the caller's.
        """
        ...

    def state(self, name: str) -> Array:
        """A state tensor of the plan, scratch included; reading it may copy."""
        ...

    def save_slot(self, slot: int) -> SlotState:
        """Copy what the slot holds: its linear state and its pending tokens."""
        ...

    def load_slot(self, slot: int, saved: SlotState) -> None:
        """Put back what `save_slot` returned, into this slot or another."""
        ...

    def close(self) -> None:
        """Free what the engine holds. Nothing may be called after it."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """A backend that gives and takes rows of its caches, beside what `save_slot` gives."""

    def save_rows(self, rows: Array) -> SlotState:
        """Copy these rows of every cache, in their order: [len(rows), ...] by state name."""
        ...

    def load_rows(self, rows: Array, saved: SlotState) -> None:
        """Put back what `save_rows` returned, into these rows or others."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A backend whose steps are best of a certain size."""

    @property
    def prefill_tokens(self) -> int:
        """The most tokens of one sequence in a prefill step."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether a sequence's bits are the same whatever runs beside it, if its steps are."""
        ...


class Ticket(Protocol):
    """A step that was queued; its tokens are asked for once, in the order of queueing."""


@runtime_checkable
class Drawing(Protocol):
    """A backend that also chooses the tokens, so that its host need not wait between steps.

    `draws` are what `lingc.runtime.sampling.draws` makes, a row for each row of logits. A token is
    the one that `lingc.runtime.sampling.choose` takes, or -1 where the largest logit is not finite.
    """

    def can_draw(self, phase: str) -> bool:
        """Whether the engine has code to choose tokens behind that phase."""
        ...

    def draw(self, phase: str, inputs: Mapping[str, Array], draws: Mapping[str, Array]) -> Array:
        """Run a phase and give a token for each row of logits, i32 [N], in their place."""
        ...

    def queue(
        self, inputs: Mapping[str, Array], draws: Mapping[str, Array], *, chained: bool = False
    ) -> Ticket:
        """Begin a decode step, and return before it is done.

        Args:
            inputs: As for `run`.
            draws: As for `draw`.
            chained: Take the tokens that the step before drew in the place of `token_ids`, which
                then hold anything. It must have been queued, for the same sequences in the same
                order, and be the last that was run.
        """
        ...

    def take(self, ticket: Ticket) -> Array:
        """The tokens of a queued step, i32 [B]; waits until they are there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStart:
    """What speculative rounds of B sequences, Q - 1 drafts each, begin from.

    Attributes:
        tokens: i32 [B], the last of each sequence, which the model was not fed.
        slots, accepted: i32 [B], as for verify.
        positions, cache_rows: i32 [B, Q], of `tokens` and of the drafts behind it.
        drafts: i32 [B], the first of each.
        logits: f32 [B, vocab], what those were drawn from; None where all is greedy.
        hidden: bf16 [B, D], what the next ones start from.
        draws: As `lingc.runtime.sampling.draws` makes them for drafts, Q rows a sequence: for the
            tokens behind those at `positions`.
        pages: The most that a sequence will ever have.
    """

    tokens: Array
    slots: Array
    accepted: Array
    positions: Array
    cache_rows: Array
    drafts: Array
    logits: Array | None
    hidden: Array
    draws: Mapping[str, Array]
    pages: int


class DeviceRounds(Protocol):
    """Speculative rounds that need no host: each goes on from what the one before left.

    What a round keeps is what `lingc.runtime.speculative.Speculator` would keep, but for rounding
    where tokens are drawn. The backend may run other steps between rounds.
    """

    def fits(self, sequences: int, pages: int) -> bool:
        """Whether there is code for rounds of so many sequences of so many pages."""
        ...

    def begin(self, start: RoundStart) -> None:
        """Forget the rounds before, all of which were read, and begin anew."""
        ...

    def queue(self, page_table: Array, rooms: Array, forced: Array) -> Ticket:
        """Begin a round, and return before it is done; at most two are not read.

        Args:
            page_table: i32 [B, P], for all that the round and the drafts of the next may be fed.
            rooms: i32 [B], how many positions there are pages for.
            forced: i32 [B], as the op `accept` has it.
        """
        ...

    def take(self, ticket: Any) -> tuple[Array, Array]:
        """What a round kept, once and in the order of queueing; waits until it is there.

        Returns:
            tokens i32 [B, Q] and accepted i32 [B]: so many of each sequence's tokens are new.
        """
        ...

    def leads(self, *, has_logits: bool) -> tuple[Array, Array | None, Array]:
        """Where the next drafts begin.

        Returns:
            The first of each sequence i32 [B]; the logits f32 [B, vocab] that it was drawn from,
            or None where they are not asked for; the hidden states [B, D] that the next ones start
            from.
        """
        ...


@runtime_checkable
class Speculating(Protocol):
    """A backend that also drafts, verifies and accepts by itself."""

    def rounds(self, drafts: int) -> DeviceRounds:
        """Rounds of so many drafts; those of another number are given up.

        Raises:
            ResourceError: The device has no room for them.
        """
        ...
