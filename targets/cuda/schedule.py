"""A program of the plan as launches, for given sizes of its symbolic axes.

Names of tensors in the launches of a tactic are the op's; here they become the program's. Values
that share memory are resolved to one buffer: results that an op updates in place, and reshapes.
"""

from collections.abc import Mapping
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


def schedule(plan: Plan, phase: str, sizes: Mapping[str, int], target: Target) -> Schedule:
    """Choose a tactic for every step.

    Raises:
        InputError: An op has no kernel for its sizes.
        StageError: A step that is neither an op nor a view.
    """
    program = plan.programs[phase]
    of = {name: name for name in (*program.inputs, *program.states, *program.weights)}
    steps: list[Scheduled] = []
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
        steps.append(_scheduled(program, step, OPS[name], of, sizes, target))
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


def _scheduled(
    program: Program, step: Step, op: Op, of: dict[str, str], sizes: Mapping[str, int],
    target: Target,
) -> Scheduled:  # fmt: skip
    arguments = [_bound(arg, program, sizes) for arg in step.args]
    choice = choose(op, target, arguments)
    buffers: dict[str, str | None] = {}
    for name, arg in zip(op.arguments, step.args, strict=True):
        if arg is None or isinstance(arg, Ref):
            buffers[name] = of[arg.name] if isinstance(arg, Ref) else None
    for result, value in zip(op.results, step.outputs, strict=True):
        of[value] = buffers.setdefault(result, value) or value
    return Scheduled(step=step, op=op, arguments=tuple(arguments), choice=choice, buffers=buffers)


def _name(arg: Arg) -> str:
    assert isinstance(arg, Ref), "a view is of a tensor"
    return arg.name


def _bound(arg: Arg, program: Program, sizes: Mapping[str, int]) -> object:
    """An argument as tactics take it: sizes are numbers."""
    match arg:
        case Ref(name):
            kind = program.types[name]
            return TensorType(kind.dtype, kind.bind(sizes))
        case Size(name):
            return sizes[name]
        case tuple():
            return [_bound(item, program, sizes) for item in arg]
    return arg
