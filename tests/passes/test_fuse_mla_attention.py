"""Attention over paged rows becomes one op that reads the page table."""

from dataclasses import replace

import pytest

from lingc.model.config import ModelConfig
from lingc.passes import fuse_mla_attention
from lingc.quantize.recipes import parse_recipe
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import TINY, before, calls, context, fire, names

RULE = fuse_mla_attention.RULE


@pytest.mark.parametrize(
    ("model", "phase", "count"),
    [("tiny", "prefill", 1), ("odd", "decode", 3), ("tiny", "verify", 1), ("tiny", "draft", 1)],
)
def test_fires_once_a_latent_layer(model: str, phase: str, count: int) -> None:
    fired = fire(RULE, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert "aten.scaled_dot_product_attention.default" not in names(fired.after)
    assert "aten.arange.default" not in names(fired.after)
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model, mechanism="attention")


def test_names_the_page_size_the_width_and_the_scale() -> None:
    (call,) = calls(fire(RULE, "tiny", "prefill").after, "lingc.mla_attention")

    assert call.args[6:] == (4, 16, 20**-0.5)


def test_refuses_a_kv_b_that_is_not_a_weight() -> None:
    program = before(RULE, "tiny", "draft")
    program.weights["layers.4.attention.kv_b_proj.weight"].meta["role"] = "input"

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert outcome.refused[0].reason == "kv_b is not a weight"


def test_refuses_a_quantized_kv_b() -> None:
    rules = [{"modules": ["*.kv_b_proj"], "format": "fp8_block"}]
    recipe = parse_recipe({"name": "all", "rules": rules}, source="a test")
    given = replace(context("tiny", "prefill"), recipe=recipe)

    outcome = apply(before(RULE, "tiny", "prefill"), RULE, given)

    assert "kv_b_proj as fp8_block, not plain" in outcome.refused[0].reason


def test_refuses_a_cache_row_that_is_cut_elsewhere() -> None:
    other = ModelConfig.from_dict({**TINY, "kv_lora_rank": 12, "qk_nope_head_dim": 20})
    given = replace(context("tiny", "draft"), config=other)

    outcome = apply(before(RULE, "tiny", "draft"), RULE, given)

    assert outcome.refused[0].reason == "the cache row is cut at 16, the head at 16"
