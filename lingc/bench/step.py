"""A whole step of a plan by its kernels, as one graph.

Weights may be a checkpoint's, to hold the step to the interpreter, or drawn on the device, to time
a model that no checkpoint is there for.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lingc.bench.kernels import poisoned
from lingc.device import Binary, Device, launch_all
from lingc.kernel import Kernel, align
from lingc.op import TORCH_DTYPE
from lingc.plan import TensorType
from lingc.targets.cuda.schedule import Schedule, Scheduled

_DRAWN = 1 << 28
"""Values that are drawn once and repeated: more than any cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """One graph of a whole step.

    Attributes:
        microseconds: Median over replays.
        launches: In the graph.
        moved_bytes: What the ops must move, by their costs.
        by_op: (op, tactic) -> calls, and microseconds a call when only those calls are recorded.
    """

    microseconds: float
    launches: int
    moved_bytes: float
    by_op: Mapping[tuple[str, str], tuple[int, float]]


class DeviceStep:
    """One phase on the device: buffers, and the launches over them.

    Args:
        weights: Packed weights by name, as stored; drawn at random where None.
    """

    def __init__(
        self,
        device: Device,
        schedule: Schedule,
        binaries: Mapping[Kernel, Binary],
        *,
        weights: Mapping[str, Any] | None,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        weight_names: frozenset[str],
        state_names: frozenset[str],
    ) -> None:
        self.device, self.schedule, self.binaries = device, schedule, binaries
        self.tensors: dict[str, torch.Tensor] = {}
        drawn = None if weights is not None else _Drawn()
        for name, kind in schedule.buffers.items():
            self.tensors[name] = _filled(name, kind, weights, inputs, drawn, weight_names,
                                         state_names)  # fmt: skip
        self._scratch = torch.full((schedule.workspace_bytes + 256,), 0xFF, dtype=torch.uint8,
                                   device="cuda")  # fmt: skip
        self._counters = torch.zeros(schedule.counter_bytes + 256, dtype=torch.uint8,
                                     device="cuda")  # fmt: skip
        self._addresses = [self._addresses_of(one) for one in schedule.steps]
        torch.cuda.synchronize()

    def _addresses_of(self, one: Scheduled) -> dict[str, int]:
        found = {
            name: 0 if buffer is None else self.tensors[buffer].data_ptr()
            for name, buffer in one.buffers.items()
        }
        scratch, counters = self._scratch.data_ptr(), self._counters.data_ptr()
        for space in one.choice.tactic.workspaces:
            if space.zeroed:
                found[space.name], counters = counters, counters + align(space.bytes)
            else:
                found[space.name], scratch = scratch, scratch + align(space.bytes)
        return found

    def launch(self, only: tuple[str, str] | None = None) -> int:
        """Put the step on the stream, or only the calls of one op and tactic."""
        count = 0
        for one, addresses in zip(self.schedule.steps, self._addresses, strict=True):
            if only is None or (one.op.name, one.choice.tactic.name) == only:
                launches = one.choice.tactic.launches
                launch_all(self.device, launches, self.binaries, addresses, first=count == 0)
                count += len(launches)
        return count

    def value(self, name: str) -> torch.Tensor:
        """What the buffer of a value holds now."""
        return self.tensors[self.schedule.of[name]]

    def time(self, *, replays: int = 15, parts: bool = True) -> StepTiming:
        """Median of replays of the whole step; and of each kind of call alone."""
        with self.device.recording() as graph:
            count = self.launch()
        graph.seconds(3)
        whole = 1e6 * statistics.median(graph.seconds(replays))
        graph.close()
        kinds: dict[tuple[str, str], int] = {}
        for one in self.schedule.steps:
            kind = (one.op.name, one.choice.tactic.name)
            kinds[kind] = kinds.get(kind, 0) + 1
        by_op: dict[tuple[str, str], tuple[int, float]] = {}
        for kind, calls in kinds.items() if parts else ():
            with self.device.recording() as graph:
                self.launch(kind)
            graph.seconds(2)
            by_op[kind] = calls, 1e6 * statistics.median(graph.seconds(7)) / calls
            graph.close()
        return StepTiming(
            microseconds=whole,
            launches=count,
            moved_bytes=sum(self.cost(one) for one in self.schedule.steps),
            by_op=by_op,
        )

    def cost(self, one: Scheduled) -> float:
        """Bytes that a step must move."""
        sizes = self.schedule.buffers
        arguments: list[Any] = []
        for name, arg in zip(one.op.arguments, one.step.args, strict=True):
            buffer = one.buffers.get(name)
            arguments.append(sizes[buffer] if buffer is not None else arg)
        return one.op.cost(*arguments).moved_bytes


class _Drawn:
    """Random values of each element type, repeated over whatever is asked for."""

    def __init__(self) -> None:
        self._generator = torch.Generator(device="cuda").manual_seed(0)
        bits = torch.randint(256, (_DRAWN,), dtype=torch.uint8, device="cuda",
                             generator=self._generator)  # fmt: skip
        # No NaN, and no code so large that products overflow.
        self._codes = bits & 0xBF
        self._values = torch.randn(_DRAWN // 8, device="cuda", generator=self._generator)
        self._bits = bits

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Draw a weight: scaled so that activations stay near one."""
        flat = tensor.view(-1)
        if tensor.dtype == torch.float8_e4m3fn:
            source = self._codes.view(torch.float8_e4m3fn)
        elif tensor.dtype == torch.int32:
            source = self._bits.view(torch.int32)
        else:
            source = self._scaled(name, tensor)
        for start in range(0, flat.numel(), source.numel()):
            part = flat[start : start + source.numel()]
            part.copy_(source[: part.numel()])

    def _scaled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("scale"):
            return (self._values.abs() * 0.01 + 0.002).to(tensor.dtype)
        if "norm" in name:
            return (1 + 0.1 * self._values).to(tensor.dtype)
        if name.endswith("decay"):
            return (self._values.abs() * 0.1 + 1e-3).to(tensor.dtype)
        width = int(tensor.shape[-1]) if tensor.dim() > 1 else 1000
        scaled: torch.Tensor = self._values * width**-0.5
        return scaled.to(tensor.dtype)


def _filled(
    name: str, kind: TensorType, weights: Mapping[str, Any] | None,
    inputs: Mapping[str, np.ndarray[Any, Any]], drawn: _Drawn | None,
    weight_names: frozenset[str], state_names: frozenset[str],
) -> torch.Tensor:  # fmt: skip
    shape, dtype = kind.bind({}), TORCH_DTYPE[kind.dtype]
    if name in inputs:
        return torch.from_numpy(np.ascontiguousarray(inputs[name])).to("cuda", dtype)
    if name in state_names:
        return torch.zeros(shape, dtype=dtype, device="cuda")
    if name not in weight_names:
        return poisoned(shape, dtype)
    if weights is not None:
        array = np.ascontiguousarray(weights[name])
        raw = torch.from_numpy(array.view(np.uint8).reshape(-1).copy()).to("cuda")
        stored: torch.Tensor = raw.view(dtype).reshape(shape)
        return stored
    made = torch.empty(shape, dtype=dtype, device="cuda")
    assert drawn is not None, "weights are given or drawn"
    drawn.fill(name, made)
    return made
