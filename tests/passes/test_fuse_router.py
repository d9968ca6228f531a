"""GEMM, sigmoid and the choice of groups and experts become one op."""

from dataclasses import replace

import pytest

from lingc.passes import fuse_router
from lingc.quantize.recipes import parse_recipe
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE = fuse_router.RULE


@pytest.mark.parametrize(
    ("model", "phase", "count", "literals"),
    [
        ("tiny", "prefill", 3, (4, 2, 4, 2.5, True)),
        ("tiny", "draft", 1, (4, 2, 4, 2.5, True)),
        # Weights as they are, not divided by their sum.
        ("odd", "decode", 4, (3, 2, 3, 2.5, False)),
    ],
)
def test_fires_once_a_layer_with_experts(
    model: str, phase: str, count: int, literals: tuple[object, ...]
) -> None:
    fired = fire(RULE, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert {node.args[3:] for node in calls(fired.after, "lingc.router")} == {literals}
    assert not {"aten.sort.stable", "aten.topk.default"} & set(names(fired.after))
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model, mechanism="experts")


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "literals"),
    [("one-head", (16, 16, 16, 2.5, True)), ("one-expert-group", (1, 1, 1, 1.0, True))],
)
def test_fires_where_a_cut_keeps_everything(model: str, literals: tuple[object, ...]) -> None:
    fired = fire(RULE, model, "prefill")

    assert {node.args[3:] for node in calls(fired.after, "lingc.router")} == {literals}
    assert_same(fired.after, fired.before, model, mechanism="experts")


@pytest.mark.parametrize("name", ["weight", "expert_bias"])
def test_refuses_a_matrix_or_bias_that_is_not_a_weight(name: str) -> None:
    program = before(RULE, "tiny", "draft")
    program.weights[f"layers.4.mlp.gate.{name}"].meta["role"] = "input"

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == "the matrix or the bias is not a weight"


def test_refuses_a_quantized_matrix() -> None:
    rules = [{"modules": ["*.mlp.gate"], "format": "fp8_block"}]
    recipe = parse_recipe({"name": "all", "rules": rules}, source="a test")
    given = replace(context("tiny", "draft"), recipe=recipe)

    outcome = apply(before(RULE, "tiny", "draft"), RULE, given)

    assert outcome.refused[0].reason == (
        "the recipe 'all' stores model.layers.4.mlp.gate as fp8_block, not plain"
    )


def test_refuses_groups_that_are_scored_by_more_than_their_two_best() -> None:
    program = before(RULE, "tiny", "draft")
    (topk,) = calls(program, "aten.topk.default")
    topk.args = (topk.args[0], 3, *topk.args[2:])

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == "a group is scored by its 3 best of 4, not by two"
