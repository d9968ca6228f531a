"""The table's rows become activations of the target's element type."""

from dataclasses import replace

import pytest

from lingc.passes import fuse_embedding
from lingc.quantize.recipes import parse_recipe
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire

RULE = fuse_embedding.RULE


@pytest.mark.parametrize(("target", "dtype"), [("cpu", "f32"), ("h20", "bf16")])
def test_fires_once_with_the_element_type_of_the_target(target: str, dtype: str) -> None:
    fired = fire(RULE, "tiny", "prefill", "bf16", target)

    (embedding,) = calls(fired.after, "lingc.embedding")
    assert fired.outcome.found == fired.expected == 1
    assert str(embedding.meta["type"]) == f"{dtype}[T, 64]"
    assert fired.again.found == 0


def test_keeps_the_numbers() -> None:
    fired = fire(RULE, "tiny", "draft")

    assert_same(fired.after, fired.before, "tiny", mechanism="elementwise")


def test_refuses_a_table_that_is_not_a_weight() -> None:
    program = before(RULE, "tiny", "draft")
    calls(program, "aten.embedding.default")[0].args[0].meta["role"] = "input"

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == "the table is not a weight"


def test_refuses_a_quantized_table_and_says_so() -> None:
    rules = [{"modules": ["*.word_embeddings"], "format": "int4_group", "group": 32}]
    recipe = parse_recipe({"name": "all", "rules": rules}, source="a test")
    given = replace(context("tiny", "draft"), recipe=recipe)

    outcome = apply(before(RULE, "tiny", "draft"), RULE, given)

    assert outcome.refused[0].reason == (
        "the recipe 'all' stores model.word_embeddings as int4_group(32), not plain"
    )
