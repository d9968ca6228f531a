"""Activations are quantized where they are made."""

import pytest

from lingc.passes import fuse_quantize
from lingc.rewrite import Builder, Rewrite, apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

TENSORRT = "rtx-120"
"""A target with FP8 activations, for which other kernels than ours are launched."""

ADD_NORM, NORM = fuse_quantize.ADD_NORM_RULE, fuse_quantize.NORM_RULE
SWIGLU = fuse_quantize.SWIGLU_RULE


@pytest.mark.parametrize(
    ("rule", "phase", "precision", "count"),
    [
        # Input norms of layers 1 and 2 and all four others; layer 3 attends without FP8.
        (ADD_NORM, "prefill", "fp8", 6),
        # And the input norm of layer 3.
        (ADD_NORM, "prefill", "fp8-max", 7),
        # And the last one, whose every row the head reads.
        (ADD_NORM, "decode", "fp8-max", 8),
        # Routed and shared experts are not FP8: what is left is attention and the dense layer.
        (ADD_NORM, "decode", "int4-fp8", 3),
        # Every norm is also read by a static product; TensorRT quantizes for that one in the norm.
        (ADD_NORM, "decode", "fp8-static", 0),
        (NORM, "prefill", "fp8-static", 0),
        (SWIGLU, "prefill", "fp8-static", 0),
        (NORM, "prefill", "fp8", 1),
        (NORM, "draft", "fp8", 0),
        (NORM, "draft", "fp8-max", 1),
        (SWIGLU, "prefill", "fp8", 4),
        (SWIGLU, "prefill", "int4-fp8", 1),
    ],
)
def test_fires_where_the_readers_take_fp8(
    rule: Rewrite, phase: str, precision: str, count: int
) -> None:
    fired = fire(rule, "tiny", phase, precision, TENSORRT)

    assert fired.outcome.found == fired.expected == count
    assert fired.outcome.refused == []
    assert fired.again.found == 0
    before, after = (names(p).count("lingc.quantize_fp8") for p in (fired.before, fired.after))
    assert before - after == count


@pytest.mark.parametrize("rule", [ADD_NORM, NORM, SWIGLU], ids=lambda rule: rule.name)
@pytest.mark.parametrize("phase", ["decode", "draft"])
def test_keeps_every_bit(rule: Rewrite, phase: str) -> None:
    fired = fire(rule, "tiny", phase, "fp8-max", TENSORRT)

    assert_same(fired.after, fired.before, "tiny", dtype="bf16", mechanism="elementwise")


@pytest.mark.parametrize("rule", [ADD_NORM, NORM, SWIGLU], ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    ("precision", "target"),
    [("fp8", "cpu"), ("bf16", TENSORRT), ("int4", TENSORRT), ("fp8", "h20")],
)
def test_is_not_expected_where_activations_stay_plain(
    rule: Rewrite, precision: str, target: str
) -> None:
    fired = fire(rule, "tiny", "prefill", precision, target)

    assert fired.outcome.found == fired.expected == 0


def test_leaves_a_swiglu_alone_that_somebody_reads_unquantized() -> None:
    program = before(SWIGLU, "tiny", "draft", "fp8", TENSORRT)
    (silu,) = calls(program, "lingc.silu_mul")
    (quantized,) = silu.users
    with program.graph.inserting_after(quantized):
        Builder(program, silu).slice(silu, 1, 0, 8)

    outcome = apply(program, SWIGLU, context("tiny", "draft", "fp8", TENSORRT))

    assert outcome.found == 0
    assert outcome.refused[0].reason.startswith("lingc.silu_mul is also read by slice_tensor")
