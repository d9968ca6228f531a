"""Steps to measure tactics in: a phase, its sizes, and inputs of these sizes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lingc.plan import Plan
from lingc.runtime.backend import Array, Limits
from lingc.runtime.slots import Piece, SlotTable
from lingc.targets.cuda import buckets

DECODE = (1, 2, 4, 8, 16, 32, 64)
USUAL = 4096
"""Tokens in the cache that contexts near it are measured before others for."""
FILLED = 0.8
"""Of a bucket's context, in the steps that are measured: 4096 of 5120."""
PREFILL = (1024, 8192, 16, 64, 256, 4096)
MOST_CACHED = 1 << 20
"""Tokens of all sequences together beyond which a bucket is not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A phase with inputs of given sizes.

    Attributes:
        sequences: Of a packed prompt all tokens but one are the first's; else all have as many.
        context: Tokens of a sequence that the page table has room for; but for a prompt most of
            them are there.
        tokens: Of all sequences together.
    """

    phase: str
    sequences: int
    context: int
    tokens: int

    @property
    def name(self) -> str:
        if self.phase == "prefill":
            return f"prefill, {self.tokens} tokens of {self.sequences} sequences"
        each = f", {self.tokens // self.sequences} tokens each" if self.phase == "verify" else ""
        return f"{self.phase}, batch {self.sequences}{each}, context {self.context}"


def default_work(
    plan: Plan, *, batches: Sequence[int] = DECODE, contexts: Sequence[int] | None = None,
    prefill: Sequence[int] = PREFILL, drafts: Sequence[int] = (),
) -> tuple[Work, ...]:  # fmt: skip
    """Decode at every batch and context, contexts first to last, then prefill, then speculation.

    Args:
        plan: Whose phases; what it has no program for is left out.
        contexts: Those of the buckets where None, the usual ones first.
        drafts: Drafted tokens of a sequence that are verified with the one before them.
    """
    most = int(plan.config["max_position_embeddings"])
    if contexts is None:
        contexts = sorted(buckets.contexts(plan), key=lambda one: abs(math.log(one / USUAL)))
    cached = [
        (batch, min(context, most))
        for context in contexts
        for batch in batches
        if batch * context <= MOST_CACHED
    ]
    made = [Work(phase="decode", sequences=b, context=c, tokens=b) for b, c in cached]
    for tokens in prefill:
        room = next((one for one in buckets.contexts(plan) if one >= tokens), most)
        made.append(Work(phase="prefill", sequences=2, context=room, tokens=tokens))
    made += _speculation(cached, drafts)
    return tuple(dict.fromkeys(one for one in made if one.phase in plan.programs))


def _speculation(cached: Sequence[tuple[int, int]], drafts: Sequence[int]) -> Iterator[Work]:
    for each in drafts:
        for batch, context in cached:
            tokens = batch * (each + 1)
            yield Work(phase="verify", sequences=batch, context=context, tokens=tokens)
    for batch, context in cached if drafts else ():
        yield Work(phase="draft", sequences=batch, context=context, tokens=batch)


def inputs_of(plan: Plan, work: Work) -> tuple[dict[str, Array], Limits]:
    """Inputs of a phase, and the room that they need."""
    is_prompt = work.phase == "prefill"
    lengths = [1 if is_prompt else work.tokens // work.sequences] * work.sequences
    if is_prompt:
        lengths[0] = work.tokens - work.sequences + 1
    limits = Limits.from_tokens(
        slots=work.sequences, tokens_per_sequence=max(lengths) if is_prompt else work.context,
        page_size=plan.page_size,
    )  # fmt: skip
    table = SlotTable(limits, plan.page_size)
    vocab = int(plan.config["vocab_size"])
    pieces = []
    for i, length in enumerate(lengths):
        first = 0 if is_prompt else int(FILLED * work.context)
        tokens = tuple((7919 * (i + 1) + 104_729 * j + 11) % vocab for j in range(length))
        pieces.append(Piece(lease=table.admit(first + length), position=first, tokens=tokens))
    # What was verified before is kept whole: a step then has the most to write.
    kept = lengths[0] if work.phase == "verify" else 0
    given = table.pack(pieces) | {"accepted": np.full(work.sequences, kept, np.int32)}
    width = -(-work.context // plan.page_size)
    missing = width - given["page_table"].shape[1]
    given["page_table"] = np.pad(given["page_table"], ((0, 0), (0, max(missing, 0))))
    given["logit_rows"] = (given["offsets"][1:] - 1).astype(np.int32)
    drawn = np.random.default_rng(0)
    hidden = drawn.standard_normal((work.tokens, int(plan.config["hidden_size"])))
    given["hidden"] = hidden.astype(np.float32)
    wanted = plan.programs[work.phase].inputs
    return {name: given[name] for name in wanted}, limits
