"""What is planted is found, and named by where it was planted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import DataError, IncompatibleError
from lingc.parity.compare import Comparison, Summary, worst
from lingc.parity.run import compare
from lingc.parity.side import F32, Scores
from tests.parity.hand import ROUTING, VOCAB, HandSide, logits, rows

ROWS = rows(5, 20, 3)


def bump(token: int, size: float) -> F32:
    made = np.zeros(VOCAB, np.float32)
    made[token] = size
    return made


def compared(other: HandSide) -> Comparison:
    ((_, found),) = compare(HandSide("right", ROWS), other, ROWS, ["prefill"], ROUTING, 2)
    return found


def summary(a: F32, b: F32, *, margin: float = 1e-3) -> Summary:
    found = Comparison("prefill", None)
    found.add(0, Scores(logits=a, experts={}), Scores(logits=b, experts={}))
    return found.summary(margin)


def test_equal_sides_differ_by_nothing() -> None:
    found = compared(HandSide("same", ROWS)).summary(1e-3)

    assert (found.tokens, found.rows) == (28, 3)
    assert (found.mean_kl, found.max_kl, found.max_abs, found.mean_abs) == (0, 0, 0, 0)
    assert found.top1_agreement == 1
    assert found.flips == ()


def test_a_bumped_logit_is_found_at_its_position() -> None:
    other = HandSide("bumped", ROWS, bumps={(2, 17): bump(4, 0.5)})

    found = compared(other)

    (token,) = worst(found.tokens, 1).each()
    assert (ROWS[token.row].line, token.position) == (2, 17)
    assert token.max_abs == pytest.approx(0.5, rel=1e-6)
    assert token.mean_abs == pytest.approx(0.5 / VOCAB, rel=1e-6)
    assert (found.tokens.kl > 0).sum() == 1


def test_another_winner_counts_apart_where_the_reference_had_a_near_tie() -> None:
    a = np.zeros((2, VOCAB), np.float32)
    a[0, 3], a[0, 5] = 1.0, 0.9995
    a[1, 3], a[1, 5] = 1.0, 0.9
    b = a[:, ::-1].copy()

    found = summary(a, b)

    assert (found.top1_above_margin, found.top1_within_margin) == (1, 1)
    assert found.top1_agreement == 0


def test_divergence_is_that_of_the_definition() -> None:
    a, b = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])

    found = summary(a.astype(np.float32), b.astype(np.float32))

    assert found.mean_kl == pytest.approx(0.25 * np.log(2), rel=1e-6)


@given(st.integers(0, 2**31), st.floats(-50, 50, width=32))
@settings(max_examples=30)
def test_divergence_does_not_see_a_constant_added_to_all_logits(seed: int, constant: float) -> None:
    a = np.random.default_rng(seed).standard_normal((3, VOCAB)).astype(np.float32)

    found = summary(a, a + np.float32(constant))

    assert found.max_kl == pytest.approx(0, abs=1e-9)
    assert found.max_abs == pytest.approx(abs(constant), abs=1e-5)


def test_a_logit_that_is_not_finite_is_counted_and_comes_first() -> None:
    other = HandSide("broken", ROWS, bumps={(1, 2): bump(0, np.nan), (2, 3): bump(0, 9.0)})

    found = compared(other)

    assert found.summary(1e-3).not_finite == 1
    (first, second) = worst(found.tokens, 2).each()
    assert (ROWS[first.row].line, first.position) == (1, 2)
    assert (ROWS[second.row].line, second.position) == (2, 3)


def test_buckets_hold_every_token_once() -> None:
    found = compared(HandSide("same", ROWS)).summary(1e-3)

    assert [(b.first, b.last, b.tokens) for b in found.buckets] == [(0, 15, 24), (16, 19, 4)]


def test_blocks_of_logits_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = logits(range(20)), logits(range(1, 21))
    whole = summary(a, b)

    monkeypatch.setattr("lingc.parity.compare._BLOCK", 3 * VOCAB)

    assert summary(a, b) == whole


def test_sides_with_other_vocabularies_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="right has 12 tokens, wide 13"):
        compared(HandSide("wide", ROWS, vocab=13))


def test_draft_mode_needs_two_tokens() -> None:
    single = rows(1)
    side = HandSide("one", single)

    with pytest.raises(DataError, match="mode 'draft' needs a row of at least 2 tokens"):
        compare(side, side, single, ["draft"], None, 1)


def test_every_mode_is_scored_batch_by_batch() -> None:
    a, b = HandSide("a", ROWS), HandSide("b", ROWS)
    done: list[int] = []

    compare(a, b, ROWS, ["prefill", "verify"], None, 2, done.append)

    assert a.modes == ["prefill", "verify", "prefill", "verify"]
    assert done == [2, 1]
