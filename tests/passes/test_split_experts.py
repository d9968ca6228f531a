"""Experts of a GPU plan are two ops, with the shared expert as one more where it can be."""

import pytest

from lingc.passes import split_experts
from lingc.plan import TensorType
from lingc.plugins import experts as experts_op
from lingc.quantize.recipes import parse_recipe
from lingc.rewrite import Rewrite, apply
from tests.evaluate import assert_same, in_f32
from tests.programs import WIDE_GPU, before, calls, context, fire, names

SPLIT, SHARED = split_experts.RULE, split_experts.SHARED_RULE
BOTH = pytest.mark.parametrize("rule", [SPLIT, SHARED], ids=lambda rule: rule.name)
TWINS = "whole-blocks"
"""A model whose shared expert is as wide as a routed one."""


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4", "int4-fp8"])
@pytest.mark.parametrize(("phase", "count"), [("decode", 3), ("draft", 1)])
def test_splits_once_a_layer_with_experts(phase: str, count: int, precision: str) -> None:
    fired = fire(SPLIT, "tiny", phase, precision, "h20")

    assert fired.outcome.found == fired.expected == count
    assert fired.outcome.refused == []
    assert not any(name.endswith("experts") for name in names(fired.after))
    assert names(fired.after).count("lingc.expert_down") == count
    assert fired.again.found == 0


@pytest.mark.parametrize(
    ("model", "precision", "count"),
    [
        (TWINS, "bf16", 3),
        (TWINS, "fp8", 3),
        (TWINS, "int4-fp8", 3),
        (TWINS, "int4-all", 3),
        (TWINS, "int4", 0),  # the shared expert stays BF16
        ("tiny", "bf16", 0),  # it is wider
        ("odd", "bf16", 0),  # there is none
    ],
)
def test_joins_a_shared_expert_of_the_same_width_and_format(
    model: str, precision: str, count: int
) -> None:
    fired = fire(SHARED, model, "decode", precision, "h20")

    assert fired.outcome.found == fired.expected == count
    assert {node.args[-1] for node in calls(fired.after, "lingc.expert_down")} == {int(count > 0)}
    assert fired.again.found == 0


@BOTH
@pytest.mark.parametrize("precision", ["bf16", "int4-all"])
@pytest.mark.parametrize("model", ["tiny", TWINS])
def test_keeps_the_numbers_where_nothing_is_rounded(
    rule: Rewrite, model: str, precision: str
) -> None:
    fired = fire(rule, model, "verify", precision, WIDE_GPU)

    assert_same(fired.after, fired.before, model, layout=precision)


@BOTH
@pytest.mark.parametrize("model", ["tiny", TWINS])
def test_quantizes_to_the_same_codes(rule: Rewrite, model: str) -> None:
    fired = fire(rule, model, "draft", "fp8", "h20")

    assert_same(in_f32(fired.after), in_f32(fired.before), model, layout="fp8")


def test_stores_the_shared_expert_behind_the_routed_ones() -> None:
    weights = fire(SHARED, TWINS, "draft", "fp8", "h20").after.weights

    codes, scales = (
        weights[f"layers.4.mlp.all_experts.gate_up_{part}"].meta["weight"]
        for part in ("codes", "scale")
    )

    assert (str(codes.type), str(scales.type)) == ("f8e4m3[17, 256, 256]", "f32[17, 2, 2]")
    assert codes.experts == scales.experts == 16
    assert (
        codes.last
        == scales.last
        == (
            "model.layers.4.mlp.shared_experts.gate_proj.weight",
            "model.layers.4.mlp.shared_experts.up_proj.weight",
        )
    )
    assert not any(".shared_experts." in name for name in weights)


def test_says_why_a_shared_expert_of_another_width_stays_apart() -> None:
    fired = fire(SHARED, "tiny", "draft", "bf16", "h20")

    assert [refusal.reason for refusal in fired.outcome.refused] == [
        "the shared expert's matrix is bf16[80, 64], a routed one's bf16[16, 64, 64]"
    ]


def test_adds_a_shared_expert_that_stays_apart_to_the_residual() -> None:
    program = fire(SHARED, "tiny", "draft", "int4", "h20").after

    (down,) = calls(program, "lingc.expert_down")

    base = down.args[7]
    assert base.args[3].meta["name"] == "layers.4.mlp.shared_experts.down_proj.weight"
    assert str(base.args[5].meta["type"]) == "bf16[T, 64]"


@BOTH
@pytest.mark.parametrize("target", ["cpu", "rtx-120"])
def test_is_not_expected_where_other_kernels_are_launched(rule: Rewrite, target: str) -> None:
    fired = fire(rule, TWINS, "decode", "fp8", target)

    assert fired.outcome.found == fired.expected == 0


def test_refuses_a_sum_that_broadcasts() -> None:
    program = before(SPLIT, "tiny", "draft", "bf16", "h20")
    (experts,) = calls(program, "lingc.experts")
    (add,) = experts.users
    add.args[0].meta["type"] = TensorType("bf16", (1, 64))

    outcome = apply(program, SPLIT, context("tiny", "draft", "bf16", "h20"))

    assert outcome.refused[0].reason == "the sum with bf16[1, 64] is bf16[T, 64]"


def test_refuses_experts_whose_tokens_nobody_listed() -> None:
    program = before(SPLIT, "tiny", "draft", "bf16", "h20")
    (experts,) = calls(program, "lingc.experts")
    (norm,) = calls(program, "lingc.norm_router")
    norm.target = experts_op.OP.overload

    outcome = apply(program, SPLIT, context("tiny", "draft", "bf16", "h20"))

    assert experts.op == "call_function"
    assert outcome.refused[0].reason == "the tokens of every expert are not listed"


def test_refuses_fp8_weights_without_fp8_activations() -> None:
    rules = [{"modules": ["*.mlp.experts.*"], "format": "fp8_block"}]
    recipe = parse_recipe({"name": "weight-only", "rules": rules}, source="a test")
    program = before(SPLIT, "tiny", "draft", "bf16", "h20", recipe=recipe)

    outcome = apply(program, SPLIT, context("tiny", "draft", "bf16", "h20", recipe=recipe))

    assert outcome.found == 0
    assert outcome.refused[0].reason == (
        "no kernel multiplies FP8 weights with activations that are not FP8"
    )
