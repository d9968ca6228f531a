"""Gate and up of an expert become one matrix; the shared expert's result joins the sum."""

from dataclasses import replace

import pytest

from lingc.passes import fuse_experts
from lingc.plan import TensorType
from lingc.quantize.recipes import parse_recipe
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE, SHARED_RULE = fuse_experts.RULE, fuse_experts.SHARED_RULE


@pytest.mark.parametrize(("phase", "count"), [("prefill", 3), ("draft", 1)])
def test_fires_once_a_layer_with_experts(phase: str, count: int) -> None:
    fired = fire(RULE, "tiny", phase)

    assert fired.outcome.found == fired.expected == count
    assert "lingc.expert_dispatch" not in names(fired.after)
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "tiny", mechanism="experts")


def test_stacks_the_rows_of_gate_before_those_of_up() -> None:
    node = fire(RULE, "tiny", "draft").after.weights["layers.4.mlp.experts.gate_up"]

    spec = node.meta["weight"]

    assert str(spec.type) == "bf16[16, 64, 64]"
    assert spec.experts == 16
    assert spec.sources == (
        "model.layers.4.mlp.experts.{e}.gate_proj.weight",
        "model.layers.4.mlp.experts.{e}.up_proj.weight",
    )


def test_refuses_a_matrix_that_is_not_a_weight() -> None:
    program = before(RULE, "tiny", "draft")
    program.weights["layers.4.mlp.experts.up_proj"].meta["role"] = "input"

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == "an expert's matrix is not a weight"


@pytest.mark.parametrize("odd", ["3.down_proj", "15.gate_proj"])
def test_refuses_experts_that_the_recipe_stores_differently(odd: str) -> None:
    rules = [{"modules": [f"*.experts.{odd}"], "format": "fp8_block"}]
    recipe = parse_recipe({"name": "odd", "rules": rules}, source="a test")
    given = replace(context("tiny", "draft"), recipe=recipe)

    outcome = apply(before(RULE, "tiny", "draft"), RULE, given)

    assert outcome.found == 0
    assert "the recipe 'odd' stores model.layers.4.mlp.experts" in outcome.refused[0].reason
    assert f"model.layers.4.mlp.experts.{odd} as fp8_block" in outcome.refused[0].reason


@pytest.mark.parametrize(("phase", "count"), [("prefill", 3), ("draft", 1)])
def test_takes_in_the_shared_expert_once_a_layer(phase: str, count: int) -> None:
    fired = fire(SHARED_RULE, "tiny", phase)

    assert fired.outcome.found == fired.expected == count
    assert all(node.args[5] is not None for node in calls(fired.after, "lingc.experts"))
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "tiny", mechanism="experts")


def test_leaves_the_residual_add_alone_where_no_expert_is_shared() -> None:
    fired = fire(SHARED_RULE, "odd", "prefill")

    assert fired.outcome.found == fired.expected == 0
    assert fired.outcome.refused == []
    assert [node.args[5] for node in calls(fired.after, "lingc.experts")] == 4 * [None]


def test_refuses_a_shared_result_that_broadcasts() -> None:
    program = before(SHARED_RULE, "tiny", "draft")
    (routed,) = calls(program, "lingc.experts")
    (add,) = routed.users
    other = next(node for node in add.all_input_nodes if node is not routed)
    other.meta["type"] = TensorType("f32", (1, 64))

    outcome = apply(program, SHARED_RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == "the add broadcasts f32[1, 64] to f32[T, 64]"
