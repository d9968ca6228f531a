"""What a speculative round keeps on the device from one of its programs to the next.

A round of B sequences, Q - 1 drafts each, runs without its host:

    draft    the draft layer over one token of each sequence, once for each draft but the first
    verify   `verify_inputs`, the model over Q tokens of each, `judge`, `accept`
    draft    the draft layer over what was kept; it draws the first draft of the next round

Inputs and outputs of these programs do not lie in the arena, which the next program overwrites, but
in memory of the round: what one leaves there is what another is given. The three ops between them
are a phase of the launch table beside those of the plan, over this memory alone.

By sequence: [B, Q]. By place: [Q, W / Q], of which B are used, so that what belongs to one place
lies together; W / Q is B in whole fours, so that each place begins at a multiple of 16 bytes.
"""

from collections.abc import Mapping
from types import MappingProxyType

from lingc.kernel import align
from lingc.plan import Plan, Program, TensorType

ROUND = "round"
"""The phase."""

LOGITS = "logits"
"""The one tensor of the phase that is not of the round: it is the verify's output, in the arena."""


def pitch(sequences: int) -> int:
    """Of what lies by place: from one place to the next."""
    return align(sequences, 4)


def round_axes(sequences: int, each: int, pages: int) -> dict[str, int]:
    """The symbolic axes of a round."""
    return {"T": sequences * each, "B": sequences, "P": pages, "W": each * pitch(sequences)}


def round_program(plan: Plan) -> Program:
    """The round's memory as the inputs of a program without steps.

    Its tensors:
        token_ids, positions, cache_rows, hidden: Of verify, then of the draft after it.
        accepted: Tokens that the last verify kept.
        slots, page_table, offsets, rooms, forced: Of the sequences; see `accept`.
        single_offsets, single_rows: For drafts of one token each.
        logit_rows: For the draft after a verify.
        drafts, draft_logits, draws: By place: tokens, the logits and the words they are drawn by.
        chained: Hidden states that the next draft starts from.
        ahead_positions, ahead_rows: By place: of the tokens to come.
        tokens: What was judged.
        temperature, top_k, top_p: As `lingc.runtime.sampling.draws` makes them.
    """
    verify = plan.programs["verify"]
    logits, hidden = (verify.types[verify.outputs[role]] for role in ("logits", "hidden"))

    def ints(*shape: str | int) -> TensorType:
        return TensorType("i32", shape)

    types: Mapping[str, TensorType] = {
        "token_ids": ints("T"),
        "accepted": ints("B"),
        "positions": ints("T"),
        "cache_rows": ints("T"),
        "slots": ints("B"),
        "offsets": ints("B+1"),
        "single_offsets": ints("B+1"),
        "single_rows": ints("B"),
        "logit_rows": ints("B"),
        "drafts": ints("W"),
        "ahead_positions": ints("W"),
        "ahead_rows": ints("W"),
        "draws": ints("W", 6),
        "temperature": TensorType("f32", ("B",)),
        "top_k": ints("B"),
        "top_p": TensorType("f32", ("B",)),
        "rooms": ints("B"),
        "forced": ints("B"),
        "tokens": ints("T"),
        "chained": TensorType(hidden.dtype, ("B", *hidden.shape[1:])),
        "hidden": TensorType(hidden.dtype, ("T", *hidden.shape[1:])),
        "draft_logits": TensorType(logits.dtype, ("T", *logits.shape[1:])),
        LOGITS: TensorType(logits.dtype, ("T", *logits.shape[1:])),
        "page_table": ints("B", "P"),
    }
    return Program(
        inputs=tuple(types),
        states=(),
        outputs=MappingProxyType({}),
        updates=MappingProxyType({}),
        weights=(),
        types=types,
        steps=(),
    )
