"""Cosines and sines of a rotary dimension become one op, once a phase."""

import pytest

from lingc.passes import fuse_rope_table
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, config, context, fire, names

RULE = fuse_rope_table.RULE


@pytest.mark.parametrize(
    ("model", "phase", "count"),
    [("tiny", "prefill", 2), ("tiny", "draft", 1), ("whole-head-rope", "decode", 2)],
)
def test_fires_once_a_rotary_dimension(model: str, phase: str, count: int) -> None:
    fired = fire(RULE, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert not {"aten.cos.default", "aten.sin.default"} & set(names(fired.after))
    assert fired.after.placeholders("constant") == []
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model, mechanism="rope")


def test_expects_one_table_where_both_kinds_of_layer_rotate_alike() -> None:
    assert RULE.expected(context("one-rope-table", "prefill")) == 1
    assert RULE.expected(context("no-linear-layers", "prefill")) == 1


def test_holds_the_frequencies_and_the_scale_of_the_config() -> None:
    (table,) = calls(fire(RULE, "whole-head-rope", "draft").after, "lingc.rope_table")

    model = config("whole-head-rope")
    assert table.args[1] == list(model.inv_freq(4))
    assert table.args[2] == model.rope_attention_factor > 1


def test_refuses_frequencies_that_are_computed() -> None:
    program = before(RULE, "tiny", "draft")
    program.placeholders("constant")[0].meta["role"] = "input"

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == "the frequencies are not constants"
