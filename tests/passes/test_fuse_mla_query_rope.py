"""RoPE of a latent layer's queries becomes one op over whole heads."""

import pytest

from lingc.passes import fuse_mla_query_rope
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE = fuse_mla_query_rope.RULE


@pytest.mark.parametrize(
    ("model", "phase", "count"),
    [("tiny", "prefill", 1), ("odd", "decode", 3), ("whole-head-rope", "draft", 1)],
)
def test_fires_once_a_latent_layer(model: str, phase: str, count: int) -> None:
    fired = fire(RULE, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert names(fired.before).count("aten.stack.default") == 2 * count
    assert names(fired.after).count("aten.stack.default") == count
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model, mechanism="rope")


def test_refuses_dims_that_are_not_the_last_ones() -> None:
    program = before(RULE, "tiny", "draft")
    (pairs, *_) = [n for n in calls(program, "aten.reshape.default") if len(n.args[1]) == 4]
    pairs.args = (pairs.args[0], [*pairs.args[1][:2], 1, 2])

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == (
        "2 of the 20 dims of 4 heads are rotated, not the last ones"
    )
