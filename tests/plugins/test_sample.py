"""The sampler: rows on their own, settings of their own, and the runtime's random numbers."""

import math

import numpy as np
import torch
from torch import Tensor

from lingc.plugins import sample
from lingc.runtime.sampling import Sampling, choose

VOCABULARY = 40


def logits(rows: int) -> Tensor:
    drawn = torch.Generator().manual_seed(3)
    return 3 * torch.randn(rows, VOCABULARY, generator=drawn)


def sampled(
    rows: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
) -> list[int]:
    """One token of each row, the i-th at position i of request 7."""
    count = rows.shape[0]
    words = [[seed & 0xFFFFFFFF, seed >> 32, 7, 0, position, 0] for position in range(count)]
    draws = torch.from_numpy(np.array(words, np.uint32).view(np.int32))
    made: Tensor = sample.OP.overload(
        rows,
        torch.full((count,), temperature),
        torch.full((count,), top_k, dtype=torch.int32),
        torch.full((count,), top_p),
        draws,
    )
    return made.tolist()


def test_tokens_are_those_that_the_runtime_draws() -> None:
    rows, seed = logits(20), 2**63 + 12_345

    made = sampled(rows, temperature=1.5, top_k=9, top_p=0.75, seed=seed)

    settings = Sampling(temperature=1.5, top_k=9, top_p=0.75, seed=seed)
    want = [choose(row, settings, request=7, position=i) for i, row in enumerate(rows.numpy())]
    assert made == want
    assert len(set(made)) > 3


def test_temperature_0_takes_the_largest_logit_and_the_lowest_of_equals() -> None:
    rows = torch.zeros(2, VOCABULARY)
    rows[1, [5, 9]] = 2.0

    assert sampled(rows, temperature=0.0, top_k=3, top_p=0.1) == [0, 5]


def test_a_row_without_a_finite_best_gives_none() -> None:
    rows = logits(4)
    rows[1, 3], rows[2, 4] = math.nan, math.inf

    made = sampled(rows, temperature=0.0)

    assert made[1:3] == [-1, -1]
    assert min(made[0], made[3]) >= 0
