"""A linear of a GPU plan takes its norm, its activation and its residual in."""

from collections import Counter
from typing import Any

import pytest

from lingc.passes import fuse_linear
from lingc.plan import TensorType
from lingc.plugins import fused_linear, rms_norm
from lingc.quantize.recipes import parse_recipe
from lingc.rewrite import Rewrite, apply
from tests.evaluate import assert_same, in_f32
from tests.programs import WIDE_GPU, before, calls, context, fire, names

BARE, NORM, GATE = fuse_linear.RULE, fuse_linear.NORM_RULE, fuse_linear.GATE_RULE
SWIGLU, RESIDUAL = fuse_linear.SWIGLU_RULE, fuse_linear.RESIDUAL_RULE
EVERY_RULE = pytest.mark.parametrize(
    "rule", [BARE, NORM, GATE, SWIGLU, RESIDUAL], ids=lambda rule: rule.name
)


def argument(node: Any, name: str) -> Any:
    return node.args[fused_linear.OP.arguments.index(name)]


@pytest.mark.parametrize(
    ("rule", "phase", "precision", "count"),
    [
        # Three linear layers of two, a latent one of three, a dense and three shared SwiGLUs of
        # two, and the head.
        (BARE, "prefill", "bf16", 18),
        # In blocks of 128 no pair of this model ends on a border: seven are stored apart.
        (BARE, "decode", "fp8-max", 26),
        (BARE, "verify", "int4-all", 18),
        (BARE, "draft", "bf16", 7),
        (NORM, "prefill", "bf16", 8),
        (NORM, "decode", "fp8-max", 16),
        (NORM, "draft", "int4-fp8", 2),
        (GATE, "verify", "fp8", 3),
        (GATE, "draft", "fp8", 0),
        (SWIGLU, "decode", "bf16", 4),
        (SWIGLU, "decode", "fp8", 0),
        (SWIGLU, "decode", "int4-fp8", 3),
        # Four attentions, a dense SwiGLU and three shared ones.
        (RESIDUAL, "decode", "bf16", 8),
        (RESIDUAL, "draft", "fp8", 2),
    ],
)
def test_fires_as_often_as_the_model_has_it(
    rule: Rewrite, phase: str, precision: str, count: int
) -> None:
    fired = fire(rule, "tiny", phase, precision, "h20")

    assert fired.outcome.found == fired.expected == count
    assert fired.outcome.refused == []
    assert fired.again.found == 0


@EVERY_RULE
@pytest.mark.parametrize("precision", ["bf16", "int4-all"])
def test_keeps_the_numbers_where_nothing_is_rounded(rule: Rewrite, precision: str) -> None:
    fired = fire(rule, "tiny", "decode", precision, WIDE_GPU)

    assert_same(fired.after, fired.before, "tiny", layout=precision)


@EVERY_RULE
def test_quantizes_to_the_same_codes(rule: Rewrite) -> None:
    fired = fire(rule, "whole-blocks", "decode", "fp8-max", "h20")

    after, want = in_f32(fired.after), in_f32(fired.before)
    assert_same(after, want, "whole-blocks", layout="fp8-max")


@EVERY_RULE
@pytest.mark.parametrize("target", ["cpu", "rtx-120"])
def test_is_not_expected_where_other_kernels_are_launched(rule: Rewrite, target: str) -> None:
    fired = fire(rule, "tiny", "decode", "fp8", target)

    assert fired.outcome.found == fired.expected == 0


def test_gives_the_head_f32_logits_and_leaves_its_norm_alone() -> None:
    program = fire(NORM, "tiny", "decode", "bf16", "h20").after

    (head,) = (
        node
        for node in calls(program, "lingc.fused_linear")
        if argument(node, "weight").meta["name"] == "lm_head.weight"
    )

    assert (argument(head, "before"), argument(head, "dtype")) == ("none", "f32")
    assert argument(head, "x").target is rms_norm.OP.overload


def test_every_reader_computes_the_norm_for_itself() -> None:
    program = fire(RESIDUAL, "tiny", "decode", "int4", "h20").after
    read = Counter(names(program))

    # What is left is the norm behind the last layer.
    assert read["lingc.rms_norm"] == 1
    assert read["lingc.quantize_fp8"] == read["lingc.silu_mul"] == read["aten.add.Tensor"] == 0


def test_takes_the_gate_out_of_the_whole_projection() -> None:
    fired = fire(GATE, "tiny", "decode", "bf16", "h20")
    (dense, *_) = (
        node
        for node in calls(fired.after, "lingc.fused_linear")
        if argument(node, "before") == "group_norm_gate"
    )

    assert str(argument(dense, "gate").meta["type"]) == "bf16[B, 256]"
    assert argument(dense, "groups") == 2
    assert "aten.slice.Tensor" not in names(fired.after)


def test_refuses_a_gate_that_is_not_the_last_part_of_the_projection() -> None:
    program = before(GATE, "tiny", "decode", "bf16", "h20")
    (gate, *_) = calls(program, "aten.slice.Tensor")
    gate.args[0].meta["type"] = TensorType("bf16", ("B", 272))

    outcome = apply(program, GATE, context("tiny", "decode", "bf16", "h20"))

    assert outcome.found == 2
    assert outcome.refused[0].reason == "the gate is not the last 64 of 272 columns"


def test_refuses_heads_that_are_not_side_by_side() -> None:
    program = before(GATE, "tiny", "decode", "bf16", "h20")
    (norm, *_) = calls(program, "lingc.group_norm_gate")
    norm.args[0].meta["type"] = TensorType("bf16", ("B", 4, 16))

    outcome = apply(program, GATE, context("tiny", "decode", "bf16", "h20"))

    assert outcome.refused[0].reason == "the heads of ['B', 4, 16] are not side by side"


def test_refuses_a_sum_that_broadcasts() -> None:
    program = before(RESIDUAL, "tiny", "draft", "bf16", "h20")
    (first, *_) = calls(program, "aten.add.Tensor")
    first.args[0].meta["type"] = TensorType("bf16", (1, 64))

    outcome = apply(program, RESIDUAL, context("tiny", "draft", "bf16", "h20"))

    assert outcome.refused[0].reason == "the sum with bf16[1, 64] is bf16[T, 64]"


def test_refuses_a_matrix_that_is_not_a_weight() -> None:
    program = before(BARE, "tiny", "draft", "bf16", "h20")
    program.weights["layers.4.attention.dense.weight"].meta["role"] = "input"

    outcome = apply(program, BARE, context("tiny", "draft", "bf16", "h20"))

    assert [refusal.reason for refusal in outcome.refused] == ["the matrix is not a weight"]


def test_refuses_fp8_weights_without_fp8_activations() -> None:
    rules = [{"modules": ["model.layers.*.attention.dense"], "format": "fp8_block"}]
    recipe = parse_recipe({"name": "weight-only", "rules": rules}, source="a test")
    given = context("tiny", "draft", "bf16", "h20", recipe=recipe)

    outcome = apply(before(BARE, "tiny", "draft", "bf16", "h20", recipe=recipe), BARE, given)

    assert (outcome.found, BARE.expected(given)) == (6, 7)
    assert outcome.refused[0].reason == (
        "no kernel multiplies FP8 weights with activations that are not FP8"
    )
