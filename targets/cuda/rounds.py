"""The ops between the programs of a speculative round, as a phase of the launch table.

    verify_inputs   before verify: its inputs from the drafts
    judge           behind verify: a token for each of its rows of logits
    accept          behind that: how many drafts hold, and the inputs of the draft layer

`lingc.round_memory` has the memory that they work on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from lingc.launch_table import TablePhase, TableStep
from lingc.op import OPS
from lingc.plan import Arg, Plan, Program, Ref, Step
from lingc.plugins import table as _table
from lingc.round_memory import ROUND, round_program
from lingc.targets.cuda.schedule import Call
from lingc.targets.spec import Target

assert _table.OPS is OPS  # the table is filled by its import

STEPS = ("verify_inputs", "judge", "accept")


@dataclass(slots=True)
class RoundPhase:
    """The phase; every op has its own kind of arguments."""

    plan: Plan
    name: str = field(default=ROUND, init=False)
    program: Program = field(init=False)
    calls: list[Call] = field(init=False)
    kinds: list[int] = field(default_factory=lambda: [*range(len(STEPS))], init=False)
    arena: tuple[str, ...] = field(default=(), init=False)
    lives: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.program = round_program(self.plan)
        self.calls = [_call(name, self.plan.page_size) for name in STEPS]
        steps = tuple(call.step for call in self.calls)
        self.program = replace(self.program, steps=steps)

    def table(self) -> TablePhase:
        return TablePhase(
            steps=tuple(
                TableStep(name=call.op.name, op=call.op.name, buffers=dict(call.buffers))
                for call in self.calls
            ),
            arena=(),
            values=MappingProxyType({}),
        )


def round_of(plan: Plan, target: Target) -> RoundPhase | None:
    """The phase; None where there is no draft layer, or the ops have no kernels for the model."""
    if not {"verify", "draft"} <= plan.programs.keys():
        return None
    phase = RoundPhase(plan)
    types = phase.program.types
    for call in phase.calls:
        given = [types[arg.name] if isinstance(arg, Ref) else arg for arg in call.step.args]
        if call.op.refusal(target, *given) is not None:
            return None
    return phase


def _call(name: str, page_size: int) -> Call:
    """A step over tensors of the round by their own names."""
    op = OPS[name]
    args: list[Arg] = [page_size if one == "page_size" else Ref(one) for one in op.arguments]
    names = {*op.arguments, *op.results} - {"page_size"}
    step = Step(op=f"lingc.{name}", args=tuple(args), outputs=(name,))
    buffers: Mapping[str, str | None] = {one: one for one in sorted(names)}
    return Call(step=step, op=op, buffers=buffers)
