"""Latent attention of a few tokens reads the cache itself; kv_b is cut into two weights."""

from dataclasses import replace

import pytest

from lingc.passes import absorb_mla
from lingc.quantize.recipes import parse_recipe
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, context, fire, names

RULE = absorb_mla.RULE


@pytest.mark.parametrize("phase", ["decode", "verify", "draft"])
def test_absorbs_every_layer_of_a_phase_of_few_tokens(phase: str) -> None:
    fired = fire(RULE, "tiny", phase)

    assert fired.outcome.found == fired.expected == 1
    assert "lingc.mla_attention" not in names(fired.after)
    assert fired.again.found == 0


@pytest.mark.parametrize("phase", ["decode", "verify", "draft"])
def test_keeps_the_numbers(phase: str) -> None:
    fired = fire(RULE, "tiny", phase)

    assert_same(fired.after, fired.before, "tiny")


def test_leaves_the_plain_form_to_the_prompt() -> None:
    fired = fire(RULE, "tiny", "prefill")

    assert fired.outcome.found == fired.expected == 0
    assert fired.outcome.refused == []
    assert "lingc.mla_attention" in names(fired.after)


def test_cuts_kv_b_by_head_into_keys_and_values() -> None:
    weights = fire(RULE, "tiny", "decode").after.weights

    parts = [weights[f"layers.3.attention.absorb_{part}"].meta["weight"] for part in "kv"]

    assert [str(part.type) for part in parts] == ["bf16[4, 16, 16]", "bf16[4, 12, 16]"]
    assert {part.sources for part in parts} == {("model.layers.3.attention.kv_b_proj.weight",)}
    assert "layers.3.attention.kv_b_proj.weight" not in weights


def test_refuses_a_quantized_kv_b_and_says_so() -> None:
    rules = [{"modules": ["*.kv_b_proj"], "format": "fp8_block"}]
    recipe = parse_recipe({"name": "all", "rules": rules}, source="a test")
    given = replace(context("tiny", "decode"), recipe=recipe)

    outcome = apply(before(RULE, "tiny", "decode"), RULE, given)

    assert outcome.found == 0
    assert outcome.refused[0].reason == (
        "the recipe 'all' stores model.layers.3.attention.kv_b_proj as fp8_block, not plain"
    )
