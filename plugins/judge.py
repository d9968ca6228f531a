"""Tokens that a verify settles on, for each token that it was fed: drafts are kept or replaced.

For the i-th of the Q tokens of a sequence, with p the model's probabilities after it, as `sample`
has them, d the draft in the next place, drawn from q, and u, v numbers of that place in [0, 1):

    temperature 0:  the likeliest of p
    the last one:   drawn from p by v                       (there is no draft in the next place)
    u q[d] < p[d]:  d
    otherwise:      drawn by v from max(p - q, 0), or from p where that is 0

so that it is distributed as p whatever q is. `accept` tells from the tokens how many drafts hold.
u is drawn with purpose 2 and v with purpose 0. A row whose largest logit is not finite gives -1,
and so does a place whose draft is no token.

`forced`, for tests and measurements: with s the position of the token, it is drawn from p, as if
there were no draft, if bit s % 16 is set.

Shapes: logits f32 [T, V], T = B Q, by sequence; drafts i32 [Q W], draws i32 [Q W, 6] by place as
`verify_inputs` says; draft_logits f32 [T, V] by place, row i B + b; temperature, top_p f32 [B];
top_k, forced i32 [B]; tokens i32 [T] by sequence. T, W, B symbolic.

Rounding: as in `sample`; what is left of p is rounded to f32 once more.

Source: Leviathan et al., Fast inference from transformers via speculative decoding, ICML 2023,
theorem 3.5.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingc.errors import LingcError
from lingc.kernel import Tactic
from lingc.kernels import sampler
from lingc.math import elements, number, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.runtime.sampling import Sampling, choose, judge
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    logits: Tensor, drafts: Tensor, draft_logits: Tensor, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, draws: Tensor, forced: Tensor,
) -> Tensor:  # fmt: skip
    sequences = temperature.numel()
    each = logits.shape[0] // sequences
    rows, drafted = (x.detach().cpu().numpy() for x in (logits, draft_logits))
    words = draws.cpu().numpy().view(np.uint32).reshape(each, -1, 6)
    guesses = drafts.cpu().view(each, -1)
    tokens = torch.empty(logits.shape[0], dtype=torch.int32)
    for b, (heat, most, share) in enumerate(
        zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), strict=True)
    ):
        for i in range(each):
            low, high, request_low, request_high, position, _ = map(int, words[i, b])
            settings = Sampling(temperature=heat, top_k=most, top_p=share, seed=low | high << 32)
            place = {"request": request_low | request_high << 32, "position": position}
            row, draft = rows[b * each + i], int(guesses[i, b])
            is_last, is_forced = i + 1 == each, int(forced[b]) >> position % 16 & 1
            try:
                if not is_last and draft < 0:
                    token = -1
                elif is_last or is_forced:
                    token = choose(row, settings, **place)
                else:
                    token = judge(row, draft, drafted[i * sequences + b], settings, **place)
            except LingcError:
                token = -1
            tokens[b * each + i] = token
    return tokens.to(logits.device)


def types(
    logits: TensorType, drafts: TensorType, draft_logits: TensorType, temperature: TensorType,
    top_k: TensorType, top_p: TensorType, draws: TensorType, forced: TensorType,
) -> TensorType:  # fmt: skip
    return TensorType("i32", (logits.shape[0],))


def cost(
    logits: TensorType, drafts: TensorType, draft_logits: TensorType, temperature: TensorType,
    top_k: TensorType, top_p: TensorType, draws: TensorType, forced: TensorType,
) -> Cost:  # fmt: skip
    made = TensorType("i32", (logits.shape[0],))
    given = (logits, drafts, temperature, top_k, top_p, draws, forced)
    return Cost(flops=4.0 * elements(logits), moved_bytes=stored_bytes(*given, made))


def refusal(
    target: Target, logits: TensorType, drafts: TensorType, draft_logits: TensorType,
    temperature: TensorType, top_k: TensorType, top_p: TensorType, draws: TensorType,
    forced: TensorType,
) -> str | None:  # fmt: skip
    if logits.dtype != "f32" or draft_logits.dtype != "f32":
        return f"logits are {logits.dtype} and {draft_logits.dtype}, not f32"
    if (target.compute_capability or (0, 0)) < (9, 0):
        return f"{target.arch} has no clusters of blocks"
    return sampler.refusal(number(logits.shape[1]), rows=2)


def tactics(
    target: Target, logits: TensorType, drafts: TensorType, draft_logits: TensorType,
    temperature: TensorType, top_k: TensorType, top_p: TensorType, draws: TensorType,
    forced: TensorType,
) -> Sequence[Tactic]:  # fmt: skip
    given = (logits, drafts, draft_logits, temperature, top_k, top_p, draws, forced)
    if refusal(target, *given) is not None:
        return ()
    (tokens, width), (sequences,), (places,) = (
        one.bind({}) for one in (logits, temperature, drafts)
    )
    return sampler.judging(tokens, width, sequences, places // (tokens // sequences))


def inputs(
    sequences: int, each: int, vocabulary: int, spread: float, greedy: int = 0, *, dtype: str,
    device: str,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments: sequences of all kinds in turn, or greedy ones; whole logits tie.

    Drafts are likely tokens of both distributions, so that some are kept and some are not.
    """
    some = Samples(dtype=dtype, device=device)
    tokens, pitch = sequences * each, -(-sequences // 4) * 4
    logits = some.state(tokens, vocabulary).float() * spread
    # The draft layer's rows, by place, are the model's, by sequence, and something else.
    order = torch.arange(tokens, device=device).view(sequences, each).T.flatten()
    drafted = logits[order] + 0.5 * spread * some.state(tokens, vocabulary).float()
    if spread > 8:
        logits, drafted = logits.round(), drafted.round()

    def in_turn(values: Sequence[float], kind: torch.dtype) -> Tensor:
        found = [values[b % len(values)] for b in range(sequences)]
        return torch.tensor(found, dtype=kind).to(device)

    drafts = torch.full((each, pitch), -1, dtype=torch.int32, device=device)
    drafts[:, :sequences] = drafted.argmax(1).view(each, sequences).int()
    forced = torch.zeros(sequences, dtype=torch.int32, device=device)
    forced[3::4] = 0x5555
    return (
        logits, drafts.flatten(), drafted.contiguous(),
        in_turn([0.0] if greedy else [1.0, 0.7, 2.0, 0.0], torch.float32),
        in_turn([0, 50, 7, 0, vocabulary], torch.int32),
        in_turn([1.0, 0.95, 0.5], torch.float32),
        some.below(1 << 31, each * pitch, 6), forced,
    )  # fmt: skip


OP = define(
    "judge(Tensor logits, Tensor drafts, Tensor draft_logits, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor draws, Tensor forced) -> Tensor tokens",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=(
        (1, 2, 12, 1.0),
        (4, 3, 1000, 3.0),
        (9, 2, 4096, 10.0),  # ties
        (3, 4, 20_000, 4.0),
        (1, 2, 157_184, 3.0),
    ),
    benchmarks=(
        Benchmark(
            name="157184 logits, 3 drafts, greedy",
            case=lambda tokens: (tokens // 4, 4, 157_184, 3.0, 1),
            tokens=(4, 64),
        ),
        Benchmark(
            name="157184 logits, 3 drafts, drawn",
            case=lambda tokens: (tokens // 4, 4, 157_184, 3.0),
            tokens=(4, 64),
        ),
    ),
)
