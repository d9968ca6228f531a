"""Norms that no add feeds become ops as well."""

import pytest

from lingc.passes import fuse_rms_norm
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE = fuse_rms_norm.RULE


@pytest.mark.parametrize(("phase", "count"), [("prefill", 1), ("decode", 1), ("draft", 3)])
def test_fires_on_what_larger_fusions_left(phase: str, count: int) -> None:
    fired = fire(RULE, "tiny", phase)

    assert fired.outcome.found == fired.expected == count
    assert "aten.rms_norm.default" not in names(fired.after)
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "tiny", mechanism="gemm")


def test_refuses_a_norm_without_a_weight() -> None:
    program = before(RULE, "tiny", "prefill")
    (norm,) = calls(program, "aten.rms_norm.default")
    norm.args = (*norm.args[:2], None, norm.args[3])

    outcome = apply(program, RULE, context("tiny", "prefill"))

    assert outcome.refused[0].reason == "the norm has no weight"


def test_refuses_a_norm_over_several_axes() -> None:
    program = before(RULE, "tiny", "prefill")
    (norm,) = calls(program, "aten.rms_norm.default")
    norm.args = (norm.args[0], [4, 16], *norm.args[2:])

    outcome = apply(program, RULE, context("tiny", "prefill"))

    assert outcome.refused[0].reason == "the norm runs over 2 axes, not the last one"
