"""The generation loop, checked against a model whose answers are known without any state."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import PromptError, UsageError
from lingc.runtime import Completion, Finish, Generator, Limits, Request, Sampling, Token
from tests.runtime.toy import VOCAB, ToyBackend, expected_greedy, expected_logits, plan

TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)


def toy(*, slots: int = 3, pages: int = 24, page_size: int = 4) -> ToyBackend:
    return ToyBackend(Limits(slots=slots, pages=pages), plan(page_size=page_size))


def request(
    tokens: list[int], count: int, *, sampling: Sampling | None = None, logprobs: int | None = None
) -> Request:
    return Request(
        tokens=tuple(tokens),
        max_tokens=count,
        sampling=Sampling() if sampling is None else sampling,
        logprobs=logprobs,
    )


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(TOKENS, st.integers(1, 12)), min_size=1, max_size=6),
    slots=st.integers(1, 4),
    page_size=st.sampled_from([1, 3, 4, 16]),
    prefill_tokens=st.integers(1, 20),
    spare=st.integers(0, 8),
)
def test_greedy_tokens_are_those_of_the_model_alone(
    jobs: list[tuple[list[int], int]],
    slots: int,
    page_size: int,
    prefill_tokens: int,
    spare: int,
) -> None:
    needed = max(-(-(len(prompt) + count) // page_size) for prompt, count in jobs)
    backend = toy(slots=slots, pages=needed + spare, page_size=page_size)
    generator = Generator(backend, prefill_tokens=prefill_tokens)

    found = generator.generate([request(prompt, count) for prompt, count in jobs])

    assert [list(c.tokens) for c in found] == [expected_greedy(*job) for job in jobs]
    assert all(c.finish is Finish.LENGTH for c in found)
    table = generator.steps.table
    assert (table.free_slots, table.free_pages) == (slots, needed + spare)


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(TOKENS, min_size=1, max_size=4),
    slots=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_sampled_request_does_not_depend_on_its_neighbours(
    prompts: list[list[int]], slots: int, seed: int
) -> None:
    drawn = Sampling(temperature=0.9, top_k=9, top_p=0.95, seed=seed)
    requests = [request(prompt, 6, sampling=drawn) for prompt in prompts]

    together = Generator(toy(slots=slots), prefill_tokens=3).generate(requests)
    one_by_one = Generator(toy(slots=1)).generate(requests)

    assert [c.tokens for c in together] == [c.tokens for c in one_by_one]


def test_equal_requests_draw_different_tokens() -> None:
    drawn = Sampling(temperature=5.0)

    first, second = Generator(toy()).generate([request([1, 2], 20, sampling=drawn)] * 2)

    assert first.tokens != second.tokens


def test_another_seed_draws_different_tokens() -> None:
    jobs = [request([1, 2], 20, sampling=Sampling(temperature=5.0, seed=seed)) for seed in (1, 2)]

    found = [Generator(toy()).generate([job])[0].tokens for job in jobs]

    assert found[0] != found[1]


def test_a_stop_id_ends_the_completion_and_stays_among_its_tokens() -> None:
    expected = expected_greedy([3, 1], 12)
    generator = Generator(toy(), stop_ids=frozenset({expected[4]}))

    (found,) = generator.generate([request([3, 1], 12)])

    first = expected.index(expected[4])
    assert list(found.tokens) == expected[: first + 1]
    assert found.finish is Finish.STOP_ID


def test_a_request_may_ignore_the_stop_ids_of_the_checkpoint() -> None:
    everything = frozenset(range(VOCAB))
    ignoring = Request(tokens=(3, 1), max_tokens=5, stop_ids=frozenset())

    (found,) = Generator(toy(), stop_ids=everything).generate([ignoring])

    assert list(found.tokens) == expected_greedy([3, 1], 5)


def test_a_request_without_an_end_gets_its_share_of_the_cache() -> None:
    generator = Generator(toy(slots=2, pages=4, page_size=4))

    (found,) = generator.generate([Request(tokens=(1, 2, 3))])

    assert found.finish is Finish.CACHE
    assert list(found.tokens) == expected_greedy([1, 2, 3], 8 + 1 - 3)


def test_a_request_that_outgrows_the_cache_says_so() -> None:
    generator = Generator(toy(slots=1, pages=2, page_size=4))

    (found,) = generator.generate([request([1, 2, 3], 100)])

    assert found.finish is Finish.CACHE
    assert list(found.tokens) == expected_greedy([1, 2, 3], 8 + 1 - 3)


def test_the_context_of_the_model_ends_a_completion_like_the_cache() -> None:
    backend = ToyBackend(Limits(slots=1, pages=9), plan(context=6))

    (found,) = Generator(backend).generate([request([1, 2, 3], 100)])

    assert found.finish is Finish.CACHE
    assert len(found.tokens) == 6 + 1 - 3


def test_a_prompt_that_fills_the_cache_still_gets_one_token() -> None:
    generator = Generator(toy(slots=1, pages=2, page_size=2))

    (found,) = generator.generate([request([5, 6, 7, 8], 9)])

    assert list(found.tokens) == expected_greedy([5, 6, 7, 8], 1)


def test_a_prompt_longer_than_the_cache_is_refused_with_both_numbers() -> None:
    with pytest.raises(PromptError, match="prompt 1 has 9 tokens, the cache holds 8"):
        Generator(toy(pages=2)).start([request([1], 1), request([1] * 9, 1)])


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    backend = ToyBackend(Limits(slots=1, pages=9), plan(context=6))

    with pytest.raises(PromptError, match="has 7 tokens, the model was made for 6"):
        Generator(backend).start([request([1] * 7, 1)])


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_out_of_range_is_named_with_its_position(token: int) -> None:
    with pytest.raises(PromptError, match=rf"token {token} at position 2 of prompt 0") as caught:
        Generator(toy()).start([request([1, 2, token], 1)])

    assert caught.value.hint == "the vocabulary has 24 tokens, 0 to 23"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="prompt 0 is empty"):
        Generator(toy()).start([request([], 1)])


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(UsageError, match="request 0 has stop strings, but the engine has no token"):
        Generator(toy()).start([Request(tokens=(1,), stop=("x",))])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(bad: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(tokens=(1,), **bad)  # type: ignore[arg-type]


def test_logprobs_are_those_of_the_model_at_temperature_one() -> None:
    (found,) = Generator(toy()).generate([request([4, 2], 5, logprobs=3)])

    tokens = [4, 2]
    for token, at in zip(found.tokens, found.logprobs, strict=True):
        logits = expected_logits(tokens).astype(float)
        total = math.log(sum(math.exp(v) for v in logits))
        best = sorted(range(VOCAB), key=lambda i: -logits[i])[:3]
        assert at.logprob == pytest.approx(logits[token] - total)
        assert [t for t, _ in at.top] == best
        tokens.append(token)


def test_events_come_in_the_order_of_each_request_and_end_with_its_completion() -> None:
    events = list(Generator(toy()).stream([request([1], 3), request([2], 5)]))

    for index, count in ((0, 3), (1, 5)):
        mine = [e for e in events if e.request == index]
        assert [type(e) for e in mine] == [Token] * count + [Completion]


def test_short_requests_leave_and_waiting_ones_join_between_steps() -> None:
    generator = Generator(toy(slots=2))
    jobs = [request([1], 12), request([2], 2), request([3], 2)]

    ends = [e.request for e in generator.stream(jobs) if isinstance(e, Completion)]

    assert ends == [1, 2, 0]


def test_abandoning_a_stream_frees_its_slots() -> None:
    generator = Generator(toy(slots=2))
    stream = generator.stream([request([1], 9), request([2], 9), request([3], 9)])
    next(stream)

    stream.close()  # type: ignore[attr-defined]

    assert generator.steps.table.free_slots == 2
    assert generator.steps.table.free_pages == 24


def test_an_interrupted_run_gives_what_there_is() -> None:
    generator = Generator(toy(slots=1))
    run = generator.start([request([1], 9), request([2], 9)])
    run.step()

    partial = run.interrupt()

    assert [(c.request, c.finish) for c in partial] == [
        (0, Finish.INTERRUPTED),
        (1, Finish.INTERRUPTED),
    ]
    assert list(partial[0].tokens) == expected_greedy([1], 2)
    assert partial[1].tokens == ()
    assert run.is_done
    assert generator.steps.table.free_slots == 1


def test_a_slot_that_is_used_again_starts_from_nothing() -> None:
    generator = Generator(toy(slots=1))

    generator.generate([request([9, 8, 7], 6)])
    (second,) = generator.generate([request([5], 6)])

    assert list(second.tokens) == expected_greedy([5], 6)


def test_prefill_takes_no_more_tokens_a_step_than_it_is_given() -> None:
    backend = toy(slots=4)
    Generator(backend, prefill_tokens=5).generate([request([1] * n, 2) for n in (7, 3, 9)])

    counts = [count for phase, count in backend.calls if phase == "prefill"]

    assert counts == [5, 5, 5, 4]


class Steady(ToyBackend):
    """Says that where a prompt is cut must not depend on the others."""

    prefill_tokens = 5
    batch_invariant = True


def test_prompts_are_cut_where_they_would_be_alone_if_bits_must_not_depend_on_the_batch() -> None:
    prompts = [[1] * n for n in (7, 3, 9, 1)]
    alone, together = Steady(Limits(slots=1, pages=16)), Steady(Limits(slots=4, pages=64))
    for prompt in prompts:
        Generator(alone).generate([request(prompt, 2)])

    Generator(together).generate([request(prompt, 2) for prompt in prompts])

    assert pieces(alone) == [5, 2, 3, 5, 4, 1]
    assert pieces(together) == [5, 2 + 3, 5, 4 + 1]


def test_a_step_of_a_prompt_is_shorter_while_others_wait_for_their_next_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lingc.runtime.generate.BESIDE_TOKENS", 3)
    backend = toy(slots=2, pages=40)

    Generator(backend, prefill_tokens=8).generate(
        [request([1], 9), request([1] * 9, 1), request([1] * 9, 1)]
    )

    # The first two share a step; until the first one has its last token steps are short.
    assert pieces(backend) == [8, 2, 3, 3, 3]


def pieces(backend: ToyBackend) -> list[int]:
    return [count for phase, count in backend.calls if phase == "prefill"]
