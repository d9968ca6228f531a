"""Kernels of other projects: called with what an op has, reported where they are absent."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from lingc.bench.peer_clock import Call
from lingc.bench.peers import PEERS, Peer, time_peers
from lingc.device import Device
from lingc.errors import IncompatibleError
from lingc.op import OPS, Benchmark
from lingc.plugins import table  # noqa: F401 (registers the ops)

EVERY = [(name, peer.name) for name, peers in PEERS.items() for peer in peers]


@pytest.mark.parametrize(("name", "peer"), EVERY)
def test_a_peer_takes_the_arguments_of_its_op_by_their_names(name: str, peer: str) -> None:
    op = OPS[name]
    prepare = next(one.prepare for one in PEERS[name] if one.name == peer)
    module = MagicMock()
    calls = []

    for case in op.cases:
        arguments = op.inputs(*case, dtype="bf16", device="cpu")
        calls.append(prepare(module, dict(zip(op.arguments, arguments, strict=True))))

    for call in filter(None, calls):
        call()
    assert module.mock_calls or not any(calls)


def test_a_package_that_is_not_installed_is_reported_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = Peer(
        name="nobody's", package="nobody", module="nobody_installs_this", prepare=lambda *_: None
    )
    monkeypatch.setattr("lingc.bench.peers.PEERS", {"quantize_fp8": (absent,)})
    benchmark = Benchmark(name="small", case=lambda tokens: (tokens, 128))

    (found,) = time_peers(
        OPS["quantize_fp8"], benchmark, 4, [torch.ones(4, 128)], 1024, FakeClock()
    )

    assert found.microseconds is None
    assert found.absent == "not installed: No module named 'nobody_installs_this'"


class FakeClock:
    """Runs calls, and has a recording that some of them break."""

    def __init__(self) -> None:
        self.recording = False
        self.warmed = 0

    def warm(self, calls: Sequence[Call], *, rounds: int) -> None:
        for call in (*calls,) * rounds:
            call()
            self.warmed += 1

    def recorded(self, calls: Sequence[Call], count: int) -> list[float]:
        self.recording = True
        try:
            return self.queued(calls, count, each=1.0)
        finally:
            self.recording = False

    def queued(self, calls: Sequence[Call], count: int, each: float = 3.0) -> list[float]:
        for i in range(count):
            calls[i % len(calls)]()
        return [each]


def _timed(monkeypatch: pytest.MonkeyPatch, clock: FakeClock, *calls: Call) -> list[Any]:
    def preparing(call: Call) -> Callable[..., Call]:
        return lambda _module, _given: call

    peers = [
        Peer(name=str(i), package=None, module="torch", prepare=preparing(call))
        for i, call in enumerate(calls)
    ]
    monkeypatch.setattr("lingc.bench.peers.PEERS", {"quantize_fp8": tuple(peers)})
    benchmark = Benchmark(name="small", case=lambda tokens: (tokens, 128))
    return list(time_peers(OPS["quantize_fp8"], benchmark, 4, [torch.ones(4, 128)], 1024, clock))


def test_a_peer_that_breaks_a_recording_is_timed_without_and_the_next_is_not_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock()

    def waits() -> None:
        if clock.recording:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    broken, fine = _timed(monkeypatch, clock, waits, lambda: None)

    assert broken.microseconds == (3.0, 3.0, 3.0)
    assert "cannot be recorded (RuntimeError: ['operation not permitted" in broken.difference
    assert "more of it" not in broken.difference
    assert fine.microseconds == (1.0, 1.0, 1.0)
    assert fine.difference == ""


def test_a_peer_is_warmed_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tuned = FakeClock(), [False]

    def tunes() -> None:
        assert tuned[0] or not clock.recording
        tuned[0] = True

    (found,) = _timed(monkeypatch, clock, tunes)

    assert found.microseconds == (1.0, 1.0, 1.0)
    assert clock.warmed >= 2


@pytest.mark.parametrize("error", [RuntimeError("no such shape"), IncompatibleError("it says no")])
def test_a_peer_that_fails_altogether_has_a_row_that_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails() -> None:
        raise error

    broken, fine = _timed(monkeypatch, FakeClock(), fails, lambda: None)

    assert broken.microseconds is None
    assert broken.absent == f"{type(error).__name__}: [{str(error)!r}]"
    assert fine.microseconds == (1.0, 1.0, 1.0)


def test_a_recording_that_breaks_leaves_the_stream_as_it_was() -> None:
    driver = MagicMock()
    driver.CUresult.CUDA_SUCCESS = 0
    driver.cuStreamBeginCapture.return_value = (0,)
    driver.cuStreamEndCapture.return_value = (901, None)  # invalidated: there is no graph
    device = Device.__new__(Device)
    device._driver, device.stream = driver, 7

    with pytest.raises(RuntimeError, match="the peer's own words"), device.recording():
        raise RuntimeError("the peer's own words")

    driver.cuStreamEndCapture.assert_called_once_with(7)
    driver.cuGraphInstantiate.assert_not_called()
