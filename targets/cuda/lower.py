"""A plan as a CUDA engine: its launch table and its kernels, compiled. No GPU is needed.

Layers are alike, so a tactic is chosen once for each kind of call and set of sizes. What depends on
how many slots and pages the runtime will have is found by asking for several such sizes: it must be
an integer that grows in proportion, and nothing but an operand.
"""

import hashlib
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lingc.device import Binary
from lingc.errors import InputError, StageError
from lingc.kernel import Kernel, Launch, Tactic, Tensor, align
from lingc.launch_table import (
    Bucket,
    Counted,
    LaunchTable,
    Operand,
    Place,
    TableLaunch,
    TablePhase,
    TableStep,
    TableTactic,
)
from lingc.plan import Plan, Program, Ref, Step, TensorType
from lingc.round_memory import ROUND
from lingc.targets.cuda.binaries import compile_all
from lingc.targets.cuda.buckets import Sizes, buckets
from lingc.targets.cuda.memory import Lifetime, place
from lingc.targets.cuda.pins import Kind, Pins, kind_of
from lingc.targets.cuda.rounds import RoundPhase, round_of
from lingc.targets.cuda.sampling import sample_of
from lingc.targets.cuda.schedule import OPEN, Call, arguments_of, calls
from lingc.targets.cuda.tactics import Choice, choose, key
from lingc.targets.spec import Target

Advance = Callable[[int], None]

_NARROWER = "another --page-size or --max-draft, or a model of widths that `docs/ops.md` lists"

_BASE = (4, 40)
_OTHERS = ((5, 40), (4, 41), (11, 97))
"""Slots and pages that operands are asked for: a base, one more of each, and a test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaEngine:
    """The code of a plan.

    Attributes:
        kernels: Digest -> file, compressed; in the table's order.
    """

    table: LaunchTable
    kernels: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A table whose kernels are not compiled yet; its launches say which of `wanted`."""

    table: LaunchTable
    wanted: tuple[Kernel, ...]


def schedule_all(
    plan: Plan, target: Target, *, sizes: Sequence[Sizes] | None = None,
    advance: Advance = lambda _done: None, invariant: bool = False,
) -> Scheduled:  # fmt: skip
    """Choose tactics and places for every bucket.

    Args:
        plan: For that target.
        target: With `cuda` engines.
        sizes: The buckets; all that a plan should have where None.
        advance: Called after each bucket.
        invariant: Whether a row's bits must not depend on the bucket (`lingc.targets.cuda.pins`).

    Raises:
        InputError: An op has no kernel for a bucket's sizes, or none that suits all.
        StageError: A launch depends on the state's size in a way that no table can say.
    """
    phases: dict[str, _Phase | RoundPhase] = {
        name: _Phase(plan, name, target) for name in plan.programs
    }
    wanted = buckets(plan, invariant=invariant) if sizes is None else sizes
    rounds = round_of(plan, target)
    if rounds is not None and any(one.phase == ROUND for one in wanted):
        phases[ROUND] = rounds
    # Where rounds have no kernels, the host does what is between their steps.
    every = [one for one in wanted if one.phase in phases]
    advance(len(wanted) - len(every))
    chosen = Tactics(plan, target, pins=Pins(target) if invariant else None)
    if invariant:
        for one in every:
            chosen.see(phases[one.phase], one)
    made = []
    for one in every:
        made.append(_bucket(phases[one.phase], one, chosen))
        advance(1)
    counters = (sum(align(size) for _, size in one.counters) for one in chosen.table)
    table = LaunchTable(
        target=target.name,
        arch=target.arch,
        kernels=(),
        tactics=tuple(chosen.table),
        phases=MappingProxyType({name: one.table() for name, one in phases.items()}),
        buckets=tuple(made),
        counter_bytes=max(counters, default=0),
    )
    return Scheduled(table=table, wanted=tuple(chosen.kernels))


def with_kernels(scheduled: Scheduled, binaries: Mapping[Kernel, Binary]) -> CudaEngine:
    """Compress the binaries, and give the table their names."""
    files = [compressed(binaries[kernel].to_bytes()) for kernel in scheduled.wanted]
    names = [hashlib.sha256(data).hexdigest() for data in files]
    old = scheduled.table
    table = LaunchTable(
        target=old.target,
        arch=old.arch,
        kernels=tuple(names),
        tactics=old.tactics,
        phases=old.phases,
        buckets=old.buckets,
        counter_bytes=old.counter_bytes,
    )
    return CudaEngine(table=table, kernels=MappingProxyType(dict(zip(names, files, strict=True))))


def compressed(data: bytes) -> bytes:
    """As files of an engine are; the same bytes each time."""
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=6)


# ---------------------------------------------------------------------------------------- a phase


@dataclass(slots=True)
class _Phase:
    """A program as its steps, kinds of calls, and buffers."""

    plan: Plan
    name: str
    target: Target
    program: Program = field(init=False)
    calls: list[Call] = field(init=False)
    of: dict[str, str] = field(init=False)
    kinds: list[int] = field(init=False)
    """For each call the first one that is alike: the same op on the same types and literals."""

    arena: tuple[str, ...] = field(init=False)
    lives: dict[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.program = self.plan.programs[self.name]
        self.calls, self.of = calls(self.program)
        if (sampling := sample_of(self.name, self.program, self.of, self.target)) is not None:
            self.program = sampling.program
            self.calls.append(sampling.call)
            self.of |= sampling.of
        seen: dict[Any, int] = {}
        self.kinds = [
            seen.setdefault((one.op.name, _typed(one.step, self.program)), index)
            for index, one in enumerate(self.calls)
        ]
        held = {*self.program.states, *self.program.weights}
        mine = [buffer for buffer in self.of.values() if buffer not in held]
        self.arena = tuple(dict.fromkeys((*self.program.inputs, *mine)))
        self.lives = self._lifetimes()

    def _lifetimes(self) -> dict[str, tuple[int, int]]:
        """Buffer of the arena -> first and last step that needs it."""
        end = len(self.calls)
        lives = dict.fromkeys(self.program.inputs, (-1, end))
        for index, call in enumerate(self.calls):
            for buffer in call.buffers.values():
                if buffer in self.arena and buffer not in self.program.inputs:
                    lives[buffer] = (lives.get(buffer, (index, index))[0], index)
        for value in self.program.outputs.values():
            if self.of[value] in lives:
                lives[self.of[value]] = (lives[self.of[value]][0], end)
        return lives

    def table(self) -> TablePhase:
        values = (*self.program.inputs, *self.program.outputs.values())
        return TablePhase(
            steps=tuple(
                TableStep(name=one.step.outputs[0], op=one.op.name, buffers=dict(one.buffers))
                for one in self.calls
            ),
            arena=self.arena,
            values={value: self.of[value] for value in values},
        )


def _typed(step: Step, program: Program) -> tuple[Any, ...]:
    """A step's arguments, tensors by their types."""
    return tuple(program.types[arg.name] if isinstance(arg, Ref) else arg for arg in step.args)


def _bucket(phase: _Phase | RoundPhase, one: Sizes, chosen: "Tactics") -> Bucket:
    found: dict[int, int] = {}
    for index in dict.fromkeys(phase.kinds):
        with _named(phase, one):
            found[index] = chosen.index(phase, phase.calls[index], one.axes)
    tactics = tuple(found[kind] for kind in phase.kinds)
    types = phase.program.types
    lifetimes = [Lifetime(types[name].bytes(one.axes), *phase.lives[name]) for name in phase.arena]
    lifetimes += [
        Lifetime(sum(align(size) for _, size in chosen.table[tactic].workspaces), step, step)
        for step, tactic in enumerate(tactics)
    ]
    offsets, total = place(lifetimes)
    return Bucket(
        phase=phase.name,
        sizes=dict(one.axes),
        tactics=tactics,
        offsets=offsets[: len(phase.arena)],
        scratch=offsets[len(phase.arena) :],
        arena_bytes=total,
    )


@contextmanager
def _named(phase: _Phase | RoundPhase, one: Sizes) -> Iterator[None]:
    """Say of which bucket it is that an op has no kernel."""
    try:
        yield
    except InputError as error:
        sizes = ", ".join(f"{axis} {size}" for axis, size in one.axes.items())
        raise InputError(f"{phase.name} with {sizes}: {error.problem}", hint=_NARROWER) from error


# ---------------------------------------------------------------------------------------- tactics


@dataclass(slots=True)
class Tactics:
    """Tactics in the order in which they are first asked for, each once."""

    plan: Plan
    target: Target
    pins: Pins | None = None
    table: list[TableTactic] = field(default_factory=list)
    kernels: dict[Kernel, int] = field(default_factory=dict)
    _known: dict[tuple[str, str, Kind | None], int] = field(default_factory=dict)

    def see(self, phase: _Phase | RoundPhase, one: Sizes) -> None:
        """Have the pins know the calls of a bucket."""
        for index in dict.fromkeys(phase.kinds):
            call = phase.calls[index]
            kind = self._pinned(phase, call)
            if kind is not None and self.pins is not None:
                with _named(phase, one):
                    given = arguments_of(phase.program, call.step, self._sizes(one.axes, _BASE))
                    self.pins.see(kind, call.op, given)

    def index(self, phase: _Phase | RoundPhase, call: Call, axes: Mapping[str, int]) -> int:
        """The tactic of a call, by its place in the table."""
        step, program = call.step, phase.program
        named = arguments_of(program, step, self._sizes(axes, _BASE), OPEN)
        text = key(named)
        kind = self._pinned(phase, call)
        if (call.op.name, text, kind) not in self._known:
            self._known[call.op.name, text, kind] = len(self.table)
            shapes = [one.shape for one in named if isinstance(one, TensorType)]
            is_open = any(isinstance(dim, str) for shape in shapes for dim in shape)
            rooms = (_BASE, *_OTHERS) if is_open else (_BASE,)
            given = [arguments_of(program, step, self._sizes(axes, room)) for room in rooms]
            if kind is None or self.pins is None:
                choices = [choose(call.op, self.target, one, known_as=named) for one in given]
            else:
                for one in given:
                    self.pins.see(kind, call.op, one)
                choices = [self.pins.choose(kind, one) for one in given]
            self.table.append(self._made(call, given[0], choices, text))
        return self._known[call.op.name, text, kind]

    def _pinned(self, phase: _Phase | RoundPhase, call: Call) -> Kind | None:
        if self.pins is None:
            return None
        return kind_of(phase.name, call.op, call.step, phase.program)

    def _sizes(self, axes: Mapping[str, int], room: tuple[int, int]) -> dict[str, int]:
        slots, pages = room
        return {**axes, "S": slots + 1, "R": pages * self.plan.page_size + 1}

    def _made(
        self, call: Call, given: Sequence[Any], choices: Sequence[Choice], text: str
    ) -> TableTactic:
        cost = call.op.cost(*given)
        choice = choices[0]
        tactic = choice.tactic
        launches = zip(*(one.tactic.launches for one in choices), strict=True)
        return TableTactic(
            op=call.op.name,
            key=text,
            tactic=tactic.name,
            origin=choice.origin,
            microseconds=round(1e6 * choice.seconds, 3),
            moved_bytes=cost.moved_bytes,
            flops=cost.flops,
            launches=tuple(self._launch(call, alike) for alike in launches),
            workspaces=_spaces(tactic, is_zeroed=False),
            counters=_spaces(tactic, is_zeroed=True),
        )

    def _launch(self, call: Call, alike: Sequence[Launch]) -> TableLaunch:
        """One launch from what it is for different rooms."""
        first = alike[0]
        for one in alike[1:]:
            same = (first.kernel, first.grid, first.cluster, first.dependent)
            if (one.kernel, one.grid, one.cluster, one.dependent) != same:
                raise _open_ended(call, "grid or kernel")
        operands = zip(*(one.operands for one in alike), strict=True)
        index = self.kernels.setdefault(first.kernel, len(self.kernels))
        return TableLaunch(
            kernel=index,
            grid=first.grid,
            cluster=first.cluster,
            dependent=first.dependent,
            operands=tuple(_operand(call, values) for values in operands),
        )


def _spaces(tactic: Tactic, *, is_zeroed: bool) -> tuple[tuple[str, int], ...]:
    return tuple((s.name, s.bytes) for s in tactic.workspaces if s.zeroed == is_zeroed)


def _operand(call: Call, values: Sequence[Any]) -> Operand:
    first = values[0]
    if isinstance(first, Tensor):
        if any(one != first for one in values):
            raise _open_ended(call, "an address")
        return Place(first.name, first.offset)
    if all(one == first for one in values):
        return first  # type: ignore[no-any-return]
    if not all(isinstance(one, int) for one in values):
        raise _open_ended(call, f"an operand {first!r}")
    base, a_slot, a_page, test = values
    by_slot, by_page = a_slot - base, a_page - base
    counted = Counted(by_slot, by_page, base - by_slot * _BASE[0] - by_page * _BASE[1])
    if counted.plus + by_slot * _OTHERS[-1][0] + by_page * _OTHERS[-1][1] != test:
        raise _open_ended(call, f"an operand {first!r}")
    return counted


def _open_ended(call: Call, what: str) -> StageError:
    return StageError(
        f"{call.op.name} of {call.step.outputs[0]!r} has {what} that depends on the number of "
        f"slots or pages in no way that a launch table can say",
        hint="a fault of the op's tactics; please report it",
    )


# ------------------------------------------------------------------------------------------ whole


def lower(
    plan: Plan, target: Target, *, cache_dir: Path, sizes: Sequence[Sizes] | None = None,
    jobs: int | None = None,
) -> CudaEngine:  # fmt: skip
    """Everything, without a word on the way."""
    scheduled = schedule_all(plan, target, sizes=sizes)
    binaries = compile_all(scheduled.wanted, target.arch, cache_dir, jobs=jobs)
    return with_kernels(scheduled, binaries)
