"""A residual add and the norm that reads it become one op with two results."""

import pytest

from lingc.passes import fuse_add_rms_norm
from lingc.plan import TensorType
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE = fuse_add_rms_norm.RULE


@pytest.mark.parametrize(("phase", "count"), [("prefill", 8), ("verify", 8), ("draft", 2)])
def test_fires_twice_a_layer(phase: str, count: int) -> None:
    fired = fire(RULE, "tiny", phase)

    assert fired.outcome.found == fired.expected == count
    assert fired.outcome.refused == []
    assert "aten.add.Tensor" not in names(fired.after)
    assert fired.again.found == 0


@pytest.mark.parametrize("phase", ["prefill", "verify", "draft"])
def test_keeps_the_numbers(phase: str) -> None:
    fired = fire(RULE, "tiny", phase)

    assert_same(fired.after, fired.before, "tiny", mechanism="gemm")


def test_hands_on_the_sum_to_the_next_layer() -> None:
    (first, second, *_) = calls(fire(RULE, "tiny", "prefill").after, "lingc.add_rms_norm")

    assert second.args[0].args == (first, 1)


def test_refuses_an_add_that_broadcasts_and_says_so() -> None:
    program = before(RULE, "tiny", "prefill")
    add = calls(program, "aten.add.Tensor")[0]
    add.args[1].meta["type"] = TensorType("f32", (1, 64))

    outcome = apply(program, RULE, context("tiny", "prefill"))

    assert outcome.found == 7
    assert [refusal.reason for refusal in outcome.refused] == [
        "the add broadcasts f32[1, 64] to f32[T, 64]"
    ]


def test_refuses_a_norm_over_several_axes_and_says_so() -> None:
    program = before(RULE, "tiny", "prefill")
    norm = calls(program, "aten.rms_norm.default")[1]
    norm.args = (norm.args[0], [4, 16], *norm.args[2:])

    outcome = apply(program, RULE, context("tiny", "prefill"))

    assert outcome.found == 7
    assert outcome.refused[0].reason == "the norm runs over 2 axes, not the last one"
