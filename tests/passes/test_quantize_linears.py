"""Linears are read in the format that the recipe gives their weights."""

from collections import Counter

import pytest

from lingc.passes import quantize_linears
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

RULE = quantize_linears.RULE


@pytest.mark.parametrize(
    ("precision", "target", "counts"),
    [
        ("bf16", "cpu", {"linear": 17, "linear_f32": 1}),
        # The latent layer's two and the head stay BF16; seven pairs are stored apart.
        ("fp8", "h20", {"linear": 2, "fp8_linear": 22, "linear_f32": 1}),
        ("fp8", "cpu", {"linear": 2, "fp8_weight_linear": 22, "linear_f32": 1}),
        # TensorRT alone has products with static scales; elsewhere the same matrices are blocks.
        ("fp8-static", "rtx-120", {"linear": 2, "fp8_static_linear": 22, "linear_f32": 1}),
        ("fp8-static", "h20", {"linear": 2, "fp8_linear": 22, "linear_f32": 1}),
        ("fp8-static", "cpu", {"linear": 2, "fp8_weight_linear": 22, "linear_f32": 1}),
        ("fp8-max", "h20", {"fp8_linear": 25, "fp8_linear_f32": 1}),
        ("fp8-max", "cpu", {"fp8_weight_linear": 25, "fp8_weight_linear_f32": 1}),
        ("int4-all", "cpu", {"linear": 2, "int4_weight_linear": 15, "int4_weight_linear_f32": 1}),
    ],
)
def test_fires_on_every_linear(precision: str, target: str, counts: dict[str, int]) -> None:
    fired = fire(RULE, "tiny", "decode", precision, target)

    linears = [name.removeprefix("lingc.") for name in names(fired.after) if "linear" in name]
    assert Counter(linears) == counts
    assert fired.outcome.found == fired.expected
    assert fired.again.found == 0


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8-max", "int4", "int4-all"])
def test_keeps_the_numbers_of_the_stored_weights(precision: str) -> None:
    fired = fire(RULE, "tiny", "draft", precision)

    assert_same(fired.after, fired.before, "tiny", layout=precision, mechanism="experts")


def test_stores_codes_and_scales_in_place_of_values() -> None:
    weights = fire(RULE, "tiny", "decode", "int4-all").after.weights

    codes, scales = (
        weights[f"layers.0.attention.dense.weight_{part}"].meta["weight"]
        for part in ("packed", "scale")
    )

    assert "layers.0.attention.dense.weight" not in weights
    assert (codes.part, str(codes.type), codes.group) == ("codes", "i32[64, 8]", 128)
    assert (scales.part, str(scales.type)) == ("scales", "bf16[64, 1]")


def test_quantizes_an_input_once_for_two_linears() -> None:
    program = fire(RULE, "tiny", "draft", "fp8-max", "h20").after

    per_input = [node.args[0] for node in calls(program, "lingc.quantize_fp8")]

    assert len(per_input) == len(set(per_input))


def test_a_static_product_reads_its_input_as_it_is_and_two_scales() -> None:
    program = fire(RULE, "tiny", "draft", "fp8-static", "rtx-120").after

    assert calls(program, "lingc.quantize_fp8") == []
    for node in calls(program, "lingc.fp8_static_linear"):
        x_scale, codes, scale = (arg.meta["weight"] for arg in node.args[1:])
        assert (x_scale.part, codes.part, scale.part) == ("input_scales", "codes", "scales")
        assert x_scale.sources == codes.sources == scale.sources
        assert str(x_scale.type) == str(scale.type) == "f32[1]"
        assert len(codes.sources) == 1


def test_refuses_a_matrix_that_is_not_a_weight() -> None:
    program = before(RULE, "tiny", "draft")
    program.weights["layers.4.attention.dense.weight"].meta["role"] = "input"

    outcome = apply(program, RULE, context("tiny", "draft"))

    assert [refusal.reason for refusal in outcome.refused] == ["the matrix is not a weight"]
