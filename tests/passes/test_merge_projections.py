"""Projections of one input become one matrix, or one result where they are stored apart."""

from dataclasses import replace

import pytest

from lingc.passes import merge_projections
from lingc.quantize.recipes import parse_recipe
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire

RULE, JOIN_RULE = merge_projections.RULE, merge_projections.JOIN_RULE


@pytest.mark.parametrize(
    ("model", "phase", "count"),
    # Three of a linear layer, one of a latent one, four of SwiGLU; no rank, no second projection.
    [("tiny", "prefill", 8), ("tiny", "draft", 2), ("odd", "decode", 5)],
)
def test_merges_every_pair_that_is_stored_alike(model: str, phase: str, count: int) -> None:
    fired = fire(RULE, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert fired.outcome.refused == []
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model, mechanism="gemm")


def test_puts_the_rows_of_the_second_below_those_of_the_first() -> None:
    node = fire(RULE, "tiny", "prefill").after.weights["layers.3.attention.qkv_a.weight"]

    spec = node.meta["weight"]

    assert str(spec.type) == "bf16[44, 64]"
    assert spec.sources == (
        "model.layers.3.attention.q_a_proj.weight",
        "model.layers.3.attention.kv_a_proj_with_mqa.weight",
    )


def test_refuses_to_share_an_fp8_block_and_joins_the_results() -> None:
    merged = fire(RULE, "tiny", "prefill", "fp8", "h20")
    joined = fire(JOIN_RULE, "tiny", "prefill", "fp8", "h20")

    assert merged.outcome.found == merged.expected == 1  # the latent layer's is BF16
    assert joined.outcome.found == joined.expected == 7
    assert merged.outcome.refused[0].reason == (
        "model.layers.0.attention.query_key_value has 192 rows, not a multiple of 128: its last"
        " FP8 block would be shared with the next matrix"
    )
    assert joined.again.found == 0
    assert_same(joined.after, joined.before, "tiny", mechanism="gemm")


def test_joins_side_by_side() -> None:
    program = fire(JOIN_RULE, "tiny", "prefill", "fp8", "h20").after

    (cat, *_) = [n for n in calls(program, "aten.cat.default") if n.meta["layer"] == 0]

    assert [part.args[1].meta["name"] for part in cat.args[0]] == [
        "layers.0.attention.query_key_value.weight",
        "layers.0.attention.g_proj.weight",
    ]
    assert str(cat.meta["type"]) == "f32[T, 256]"


def test_refuses_a_pair_that_the_recipe_stores_differently() -> None:
    rules = [{"modules": ["*.kv_a_proj_with_mqa"], "format": "int4_group", "group": 32}]
    recipe = parse_recipe({"name": "half", "rules": rules}, source="a test")
    given = replace(context("tiny", "draft"), recipe=recipe)

    outcome = apply(before(RULE, "tiny", "draft"), RULE, given)

    assert outcome.found == RULE.expected(given) == 1
    assert outcome.refused[0].reason == (
        "the recipe 'half' stores model.layers.4.attention.q_a_proj as plain, "
        "model.layers.4.attention.kv_a_proj_with_mqa as int4_group(32)"
    )


def test_leaves_other_readers_of_one_input_apart() -> None:
    fired = fire(RULE, "odd", "prefill")

    for layer in (3, 4, 5):
        names = {f"layers.{layer}.attention.{n}.weight" for n in ("q_proj", "kv_a_proj_with_mqa")}
        assert names <= fired.after.weights.keys()
    assert fired.outcome.refused == []


def test_leaves_a_matrix_alone_that_is_not_a_weight() -> None:
    program = before(RULE, "tiny", "draft")
    program.weights["layers.4.attention.q_a_proj.weight"].meta["role"] = "input"

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert (outcome.found, outcome.refused) == (1, [])
