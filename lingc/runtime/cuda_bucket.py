"""One bucket of a launch table at its place in memory: its launches, and graphs of them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from lingc.device import Binary, Device, Graph
from lingc.errors import IntegrityError
from lingc.kernel import align
from lingc.launch_table import Bucket, Counted, Operand, Place, TableLaunch, TableStep, TableTactic
from lingc.plan import TensorType, refs
from lingc.runtime.backend import Limits
from lingc.runtime.cuda_code import CudaCode, all_sizes
from lingc.runtime.cuda_inputs import ROWS
from lingc.runtime.cuda_memory import DeviceMemory, Held

SAMPLE = "sample"
"""Op and name of the step behind a program's own that draws a token from each row of logits."""

WHOLE, AGAIN, DRAWN = "whole", "again", "drawn"
"""What is recorded: the program; what depends on which rows of logits are asked for; the program
and the drawing of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundLaunch:
    """A launch with its kernel and the values of its arguments."""

    binary: Binary
    values: tuple[Any, ...]
    launch: TableLaunch


class BoundBucket:
    """A bucket whose buffers have addresses.

    Args:
        kernel: The kernel of a number in the table, read when it is first asked for.
        elsewhere: Buffers that lie at another address than in the arena, or nowhere in it.
    """

    def __init__(
        self,
        device: Device,
        code: CudaCode,
        bucket: Bucket,
        memory: DeviceMemory,
        limits: Limits,
        kernel: Callable[[int], Binary],
        *,
        elsewhere: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.bucket = bucket
        self.sizes = all_sizes(bucket.sizes)
        self._device, self._code, self._limits, self._kernel = device, code, limits, kernel
        self._arena, self._counters = memory.arena, memory.counters
        phase = code.table.phases[bucket.phase]
        self._addresses = {
            **{name: held.address for name, held in memory.weights.items()},
            **{name: held.address for name, held in memory.states.items()},
            **{
                name: memory.arena + offset
                for name, offset in zip(phase.arena, bucket.offsets, strict=True)
            },
            **elsewhere,
        }
        self._values_at: dict[str, Held] = {}
        self._graphs: dict[str, Graph] = {}

    def value(self, name: str, kind: TensorType) -> Held:
        """Where an input or an output of the program lies."""
        if name not in self._values_at:
            buffer = self._code.table.phases[self.bucket.phase].values[name]
            bound = TensorType(kind.dtype, kind.bind(self.sizes))
            address = self._addresses[buffer]
            self._values_at[name] = Held(kind=bound, address=address, bytes=bound.bytes())
        return self._values_at[name]

    def replay(self, which: str) -> None:
        """Put the bucket, or a part of it, on the stream; recorded when it is first asked for."""
        if which not in self._graphs:
            self._graphs[which] = self.record(self.names(which))
        self._graphs[which].replay()

    def record(self, names: Collection[str]) -> Graph:
        """A graph of these steps alone, in the program's order; whoever asks for it closes it."""
        return record(self._device, [[*self.launches(names)]])

    @property
    def addresses(self) -> Mapping[str, int]:
        """Where each buffer of the phase lies."""
        return self._addresses

    def close(self) -> None:
        """Forget what was recorded."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def launches(self, wanted: Collection[str]) -> Iterator[BoundLaunch]:
        """The launches of these steps, in the program's order."""
        table, bucket = self._code.table, self.bucket
        steps = table.phases[bucket.phase].steps
        for step, index, scratch in zip(steps, bucket.tactics, bucket.scratch, strict=True):
            if step.name not in wanted:
                continue
            tactic = table.tactics[index]
            addresses = self._addresses_of(step, tactic, scratch)
            for launch in tactic.launches:
                binary = self._kernel(launch.kernel)
                values = tuple(self._values(binary, launch.operands, addresses))
                yield BoundLaunch(binary=binary, values=values, launch=launch)

    def names(self, which: str) -> set[str]:
        """The steps of the bucket, or of a part of it."""
        steps = self._code.table.phases[self.bucket.phase].steps
        if which == DRAWN:
            return {step.name for step in steps}
        if which == WHOLE:
            return {step.name for step in steps if step.op != SAMPLE}
        program = self._code.plan.programs[self.bucket.phase]
        moving = {ROWS}
        for step in program.steps:
            if moving & {*refs(step.args)}:
                moving |= {*step.outputs}
        return {step.name for step in steps if step.name in moving}

    def _addresses_of(
        self, step: TableStep, tactic: TableTactic, scratch: int
    ) -> Mapping[str, int]:
        found = {
            name: 0 if buffer is None else self._addresses[buffer]
            for name, buffer in step.buffers.items()
        }
        found |= _side_by_side(tactic.workspaces, self._arena + scratch)
        found |= _side_by_side(tactic.counters, self._counters)
        return found

    def _values(
        self, binary: Binary, operands: Sequence[Operand], addresses: Mapping[str, int]
    ) -> Iterator[Any]:
        if len(operands) != len(binary.arguments):
            raise _mismatch(binary, f"takes {len(binary.arguments)} arguments, not {len(operands)}")
        for (name, kind), operand in zip(binary.arguments, operands, strict=True):
            if kind.startswith("*") != (operand is None or isinstance(operand, Place)):
                raise _mismatch(binary, f"takes {kind} for {name!r}, not {operand!r}")
            match operand:
                case Place():
                    address = addresses[operand.name]
                    yield address + operand.offset if address else 0
                case Counted():
                    limits = self._limits
                    sized = operand.slots * limits.slots + operand.pages * limits.pages
                    yield sized + operand.plus
                case None:
                    yield 0
                case _:
                    yield operand


def record(device: Device, parts: Sequence[Sequence[BoundLaunch]]) -> Graph:
    """A graph of programs one after another; whoever asks for it closes it.

    Each begins when all before it has ended: kernels read inputs of their program, and what older
    ones wrote, before the launches ahead of them are complete.
    """
    for part in parts:
        for one in part:
            device.function(one.binary)  # nothing can be loaded while recording
    with device.recording() as graph:
        for part in parts:
            for index, one in enumerate(part):
                device.put(
                    one.binary,
                    one.values,
                    grid=one.launch.grid,
                    cluster=one.launch.cluster,
                    dependent=one.launch.dependent and index > 0,
                )
    return graph


def _side_by_side(spaces: Sequence[tuple[str, int]], start: int) -> dict[str, int]:
    ends = accumulate((align(size) for _, size in spaces), initial=start)
    return {name: at for (name, _), at in zip(spaces, ends, strict=False)}


def _mismatch(binary: Binary, what: str) -> IntegrityError:
    return IntegrityError(
        f"the engine's launch table does not go with its kernels: {binary.entry} {what}",
        hint="build the engine again, and report it if that does not help",
    )
