"""Between its two projections, a linear layer of a few tokens is one op."""

import pytest

from lingc.passes import fuse_mixer
from lingc.plan import TensorType
from lingc.rewrite import Rewrite, apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, fire, names

DECODE, VERIFY = fuse_mixer.DECODE_RULE, fuse_mixer.VERIFY_RULE
BOTH = pytest.mark.parametrize(("rule", "phase"), [(DECODE, "decode"), (VERIFY, "verify")])
TAKEN_IN = {"lingc.qk_norm_rope", "lingc.group_norm_gate", "aten.slice.Tensor"}


@BOTH
@pytest.mark.parametrize(("model", "count"), [("tiny", 3), ("odd", 3), ("whole-head-rope", 3)])
def test_fires_once_a_linear_layer(rule: Rewrite, phase: str, model: str, count: int) -> None:
    fired = fire(rule, model, phase)

    assert fired.outcome.found == fired.expected == count
    assert not (TAKEN_IN | {f"lingc.lightning_{phase}"}) & set(names(fired.after))
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model)


@BOTH
def test_only_its_own_phase_expects_it(rule: Rewrite, phase: str) -> None:
    expected = {p: rule.expected(context("tiny", p)) for p in ("prefill", "decode", "verify")}

    assert expected == {"prefill": 0, "decode": 0, "verify": 0} | {phase: 3}


def test_gives_every_state_that_it_changes() -> None:
    program = fire(VERIFY, "tiny", "verify").after
    after = dict(zip(program.updates, program.results()[2:], strict=True))

    (mixer, *_) = calls(program, "lingc.verify_mixer")

    assert [after[f"{s}.0"].args for s in ("linear_state", "pending_k", "pending_v")] == [
        (mixer, 1),
        (mixer, 2),
        (mixer, 3),
    ]


@BOTH
def test_refuses_a_projection_that_holds_more_and_says_so(rule: Rewrite, phase: str) -> None:
    program = before(rule, "tiny", phase)
    (roped, *_) = calls(program, "lingc.qk_norm_rope")
    roped.args[0].meta["type"] = TensorType("f32", ("T", 272))

    outcome = apply(program, rule, context("tiny", phase))

    assert outcome.found == 2
    assert outcome.refused[0].reason == (
        "the projection of 272 columns is not q, k, v and gate of one width"
    )
