"""Calls that mean the same are spelled the same; what changes nothing goes."""

import pytest
import torch

from lingc.passes import canonicalize_calls
from lingc.plan import TensorType
from lingc.rewrite import Builder, Rewrite, apply
from tests.evaluate import assert_same
from tests.programs import before, calls, context, copy, fire, names, output

aten = torch.ops.aten
RULES = canonicalize_calls.RULES
SPLIT = "aten.split_with_sizes.default"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("phase", ["prefill", "draft"])
def test_keeps_the_numbers(rule: Rewrite, phase: str) -> None:
    fired = fire(rule, "tiny", phase)

    assert fired.again.found == 0
    assert_same(fired.after, fired.before, "tiny", mechanism="elementwise")


@pytest.mark.parametrize(
    ("rule", "gone"),
    [
        (canonicalize_calls.VIEWS, ["aten.view.default", "aten._unsafe_view.default"]),
        (canonicalize_calls.SPLITS, ["aten.split.Tensor", SPLIT]),
    ],
    ids=["views", "splits"],
)
def test_leaves_one_spelling(rule: Rewrite, gone: list[str]) -> None:
    fired = fire(rule, "tiny", "prefill")

    assert fired.outcome.found > 0
    assert fired.outcome.refused == []
    assert set(names(fired.before)) & set(gone)
    assert not set(names(fired.after)) & set(gone)


def test_cuts_where_the_split_cut() -> None:
    program = fire(canonicalize_calls.SPLITS, "tiny", "prefill").after

    qkv = calls(program, "aten.linear.default")[0]

    assert {user.args[1:] for user in qkv.users} == {(1, 0, 64), (1, 64, 128), (1, 128, 192)}


def test_the_last_of_equal_parts_may_be_shorter() -> None:
    rule = canonicalize_calls.SPLITS
    program = before(rule, "tiny", "prefill")
    split = calls(program, "aten.split.Tensor")[0]
    assert split.args[1] == 64
    split.args = (split.args[0], 80, *split.args[2:])

    apply(program, rule, context("tiny", "prefill"))

    qkv = calls(program, "aten.linear.default")[0]
    cuts = {user.args[2:]: user.meta["type"].shape for user in qkv.users}
    assert cuts == {(0, 80): ("T", 80), (80, 160): ("T", 80), (160, 192): ("T", 32)}


def test_refuses_to_split_an_axis_of_unknown_size() -> None:
    rule = canonicalize_calls.SPLITS
    program = before(rule, "tiny", "prefill")
    split = calls(program, "aten.split.Tensor")[0]
    split.args = (*split.args[:2], 0)

    outcome = apply(program, rule, context("tiny", "prefill"))

    assert [refusal.reason for refusal in outcome.refused] == 3 * ["a split of symbolic size"]


def test_keeps_a_cast_that_changes_the_type() -> None:
    rule = canonicalize_calls.CASTS
    program = before(rule, "tiny", "prefill")

    apply(program, rule, context("tiny", "prefill"))

    # Positions become numbers before they become angles, once for each rotary table.
    assert len(calls(program, "aten.to.dtype")) == 2


def test_drops_a_slice_of_everything_and_an_alias() -> None:
    program = before(canonicalize_calls.ALIASES, "tiny", "prefill")
    hidden = program.results()[1]
    kind = hidden.meta["type"]
    build = Builder(program, hidden)
    with program.graph.inserting_before(output(program)):
        alias = build.call(aten.alias.default, hidden, type=kind)
        whole = build.call(aten.slice.Tensor, alias, 1, 0, 2**63 - 1, type=kind)
    output(program).args = ((program.results()[0], whole, *program.results()[2:]),)
    changed = copy(program)

    for rule in (canonicalize_calls.ALIASES, canonicalize_calls.SLICES):
        assert apply(program, rule, context("tiny", "prefill")).found == 1

    assert program.results()[1] is hidden
    assert_same(program, changed, "tiny", mechanism="elementwise")


def test_folds_slices_of_slices_down_to_one() -> None:
    program = before(canonicalize_calls.NESTED, "tiny", "prefill")
    linear = calls(program, "aten.linear.default")[0]
    build, tokens = Builder(program, linear), linear.meta["type"].shape[0]
    with program.graph.inserting_before(output(program)):
        outer = build.slice(build.slice(build.slice(linear, 1, 8, 100), 1, 4, 64), -1, 2, 40)
    output(program).args = ((outer, *program.results()[1:]),)

    outcome = apply(program, canonicalize_calls.NESTED, context("tiny", "prefill"))

    assert outcome.found == 2
    assert program.results()[0].args == (linear, 1, 14, 52)
    assert program.results()[0].meta["type"] == TensorType("f32", (tokens, 38))


def test_does_nothing_to_a_slice_that_counts_from_the_end() -> None:
    program = before(canonicalize_calls.NESTED, "tiny", "prefill")
    linear = calls(program, "aten.linear.default")[0]
    build = Builder(program, linear)
    with program.graph.inserting_before(output(program)):
        inner = build.slice(linear, 1, 8, 100)
        outer = build.call(aten.slice.Tensor, inner, 1, -4, 92, type=linear.meta["type"])
    output(program).args = ((outer, *program.results()[1:]),)

    outcome = apply(program, canonicalize_calls.NESTED, context("tiny", "prefill"))

    assert (outcome.found, outcome.refused) == (0, [])
