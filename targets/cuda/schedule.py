"""A program of the plan as launches, for given sizes of its symbolic axes.

Names of tensors in the launches of a tactic are the op's; here they become the program's. Values
that share memory are resolved to one buffer: results that an op updates in place, and reshapes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lingc.errors import StageError
from lingc.kernel import align
from lingc.op import OPS, Op
from lingc.plan import Arg, Plan, Program, Ref, Size, Step, TensorType
from lingc.plugins import table as _table
from lingc.targets.cuda.tactics import Choice, choose
from lingc.targets.spec import Target

assert _table.OPS is OPS  # the table is filled by its import

OPEN = ("S", "R")
"""Sizes of the runtime's own: how many slots and cache rows there are, scratch included."""

_VIEWS = ("aten.reshape.default", "aten.view.default")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """One step and how it runs.

    Attributes:
        arguments: Of the op, as `tactics` and `cost` take them.
        buffers: Name in the tactic's launches -> buffer of the program; workspaces as they are.
    """

    step: Step
    op: Op
    arguments: tuple[Any, ...]
    choice: Choice
    buffers: Mapping[str, str | None]

    @property
    def moved_bytes(self) -> float:
        """What the op must read and write."""
        return self.op.cost(*self.arguments).moved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One phase for one set of sizes.

    Attributes:
        sizes: Symbolic axis -> value.
        buffers: Buffer -> type of what it holds; inputs, states, weights and activations.
        of: Value of the program -> its buffer.
        workspace_bytes: The most that any tactic needs, zeroed parts apart.
        counter_bytes: The most that any tactic needs zeroed.
    """

    steps: tuple[Scheduled, ...]
    sizes: Mapping[str, int]
    buffers: Mapping[str, TensorType]
    of: Mapping[str, str]
    workspace_bytes: int
    counter_bytes: int

    @property
    def launches(self) -> int:
        return sum(len(one.choice.tactic.launches) for one in self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One step as a call of its op, for any sizes.

    Attributes:
        buffers: Name in a tactic's launches -> buffer of the program; None for what is absent.
    """

    step: Step
    op: Op
    buffers: Mapping[str, str | None]


def calls(program: Program) -> tuple[list[Call], dict[str, str]]:
    """The steps that launch something, and the buffer of every value.

    Raises:
        StageError: A step that is neither an op nor a view, or overwrites an input.
    """
    of = {name: name for name in (*program.inputs, *program.states, *program.weights)}
    found: list[Call] = []
    for step in program.steps:
        if step.op in _VIEWS:
            of[step.outputs[0]] = of[_name(step.args[0])]
            continue
        name = step.op.removeprefix("lingc.")
        if name not in OPS:
            raise StageError(
                f"step {step.outputs[0]!r} is {step.op}, which no kernel runs",
                hint="a fault of the passes; please report it",
            )
        found.append(_call(step, OPS[name], of))
        for result in found[-1].op.results:
            if found[-1].buffers[result] in program.inputs:
                raise StageError(
                    f"step {step.outputs[0]!r} overwrites the input {found[-1].buffers[result]!r}",
                    hint="a fault of the passes; please report it",
                )
    return found, of


def _call(step: Step, op: Op, of: dict[str, str]) -> Call:
    buffers: dict[str, str | None] = {}
    for name, arg in zip(op.arguments, step.args, strict=True):
        if arg is None or isinstance(arg, Ref):
            buffers[name] = of[arg.name] if isinstance(arg, Ref) else None
    for result, value in zip(op.results, step.outputs, strict=True):
        of[value] = buffers.setdefault(result, value) or value
    return Call(step=step, op=op, buffers=buffers)


def schedule(plan: Plan, phase: str, sizes: Mapping[str, int], target: Target) -> Schedule:
    """Choose a tactic for every step.

    Raises:
        InputError: An op has no kernel for its sizes.
        StageError: A step that is neither an op nor a view.
    """
    program = plan.programs[phase]
    found, of = calls(program)
    steps = [_scheduled(program, call, sizes, target) for call in found]
    spaces = [one.choice.tactic.workspaces for one in steps]
    return Schedule(
        steps=tuple(steps),
        sizes=dict(sizes),
        buffers={
            buffer: TensorType(program.types[buffer].dtype, program.types[buffer].bind(sizes))
            for buffer in dict.fromkeys(of.values())
        },
        of=of,
        workspace_bytes=max(
            (sum(align(s.bytes) for s in some if not s.zeroed) for some in spaces), default=0
        ),
        counter_bytes=max(
            (sum(align(s.bytes) for s in some if s.zeroed) for some in spaces), default=0
        ),
    )


def _scheduled(program: Program, call: Call, sizes: Mapping[str, int], target: Target) -> Scheduled:
    arguments = arguments_of(program, call.step, sizes)
    named = arguments_of(program, call.step, sizes, OPEN)
    return Scheduled(
        step=call.step,
        op=call.op,
        arguments=tuple(arguments),
        choice=choose(call.op, target, arguments, known_as=named),
        buffers=call.buffers,
    )


def arguments_of(
    program: Program, step: Step, sizes: Mapping[str, int], open_sizes: Collection[str] = ()
) -> list[Any]:
    """Arguments of a step's op as tactics take them: sizes are numbers, but for open ones."""
    return [_bound(arg, program, sizes, open_sizes) for arg in step.args]


def _name(arg: Arg) -> str:
    assert isinstance(arg, Ref), "a view is of a tensor"
    return arg.name


def _bound(
    arg: Arg, program: Program, sizes: Mapping[str, int], open_sizes: Collection[str]
) -> object:
    match arg:
        case Ref(name):
            kind = program.types[name]
            shape = zip(kind.shape, kind.bind(sizes), strict=True)
            kept = tuple(dim if dim in open_sizes else size for dim, size in shape)
            return TensorType(kind.dtype, kept)
        case Size(name):
            return sizes[name]
        case tuple():
            return [_bound(item, program, sizes, open_sizes) for item in arg]
    return arg
