"""Which sizes an engine has code for: whatever a runtime may be asked for fits somewhere."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingc.plan import Plan
from lingc.round_memory import ROUND
from lingc.targets.cuda.buckets import (
    MANY_TOKENS,
    PREFILL_TOKENS,
    Sizes,
    buckets,
    contexts,
)
from tests import programs

PLAN = programs.compiled("tiny")
EVERY = buckets(PLAN)
MOST = PLAN.config["max_position_embeddings"]


def fits(phase: str, *, padded: bool = False, **needed: int) -> bool:
    """Whether a bucket has room; `padded`: a sequence more where there are fewer tokens."""
    for one in EVERY:
        if one.phase != phase or any(one.axes[name] < size for name, size in needed.items()):
            continue
        is_full = one.axes.get("T") == needed.get("T")
        if not padded or is_full or one.axes["B"] > needed["B"]:
            return True
    return False


def test_a_bucket_has_a_size_for_each_open_axis_of_the_inputs() -> None:
    axes = {
        "prefill": {"T", "B", "B+1", "P", "N"},
        "decode": {"B", "B+1", "P"},
        "verify": {"T", "B", "B+1", "P"},
        "draft": {"T", "B", "B+1", "P", "N"},
        ROUND: {"T", "B", "P", "W"},
    }

    assert {one.phase for one in EVERY} == set(axes)
    assert all(one.axes.keys() == axes[one.phase] for one in EVERY)
    assert all(one.axes["B+1"] == one.axes["B"] + 1 for one in EVERY if one.phase != ROUND)


def test_no_bucket_is_there_twice() -> None:
    assert len({(one.phase, *sorted(one.axes.items())) for one in EVERY}) == len(EVERY)


@given(st.integers(1, 64), st.integers(1, MOST))
def test_up_to_64_sequences_of_any_length_decode(sequences: int, context: int) -> None:
    assert fits("decode", B=sequences, P=-(-context // PLAN.page_size))


@given(st.integers(1, 16), st.integers(2, PLAN.max_draft + 1), st.integers(1, MOST))
def test_every_number_of_drafts_has_its_own_verify(sequences: int, each: int, context: int) -> None:
    pages = -(-context // PLAN.page_size)

    assert any(
        one.axes["T"] == each * one.axes["B"]
        and one.axes["B"] >= sequences
        and one.axes["P"] >= pages
        for one in EVERY
        if one.phase == "verify"
    )


@given(st.integers(1, 8192), st.integers(1, 64), st.integers(1, MOST))
@pytest.mark.parametrize("phase", ["prefill", "draft"])
def test_packed_tokens_have_room_for_themselves_and_a_sequence_of_padding(
    phase: str, tokens: int, sequences: int, context: int
) -> None:
    sequences = min(sequences, tokens)
    context = max(context, -(-tokens // sequences))
    pages = -(-context // PLAN.page_size)

    if context <= MOST:
        assert fits(phase, padded=True, T=tokens, B=sequences, N=sequences, P=pages)


@pytest.mark.parametrize("phase", ["prefill", "draft"])
def test_a_sequence_alone_may_have_more_tokens_in_a_step(phase: str) -> None:
    long = replace(PLAN, config={**PLAN.config, "max_position_embeddings": 131_072})
    many = [one.axes for one in buckets(long) if one.phase == phase and one.axes["T"] > MANY_TOKENS]

    assert {one["T"] for one in many} == {size for size in PREFILL_TOKENS if size > MANY_TOKENS}
    assert {one["B"] for one in many} == {2}
    for one in many:
        assert one["P"] * PLAN.page_size > one["T"]
    for tokens in {one["T"] for one in many}:
        assert max(one["P"] for one in many if one["T"] == tokens) * PLAN.page_size >= 131_072


def test_contexts_end_where_the_model_does() -> None:
    longer = replace(PLAN, config={**PLAN.config, "max_position_embeddings": 131_072})
    odd = replace(PLAN, config={**PLAN.config, "max_position_embeddings": 600})

    assert contexts(PLAN) == [512, 4096]
    assert contexts(longer) == [512, 5120, 36_864, 131_072]
    assert contexts(odd) == [512, 600]
    assert max(one.axes["P"] for one in buckets(odd)) == -(-600 // PLAN.page_size)


def test_many_sequences_of_the_longest_context_have_no_prefill() -> None:
    long = replace(PLAN, config={**PLAN.config, "max_position_embeddings": 131_072})

    rows = [_rows(long, one) for one in buckets(long) if one.phase == "prefill"]

    assert max(rows) <= 65 * 36_864
    assert 9 * 131_072 in rows


def _rows(plan: Plan, one: Sizes) -> int:
    return one.axes["B"] * one.axes["P"] * plan.page_size


def test_a_model_without_draft_layer_has_no_bucket_for_it() -> None:
    less = {phase: one for phase, one in PLAN.programs.items() if phase != "draft"}

    assert not {"draft", ROUND} & {one.phase for one in buckets(replace(PLAN, programs=less))}


def test_whatever_is_verified_has_a_round() -> None:
    """Drafts of the same sequences and pages: of a token each, and of what the verify leaves."""
    known = {
        (one.phase, one.axes["T"], one.axes["B"], one.axes["P"])
        for one in EVERY
        if one.phase != "decode" and one.axes.get("N", one.axes["B"]) == one.axes["B"]
    }

    for phase, tokens, sequences, pages in [*known]:
        if phase == "verify":
            for wanted in ((ROUND, tokens), ("draft", tokens), ("draft", sequences)):
                assert (*wanted, sequences, pages) in known
