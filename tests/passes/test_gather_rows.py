"""The head of a GPU plan reads the rows that a kernel of ours picks."""

import pytest

from lingc import stages
from lingc.errors import StageError
from lingc.passes import gather_rows
from tests.evaluate import assert_same
from tests.programs import WIDE_GPU, before, calls, fire, names

RULE = gather_rows.RULE


@pytest.mark.parametrize(
    ("model", "phase"), [("tiny", "prefill"), ("tiny", "draft"), ("odd", "prefill")]
)
def test_fires_where_some_rows_have_logits(model: str, phase: str) -> None:
    fired = fire(RULE, model, phase, "bf16", WIDE_GPU)

    assert fired.outcome.found == fired.expected == 1
    assert "aten.index_select.default" not in names(fired.after)
    (picked,) = calls(fired.after, "lingc.gather_rows")
    assert picked.args[1].meta["name"] == "logit_rows"
    assert picked.meta["type"].shape[0] == "N"
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model)


@pytest.mark.parametrize("phase", ["decode", "verify"])
def test_every_row_has_logits_in_other_phases(phase: str) -> None:
    fired = fire(RULE, "tiny", phase, "bf16", "h20")

    assert fired.outcome.found == fired.expected == 0


@pytest.mark.parametrize("target", ["cpu", "rtx-120"])
def test_is_not_expected_where_other_kernels_are_launched(target: str) -> None:
    fired = fire(RULE, "tiny", "prefill", "fp8", target)

    assert fired.outcome.found == fired.expected == 0
    assert fired.outcome.refused == []


def test_no_kernel_selects_rows_otherwise() -> None:
    program = before(RULE, "tiny", "prefill", "bf16", "h20")

    with pytest.raises(StageError, match=r"index_select.*left over: no GPU kernel"):
        stages.check(program, "launched")
