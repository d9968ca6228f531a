"""Routed experts are read in the format that the recipe gives them."""

import pytest

from lingc.passes import quantize_experts
from tests.evaluate import assert_same
from tests.programs import calls, fire, names

RULE = quantize_experts.RULE


@pytest.mark.parametrize(
    ("precision", "target", "op"),
    [
        ("fp8", "h20", "lingc.fp8_experts"),
        ("fp8", "cpu", "lingc.fp8_weight_experts"),
        ("int4", "cpu", "lingc.int4_weight_experts"),
        ("int4-fp8", "h20", "lingc.int4_weight_experts"),
    ],
)
@pytest.mark.parametrize(("phase", "count"), [("prefill", 3), ("draft", 1)])
def test_fires_once_a_layer_with_experts(
    precision: str, target: str, op: str, phase: str, count: int
) -> None:
    fired = fire(RULE, "tiny", phase, precision, target)

    assert fired.outcome.found == fired.expected == count
    assert names(fired.after).count(op) == count
    assert "lingc.experts" not in names(fired.after)
    assert fired.again.found == 0


@pytest.mark.parametrize("precision", ["fp8", "int4", "int4-all"])
def test_keeps_the_numbers_of_the_stored_weights(precision: str) -> None:
    fired = fire(RULE, "tiny", "decode", precision)

    assert_same(fired.after, fired.before, "tiny", layout=precision, mechanism="experts")


def test_leaves_plain_experts_as_they_are() -> None:
    fired = fire(RULE, "tiny", "prefill", "bf16", "h20")

    assert fired.outcome.found == fired.expected == 0
    assert fired.outcome.refused == []


def test_starts_the_blocks_of_up_anew() -> None:
    weights = fire(RULE, "tiny", "draft", "fp8", "h20").after.weights

    codes, scales = (
        weights[f"layers.4.mlp.experts.gate_up_{part}"].meta["weight"]
        for part in ("codes", "scale")
    )

    assert str(codes.type) == "f8e4m3[16, 64, 64]"
    assert str(scales.type) == "f32[16, 2, 1]"


def test_quantizes_an_input_once_for_experts_and_linears() -> None:
    program = fire(RULE, "tiny", "draft", "fp8", "h20").after
    (routed,) = calls(program, "lingc.fp8_experts")

    readers = {user for item in routed.args[0].args[0].users for user in item.users}

    # The shared expert's gate and up, stored apart, and the routed experts.
    assert len(readers) == 3
