"""The router: groups, bias, weights and ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lingc.compare import assert_close
from lingc.plugins import router

EXPERTS, GROUPS, KEPT, TOP = 12, 4, 2, 4


def route(
    scores: list[list[float]], *, bias: list[float] | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Route tokens whose sigmoid scores are given."""
    wanted = torch.tensor(scores, dtype=torch.float64)
    weight = torch.eye(wanted.shape[1], dtype=torch.float64)
    shift = torch.zeros(wanted.shape[1]) if bias is None else torch.tensor(bias)
    return router.reference(wanted.logit(), weight, shift, GROUPS, KEPT, TOP, 2.5, normalize)


def by_hand(biased: list[float]) -> list[int]:
    size = EXPERTS // GROUPS
    best = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(GROUPS)]
    groups = sorted(range(GROUPS), key=lambda g: (-best[g], g))[:KEPT]
    allowed = [e for e in range(EXPERTS) if e // size in groups]
    return sorted(allowed, key=lambda e: (-biased[e], e))[:TOP]


# Eighths add up exactly, so that equal scores are ties in f32 too.
eighths = st.lists(st.integers(-4, 4).map(lambda n: n / 8), min_size=EXPERTS, max_size=EXPERTS)


@given(bias=eighths)
def test_of_equal_scores_the_lower_index_comes_first(bias: list[float]) -> None:
    ids, _ = route([[0.5] * EXPERTS], bias=bias)

    assert ids[0].tolist() == by_hand([0.5 + b for b in bias])


@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 5))
def test_experts_are_distinct_of_few_groups_and_weighed_to_the_scale(
    seed: int, tokens: int
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=drawn, dtype=torch.bfloat16)
    weight = torch.randn(EXPERTS, 8, generator=drawn, dtype=torch.bfloat16)
    bias = torch.randn(EXPERTS, generator=drawn) * 0.2

    ids, weights = router.reference(x, weight, bias, GROUPS, KEPT, TOP, 2.5, normalize=True)

    biased = torch.sigmoid(x.float() @ weight.float().T) + bias
    for row, chosen in zip(biased, ids.long(), strict=True):
        assert len(set(chosen.tolist())) == TOP
        assert len(set((chosen // (EXPERTS // GROUPS)).tolist())) <= KEPT
        assert (row[chosen].diff() <= 0).all()
    assert_close(weights.sum(-1), torch.full((tokens,), 2.5), dtype="f32", mechanism="router")
    assert weights.dtype == torch.float32


def test_the_bias_selects_and_does_not_weigh() -> None:
    scores = [0.9, 0.8, 0.1, 0.7, 0.6, 0.1] + [0.2] * 6
    bias = [0.0] * 11 + [5.0]

    ids, weights = route([scores], bias=bias)

    assert ids[0].tolist() == [11, 0, 1, 9]
    want = torch.tensor([[0.2, 0.9, 0.8, 0.2]], dtype=torch.float64) * 2.5 / 2.1
    assert_close(weights, want, dtype="f64")


def test_a_group_is_judged_by_its_two_best() -> None:
    one_star = [0.99, 0.01, 0.01]
    two_good = [0.6, 0.6, 0.01]

    ids, _ = route([[*one_star, *two_good, *two_good, 0.1, 0.1, 0.1]])

    assert sorted(ids[0].tolist()) == [3, 4, 6, 7]


def test_weights_are_not_normalized_where_the_config_says_so() -> None:
    ids, weights = route([[0.1 * (e % 9 + 1) for e in range(EXPERTS)]], normalize=False)

    want = 2.5 * torch.tensor([0.1 * (e % 9 + 1) for e in ids[0].tolist()], dtype=torch.float64)
    assert_close(weights[0], want, dtype="f64")


def test_logits_are_not_rounded_to_bf16() -> None:
    # In bf16 both logits would be 256 + 0: a tie that the lower index wins.
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    weight = torch.tensor([[8.0, 0.0], [8.0, 0.0078125]], dtype=torch.bfloat16)

    ids, _ = router.reference(x, weight, torch.zeros(2), 1, 1, 2, 1.0, normalize=True)

    assert ids[0].tolist() == [1, 0]


@pytest.mark.parametrize("groups", [1, EXPERTS])
def test_one_group_and_groups_of_one_pick_the_best_experts(groups: int) -> None:
    scores = torch.linspace(0.1, 0.9, EXPERTS, dtype=torch.float64)[None]
    eye = torch.eye(EXPERTS, dtype=torch.float64)
    kept = min(groups, TOP)

    ids, _ = router.reference(
        scores.logit(), eye, torch.zeros(EXPERTS), groups, kept, TOP, 1.0, normalize=True
    )

    assert ids[0].tolist() == [11, 10, 9, 8]
