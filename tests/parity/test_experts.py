"""Which tokens went to other experts, how near the choice was, and what only follows."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lingc.parity.budget import Budget, judge
from lingc.parity.compare import Comparison
from lingc.parity.experts import flips, gap
from lingc.parity.run import compare
from lingc.parity.side import F32, Choice
from tests.parity.hand import EXPERTS, ROUTING, HandSide, choose, experts, rows

ROWS = rows(6, 9)


def compared(**swaps: tuple[tuple[int, int, int], list[int]]) -> Comparison:
    other = HandSide("other", ROWS, swaps=dict(swaps.values()))
    ((_, found),) = compare(HandSide("right", ROWS), other, ROWS, ["prefill"], ROUTING, 4)
    return found


def scores(*values: float) -> F32:
    return np.array(values, np.float32)


def test_a_swapped_expert_is_found_and_named() -> None:
    right = experts(ROWS[1].ids)[2].ids[4].tolist()
    new = next(e for e in range(EXPERTS) if e not in right)

    (flip,) = compared(swap=((2, 4, 2), [right[0], new])).flips

    assert (ROWS[flip.row].line, flip.position, flip.layer) == (2, 4, 2)
    assert (flip.reference, flip.other) == ((right[1],), (new,))
    assert flip.is_root


def test_the_order_of_the_same_experts_is_no_difference() -> None:
    right = experts(ROWS[1].ids)[2].ids[4].tolist()

    assert compared(swap=((2, 4, 2), right[::-1])).flips == []


def test_deeper_layers_and_later_tokens_follow_from_the_first_difference() -> None:
    all_zero = [0, 1]
    wanted = {(3, 2): True, (3, 3): False, (5, 3): False, (2, 3): True}
    swaps = {f"s{t}{n}": ((2, t, n), all_zero) for t, n in wanted}

    found = {(f.position, f.layer): f.is_root for f in compared(**swaps).flips}

    # What chance already chose is no difference; the others are told apart.
    assert found.items() <= wanted.items()
    assert len(found) >= 3


def test_the_gap_of_two_experts_of_one_group_is_their_difference() -> None:
    biased = scores(0.9, 0.8, 0.7, 0.6999, 0, 0, 0, 0)  # groups 0 and 1 are kept

    assert gap(biased, [0, 1], ROUTING) == 0
    assert gap(biased, [0, 2], ROUTING) == pytest.approx(0.1, rel=1e-5)


def test_the_gap_of_a_group_that_lost_is_that_of_the_groups() -> None:
    biased = scores(0.9, 0.8, 0.3, 0.2, 0.45, 0.04, 0, 0)  # sums 1.7, 0.5, 0.49, 0

    assert gap(biased, [0, 4], ROUTING) == pytest.approx(max(0.5 - 0.49, 0.8 - 0.45), rel=1e-5)
    assert gap(scores(0.9, 0.1, 0.3, 0.2, 0.45, 0.04, 0, 0), [0, 4], ROUTING) == pytest.approx(
        0.01, rel=1e-4
    )


def test_a_choice_that_no_scores_explain_has_an_infinite_gap() -> None:
    biased = np.linspace(0, 1, EXPERTS, dtype=np.float32)
    three_groups = [0, 2, 4]

    assert gap(biased, three_groups, ROUTING) == float("inf")
    assert gap(biased, [7, 7], ROUTING) == float("inf")


@given(st.integers(0, 2**31), st.floats(1e-6, 0.2))
@settings(max_examples=60)
def test_a_choice_made_from_nudged_scores_is_no_further_than_the_nudge(
    seed: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    right = rng.random((1, EXPERTS), dtype=np.float32)
    nudged = right + rng.uniform(-size, size, right.shape).astype(np.float32)

    found = gap(right[0], choose(nudged).ids[0].tolist(), ROUTING)

    # Two scores, or the sums of two groups of two, each move by at most the nudge.
    assert 0 <= found <= 4 * size + 1e-6


@given(st.integers(0, 2**31))
@settings(max_examples=40)
def test_only_the_choice_that_the_scores_make_has_no_gap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    biased = rng.random((1, EXPERTS), dtype=np.float32)
    right = choose(biased).ids[0].tolist()
    other = sorted(rng.choice(EXPERTS, ROUTING.top_k, replace=False).tolist())
    assume(sorted(right) != other)

    assert gap(biased[0], right, ROUTING) == 0
    assert gap(biased[0], other, ROUTING) > 0


def test_the_other_side_may_tell_the_scores() -> None:
    told = choose(np.linspace(0, 1, 2 * EXPERTS, dtype=np.float32).reshape(2, EXPERTS))
    untold = Choice(ids=np.array([[7, 6], [7, 5]], np.int32))

    (flip,) = flips(0, {1: untold}, {1: told}, ROUTING)

    assert flip.gap == pytest.approx(1 / 15, rel=1e-4)


def test_a_gap_that_nobody_knows_is_over_budget() -> None:
    a, b = (Choice(ids=np.array([ids], np.int32)) for ids in ([1, 2], [1, 3]))
    found = Comparison("prefill", ROUTING)
    side = HandSide("a", rows(1)).score([[0]], "prefill")[0]
    found.add(
        0,
        type(side)(logits=side.logits, experts={1: a}),
        type(side)(logits=side.logits, experts={1: b}),
    )

    checks = judge(found.summary(1e-3), Budget(name="gap", expert_gap=1e-5))

    assert [(c.name, c.ok) for c in checks] == [("finite", True), ("expert_gap", False)]
    assert "1 without scores" in checks[1].found


def test_layers_that_one_side_does_not_tell_are_not_compared() -> None:
    told = experts(ROWS[0].ids)

    assert flips(0, told, {}, ROUTING) == []
