"""Linear attention of a GPU plan reads the merged projection itself."""

import pytest

from lingc.passes import fuse_lightning
from lingc.rewrite import Rewrite, apply
from tests.evaluate import assert_same
from tests.programs import WIDE_GPU, before, calls, context, fire, names

RULES = {
    "prefill": fuse_lightning.PREFILL_RULE,
    "decode": fuse_lightning.DECODE_RULE,
    "verify": fuse_lightning.VERIFY_RULE,
}
EACH = pytest.mark.parametrize(("phase", "rule"), RULES.items())


@EACH
@pytest.mark.parametrize("model", ["tiny", "odd", "whole-head-rope"])
def test_fires_once_a_linear_layer(phase: str, rule: Rewrite, model: str) -> None:
    fired = fire(rule, model, phase, "bf16", WIDE_GPU)

    assert fired.outcome.found == fired.expected == len(context(model, phase).linear_layers)
    assert not {"lingc.qk_norm_rope", f"lingc.lightning_{phase}"} & set(names(fired.after))
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model)


@EACH
def test_only_its_own_phase_expects_it(phase: str, rule: Rewrite) -> None:
    expected = {p: rule.expected(context("tiny", p, target="h20")) for p in (*RULES, "draft")}

    assert expected == {**dict.fromkeys(RULES, 0), "draft": 0} | {phase: 3}


@EACH
def test_is_not_expected_where_other_kernels_are_launched(phase: str, rule: Rewrite) -> None:
    fired = fire(rule, "tiny", phase, "fp8", "rtx-120")

    assert fired.outcome.found == fired.expected == 0


def test_gives_every_state_that_it_changes() -> None:
    program = fire(RULES["verify"], "tiny", "verify", "bf16", "h20").after
    after = dict(zip(program.updates, program.results()[2:], strict=True))

    (made, *_) = calls(program, "lingc.lightning_verify_qkv")

    assert [after[f"{s}.0"].args for s in ("linear_state", "pending_k", "pending_v")] == [
        (made, 1),
        (made, 2),
        (made, 3),
    ]


@EACH
def test_refuses_values_that_stand_elsewhere(phase: str, rule: Rewrite) -> None:
    program = before(rule, "tiny", phase, "bf16", "h20")
    (values, *_) = (
        node for node in calls(program, "aten.slice.Tensor") if node.args[2:] == (128, 192)
    )
    values.args = (*values.args[:2], 112, 176)

    outcome = apply(program, rule, context("tiny", phase, "bf16", "h20"))

    assert outcome.found == 2
    assert outcome.refused[0].reason == "v is not the third block of 64 columns, but 112 to 176"
