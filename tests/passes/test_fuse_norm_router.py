"""The router of a GPU plan norms its input and lists every expert's tokens."""

import pytest

from lingc.passes import fuse_norm_router
from lingc.plugins import rms_norm
from tests.evaluate import assert_same
from tests.programs import WIDE_GPU, calls, fire, names

RULE = fuse_norm_router.RULE


@pytest.mark.parametrize(("phase", "count"), [("prefill", 3), ("draft", 1)])
def test_fires_once_a_layer_with_experts(phase: str, count: int) -> None:
    fired = fire(RULE, "tiny", phase, "bf16", WIDE_GPU)

    assert fired.outcome.found == fired.expected == count
    assert "lingc.router" not in names(fired.after)
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "tiny")


def test_leaves_the_norm_to_the_experts_that_read_it_too() -> None:
    program = fire(RULE, "tiny", "draft", "bf16", "h20").after

    (experts,) = calls(program, "lingc.experts")

    assert experts.args[0].target is rms_norm.OP.overload


@pytest.mark.parametrize("target", ["cpu", "rtx-120"])
def test_is_not_expected_where_other_kernels_are_launched(target: str) -> None:
    fired = fire(RULE, "tiny", "decode", "fp8", target)

    assert fired.outcome.found == fired.expected == 0
