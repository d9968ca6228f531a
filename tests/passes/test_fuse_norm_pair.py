"""The draft layer of a GPU plan norms its two inputs in one call, side by side."""

import pytest
import torch

from lingc.graph import tensor_type
from lingc.passes import fuse_norm_pair
from lingc.plan import TensorType
from lingc.rewrite import apply
from tests.evaluate import assert_same
from tests.programs import WIDE_GPU, before, calls, context, fire, names

RULE = fuse_norm_pair.RULE


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_fires_once_in_a_draft(precision: str) -> None:
    fired = fire(RULE, "whole-blocks", "draft", precision, WIDE_GPU)

    assert fired.outcome.found == fired.expected == 1
    assert "aten.cat.default" not in names(fired.after)
    (both,) = calls(fired.after, "lingc.rms_norm_pair")
    assert [node.meta["name"].rpartition("layers.4.")[2] for node in both.args[1:4]] == [
        "enorm.weight", "hidden", "hnorm.weight",
    ]  # fmt: skip
    assert both.meta["type"] == TensorType("f32", ("T", 2 * tensor_type(both.args[2]).shape[1]))
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "whole-blocks", layout=precision)


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify"])
def test_other_phases_have_no_such_pair(phase: str) -> None:
    fired = fire(RULE, "tiny", phase, "bf16", "h20")

    assert fired.outcome.found == fired.expected == 0


@pytest.mark.parametrize("target", ["cpu", "rtx-120"])
def test_is_not_expected_where_other_kernels_are_launched(target: str) -> None:
    fired = fire(RULE, "tiny", "draft", "fp8", target)

    assert fired.outcome.found == fired.expected == 0
    assert fired.outcome.refused == []


def test_a_norm_that_somebody_else_reads_is_refused() -> None:
    program = before(RULE, "tiny", "draft", "bf16", WIDE_GPU)
    (cat,) = calls(program, "aten.cat.default")
    with program.graph.inserting_after(cat):
        other = program.graph.call_function(torch.ops.aten.add.Tensor, (cat.args[0][0], 1))
    other.meta.update(cat.args[0][0].meta)
    (end,) = program.graph.find_nodes(op="output")
    end.args = ((*end.args[0], other),)

    outcome = apply(program, RULE, context("tiny", "draft", "bf16", WIDE_GPU))

    assert outcome.found == 0
    (refusal,) = outcome.refused
    assert "lingc.rms_norm is also read by" in refusal.reason


def test_norms_of_different_types_are_refused() -> None:
    program = before(RULE, "tiny", "draft", "bf16", WIDE_GPU)
    (cat,) = calls(program, "aten.cat.default")
    cat.args[0][0].args[0].meta["type"] = TensorType("f32", ("N", 64))

    outcome = apply(program, RULE, context("tiny", "draft", "bf16", WIDE_GPU))

    assert outcome.refused[0].reason == "one is f32[N, 64], the other f32[T, 64]"
