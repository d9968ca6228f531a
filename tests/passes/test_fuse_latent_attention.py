"""MLA of a GPU plan: the query's norm in its projection, the cache write in the attention."""

import pytest

from lingc.passes import fuse_latent_attention
from lingc.rewrite import Rewrite
from tests.evaluate import assert_same
from tests.programs import WIDE_GPU, calls, fire, names

LATENT = fuse_latent_attention.LATENT_RULE
ATTENTION = fuse_latent_attention.ATTENTION_RULE
TAKEN_IN = {"lingc.mla_latent_kv", "lingc.mla_query_rope", "lingc.mla_absorbed_attention"}


@pytest.mark.parametrize("phase", ["prefill", "verify", "draft"])
def test_the_projection_of_queries_norms_its_first_columns(phase: str) -> None:
    fired = fire(LATENT, "tiny", phase, "bf16", WIDE_GPU)

    assert fired.outcome.found == fired.expected == 1
    assert "lingc.mla_latent" not in names(fired.after)
    (write,) = calls(fired.after, "lingc.mla_latent_kv")
    (query,) = (user for user in write.args[0].users if user is not write)
    assert query.args[3].meta["name"].endswith("q_b_proj.weight")
    assert query.args[6] == "rms_norm"
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "tiny")


def test_queries_without_a_latent_have_no_such_norm() -> None:
    fired = fire(LATENT, "odd", "decode", "bf16", "h20")

    assert fired.outcome.found == fired.expected == 0


@pytest.mark.parametrize(
    ("model", "phase", "count"),
    [("tiny", "decode", 1), ("odd", "verify", 3), ("tiny", "draft", 1), ("tiny", "prefill", 0)],
)
def test_few_tokens_are_written_and_read_by_one_op(model: str, phase: str, count: int) -> None:
    fired = fire(ATTENTION, model, phase, "bf16", WIDE_GPU)

    assert fired.outcome.found == fired.expected == count
    assert not count or not TAKEN_IN & set(names(fired.after))
    assert fired.again.found == 0
    assert_same(fired.after, fired.before, model)


@pytest.mark.parametrize("rule", [LATENT, ATTENTION], ids=lambda rule: rule.name)
@pytest.mark.parametrize("target", ["cpu", "rtx-120"])
def test_is_not_expected_where_other_kernels_are_launched(rule: Rewrite, target: str) -> None:
    fired = fire(rule, "tiny", "decode", "fp8", target)

    assert fired.outcome.found == fired.expected == 0
