"""The sets of sizes that an engine has code for: smaller inputs run in the next one, padded.

    decode   sequences x context
    verify   tokens a sequence x sequences x context; whole sequences are padding
    prefill  tokens x sequences; a sequence of padding takes the tokens that are left over
    draft    a token for each sequence, x context; longer ones as prefill

A context is what a sequence's page table has room for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lingc.plan import Plan

CONTEXTS = (512, 4096, 32768, 131072)
DECODE_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
VERIFY_SEQUENCES = (1, 2, 4, 8, 16)
PREFILL_TOKENS = (16, 64, 256, 1024, 4096, 8192)
PREFILL_SEQUENCES = (2, 9, 65)
"""One more than the sequences that are meant: the last may be padding."""

FEW_TOKENS = 64
"""Up to here a draft has room for as many sequences as tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A phase, and the value of each symbolic axis of its inputs; those of the state left out."""

    phase: str
    axes: Mapping[str, int]


def buckets(plan: Plan) -> tuple[Sizes, ...]:
    """Every bucket of a plan, by phase, small to large."""
    makers = {"prefill": _prefill, "decode": _decode, "verify": _verify, "draft": _draft}
    return tuple(
        Sizes(phase=phase, axes=_axes(plan, phase, axes))
        for phase in plan.programs
        for axes in makers[phase](plan)
    )


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
    for tokens in PREFILL_TOKENS:
        for sequences in PREFILL_SEQUENCES:
            if least < tokens and sequences <= tokens + 1:
                yield {"T": tokens, "B": sequences, "N": sequences, "P": _pages(plan)[-1]}


def _draft(plan: Plan) -> Iterator[dict[str, int]]:
    for tokens in DECODE_SEQUENCES:
        for pages in _pages(plan):
            yield {"T": tokens, "B": tokens, "N": tokens, "P": pages}
    yield from _prefill(plan, FEW_TOKENS)


def _axes(plan: Plan, phase: str, axes: Mapping[str, int]) -> dict[str, int]:
    """Those that the inputs have."""
    known = {**axes, "B+1": axes["B"] + 1}
    program = plan.programs[phase]
    named = (dim for name in program.inputs for dim in program.types[name].shape)
    return {dim: known[dim] for dim in dict.fromkeys(named) if isinstance(dim, str)}
