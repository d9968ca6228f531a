"""The group norm of linear attention and its gate become one op."""

import pytest

from lingc.passes import fuse_group_norm_gate
from lingc.rewrite import Builder, apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE = fuse_group_norm_gate.RULE


@pytest.mark.parametrize(
    ("model", "phase", "count", "groups"),
    [("tiny", "prefill", 3, 2), ("tiny", "decode", 3, 2), ("odd", "prefill", 3, 3)],
)
def test_fires_once_a_linear_layer(model: str, phase: str, count: int, groups: int) -> None:
    fired = fire(RULE, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert {node.args[3] for node in calls(fired.after, "lingc.group_norm_gate")} == {groups}
    assert "aten.sigmoid.default" not in names(fired.after)
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model)


def test_is_not_expected_where_no_layer_is_linear() -> None:
    assert RULE.expected(context("tiny", "draft")) == 0
    assert RULE.expected(context("no-linear-layers", "prefill")) == 0


def test_refuses_a_scale_that_is_not_a_weight() -> None:
    program = before(RULE, "tiny", "prefill")
    program.weights["layers.1.attention.g_norm.weight"].meta["role"] = "input"

    outcome = apply(program, RULE, context("tiny", "prefill"))

    assert outcome.found == 2
    assert outcome.refused[0].reason == "the norm's weight is not a weight"


def test_refuses_a_norm_that_somebody_else_reads_and_says_who() -> None:
    program = before(RULE, "tiny", "prefill")
    (sigmoid, *_) = calls(program, "aten.sigmoid.default")
    gated = next(iter(sigmoid.users))
    with program.graph.inserting_after(gated):
        Builder(program, gated).slice(sigmoid, 1, 0, 8)

    outcome = apply(program, RULE, context("tiny", "prefill"))

    assert outcome.found == 2
    assert outcome.refused[0].reason.startswith("aten.sigmoid.default is also read by slice_tensor")
    assert "layer 0, linear_attention.py:" in outcome.refused[0].reason
