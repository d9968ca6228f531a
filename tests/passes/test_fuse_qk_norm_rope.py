"""Per-head norms of q and k, and their rotation, become one op."""

import pytest

from lingc.passes import fuse_qk_norm_rope
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire

RULE = fuse_qk_norm_rope.RULE


@pytest.mark.parametrize(
    ("model", "phase", "count", "heads"),
    [("tiny", "prefill", 3, 4), ("odd", "decode", 3, 3), ("whole-head-rope", "verify", 3, 4)],
)
def test_fires_once_a_linear_layer(model: str, phase: str, count: int, heads: int) -> None:
    fired = fire(RULE, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert {node.args[5] for node in calls(fired.after, "lingc.qk_norm_rope")} == {heads}
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model)


def test_is_not_expected_where_no_layer_is_linear() -> None:
    assert RULE.expected(context("tiny", "draft")) == 0


def test_refuses_q_and_k_that_do_not_come_first() -> None:
    program = before(RULE, "tiny", "prefill")
    linear = calls(program, "aten.linear.default")[0]
    (q,) = (n for n in calls(program, "aten.slice.Tensor") if n.args == (linear, 1, 0, 64))
    q.args = (linear, 1, 16, 64)

    outcome = apply(program, RULE, context("tiny", "prefill"))

    assert outcome.found == 2
    assert outcome.refused[0].reason == "q and k are not the first two blocks of the projection"


def test_refuses_rotary_halves_of_two_widths() -> None:
    program = before(RULE, "tiny", "prefill")
    for node in calls(program, "aten.slice.Tensor"):
        if node.meta["layer"] == 0 and node.args[1:] == (2, 4, 8):
            node.args = (node.args[0], 2, 4, 10)
        if node.meta["layer"] == 0 and node.args[1] == 2 and node.args[2] == 8:
            node.args = (*node.args[:2], 10, node.args[3])

    outcome = apply(program, RULE, context("tiny", "prefill"))

    assert outcome.found == 2
    assert outcome.refused[0].reason == "the rotary halves end at 4 and 10"
