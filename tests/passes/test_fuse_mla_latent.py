"""Norms, RoPE and cache write of a latent layer become one op."""

import pytest

from lingc.passes import fuse_mla_latent
from lingc.rewrite import Rewrite, apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE, KV_RULE = fuse_mla_latent.RULE, fuse_mla_latent.KV_RULE


@pytest.mark.parametrize("phase", ["prefill", "decode", "draft"])
def test_fires_once_a_latent_layer(phase: str) -> None:
    fired = fire(RULE, "tiny", phase)

    assert fired.outcome.found == fired.expected == 1
    assert not {"aten.index_put.default", "aten.stack.default"} & set(names(fired.after))
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "tiny", mechanism="rope")


def test_fires_on_the_latent_alone_where_queries_have_no_rank() -> None:
    fired = fire(KV_RULE, "odd", "prefill")

    assert fired.outcome.found == fired.expected == 3
    assert fire(RULE, "odd", "prefill").outcome.found == 0
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "odd", mechanism="rope")


def test_does_not_take_half_of_a_layer_whose_queries_have_a_rank() -> None:
    program = before(RULE, "tiny", "prefill")

    outcome = apply(program, KV_RULE, context("tiny", "prefill"))

    assert (outcome.found, outcome.refused) == (0, [])
    assert KV_RULE.expected(context("tiny", "prefill")) == 0


def test_the_cache_it_returns_is_the_one_that_is_read() -> None:
    program = fire(RULE, "tiny", "prefill").after
    (latent,) = calls(program, "lingc.mla_latent")
    (attention,) = calls(program, "lingc.mla_attention")

    assert attention.args[1].args == (latent, 1)
    assert attention.args[1] in program.results()


@pytest.mark.parametrize(("rule", "model"), [(RULE, "tiny"), (KV_RULE, "odd")])
def test_refuses_a_scale_that_is_not_a_weight(rule: Rewrite, model: str) -> None:
    program = before(rule, model, "prefill")
    layer = context(model, "prefill").mla_layers[0]
    program.weights[f"layers.{layer}.attention.kv_a_layernorm.weight"].meta["role"] = "input"

    outcome = apply(program, rule, context(model, "prefill"))

    assert outcome.refused[0].reason == "the norm's weight is not a weight"
