"""The inputs of a verify from the drafts that it judges: Q tokens of each of B sequences.

    token_ids[b, 0] = token_ids[b, Q - 1];  token_ids[b, i] = drafts[i - 1, b]
    positions[b, i] = ahead_positions[i, b];  cache_rows[b, i] = ahead_rows[i, b]

The last of a sequence's `token_ids` before is its last token, as `accept` leaves it; where that is
-1 the sequence is padding: tokens and rows -1, positions 0.

Drafts are made one place after another for all sequences, so that what is known of each place lies
together: those tensors are [Q, W], W >= B and a multiple of 4, and what is beyond B is not read.

Shapes: token_ids, positions, cache_rows i32 [T], T = B Q; drafts, ahead_positions, ahead_rows i32
[Q W]; slots i32 [B], for B alone. T, W, B symbolic.

Rounding: none.

Source: none; the order of a round of `lingc.runtime.speculative`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lingc.kernel import Kernel, Launch, Tactic
from lingc.kernel import Tensor as Operand
from lingc.math import stored_bytes, uneven
from lingc.op import Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target

MOST_TOKENS = 32
"""Of a sequence: a warp has them."""


def reference(
    token_ids: Tensor, drafts: Tensor, ahead_positions: Tensor, ahead_rows: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = slots.numel()
    each = token_ids.numel() // sequences
    last = token_ids.view(sequences, each)[:, -1:]
    made, positions, rows = (
        one.view(each, -1)[:, :sequences].T for one in (drafts, ahead_positions, ahead_rows)
    )
    tokens = torch.cat((last, made[:, :-1]), dim=1)
    filled = zip((tokens, positions, rows), (-1, 0, -1), strict=True)
    found = [torch.where(last < 0, padding, one).flatten() for one, padding in filled]
    return found[0], found[1], found[2]


def types(
    token_ids: TensorType,
    drafts: TensorType,
    ahead_positions: TensorType,
    ahead_rows: TensorType,
    slots: TensorType,
) -> tuple[TensorType, TensorType, TensorType]:
    return token_ids, token_ids, token_ids


def cost(
    token_ids: TensorType,
    drafts: TensorType,
    ahead_positions: TensorType,
    ahead_rows: TensorType,
    slots: TensorType,
) -> Cost:
    return Cost(flops=0.0, moved_bytes=stored_bytes(*[token_ids] * 6, slots))


def refusal(
    _target: Target,
    token_ids: TensorType,
    drafts: TensorType,
    ahead_positions: TensorType,
    ahead_rows: TensorType,
    slots: TensorType,
) -> str | None:
    return uneven(token_ids.shape[0], slots.shape[0], MOST_TOKENS)


def tactics(
    target: Target,
    token_ids: TensorType,
    drafts: TensorType,
    ahead_positions: TensorType,
    ahead_rows: TensorType,
    slots: TensorType,
) -> Sequence[Tactic]:
    if refusal(target, token_ids, drafts, ahead_positions, ahead_rows, slots) is not None:
        return ()
    (tokens,), (sequences,), (places,) = (one.bind({}) for one in (token_ids, slots, drafts))
    each = tokens // sequences
    tensors = ("token_ids", "drafts", "ahead_positions", "ahead_rows", "positions", "cache_rows")
    kernel = Kernel(
        language="cuda",
        source="kernels/verify_inputs.cu",
        entry="verify_inputs",
        arguments=(*((name, "*i32") for name in tensors), ("each", "i32"), ("pitch", "i32")),
        warps=1,
    )
    launch = Launch(
        kernel=kernel,
        grid=(sequences, 1, 1),
        operands=(*map(Operand, tensors), each, places // each),
        dependent=(target.compute_capability or (0, 0)) >= (9, 0),
        moved_bytes=cost(token_ids, drafts, ahead_positions, ahead_rows, slots).moved_bytes,
    )
    return (Tactic(name="sequence", launches=(launch,)),)


def inputs(sequences: int, each: int, *, dtype: str, device: str) -> tuple[Tensor, ...]:
    """Arguments; the last of three sequences and more is padding."""
    some = Samples(dtype=dtype, device=device)
    pitch = -(-sequences // 4) * 4
    tokens = some.below(1000, sequences * each)
    if sequences > 2:
        tokens[-1] = -1
    drafts, positions, rows = (some.below(1000, each * pitch) for _ in range(3))
    return tokens, drafts, positions, rows, some.below(sequences, sequences)


OP = define(
    "verify_inputs(Tensor token_ids, Tensor drafts, Tensor ahead_positions, Tensor ahead_rows, "
    "Tensor slots) -> (Tensor token_ids, Tensor positions, Tensor cache_rows)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 2), (3, 4), (5, 3), (16, 4), (33, 8)),
)
