"""The sets of sizes that an engine has code for: smaller inputs run in the next one, padded.

    decode   sequences x context
    verify   tokens a sequence x sequences x context; whole sequences are padding
    prefill  tokens x sequences x context; a sequence of padding takes the tokens that are left over
    draft    room for a sequence a token, x context; what a verify leaves, for each of its
             buckets; of more tokens as prefill
    round    one for each bucket of verify

A context is what a sequence's page table has room for. Attention of many tokens makes keys and
values of whole contexts: many sequences of the longest have no bucket, and run in several steps.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lingc.plan import PHASES, Plan
from lingc.round_memory import ROUND, round_axes

CONTEXTS = (512, 4096 + 1024, 32768 + 4096, 131072)
"""Of a sequence at the end of a step: round lengths of prompts and room for what follows them."""

DECODE_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
VERIFY_SEQUENCES = (1, 2, 4, 8, 16)
PREFILL_TOKENS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768)
PREFILL_SEQUENCES = (2, 9, 65)
"""One more than the sequences that are meant: the last may be padding."""

MANY_TOKENS = 8192
"""Beyond, a step is meant for one sequence: the more tokens it has, the fuller are the experts'
tiles, and the fewer times keys and values of what came before are made. More sequences than one
can share several steps of fewer tokens."""

MOST_ROWS = PREFILL_SEQUENCES[-1] * CONTEXTS[-2]
"""Most rows of the cache, sequences times context, of a prefill bucket: about 1 GiB a head."""

FEW_TOKENS = 64
"""Up to here a draft has room for as many sequences as tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A phase, and the value of each symbolic axis of its inputs; those of the state left out."""

    phase: str
    axes: Mapping[str, int]


INVARIANT_FROM = 256
"""Tokens of the smallest prefill bucket of a batch-invariant engine: all its buckets are of many
tokens, since kernels of few add up in another order."""


def buckets(plan: Plan, *, invariant: bool = False) -> tuple[Sizes, ...]:
    """Every bucket of a plan, by phase, small to large.

    Args:
        invariant: Whether a row's bits must not depend on which one is used.
    """
    makers = {"prefill": _prefill, "decode": _decode, "verify": _verify, "draft": _draft}
    found = [
        Sizes(phase=phase, axes=_axes(plan, phase, axes))
        for phase in PHASES
        if phase in plan.programs
        for axes in makers[phase](plan)
        if not (invariant and phase == "prefill" and axes["T"] < INVARIANT_FROM)
    ]
    if "draft" in plan.programs:
        found += [
            Sizes(phase=ROUND, axes=round_axes(axes["B"], axes["T"] // axes["B"], axes["P"]))
            for axes in _verify(plan)
        ]
    return tuple(found)


def contexts(plan: Plan) -> list[int]:
    """Tokens of a sequence that buckets are made for: up to what the model is made for."""
    most = int(plan.config["max_position_embeddings"])
    return [*(one for one in CONTEXTS if one < most), most]


def _pages(plan: Plan) -> list[int]:
    return [-(-context // plan.page_size) for context in contexts(plan)]


def _decode(plan: Plan) -> Iterator[dict[str, int]]:
    for sequences in DECODE_SEQUENCES:
        for pages in _pages(plan):
            yield {"T": sequences, "B": sequences, "N": sequences, "P": pages}


def _verify(plan: Plan) -> Iterator[dict[str, int]]:
    for each in range(2, plan.max_draft + 2):
        for sequences in VERIFY_SEQUENCES:
            for pages in _pages(plan):
                tokens = each * sequences
                yield {"T": tokens, "B": sequences, "N": tokens, "P": pages}


def _prefill(plan: Plan, least: int = 0) -> Iterator[dict[str, int]]:
    for below, tokens in itertools.pairwise((0, *PREFILL_TOKENS)):
        for sequences, context in itertools.product(PREFILL_SEQUENCES, contexts(plan)):
            is_needed = least < tokens and sequences <= tokens + 1
            has_use = below < (sequences - 1) * context and sequences * context <= MOST_ROWS
            is_meant = tokens <= MANY_TOKENS or sequences == PREFILL_SEQUENCES[0]
            if is_needed and has_use and is_meant:
                pages = -(-context // plan.page_size)
                yield {"T": tokens, "B": sequences, "N": sequences, "P": pages}


def _draft(plan: Plan) -> Iterator[dict[str, int]]:
    for tokens in DECODE_SEQUENCES:
        for pages in _pages(plan):
            yield {"T": tokens, "B": tokens, "N": tokens, "P": pages}
    for axes in _verify(plan):
        yield {**axes, "N": axes["B"]}
    yield from _prefill(plan, FEW_TOKENS)


def _axes(plan: Plan, phase: str, axes: Mapping[str, int]) -> dict[str, int]:
    """Those that the inputs have."""
    known = {**axes, "B+1": axes["B"] + 1}
    program = plan.programs[phase]
    named = (dim for name in program.inputs for dim in program.types[name].shape)
    return {dim: known[dim] for dim in dict.fromkeys(named) if isinstance(dim, str)}
