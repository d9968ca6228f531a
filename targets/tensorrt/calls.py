"""Which steps become plugins, and the table of what those launch."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from lingc.device import Binary
from lingc.errors import InputError, UnsupportedError
from lingc.kernel import Kernel
from lingc.op import OPS, Op
from lingc.plan import Arg, Plan, Program, Ref, Size, Step, TensorType
from lingc.plugin_table import Axis, Call, Dim, Output, PluginTable
from lingc.plugins import table as _table
from lingc.targets.cuda.buckets import Sizes
from lingc.targets.cuda.lower import Tactics, compressed
from lingc.targets.cuda.schedule import OPEN
from lingc.targets.cuda.schedule import Call as Scheduled
from lingc.targets.cuda.tactics import key
from lingc.targets.spec import Target
from lingc.targets.tensorrt.profile import sizes

assert _table.OPS is OPS  # the table is filled by its import


@dataclass(frozen=True, slots=True)
class _Owner:
    """What tactics are chosen for: they ask for the program alone."""

    program: Program
    name: str


@dataclass(slots=True)
class Calls:
    """The plugin calls of all phases, each kind of call once.

    Args:
        plan: Made for the target.
        target: What kernels are compiled for.
        buckets: Sizes that calls are made for; those of the plan where None.
    """

    plan: Plan
    target: Target
    buckets: tuple[Sizes, ...] | None = None
    made: list[Call] = field(default_factory=list)
    _tactics: Tactics = field(init=False)
    _known: dict[Any, int] = field(default_factory=dict)
    _sizes: tuple[Sizes, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._tactics = Tactics(self.plan, self.target)
        self._sizes = sizes(self.plan) if self.buckets is None else self.buckets

    def number(self, phase: str, step: Step) -> int:
        """The number of a step's call in the table; equal calls of a phase have one.

        Raises:
            InputError: The op has no kernel for a bucket's sizes on this target.
            UnsupportedError: The step is no op of ours.
        """
        program = self.plan.programs[phase]
        op = OPS.get(step.op.removeprefix("lingc."))
        if op is None:
            raise UnsupportedError(
                f"step {step.outputs[0]!r} is {step.op}, which TensorRT engines do not have",
                hint="a fault of the passes; please report it",
            )
        alike = (phase, step.op, _typed(step.args, program))
        if alike not in self._known:
            self._known[alike] = len(self.made)
            self.made.append(self._call(phase, op, step))
        return self._known[alike]

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """What has to be compiled, in the table's order."""
        return tuple(self._tactics.kernels)

    def table(self, binaries: Mapping[Kernel, Binary]) -> tuple[PluginTable, dict[str, bytes]]:
        """The table, and the kernels' files by digest."""
        images = [binaries[kernel].to_bytes() for kernel in self.kernels]
        files = [compressed(image) for image in images]
        names = [hashlib.sha256(data).hexdigest() for data in files]
        made = PluginTable(
            target=self.target.name,
            arch=self.target.arch,
            page_size=self.plan.page_size,
            kernels=tuple(names),
            images=tuple(hashlib.sha256(image).hexdigest() for image in images),
            tactics=tuple(self._tactics.table),
            calls=tuple(self.made),
        )
        return made, dict(zip(names, files, strict=True))

    def _call(self, phase: str, op: Op, step: Step) -> Call:
        program = self.plan.programs[phase]
        given = [
            (name, arg, program.types[arg.name])
            for name, arg in zip(op.arguments, step.args, strict=True)
            if isinstance(arg, Ref)
        ]
        found = _axes([kind for _, _, kind in given])
        names = [name for name, _, _ in given]
        sized = tuple(axis for axis in found if axis not in OPEN)
        outputs = tuple(
            Output(
                name=name,
                dtype=program.types[value].dtype,
                shape=tuple(_dim(dim, found) for dim in program.types[value].shape),
                place=names.index(name) if name in names else -1,
            )
            for name, value in zip(op.results, step.outputs, strict=True)
        )
        scheduled = Scheduled(step=step, op=op, buffers={})
        choices: dict[tuple[int, ...], int] = {}
        for one in self._sizes:
            chosen = tuple(one.axes.get(axis, -1) for axis in sized)
            if one.phase == phase and chosen not in choices:
                choices[chosen] = self._choice(phase, scheduled, one)
        return Call(
            op=op.name,
            key=key([program.types[a.name] if isinstance(a, Ref) else a for a in step.args]),
            literals={
                name: _literal(arg)
                for name, arg in zip(op.arguments, step.args, strict=True)
                if not isinstance(arg, Ref)
            },
            inputs=tuple((name, kind.dtype, len(kind.shape)) for name, _, kind in given),
            outputs=outputs,
            axes=tuple(found[axis] for axis in sized),
            choices=choices,
            slots=found.get("S"),
            rows=found.get("R"),
        )

    def _choice(self, phase: str, scheduled: Scheduled, one: Sizes) -> int:
        owner = cast("Any", _Owner(self.plan.programs[phase], phase))
        try:
            return self._tactics.index(owner, scheduled, one.axes)
        except InputError as error:
            named = ", ".join(f"{axis} {size}" for axis, size in one.axes.items())
            raise InputError(
                f"{phase} with {named}: {error.problem}",
                hint="`docs/ops.md` lists the sizes that kernels take",
            ) from error


def _typed(args: Sequence[Arg], program: Program) -> tuple[Any, ...]:
    return tuple(program.types[arg.name] if isinstance(arg, Ref) else arg for arg in args)


def _axes(kinds: Sequence[TensorType]) -> dict[str, Axis]:
    """Where each open size is read, by its letter."""
    found: dict[str, Axis] = {}
    for number, kind in enumerate(kinds):
        for axis, dim in enumerate(kind.shape):
            if isinstance(dim, str) and "*" not in dim:
                found.setdefault(dim, Axis(number, axis))
    return found


def _dim(dim: int | str, found: Mapping[str, Axis]) -> Dim:
    if isinstance(dim, int):
        return dim
    times, _, letter = dim.rpartition("*")
    return replace(found[letter], times=int(times or 1))


def _literal(arg: Arg) -> Any:
    """A literal as JSON has it."""
    assert not isinstance(arg, Size), "an op takes sizes from its tensors"
    return list(arg) if isinstance(arg, tuple) else arg
