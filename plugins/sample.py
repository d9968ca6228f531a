"""A token from each row of logits: the likeliest, or one drawn as `lingc.runtime.sampling` draws.

    best = the largest logit, of equals the lowest id
    w[v] = exp((logits[t, v] - logits[t, best]) / temperature[t])
    keep the top_k[t] likeliest; of them the fewest whose share reaches top_p[t]
    tokens[t] = the first v at which the kept w, added up by rising id, exceed u * their sum

`temperature` 0 takes the best, `top_k` 0 keeps all, `top_p` 1 keeps all. Of equal weights the lower
id is the likelier. u is the number in [0, 1) that Philox-4x64-10 gives for `draws[t]`: low and high
words of the seed, low and high words of the request, position, purpose; so a row draws the same
token whatever stands beside it. A row whose largest logit is not finite gives -1.

Shapes: logits f32 [T, V]; temperature, top_p f32 [T]; top_k i32 [T]; draws i32 [T, 6]; tokens
i32 [T]. T symbolic.

Rounding: the runtime adds up f64 weights. The kernel's weights are f32 from exponents in f64, added
up in f64: about 2e-7 of each, so that it draws another token about once in a million.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011, for Philox; Holtzman et
al., The curious case of neural text degeneration, 2020, arXiv:1904.09751, for top-p.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lingc.errors import LingcError
from lingc.kernel import Tactic
from lingc.kernels import sampler
from lingc.math import elements, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.runtime.sampling import Sampling, argmax, pick, probabilities, uniform
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, draws: Tensor
) -> Tensor:
    rows = logits.detach().cpu().numpy()
    words = draws.cpu().numpy().view(np.uint32)
    settings = zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), strict=True)
    chosen = [_token(row, *one, draw) for row, one, draw in zip(rows, settings, words, strict=True)]
    return torch.tensor(chosen, dtype=torch.int32, device=logits.device)


def _token(row: np.ndarray, temperature: float, top_k: int, top_p: float, draw: np.ndarray) -> int:
    low, high, request_low, request_high, position, purpose = (int(word) for word in draw)
    settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=low | high << 32)
    try:
        best = argmax(row)
    except LingcError:
        return -1
    if settings.is_greedy:
        return best
    request = request_low | request_high << 32
    drawn = uniform(settings, request=request, position=position, purpose=purpose)
    return pick(probabilities(row, settings), drawn)


def types(
    logits: TensorType,
    temperature: TensorType,
    top_k: TensorType,
    top_p: TensorType,
    draws: TensorType,
) -> TensorType:
    return TensorType("i32", (logits.shape[0],))


def cost(
    logits: TensorType,
    temperature: TensorType,
    top_k: TensorType,
    top_p: TensorType,
    draws: TensorType,
) -> Cost:
    made = types(logits, temperature, top_k, top_p, draws)
    return Cost(
        flops=4.0 * elements(logits),
        moved_bytes=stored_bytes(logits, temperature, top_k, top_p, draws, made),
    )


def refusal(
    target: Target,
    logits: TensorType,
    temperature: TensorType,
    top_k: TensorType,
    top_p: TensorType,
    draws: TensorType,
) -> str | None:
    if logits.dtype != "f32":
        return f"logits are {logits.dtype}, not f32"
    if (target.compute_capability or (0, 0)) < (9, 0):
        return f"{target.arch} has no clusters of blocks"
    return sampler.refusal(logits.bind({})[1])


def tactics(
    target: Target,
    logits: TensorType,
    temperature: TensorType,
    top_k: TensorType,
    top_p: TensorType,
    draws: TensorType,
) -> Sequence[Tactic]:
    if refusal(target, logits, temperature, top_k, top_p, draws) is not None:
        return ()
    tokens, width = logits.bind({})
    return sampler.tactics(tokens, width)


def inputs(
    tokens: int, vocabulary: int, spread: float, greedy: int = 0, *, dtype: str, device: str
) -> tuple[Tensor, ...]:
    """Rows of all kinds in turn, or greedy ones; whole logits tie."""
    some = Samples(dtype=dtype, device=device)
    logits = some.state(tokens, vocabulary).float() * spread
    if spread > 8:
        logits = logits.round()

    def in_turn(values: Sequence[float], kind: torch.dtype) -> Tensor:
        return torch.tensor([values[t % len(values)] for t in range(tokens)], dtype=kind).to(device)

    return (
        logits,
        in_turn([0.0] if greedy else [0.7, 1.0, 0.0, 2.0], torch.float32),
        in_turn([50, 0, 1, vocabulary, 7], torch.int32),
        in_turn([0.95, 1.0, 0.5], torch.float32),
        some.below(1 << 31, tokens, 6),
    )


OP = define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor draws) -> "
    "Tensor tokens",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=(
        (1, 12, 1.0),
        (7, 1000, 3.0),
        (17, 4096, 10.0),  # ties
        (3, 20_000, 4.0),
        (2, 157_184, 3.0),
    ),
    benchmarks=(
        Benchmark(
            name="157184 logits, greedy",
            case=lambda tokens: (tokens, 157_184, 3.0, 1),
            tokens=(1, 4, 64),
        ),
        Benchmark(
            name="157184 logits, drawn",
            case=lambda tokens: (tokens, 157_184, 3.0),
            tokens=(1, 4, 64),
        ),
    ),
)
