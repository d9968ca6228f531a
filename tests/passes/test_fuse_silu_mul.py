"""SwiGLU over a merged projection becomes one op."""

import pytest

from lingc.passes import fuse_silu_mul
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE = fuse_silu_mul.RULE


@pytest.mark.parametrize(
    ("model", "phase", "count"),
    [("tiny", "prefill", 4), ("odd", "decode", 2), ("tiny", "draft", 1)],
)
def test_fires_on_dense_layers_and_shared_experts(model: str, phase: str, count: int) -> None:
    fired = fire(RULE, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert "aten.silu.default" not in names(fired.after)
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model, mechanism="gemm")


def test_fires_on_projections_that_are_stored_apart() -> None:
    fired = fire(RULE, "odd", "prefill", "fp8", "cpu")

    assert fired.outcome.found == fired.expected == 2


def test_refuses_parts_that_are_not_the_two_halves() -> None:
    program = before(RULE, "tiny", "draft")
    (silu,) = calls(program, "aten.silu.default")
    gate = silu.args[0]
    gate.args = (*gate.args[:2], 8, gate.args[3])

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == "gate and up are not the two halves of the projection"
