"""Speculation by a CUDA engine, a round ahead of the host: what the host's own loop makes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc import targets
from lingc.errors import LingcError, ResourceError, UsageError
from lingc.runtime import Completion, Finish, Generator, Limits, Request, Sampling
from lingc.runtime.cuda_backend import CudaBackend
from tests.runtime.cuda_engine import (
    BUCKETS,
    LIMITS,
    REQUESTS,
    ROUNDS,
    TARGET,
    code,
    plan_and_weights,
    predictable,
)
from tests.runtime.host_device import HostDevice, reference_code


def backend(
    limits: Limits = LIMITS, device: HostDevice | None = None, *, has_rounds: bool = True
) -> CudaBackend:
    """With weights whose drafts are right now and then."""
    used = code(has_rounds=has_rounds)
    return CudaBackend(used, predictable(), limits, device=device or HostDevice())


def by_host(
    requests: Sequence[Request], drafts: int, limits: Limits = LIMITS, **forced: Any
) -> list[Completion]:
    generator = Generator(
        backend(limits, has_rounds=False), drafts=drafts, prefill_tokens=48, **forced
    )
    return generator.generate(requests)


def by_device(
    requests: Sequence[Request], drafts: int, limits: Limits = LIMITS, **forced: Any
) -> list[Completion]:
    device = HostDevice()
    generator = Generator(backend(limits, device), drafts=drafts, prefill_tokens=48, **forced)
    found = generator.generate(requests)
    assert generator.speculator is not None
    table = generator.steps.table
    assert (table.free_slots, table.free_pages) == (limits.slots, limits.pages)
    return found


def same(got: list[Completion], want: list[Completion]) -> None:
    assert [one.tokens for one in got] == [one.tokens for one in want]
    assert [one.finish for one in got] == [one.finish for one in want]
    assert [one.acceptance for one in got] == [one.acceptance for one in want]


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_tokens_and_drafts_kept_are_those_of_the_host(drafts: int) -> None:
    """Five requests over three slots: they wait, join and leave; some drafts hold."""
    plain = Generator(backend(has_rounds=False), prefill_tokens=48).generate(REQUESTS)
    want = by_host(REQUESTS, drafts)

    got = by_device(REQUESTS, drafts)

    same(got, want)
    assert [one.tokens for one in got] == [one.tokens for one in plain]
    kept = np.sum([one.acceptance.histogram for one in got], axis=0)
    assert all(kept[:2])
    assert any(kept[2:]) == (drafts > 1)


@settings(max_examples=4, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 12)), min_size=1, max_size=5),
    drafts=st.integers(1, 3),
    rejected=st.integers(0, 100),
    kept=st.integers(0, 60),
    salt=st.integers(0, 1000),
)
def test_drafts_that_are_forced_are_so_on_both_sides(
    shapes: list[tuple[int, int]], drafts: int, rejected: int, kept: int, salt: int
) -> None:
    """Whatever a draft is worth, where it is kept and where it is not."""
    requests = [
        Request(tokens=tuple(range(i, i + length)), max_tokens=most, stop_ids=frozenset())
        for i, (length, most) in enumerate(shapes)
    ]

    def share(index: int, position: int, step: int) -> int:
        return (31 * index + 17 * position + step * salt) * 7919 % 100

    forced: dict[str, Any] = {
        "force_reject": lambda index, position: share(index, position, 1) < rejected,
        "force_keep": lambda index, position: share(index, position, 3) < kept,
    }

    same(by_device(requests, drafts, **forced), by_host(requests, drafts, **forced))


def test_every_draft_that_is_kept_by_force_is_a_token() -> None:
    (found,) = by_device(REQUESTS[:1], 3, force_keep=lambda _index, _position: True)

    assert found.acceptance.histogram == (0, 0, 0, 2)
    assert len(found.tokens) == 9


def test_sampled_tokens_are_the_hosts() -> None:
    """Drafts that were drawn are judged on the device, and what takes their place is drawn there.

    All begin and end together: on a CPU a row's last bits depend on how many others there are.
    """
    drawn = [
        Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=3),
        Sampling(),
        Sampling(temperature=1.2, seed=(1 << 63) + 1),
    ]
    requests = [
        replace(REQUESTS[i], sampling=one, max_tokens=12)
        for i, one in zip((0, 1, 3), drawn, strict=True)
    ]
    for drafts in (1, 3):
        same(by_device(requests, drafts), by_host(requests, drafts))


def test_who_draws_may_join_those_who_do_not() -> None:
    """Their drafts are known without logits; those of the others are judged by them."""
    drawn = Sampling(temperature=0.9, seed=5)
    asked = [replace(one, max_tokens=6) for one in REQUESTS[:4]]
    requests = [*asked[:3], replace(asked[3], sampling=drawn), *asked[:2]]

    got, want = by_device(requests, 2), by_host(requests, 2)

    greedy = [i for i, one in enumerate(requests) if one.sampling.is_greedy]
    same([got[i] for i in greedy], [want[i] for i in greedy])
    assert len(got[3].tokens) == 6


def test_the_next_round_is_queued_before_this_one_is_read() -> None:
    device = HostDevice()
    request = Request(tokens=(7, 8, 9), max_tokens=8, stop_ids=frozenset())
    rejecting = Generator(
        backend(device=device), drafts=2, force_reject=lambda _index, _position: True
    )

    with rejecting.start([request]) as run:
        replays, done = [], 0
        while not run.is_done:
            done += len(run.step())
            replays.append(device.replays)

    # Prefill, the drafts of the prompt, two rounds; then a round a turn, and none behind the last.
    assert replays == [4, 5, 6, 7, 8, 9, 9]


def test_a_sequence_that_stops_within_a_round_leaves_the_queued_one_behind() -> None:
    """Others go on, and whoever gets its slot is not disturbed."""
    free = Request(tokens=(5, 6, 7, 8), max_tokens=12, stop_ids=frozenset())
    (known,) = by_host([free], 3)
    for place in (3, 5):
        stopping = replace(free, stop_ids=frozenset({known.tokens[place]}))
        requests = [stopping, REQUESTS[0], stopping, stopping, REQUESTS[3], stopping]

        same(by_device(requests, 3), by_host(requests, 3))


def test_drafts_beyond_the_last_page_of_the_longest_bucket_need_no_longer_one() -> None:
    """On the host too: what lies there stands at the last position that there is."""
    limits = Limits(slots=1, pages=12)
    room = limits.pages * plan_and_weights()[0].page_size
    asked = [Request(tokens=tuple(range(room - 6)), stop_ids=frozenset())]
    plain = Generator(backend(limits, has_rounds=False)).generate(asked)

    got, want = by_device(asked, 3, limits), by_host(asked, 3, limits)

    same(got, want)
    assert got[0].tokens == plain[0].tokens
    assert len(got[0].tokens) == 7


def test_a_sequence_goes_to_the_end_of_the_cache() -> None:
    """Rounds reach beyond the last row, and what lies there is of nobody."""
    drafts = 3
    limits = Limits(slots=2, pages=2)
    room = limits.pages * plan_and_weights()[0].page_size
    alone = Request(tokens=tuple(range(room - 9)), stop_ids=frozenset())
    halves = [Request(tokens=tuple(range(9, 60)), stop_ids=frozenset()) for _ in range(2)]
    for requests in ([alone], halves):
        plain = Generator(backend(limits, has_rounds=False), prefill_tokens=48).generate(requests)

        got = by_device(requests, drafts, limits)

        assert [one.tokens for one in got] == [one.tokens for one in plain]
        assert {one.finish for one in got} == {Finish.CACHE}
        same(got, by_host(requests, drafts, limits))


def test_the_host_goes_on_where_the_device_has_no_code_and_gives_back_after() -> None:
    """Rounds of one sequence alone: two are drafted and verified on the host."""
    few = [one for one in ROUNDS if one.axes["B"] == 1]
    plan, _ = plan_and_weights()
    used = reference_code(plan, targets.get(TARGET), [*BUCKETS, *few])
    engine = CudaBackend(used, predictable(), LIMITS, device=HostDevice())
    requests = [REQUESTS[0], replace(REQUESTS[1], max_tokens=4), REQUESTS[3]]
    assert engine.rounds(2).fits(1, 1)
    assert not engine.rounds(2).fits(2, 1)

    got = Generator(engine, drafts=2, prefill_tokens=30).generate(requests)

    want = Generator(backend(has_rounds=False), drafts=2, prefill_tokens=30).generate(requests)
    same(got, want)


def test_requests_that_ask_for_logits_have_their_rounds_on_the_host() -> None:
    told = replace(REQUESTS[1], tokens=(9, 8, 7), max_tokens=5, logprobs=2)
    requests = [REQUESTS[0], told, REQUESTS[3]]

    got, want = by_device(requests, 2), by_host(requests, 2)

    same(got, want)
    assert [len(one.logprobs) for one in got] == [0, 5, 0]


def test_a_run_that_is_given_up_leaves_the_backend_to_the_next() -> None:
    engine = backend()
    generator = Generator(engine, drafts=2)
    request = Request(tokens=(7, 8, 9), max_tokens=6, stop_ids=frozenset())
    (want,) = generator.generate([request])
    for _ in range(3):
        with generator.start([request]) as run:
            run.step()

    (got,) = generator.generate([request])
    (other,) = Generator(engine, drafts=3).generate([request])
    engine.close()

    assert got.tokens == want.tokens == other.tokens


def test_rounds_leave_no_memory_behind() -> None:
    device = HostDevice()
    engine = backend(device=device)
    generator = Generator(engine, drafts=3)
    generator.generate(REQUESTS)
    blocks, pinned = [*device.blocks], [*device.pinned]

    generator.generate(REQUESTS)

    assert [*device.blocks] == blocks
    assert [*device.pinned] == pinned
    engine.close()
    assert not device.blocks
    assert not device.pinned


def test_logits_that_are_not_finite_end_the_run() -> None:
    weights = predictable()
    bad = np.full_like(weights["norm.weight"], 0x7FC0)
    engine = CudaBackend(
        code(has_rounds=True), {**weights, "norm.weight": bad}, LIMITS, device=HostDevice()
    )

    with pytest.raises(LingcError, match=r"logit of nan|logits that are not finite"):
        Generator(engine, drafts=1).generate(REQUESTS[:1])


def test_a_device_without_room_for_rounds_says_so() -> None:
    device = HostDevice()
    engine = backend(device=device)
    device.total -= device.memory_bytes()[0] - 1000

    with pytest.raises(ResourceError, match=r"rounds of 3 drafts need .* MB of device memory"):
        Generator(engine, drafts=3).generate(REQUESTS[:1])


def test_queued_rounds_are_read_in_turn() -> None:
    engine = backend()
    request = Request(tokens=(7, 8, 9), max_tokens=9, stop_ids=frozenset())
    with Generator(engine, drafts=1).start([request]) as run:
        run.step()  # leaves a round on its way
        rounds = engine.rounds(1)
        table, rooms = np.zeros((1, 1), np.int32), np.full(1, 64, np.int32)
        second = rounds.queue(table, rooms, np.zeros(1, np.int32))
        with pytest.raises(UsageError, match="a third round is queued"):
            rounds.queue(table, rooms, np.zeros(1, np.int32))
        rounds.take(second)
        with pytest.raises(UsageError, match="read once"):
            rounds.take(second)
        with pytest.raises(UsageError, match="of other sequences"):
            rounds.queue(np.zeros((2, 1), np.int32), rooms, np.zeros(2, np.int32))
