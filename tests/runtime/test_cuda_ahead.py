"""Generation by a CUDA engine, a step ahead of the host: the tokens that the interpreter makes."""

from dataclasses import replace

import numpy as np
import pytest

from lingc.errors import (
    LingcError,
    UsageError,
)
from lingc.interpret import InterpreterBackend
from lingc.runtime import Generator, Request, Sampling
from lingc.runtime.backend import Ticket
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.sampling import draws
from lingc.runtime.slots import Piece, SlotTable
from lingc.runtime.steps import Steps
from tests.runtime.cuda_engine import (
    LIMITS,
    REQUESTS,
    code,
    loaded,
    plan_and_weights,
)
from tests.runtime.host_device import HostDevice


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_generation_is_the_interpreters(drafts: int) -> None:
    """Five requests over three slots: they wait, join and leave; drafts are taken back."""
    plan, weights = plan_and_weights()
    reference = InterpreterBackend(plan, weights, LIMITS)
    want = Generator(reference, drafts=drafts, prefill_tokens=48).generate(REQUESTS)

    got = Generator(loaded(), drafts=drafts, prefill_tokens=48).generate(REQUESTS)

    assert [one.tokens for one in got] == [one.tokens for one in want]
    assert [one.acceptance for one in got] == [one.acceptance for one in want]


def test_sampled_tokens_are_the_hosts() -> None:
    """Drawn on the device, a step ahead of the host, or on the host where logits are asked for.

    All begin and end together: on a CPU a row's last bits depend on how many others there are, and
    what is drawn from nearly equal weights depends on them.
    """
    backend = loaded()
    for seed in range(4):
        settings = [
            Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=seed),
            Sampling(),
            Sampling(temperature=1.5, seed=(1 << 63) + seed),
        ]
        requests = [
            replace(REQUESTS[i], sampling=one, max_tokens=12)
            for i, one in zip((0, 1, 3), settings, strict=True)
        ]
        told = Generator(backend).generate([replace(one, logprobs=2) for one in requests])

        drawn = Generator(backend).generate(requests)

        assert [one.tokens for one in drawn] == [one.tokens for one in told]


def test_the_next_step_is_queued_before_the_tokens_of_this_one_are_read() -> None:
    device = HostDevice()
    backend = loaded(device=device)
    request = Request(tokens=(7, 8, 9), max_tokens=6, stop_ids=frozenset())

    with Generator(backend).start([request]) as run:
        replays = []
        while not run.is_done:
            run.step()
            replays.append(device.replays)

    # Prefill and two steps, then a step a turn, and none behind the last.
    assert replays == [3, 4, 5, 6, 6]


def test_a_sequence_that_stops_leaves_the_queued_step_behind() -> None:
    """Others go on, and whoever gets its slot is not disturbed."""
    plan, weights = plan_and_weights()
    free = Request(tokens=(5, 6, 7, 8), max_tokens=12, stop_ids=frozenset())
    reference = Generator(InterpreterBackend(plan, weights, LIMITS))
    (known,) = reference.generate([free])
    stopping = replace(free, stop_ids=frozenset({known.tokens[4]}))
    requests = [stopping, REQUESTS[0], stopping, stopping, REQUESTS[3], stopping]
    want = reference.generate(requests)

    got = Generator(loaded()).generate(requests)

    assert [one.tokens for one in got] == [one.tokens for one in want]
    assert [one.finish for one in got] == [one.finish for one in want]


def test_a_run_that_is_given_up_leaves_the_backend_to_the_next() -> None:
    backend = loaded()
    generator = Generator(backend)
    request = Request(tokens=(7, 8, 9), max_tokens=6, stop_ids=frozenset())
    (want,) = generator.generate([request])
    for _ in range(3):
        with generator.start([request]) as run:
            run.step()

    (got,) = generator.generate([request])

    assert got.tokens == want.tokens


def test_logits_that_are_not_finite_end_the_run() -> None:
    _, weights = plan_and_weights()
    bad = np.full_like(weights["norm.weight"], 0x7FC0)
    backend = CudaBackend(code(), {**weights, "norm.weight": bad}, LIMITS, device=HostDevice())

    with pytest.raises(LingcError, match="logits that are not finite"):
        Generator(backend).generate(REQUESTS[:1])


def test_queued_steps_are_taken_in_turn() -> None:
    plan, _ = plan_and_weights()
    backend = loaded()
    table = SlotTable(LIMITS, plan.page_size)
    steps, lease = Steps(backend, table), table.admit(20)
    given = draws([(Sampling(), 0, 0)])

    def queue(position: int, *, chained: bool) -> Ticket:
        piece = Piece(lease=lease, position=position, tokens=[5])
        return steps.queue([piece], given, chained=chained)

    with pytest.raises(UsageError, match="of a step that was not ahead"):
        queue(0, chained=True)
    first, _ = queue(0, chained=False), queue(1, chained=True)
    with pytest.raises(UsageError, match="a third step is queued"):
        queue(2, chained=True)
    backend.take(first)
    with pytest.raises(UsageError, match="taken once"):
        backend.take(first)
    backend.close()
