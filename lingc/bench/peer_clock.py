"""How long calls of other people's code take on the device.

They are recorded by the driver on a stream of their own, not by torch: what torch keeps while it
records (whether its generator is recorded, which pool memory comes from) stays as it was when a
call breaks the recording, and whatever draws numbers or allocates next fails in its turn.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from lingc.bench.kernels import REPLAYS
from lingc.device import Device

Call = Callable[[], object]

_AHEAD_S = 0.02
"""How long the device is kept busy while the host puts calls in a row."""
_CYCLES_PER_S = 2e9


class Clock(Protocol):
    """Times calls, each way in microseconds of one call, a value a repetition."""

    def warm(self, calls: Sequence[Call], *, rounds: int) -> None:
        """Run every call outside any recording, and wait for the last."""
        ...

    def recorded(self, calls: Sequence[Call], count: int) -> list[float]:
        """`count` calls as nodes of one graph, taken in turn."""
        ...

    def queued(self, calls: Sequence[Call], count: int) -> list[float]:
        """`count` calls put on the stream one by one while the device is busy with other things."""
        ...


class DeviceClock:
    """The one that measures."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = torch.cuda.ExternalStream(int(device.stream))

    def warm(self, calls: Sequence[Call], *, rounds: int) -> None:
        with self._alone():
            for call in (*calls,) * rounds:
                call()

    def recorded(self, calls: Sequence[Call], count: int) -> list[float]:
        with self._alone():
            with self._device.recording() as graph:
                for i in range(count):
                    calls[i % len(calls)]()
            graph.seconds(2)
            times = graph.seconds(REPLAYS)
            graph.close()
        return [1e6 * seconds / count for seconds in times]

    def queued(self, calls: Sequence[Call], count: int) -> list[float]:
        times = []
        with self._alone():
            for _ in range(REPLAYS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(int(_AHEAD_S * _CYCLES_PER_S))  # noqa: SLF001
                begin.record(self._stream)
                for i in range(count):
                    calls[i % len(calls)]()
                end.record(self._stream)
                end.synchronize()
                times.append(1e3 * begin.elapsed_time(end) / count)
        return times

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Torch works on this stream, with nothing under way before or after."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()
