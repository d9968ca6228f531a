"""Speculative generation changes the speed and nothing else."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lingc.errors import UsageError
from lingc.runtime import Acceptance, Generator, Limits, Request, Sampling
from lingc.runtime.sampling import probabilities
from lingc.runtime.slots import SlotTable
from tests.runtime.toy import VOCAB, ToyBackend, expected_greedy, expected_logits, plan

TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def jobs_of(prompts: list[list[int]], count: int, sampling: Sampling) -> list[Request]:
    return [Request(tokens=tuple(p), max_tokens=count, sampling=sampling) for p in prompts]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that may not change greedy tokens."""

    drafts: int
    slots: int
    page_size: int
    spare_pages: int
    prefill_tokens: int
    spoilt: int  # per cent of the drafts
    rejected: int  # per cent of the drafts, whatever they are
    salt: int


SETTINGS = st.builds(
    Setting,
    drafts=st.integers(0, 3),
    slots=st.integers(1, 4),
    page_size=st.sampled_from([1, 3, 4, 16]),
    spare_pages=st.integers(0, 6),
    prefill_tokens=st.integers(1, 16),
    spoilt=st.integers(0, 100),
    rejected=st.integers(0, 100),
    salt=st.integers(0, 1000),
)


@settings(max_examples=120, deadline=None)
@given(
    jobs=st.lists(st.tuples(TOKENS, st.integers(1, 15)), min_size=1, max_size=5), chosen=SETTINGS
)
def test_greedy_tokens_do_not_change(jobs: list[tuple[list[int], int]], chosen: Setting) -> None:
    size, salt = chosen.page_size, chosen.salt
    pages = chosen.spare_pages + max(-(-(len(prompt) + count) // size) for prompt, count in jobs)
    backend = ToyBackend(
        Limits(slots=chosen.slots, pages=pages),
        plan(page_size=size),
        is_off=lambda s, a: (s + 7 * a + salt) % 100 < chosen.spoilt,
    )
    generator = Generator(
        backend,
        drafts=chosen.drafts,
        prefill_tokens=chosen.prefill_tokens,
        force_reject=lambda index, at: (31 * index + 17 * at + salt) * 7919 % 100 < chosen.rejected,
    )

    found = generator.generate([Request(tokens=tuple(p), max_tokens=n) for p, n in jobs])

    assert [list(c.tokens) for c in found] == [expected_greedy(*job) for job in jobs]
    table = generator.steps.table
    assert (table.free_slots, table.free_pages) == (chosen.slots, pages)


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(TOKENS, min_size=1, max_size=4),
    drafts=st.integers(1, 3),
    page_size=st.sampled_from([1, 3, 16]),
    prefill_tokens=st.integers(1, 16),
)
def test_a_perfect_draft_layer_is_always_right(
    prompts: list[list[int]], drafts: int, page_size: int, prefill_tokens: int
) -> None:
    """Any wrong row of its cache, hidden state or position would spoil a draft."""
    room = Limits.from_tokens(slots=4, tokens_per_sequence=40, page_size=page_size)
    generator = Generator(
        ToyBackend(room, plan(page_size=page_size)), drafts=drafts, prefill_tokens=prefill_tokens
    )

    found = generator.generate(jobs_of(prompts, 14, Sampling()))

    rounds = -(-13 // (drafts + 1))
    for completion in found:
        assert completion.acceptance.histogram == (*[0] * drafts, rounds)


def test_rejections_do_not_spoil_later_drafts() -> None:
    """After a forced rejection the chained rows must be replaced, or the next drafts are wrong."""
    room = Limits.from_tokens(slots=1, tokens_per_sequence=64, page_size=4)
    generator = Generator(
        ToyBackend(room), drafts=3, force_reject=lambda _index, at: at % 7 in (2, 5)
    )

    (found,) = generator.generate(jobs_of([[1, 2, 3]], 40, Sampling()))

    # Tokens 3 to 42; a round ends early at every forced position and nowhere else. With three
    # drafts between two forced ones at most, each round ends at the next forced position or
    # after four tokens.
    histogram = [0] * 4
    position = 3
    while position < 42:
        ahead = next((i for i in range(1, 4) if (position + i) % 7 in (2, 5)), 4)
        histogram[ahead - 1] += 1
        position += ahead
    assert found.acceptance.histogram == tuple(histogram)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(TOKENS, min_size=1, max_size=4),
    drafts=st.integers(1, 3),
    slots=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
def test_sampled_tokens_do_not_depend_on_neighbours_either(
    prompts: list[list[int]], drafts: int, slots: int, seed: int
) -> None:
    drawn = Sampling(temperature=1.1, top_p=0.9, seed=seed)

    def generate(slots: int) -> list[tuple[int, ...]]:
        backend = ToyBackend(Limits(slots=slots, pages=40), draft_scale=2.0)
        found = Generator(backend, drafts=drafts).generate(jobs_of(prompts, 7, drawn))
        return [c.tokens for c in found]

    assert generate(slots) == generate(1)


@pytest.mark.parametrize(
    ("drawn", "drafts", "rejects"),
    [
        (Sampling(temperature=1.3), 1, False),
        (Sampling(temperature=1.3), 2, True),
        (Sampling(temperature=0.9, top_k=6, top_p=0.9), 2, False),
        (Sampling(temperature=0.9, top_k=6, top_p=0.9), 1, True),
    ],
)
def test_sampling_keeps_the_distribution(drawn: Sampling, drafts: int, *, rejects: bool) -> None:
    """Chi-square of pairs of tokens against the model's own probabilities, at a fixed seed.

    Pairs, so that the second is drawn after an accepted draft in some and a rejected one in others.
    """
    repeats = 2000
    backend = ToyBackend(
        Limits(slots=50, pages=150), draft_scale=2.5, is_off=lambda s, _a: s % 3 == 0
    )
    generator = Generator(
        backend,
        drafts=drafts,
        force_reject=(lambda index, at: (index + at) % 4 == 0) if rejects else None,
    )
    prompt = [3, 14, 15]

    # The first token comes from prefill; the two after it from rounds.
    found = generator.generate(jobs_of([prompt] * repeats, 3, drawn))

    seen = Counter(c.tokens for c in found)
    expected = np.zeros((VOCAB,) * 3)
    first = probabilities(expected_logits(prompt), drawn)
    for a in np.flatnonzero(first).tolist():
        second = probabilities(expected_logits([*prompt, a]), drawn)
        for b in np.flatnonzero(second).tolist():
            third = probabilities(expected_logits([*prompt, a, b]), drawn)
            expected[a, b] = first[a] * second[b] * third * repeats
    counts = np.zeros_like(expected)
    for tokens, n in seen.items():
        counts[tokens] = n
    assert not counts[expected == 0].any(), "a token outside top-k or top-p"
    for axes in ((0, 1), (0, 2), (1, 2)):
        assert chi_square_z(counts.sum(axes), expected.sum(axes)) < 4
    for axis in range(3):
        assert chi_square_z(counts.sum(axis), expected.sum(axis)) < 4


def chi_square_z(counts: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """How many standard deviations chi-square lies above its mean; rare cells are pooled."""
    rare = expected < 5
    got = np.append(counts[~rare], counts[rare].sum())
    want = np.append(expected[~rare], expected[rare].sum())
    got, want = got[want > 0], want[want > 0]
    degrees = len(got) - 1
    chi_square = float(((got - want) ** 2 / want).sum())
    return (chi_square - degrees) / math.sqrt(2 * degrees)


def test_acceptance_is_counted_by_place() -> None:
    counted = Acceptance(histogram=(82, 99, 48, 150))

    assert counted.rounds == 379
    assert counted.drafted == (379, 297, 198)
    assert counted.accepted == (297, 198, 150)
    assert counted.rates == pytest.approx((0.7836, 0.6667, 0.7576), abs=1e-4)
    assert counted.mean_accepted == pytest.approx(1.7018, abs=1e-4)


def test_acceptance_adds_up_over_requests() -> None:
    parts = [Acceptance(histogram=(1, 2, 3)), Acceptance(histogram=(0, 5, 0))]

    assert Acceptance.total(parts) == Acceptance(histogram=(1, 7, 3))


def test_no_round_has_no_rate() -> None:
    assert Acceptance(histogram=(0, 0)).rates == (None,)
    assert Acceptance(histogram=(0, 0)).mean_accepted == 0
    assert Acceptance.total([]).rounds == 0


def test_drafting_without_a_draft_layer_is_refused_with_the_reason() -> None:
    backend = ToyBackend(Limits(slots=1, pages=4), plan(has_draft=False))

    with pytest.raises(UsageError, match="its checkpoint has no MTP weights"):
        Generator(backend, drafts=1)


@pytest.mark.parametrize(("drafts", "message"), [(-1, "0 or more"), (4, "verifies at most 3")])
def test_a_number_of_drafts_that_cannot_be_made_is_refused(drafts: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Generator(ToyBackend(Limits(slots=1, pages=4)), drafts=drafts)


def test_an_engine_without_a_draft_layer_decodes_plainly() -> None:
    backend = ToyBackend(Limits(slots=1, pages=4), plan(has_draft=False))

    (found,) = Generator(backend).generate(jobs_of([[4]], 8, Sampling()))

    assert list(found.tokens) == expected_greedy([4], 8)


def test_wasted_drafts_take_no_page_that_another_sequence_counts_on() -> None:
    backend = ToyBackend(Limits(slots=2, pages=4))
    generator = Generator(backend, drafts=3)

    # Each needs two pages for 8 tokens; the drafts of the last round would reach into a third.
    found = generator.generate(jobs_of([[1, 2], [3, 4]], 7, Sampling()))

    assert [list(c.tokens) for c in found] == [expected_greedy(p, 7) for p in ([1, 2], [3, 4])]
    assert SlotTable(backend.limits, 4).capacity == 16
