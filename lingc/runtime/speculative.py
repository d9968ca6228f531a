"""Speculative generation: draft, verify, accept, commit.

A round, for a sequence whose tokens x[0..m] are known and x[0..m-1] were fed to the model:

    draft    the draft layer guesses d[1..n] for the positions after m, each from the last
    verify   the model takes x[m], d[1], …, d[n] at once and gives the logits after each
    accept   d[1..a] are kept, and the logits after d[a] give one more token
    commit   the next step is told that a + 1 of the pending tokens count

What a rejected token leaves behind: nothing in the linear state, which verify does not write; rows
of the latent cache, which the next round overwrites before anything reads them.

The draft layer's cache holds, at position t, the row of hidden[t] and token x[t+1]. Chained drafts
write rows computed from the layer's own output; after the round those of accepted tokens are
computed again from the model's hidden states, and the others are overwritten in their turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lingc.errors import UsageError
from lingc.plan import Plan
from lingc.runtime import sampling
from lingc.runtime.backend import Array
from lingc.runtime.sampling import Row
from lingc.runtime.sequence import Lead
from lingc.runtime.sequence import Sequence as Running
from lingc.runtime.slots import Piece
from lingc.runtime.steps import Steps

Forced = Callable[[int, int], bool]
"""Of a request and a position: whether its draft is kept, or rejected, whatever it is."""


@dataclass(slots=True, kw_only=True)
class Proposal:
    """Drafted tokens, with the logits that each was drawn from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What one round gives one sequence.

    Attributes:
        tokens: The accepted drafts and one more token.
        logits: The row that each token was chosen by.
        hidden: The model's hidden state of each token that was fed and kept, [a + 1, D].
    """

    tokens: list[int]
    logits: Array
    hidden: Array


def check_drafts(plan: Plan, drafts: int) -> None:
    """Refuse a number of drafts that the engine cannot make.

    Raises:
        UsageError: It is negative, too large, or there is no draft layer.
    """
    if drafts < 0:
        raise UsageError(f"{drafts} drafts a round were asked for, it must be 0 or more")
    if drafts and "draft" not in plan.programs:
        raise UsageError(
            f"{drafts} drafts a round were asked for, but the engine has no draft program: "
            "its checkpoint has no MTP weights",
            hint="run without --mtp, or build from a checkpoint that has the MTP layer",
        )
    if drafts > plan.max_draft:
        raise UsageError(
            f"{drafts} drafts a round were asked for, the engine verifies at most {plan.max_draft}",
            hint=f"use --mtp {plan.max_draft} or fewer",
        )


class Speculator:
    """The draft layer at work beside the model.

    Args:
        drafts: Tokens drafted a round, the same for every sequence: a verify step takes the same
            number of tokens from each. A sequence near its end wastes some.
        force_reject: For tests of the rollback.
        force_keep: For measurements on drawn weights, whose drafts nobody would keep; it wins.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        drafts: int,
        force_reject: Forced | None = None,
        force_keep: Forced | None = None,
    ) -> None:
        check_drafts(steps.backend.plan, drafts)
        self._steps = steps
        self._drafts = drafts
        self._force_reject, self._force_keep = force_reject, force_keep

    def feed(self, sequences: Sequence[Running], hidden: Sequence[Array]) -> None:
        """Give the draft layer what the model has just computed.

        `hidden` holds, for each sequence, the model's hidden states of its last fed tokens,
        [c, D]. The token after each must be known.
        """
        pieces = [
            Piece(
                lease=s.lease,
                position=s.fed - len(rows),
                tokens=s.tokens[s.fed - len(rows) + 1 : s.fed + 1],
            )
            for s, rows in zip(sequences, hidden, strict=True)
        ]
        logits, chained = self._steps.draft(pieces, np.concatenate(hidden))
        for s, row, state in zip(sequences, logits, chained, strict=True):
            s.lead = Lead(logits=row, hidden=state)

    def run(self, sequences: Sequence[Running]) -> list[Verified]:
        """One round for each sequence. The caller appends the tokens, then calls `feed`."""
        proposals = self._draft(sequences)
        pieces = [
            Piece(lease=s.lease, position=s.fed, tokens=[s.tokens[s.fed], *p.tokens])
            for s, p in zip(sequences, proposals, strict=True)
        ]
        logits, hidden = self._steps.verify(pieces, [s.accepted for s in sequences])
        verified = []
        for s, proposal, rows, states in zip(sequences, proposals, logits, hidden, strict=True):
            tokens = self._settle(s, proposal, rows)
            s.histogram[len(tokens) - 1] += 1
            s.accepted = len(tokens)
            s.fed += len(tokens)
            verified.append(
                Verified(tokens=tokens, logits=rows[: len(tokens)], hidden=states[: len(tokens)])
            )
        return verified

    def _draft(self, sequences: Sequence[Running]) -> list[Proposal]:
        proposals = [Proposal() for _ in sequences]
        leads = [s.lead for s in sequences]
        for place in range(1, self._drafts + 1):
            for s, proposal, lead in zip(sequences, proposals, leads, strict=True):
                assert lead is not None, "feed comes before run"
                assert lead.logits is not None, "who hands back says that they are wanted"
                _propose(s, proposal, lead.logits)
            if place == self._drafts:
                break
            pieces = [
                Piece(lease=s.lease, position=s.fed + place - 1, tokens=p.tokens[-1:])
                for s, p in zip(sequences, proposals, strict=True)
            ]
            states = np.stack([lead.hidden for lead in leads if lead is not None])
            logits, hidden = self._steps.draft(pieces, states)
            leads = [Lead(logits=r, hidden=h) for r, h in zip(logits, hidden, strict=True)]
        return proposals

    def _settle(self, s: Running, proposal: Proposal, logits: Array) -> list[int]:
        """The drafts that are kept, and the token after them."""
        kept: list[int] = []
        for place, draft in enumerate(proposal.tokens):
            position = s.fed + place + 1
            row = logits[place]
            if self._force_keep is not None and self._force_keep(s.index, position):
                kept.append(draft)
                continue
            if self._force_reject is not None and self._force_reject(s.index, position):
                # Decided without looking at the draft, so the draft tells nothing about the token.
                return [*kept, _choose(s, row, position)]
            token = sampling.judge(
                row, draft, proposal.logits[place], s.request.sampling, request=s.draws,
                position=position,
            )  # fmt: skip
            kept.append(token)
            if token != draft:
                return kept
        return [*kept, _choose(s, logits[len(kept)], s.fed + len(kept) + 1)]


def _propose(s: Running, proposal: Proposal, logits: Row) -> None:
    """Draw the next draft from the draft layer's logits."""
    position = s.fed + len(proposal.tokens) + 1
    token = sampling.propose(logits, s.request.sampling, request=s.draws, position=position)
    proposal.tokens.append(token)
    proposal.logits.append(logits)


def _choose(s: Running, logits: Row, position: int) -> int:
    return sampling.choose(logits, s.request.sampling, request=s.draws, position=position)
