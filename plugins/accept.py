"""What a verify's tokens make of its inputs: how many drafts are kept, and what comes after them.

For a sequence that was fed x, d[1], …, d[n] (Q = n + 1) and for which `judge` chose t[0], …, t[n]:

    a = the drafts before the first i with t[i] != d[i + 1]
    token_ids = d[1], …, d[a], t[a], t[a], …        accepted = a + 1
    positions, hidden = those of the first a + 1 tokens, then of the last of these
    cache_rows = those of the first a + 1 tokens, then -1
    logit_rows = the row of the (a + 1)-th token
    ahead[i] = the first position + a + 1 + i, its row of the cache, draws for the token after it

which are the inputs of the draft layer over what was kept, Q tokens whatever that is, and those of
the next drafts. Tokens that were not kept repeat the last one that was, so that they ask for no
expert of their own, and are not written to the cache.

A sequence has room for `rooms` positions, in the first pages of its table; later ones have no row,
and stand as the last position that there is, so that nothing looks beyond the table. They are of
tokens that nobody will read.

`forced`, for tests and measurements: with p the position of a token, the draft in its place is
rejected if bit p % 16 is set, and else kept if bit 16 + p % 16 is set, whatever was judged.

A sequence of slot -1 is padding: tokens and rows -1, positions 0, accepted 0; its hidden states and
draws stay.

Shapes: token_ids, positions, cache_rows, tokens i32 [T], T = B Q, by sequence; hidden [T, D]; draws
i32 [Q W, 6], ahead_positions, ahead_rows i32 [Q W], by place as `verify_inputs` says; slots, rooms,
forced, accepted, logit_rows i32 [B]; page_table i32 [B, P]. T, W, B, P symbolic, Q <= 8. Of a row
of `draws` that for place i is what `sample` takes for the token after the i-th one fed: its
position is where `forced` is looked up.

Rounding: none.

Source: Leviathan et al., Fast inference from transformers via speculative decoding, ICML 2023,
algorithm 1; the order of a round of `lingc.runtime.speculative`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence

import torch
from torch import Tensor

from lingc.kernel import Kernel, Launch, Tactic
from lingc.kernel import Tensor as Operand
from lingc.math import number, stored_bytes, uneven
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target

MOST_TOKENS = 8
"""Of a sequence: their positions differ in the bits that `forced` looks at, two rounds ahead."""

POSITION = 4
"""The word of a draw that is the position."""


def reference(
    token_ids: Tensor, positions: Tensor, cache_rows: Tensor, hidden: Tensor, draws: Tensor,
    tokens: Tensor, slots: Tensor, page_table: Tensor, rooms: Tensor, forced: Tensor,
    page_size: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    made = [one.clone() for one in (token_ids, positions, cache_rows, hidden, draws)]
    sequences, width = slots.numel(), hidden.shape[1]
    each = tokens.numel() // sequences
    ids, at, rows = (one.view(sequences, each) for one in made[:3])
    states, words = made[3].view(sequences, each, width), made[4].view(each, -1, 6)
    ahead = torch.zeros(words.shape[:2], dtype=torch.int32, device=tokens.device)
    ahead_rows = torch.full_like(ahead, -1)
    accepted, logit_rows = torch.zeros_like(slots), torch.full_like(slots, -1)
    for b in range(sequences):
        if slots[b] < 0:
            ids[b], at[b], rows[b] = -1, 0, -1
            continue
        chosen = tokens.view(sequences, each)[b].tolist()
        drafts, places = ids[b, 1:].tolist(), words[:, b, POSITION].tolist()
        last = _kept(chosen, drafts, places, int(forced[b]))
        ids[b] = torch.tensor([*drafts[:last], *[chosen[last]] * (each - last)])
        first, room = int(at[b, 0]) + last + 1, min(int(rooms[b]), page_table.shape[1] * page_size)
        at[b, last:], rows[b, last + 1 :] = int(at[b, last]), -1
        states[b, last:] = states[b, last].clone()
        words[:, b, POSITION] += last + 1
        accepted[b], logit_rows[b] = last + 1, b * each + last
        for i, position in enumerate(range(first, first + each)):
            ahead[i, b] = max(min(position, room - 1), 0)
            if position < room:
                page, within = divmod(position, page_size)
                ahead_rows[i, b] = int(page_table[b, page]) * page_size + within
    return *made, accepted, logit_rows, ahead.flatten(), ahead_rows.flatten()


def _kept(chosen: list[int], drafts: list[int], places: list[int], forced: int) -> int:
    """How many drafts are kept."""
    for i, (token, draft) in enumerate(zip(chosen, drafts, strict=False)):
        bit = places[i] % 16
        is_rejected, is_kept = forced >> bit & 1, forced >> (16 + bit) & 1
        if not is_kept and (is_rejected or token < 0 or token != draft):
            return i
    return len(drafts)


def types(
    token_ids: TensorType, positions: TensorType, cache_rows: TensorType, hidden: TensorType,
    draws: TensorType, tokens: TensorType, slots: TensorType, page_table: TensorType,
    rooms: TensorType, forced: TensorType, page_size: int,
) -> tuple[TensorType, ...]:  # fmt: skip
    ahead = TensorType("i32", (draws.shape[0],))
    return token_ids, positions, cache_rows, hidden, draws, slots, slots, ahead, ahead


def cost(
    token_ids: TensorType, positions: TensorType, cache_rows: TensorType, hidden: TensorType,
    draws: TensorType, tokens: TensorType, slots: TensorType, page_table: TensorType,
    rooms: TensorType, forced: TensorType, page_size: int,
) -> Cost:  # fmt: skip
    ahead = TensorType("i32", (draws.shape[0],))
    small = (token_ids, positions, cache_rows, draws)
    moved = stored_bytes(*small, *small, tokens, *[slots] * 5, ahead, ahead, hidden)
    return Cost(flops=0.0, moved_bytes=moved)


def refusal(
    _target: Target, token_ids: TensorType, positions: TensorType, cache_rows: TensorType,
    hidden: TensorType, draws: TensorType, tokens: TensorType, slots: TensorType,
    page_table: TensorType, rooms: TensorType, forced: TensorType, page_size: int,
) -> str | None:  # fmt: skip
    if hidden.dtype != "bf16":
        return f"hidden states are {hidden.dtype}, not bf16"
    if number(hidden.shape[1]) % 8:
        return f"hidden states of {hidden.shape[1]} elements are not a multiple of 8"
    count, sequences = tokens.shape[0], slots.shape[0]
    return uneven(count, sequences, MOST_TOKENS)


def tactics(
    target: Target, token_ids: TensorType, positions: TensorType, cache_rows: TensorType,
    hidden: TensorType, draws: TensorType, tokens: TensorType, slots: TensorType,
    page_table: TensorType, rooms: TensorType, forced: TensorType, page_size: int,
) -> Sequence[Tactic]:  # fmt: skip
    given = (
        token_ids, positions, cache_rows, hidden, draws, tokens, slots, page_table, rooms, forced,
        page_size,
    )  # fmt: skip
    if refusal(target, *given) is not None:
        return ()
    (count, width), (sequences, pages), (places, _) = (
        one.bind({}) for one in (hidden, page_table, draws)
    )
    each = count // sequences
    names = (
        "token_ids", "positions", "cache_rows", "hidden", "draws", "tokens", "slots",
        "page_table", "rooms", "forced", "accepted", "logit_rows", "ahead_positions", "ahead_rows",
    )  # fmt: skip
    sizes = ("each", "pitch", "pages", "page_size")
    kernel = Kernel(
        language="cuda",
        source="kernels/accept.cu",
        entry="accept_drafts",
        arguments=(
            *((name, "*bf16" if name == "hidden" else "*i32") for name in names),
            *((name, "i32") for name in sizes),
        ),
        constants=(("WIDTH", width),),
        warps=8,
    )
    launch = Launch(
        kernel=kernel,
        grid=(sequences, 1, 1),
        operands=(*map(Operand, names), each, places // each, pages, page_size),
        dependent=(target.compute_capability or (0, 0)) >= (9, 0),
        moved_bytes=cost(*given).moved_bytes,
    )
    return (Tactic(name="sequence", launches=(launch,)),)


def inputs(
    sequences: int, each: int, width: int, *, dtype: str, device: str
) -> tuple[Tensor | int, ...]:
    """Arguments: some drafts right, some forced, a sequence at the end of its room, a padding."""
    some = Samples(dtype=dtype, device=device)
    pitch, pages, page_size = -(-sequences // 4) * 4, 3, 16
    ids = some.below(1000, sequences, each)
    tokens = some.below(1000, sequences, each)
    for b in range(sequences):
        right = b % each
        tokens[b, :right] = ids[b, 1 : 1 + right]
    starts = some.below(20, sequences, 1)
    if sequences > 1:
        starts[1] = pages * page_size - each
    positions = starts + torch.arange(each, dtype=torch.int32, device=device)
    draws = some.below(1 << 30, each, pitch, 6)
    draws[:, :sequences, POSITION] = positions.T + 1
    forced = torch.zeros(sequences, dtype=torch.int32, device=device)
    forced[2::5], forced[3::5] = 0b101 << 16, 0b1001
    slots = torch.arange(sequences, dtype=torch.int32, device=device)
    if sequences > 2:
        slots[-1] = -1
    table = some.below(40, sequences, pages)
    rooms = torch.full_like(slots, pages * page_size)
    return (
        ids.flatten(), positions.flatten(), some.below(640, sequences * each),
        some.normal(sequences * each, width), draws.flatten(0, 1), tokens.flatten(), slots, table,
        rooms, forced, page_size,
    )  # fmt: skip


OP = define(
    "accept(Tensor token_ids, Tensor positions, Tensor cache_rows, Tensor hidden, Tensor draws, "
    "Tensor tokens, Tensor slots, Tensor page_table, Tensor rooms, Tensor forced, int page_size) "
    "-> (Tensor token_ids, Tensor positions, Tensor cache_rows, Tensor hidden, Tensor draws, "
    "Tensor accepted, Tensor logit_rows, Tensor ahead_positions, Tensor ahead_rows)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 2, 8), (3, 4, 24), (8, 3, 40), (16, 4, 256), (6, 8, 4096)),
)
