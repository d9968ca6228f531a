"""The head's logits are FP32 whatever the activations are."""

import pytest

from lingc.passes import fuse_lm_head
from tests.evaluate import assert_same
from tests.programs import calls, fire, names

RULE = fuse_lm_head.RULE


@pytest.mark.parametrize("phase", ["prefill", "decode", "draft"])
def test_fires_once_a_phase_and_on_the_head_alone(phase: str) -> None:
    fired = fire(RULE, "tiny", phase)

    (head,) = calls(fired.after, "lingc.linear_f32")
    assert fired.outcome.found == fired.expected == 1
    assert fired.outcome.refused == []
    assert head.args[1].meta["name"] == "lm_head.weight"
    assert "aten.linear.default" in names(fired.after)
    assert fired.again.found == 0


def test_keeps_the_numbers() -> None:
    fired = fire(RULE, "tiny", "decode")

    assert_same(fired.after, fired.before, "tiny", mechanism="gemm")
