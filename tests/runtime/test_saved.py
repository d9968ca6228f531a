"""Sequences apart from their slots: parked and resumed, begun from a prefix, added to a run."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lingc.errors import InputError, PromptError, UsageError
from lingc.interpret import InterpreterBackend
from lingc.runtime import Completion, Finish, Generator, Limits, Prefix, Request, Run, Token
from lingc.runtime.backend import Backend
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_state import runs
from lingc.runtime.sampling import Sampling
from tests.runtime.cuda_engine import LIMITS, REQUESTS, code, loaded, plan_and_weights
from tests.runtime.host_device import HostDevice
from tests.runtime.toy import ToyBackend, expected_greedy, plan


def toy(slots: int = 1, pages: int = 8) -> ToyBackend:
    return ToyBackend(Limits(slots=slots, pages=pages), plan(page_size=4))


def request(prompt: list[int], count: int, prefix: Prefix | None = None) -> Request:
    return Request(tokens=tuple(prompt), max_tokens=count, stop_ids=frozenset(), prefix=prefix)


def finished(run: Run) -> dict[int, Completion]:
    """Run to the end; every token told once, in its order."""
    told: dict[int, list[int]] = {}
    done: dict[int, Completion] = {}
    while not run.is_done:
        for event in run.step():
            if isinstance(event, Token):
                told.setdefault(event.request, []).append(event.token)
            else:
                done[event.request] = event
    for index, tokens in told.items():
        assert tokens == [*done[index].tokens][-len(tokens) :]
    return done


# ----------------------------------------------------------------------------------------- parked


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_parked_request_lets_another_have_its_only_slot_and_goes_on(drafts: int) -> None:
    generator = Generator(toy(), drafts=drafts)
    with generator.start([request([3, 1, 4], 12)]) as run:
        for _ in range(3):
            run.step()
        parked = run.park(0)
        other = run.add(request([9, 2, 6, 5], 6))
        run.resume(parked)

        found = finished(run)

    assert [*found[0].tokens] == expected_greedy([3, 1, 4], 12)
    assert [*found[other].tokens] == expected_greedy([9, 2, 6, 5], 6)
    assert generator.steps.table.free_pages == 8


def test_a_parked_request_may_go_on_in_another_run_with_other_limits() -> None:
    with Generator(toy()).start([request([3, 1, 4], 9)]) as run:
        run.step()
        parked = run.park(0)
    assert parked.saved.count == len(parked.sequence.tokens) - 1

    with Generator(toy(slots=3, pages=12)).start([request([8], 2)] * 2) as run:
        run.step()
        index = run.resume(parked)
        added = run.add(request([8], 2))
        found = finished(run)

    assert (index, added, sorted(found)) == (2, 3, [2, 3])
    assert [*found[index].tokens] == expected_greedy([3, 1, 4], 9)


def test_a_request_that_gets_another_index_draws_as_it_would_have() -> None:
    asked = replace(request([3, 1, 4], 24), sampling=Sampling(temperature=1.5, seed=5))
    want = Generator(toy()).generate([asked])[0]
    with Generator(toy()).start([asked]) as run:
        run.step()
        parked = run.park(0)
    with Generator(toy(slots=3, pages=24)).start([asked, asked]) as run:
        index = run.resume(parked)
        found = finished(run)

    assert index == 2
    assert found[2].tokens == want.tokens != found[1].tokens


@pytest.mark.parametrize(
    ("backend", "drafts", "message"),
    [
        (ToyBackend(Limits(slots=1, pages=8), plan(page_size=8)), 0, "parked by another engine"),
        (toy(), 1, "parked with 0 drafts, this run makes 1"),
        (toy(pages=2), 0, "may come to 11 tokens, the cache holds 8"),
    ],
)
def test_where_a_parked_request_cannot_go_on_it_is_refused(
    backend: ToyBackend, drafts: int, message: str
) -> None:
    with Generator(toy()).start([request([3, 1, 4], 9)]) as run:
        run.step()
        parked = run.park(0)
        with Generator(backend, drafts=drafts).start([]) as other:
            with pytest.raises(UsageError, match=message):
                other.resume(parked)
            assert other.is_done
        assert run.resume(parked) == 0


def test_what_does_not_run_cannot_be_parked_and_goes_on_once() -> None:
    with Generator(toy()).start([request([3], 5), request([4], 5)]) as run:
        run.step()
        for index in (1, 2):
            with pytest.raises(UsageError, match=f"request {index} does not run"):
                run.park(index)
        parked = run.park(0)
        run.resume(parked)
        with pytest.raises(UsageError, match="request 0 was resumed before"):
            run.resume(parked)


def test_what_waits_parked_is_told_when_the_run_is_interrupted() -> None:
    with Generator(toy()).start([request([3, 1, 4], 12), request([5], 4)]) as run:
        run.step()
        run.resume(run.park(0))
        partial = run.interrupt()

    (first,) = [one for one in partial if one.request == 0]
    assert first.finish is Finish.INTERRUPTED
    assert [*first.tokens] == expected_greedy([3, 1, 4], len(first.tokens))
    assert len(first.tokens) >= 1


class Forgetful:
    """A backend that gives no rows."""

    def __init__(self, backend: ToyBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> object:
        if name.endswith("_rows"):
            raise AttributeError(name)
        return getattr(self._backend, name)


def test_an_engine_that_keeps_no_rows_says_so() -> None:
    generator = Generator(Forgetful(toy()))  # type: ignore[arg-type]
    with generator.start([request([3, 1, 4], 12)]) as run:
        run.step()
        with pytest.raises(UsageError, match="cannot save rows of its caches"):
            run.park(0)
        assert [*finished(run)[0].tokens] == expected_greedy([3, 1, 4], 12)


# ---------------------------------------------------------------------------------- in a live run


def test_requests_are_added_to_a_run_and_checked_like_the_first() -> None:
    with Generator(toy(slots=2)).start([]) as run:
        assert run.is_done
        first = run.add(request([3, 1], 4))
        run.step()
        second = run.add(request([2], 3))
        with pytest.raises(PromptError, match="prompt 2 is empty"):
            run.add(request([], 3))
        found = finished(run)

    assert (first, second) == (0, 1)
    assert [*found[0].tokens] == expected_greedy([3, 1], 4)
    assert [*found[1].tokens] == expected_greedy([2], 3)


# ---------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("prefill_tokens", [3, 64])
def test_prompts_go_on_behind_a_prefix_that_is_computed_once(
    drafts: int, prefill_tokens: int
) -> None:
    backend = toy(slots=3, pages=24)
    generator = Generator(backend, drafts=drafts, prefill_tokens=prefill_tokens)
    shared = [3, 1, 4, 1, 5, 9, 2]
    prefix = generator.prefix(shared)
    prompts = [[*shared, 6], [*shared, 5, 3], [*shared, 5]]
    backend.calls.clear()

    found = generator.generate([request(prompt, 8, prefix=prefix) for prompt in prompts])

    assert [[*one.tokens] for one in found] == [expected_greedy(prompt, 8) for prompt in prompts]
    assert sum(count for phase, count in backend.calls if phase == "prefill") == 1 + 2 + 1
    assert prefix.saved.count == len(shared)
    if drafts:
        without = generator.generate([request(prompt, 8) for prompt in prompts])
        assert [one.acceptance for one in found] == [one.acceptance for one in without]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([3, 1, 5, 9], "prompt 0 does not begin with the 3 tokens of its prefix: it differs at"),
        ([3, 1, 5, 9], "at position 2"),
        ([3, 1], "differs at position 2"),
        ([3, 1, 4], "prompt 0 ends where its prefix does, at 3 tokens"),
    ],
)  # fmt: skip
def test_a_prefix_of_other_tokens_is_refused(prompt: list[int], message: str) -> None:
    generator = Generator(toy())
    prefix = generator.prefix([3, 1, 4])

    with pytest.raises(UsageError, match=message):
        generator.generate([request(prompt, 2, prefix=prefix)])


def test_a_prefix_without_drafts_is_none_for_who_drafts() -> None:
    prefix = Generator(toy()).prefix([3, 1, 4])

    with pytest.raises(UsageError, match="prefix of prompt 0 was made without drafts"):
        Generator(toy(), drafts=1).generate([request([3, 1, 4, 1], 2, prefix=prefix)])


def test_a_prefix_that_cannot_be_is_refused() -> None:
    generator = Generator(toy(pages=2))

    with pytest.raises(PromptError, match="prompt 0 is empty"):
        generator.prefix([])
    with pytest.raises(PromptError, match="prompt 0 has 9 tokens, the cache holds 8"):
        generator.prefix([1] * 9)
    assert generator.steps.table.free_slots == 1


# ----------------------------------------------------------------------------------- real engines


def interpreted() -> Backend:
    made, weights = plan_and_weights()
    return InterpreterBackend(made, weights, LIMITS)


def with_rounds() -> Backend:
    _, weights = plan_and_weights()
    return CudaBackend(code(has_rounds=True), weights, LIMITS, device=HostDevice())


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("start", [interpreted, loaded, with_rounds])
def test_a_request_goes_on_to_the_same_tokens(start: Callable[[], Backend], drafts: int) -> None:
    """Steps begun ahead of the host and rounds on the device are read before it is parked."""
    generator = Generator(start(), drafts=drafts)
    asked = [REQUESTS[0], replace(REQUESTS[3], max_tokens=8)]
    want = [generator.generate([one])[0] for one in asked]

    with generator.start(asked[:1]) as run:
        for _ in range(3):
            run.step()
        parked = run.park(0)
        added = run.add(asked[1])
        run.step()
        run.resume(parked)
        found = finished(run)

    assert [found[0].tokens, found[added].tokens] == [one.tokens for one in want]


def test_rows_of_a_cache_are_saved_and_put_back_elsewhere() -> None:
    backend = loaded()
    size = backend.plan.page_size
    generator = Generator(backend)
    generator.generate([REQUESTS[0]])
    rows = np.array([3, 4, 5, size + 1, 0])
    there = np.array([2 * size, 2 * size + 1, 7 * size, 9, 10])

    saved = backend.save_rows(rows)
    backend.load_rows(there, saved)

    assert saved
    for name, value in backend.save_rows(there).items():
        np.testing.assert_array_equal(value, saved[name])
        np.testing.assert_array_equal(backend.state(name)[there], backend.state(name)[rows])
    with pytest.raises(InputError, match="the saved rows lacks 'latent_cache"):
        backend.load_rows(there, {})
    with pytest.raises(
        InputError, match=r"of the saved rows is uint16 \[5, 576\], not bf16\[4, 576\]"
    ):
        backend.load_rows(there[:4], saved)


def test_rows_that_follow_each_other_are_copied_at_once() -> None:
    assert [*runs(np.array([4, 5, 6, 9, 1, 2]))] == [(4, 3), (9, 1), (1, 2)]
    assert [*runs(np.array([], np.int64))] == []
