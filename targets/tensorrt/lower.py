"""Lowers a plan to TensorRT engines, one a phase, and the table of what their plugins launch.

    steps -> native layers (`native.py`), views (`views.py`), or a plugin for anything else

States and weights are inputs of a network, and updated states outputs; the runtime binds both to
one buffer. So an engine holds no weights, but for those that TensorRT fuses only as constants.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from lingc import plugin_table
from lingc.device import Binary
from lingc.engine import canonical
from lingc.errors import StageError, UnsupportedError
from lingc.kernel import Kernel
from lingc.plan import Arg, Plan, Program, Ref, Step, refs
from lingc.plugin_table import PluginTable
from lingc.runtime.tensorrt_constants import PLAIN, SIGNED, flipped
from lingc.runtime.tensorrt_plugin import Launcher, OpPlugin, plugin_class, register
from lingc.targets.cuda.lower import compressed
from lingc.targets.spec import Target
from lingc.targets.tensorrt.backend import Backend
from lingc.targets.tensorrt.body import Body, Value
from lingc.targets.tensorrt.calls import Calls
from lingc.targets.tensorrt.native import EMBEDDED, NATIVE, is_native
from lingc.targets.tensorrt.profile import ranges, shapes
from lingc.targets.tensorrt.views import VIEWS

if TYPE_CHECKING:
    from lingc.targets.cuda.buckets import Sizes

Compile = Callable[[tuple[Kernel, ...]], Mapping[Kernel, Binary]]
Array = NDArray[Any]


PLUGIN = "plugin "
"""What becomes of a step, where a report is to show it: a plugin (its op follows), or a product of
`native.EMBEDDED`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tabled:
    """The plugins of a plan before any network is made.

    Attributes:
        table: What they launch.
        data: The table's file, compressed.
        digest: SHA-256 of what is in it, by which plugins name it.
        kernels: Digest -> file, compressed.
        numbers: For each phase, step by step, the number of its call; None for a native one.
    """

    table: PluginTable
    data: bytes
    kernels: Mapping[str, bytes]
    numbers: Mapping[str, tuple[int | None, ...]]
    digest: str


@dataclass(slots=True, kw_only=True)
class Network:
    """A phase's network, and what must live as long as it."""

    phase: str
    builder: Any
    network: Any
    body: Body
    plugins: dict[str, OpPlugin] = field(default_factory=dict)
    """Name of the layer -> its plugin."""

    roles: dict[str, str] = field(default_factory=dict)
    """First value of a step -> what became of it, where a report is to show that."""

    embedded: set[str] = field(default_factory=set)
    """Weights that became constants."""

    inputs: set[str] = field(default_factory=set)
    """Names of its inputs: of the program's, of states, and of weights that are bound."""

    constants: dict[str, tuple[Array, int]] = field(default_factory=dict)
    """Embedded weights that lie in a constant, and what each of their bytes is XORed with there."""


def calls_of(
    plan: Plan, target: Target, *, embeds: bool, buckets: "tuple[Sizes, ...] | None" = None
) -> tuple[Calls, dict[str, tuple[int | None, ...]]]:
    """The plugin calls of a plan, and which step is which.

    Args:
        plan: Made for the target.
        target: What kernels are compiled for.
        embeds: Whether weights are there for those layers of TensorRT that want constants.
        buckets: Sizes that plugins have launches for; those of the plan where None.

    Raises:
        UnsupportedError: Activations are not BF16.
        InputError: An op has no kernel for a bucket's sizes.
    """
    if plan.activation != "bf16":
        raise UnsupportedError(
            f"the plan has {plan.activation} activations, and TensorRT engines compute in bf16",
            hint="build for a GPU",
        )
    calls = Calls(plan, target, buckets)
    numbers = {
        phase: tuple(
            None
            if step.op in VIEWS or is_native(step, program, embeds=embeds)
            else calls.number(phase, step)
            for step in program.steps
        )
        for phase, program in plan.programs.items()
    }
    return calls, numbers


def tabled(
    plan: Plan, target: Target, compile_kernels: Compile, *, embeds: bool = False,
    buckets: "tuple[Sizes, ...] | None" = None,
) -> Tabled:  # fmt: skip
    """Choose the plugins' launches and compile their kernels; see `calls_of`."""
    calls, numbers = calls_of(plan, target, embeds=embeds, buckets=buckets)
    table, kernels = calls.table(compile_kernels(calls.kernels))
    data = canonical.encode(plugin_table.to_value(table))
    return Tabled(
        table=table,
        data=compressed(data),
        kernels=kernels,
        numbers=numbers,
        digest=hashlib.sha256(data).hexdigest(),
    )


class Lowering:
    """Networks and engines of one plan.

    Args:
        backend: The flavour.
        plan: Made for the target.
        target: What to build for.
        plugins: Of the plan.
        weights: Of the plan, for what becomes constants; needed where `plugins` was made so.
        aliased: Have states updated in place be one tensor to TensorRT, which parts what surrounds
            the plugin; else they are an input and an output that may lie in one place.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        target: Target,
        plugins: Tabled,
        *,
        weights: Mapping[str, Array] | None = None,
        aliased: bool = False,
    ) -> None:
        self.backend = backend
        self.plan = plan
        self.target = target
        self.aliased = aliased
        self._tabled = plugins
        self.weights: Mapping[str, Array] = {} if weights is None else weights
        self._launcher = Launcher(table=plugins.table, digest=plugins.digest, aliased=aliased)
        register(backend.trt, self._launcher)

    def network(self, phase: str) -> Network:
        """The network of a phase."""
        program = self.plan.programs[phase]
        numbers = self._tabled.numbers[phase]
        kind = plugin_class(self.backend.trt)
        plugins = [kind(self._launcher, number) for number in numbers if number is not None]
        _refuse_idle(program, numbers)
        builder = self.backend.builder()
        network = self.backend.network(builder, plugins)
        network.name = phase
        body = Body(self.backend, network)
        made = Network(phase=phase, builder=builder, network=network, body=body)
        _Phase(made, program, plugins, self).lower(numbers)
        return made

    def into(self, made: Network, values: Mapping[str, Value]) -> dict[str, Value]:
        """Add a phase's steps to a network that has others, for a flavour that can.

        Args:
            made: The network, of the phase.
            values: What the phase takes, its weights that are no constants included.

        Returns:
            Those and the values of all steps.
        """
        numbers = self._tabled.numbers[made.phase]
        kind = plugin_class(self.backend.trt)
        plugins = [kind(self._launcher, number) for number in numbers if number is not None]
        lowered = _Phase(made, self.plan.programs[made.phase], plugins, self)
        lowered.values.update(values)
        lowered.steps(numbers)
        return lowered.values

    def engine(self, made: Network) -> bytes:
        """Build a network.

        Raises:
            StageError: TensorRT refuses.
        """
        config = self.backend.config(made.builder, self.target, aliased=self.aliased)
        profile = made.builder.create_optimization_profile()
        program, found = self.plan.programs[made.phase], ranges(self.plan, made.phase)
        for name in (*program.inputs, *program.states):
            kind = program.types[name]
            if any(isinstance(dim, str) for dim in kind.shape):
                profile.set_shape(name, *shapes(kind, found))
        config.add_optimization_profile(profile)
        return self.backend.build(made.builder, made.network, config)


class _Phase:
    """One program on its way into a network."""

    def __init__(
        self, made: Network, program: Program, plugins: list[OpPlugin], lowering: Lowering
    ) -> None:
        self._made = made
        self._program = program
        self._plugins = plugins
        self._lowering = lowering
        self.values: dict[str, Value] = {}

    def lower(self, numbers: tuple[int | None, ...]) -> None:
        program, body = self._program, self._made.body
        read = {
            name
            for step, number in zip(program.steps, numbers, strict=True)
            for index, arg in enumerate(step.args)
            if number is not None or index not in _constants(step)
            for name in refs((arg,))
        }
        for name in (*program.inputs, *program.states, *program.weights):
            if name not in program.weights or name in read:
                self.values[name] = body.input(name, program.types[name])
                self._made.inputs.add(name)
        self.steps(numbers)
        for name in dict.fromkeys((*program.outputs.values(), *program.updates.values())):
            body.output(self.values[name], name)

    def steps(self, numbers: tuple[int | None, ...]) -> None:
        """Add what becomes of the steps; all that they take is there."""
        seen = 0
        for step, number in zip(self._program.steps, numbers, strict=True):
            self._made.body.begin(step)
            if number is None:
                self._native(step)
            else:
                op = self._plugins[seen].call.op
                self._made.roles[step.outputs[0]] = PLUGIN + op
                self._plugin(step, seen)
                seen += 1

    def _native(self, step: Step) -> None:
        if _constants(step):
            self._embedded(step)
            return
        args = [self._argument(arg) for arg in step.args]
        if step.op in VIEWS:
            kind = self._program.types[step.outputs[0]]
            self.values[step.outputs[0]] = VIEWS[step.op](self._made.body, kind, *args)
            return
        made = NATIVE[step.op.removeprefix("lingc.")](self._made.body, *args)
        results = made if isinstance(made, tuple) else (made,)
        self.values.update(zip(step.outputs, results, strict=True))

    def _embedded(self, step: Step) -> None:
        """A layer of whose weights some are constants."""
        known = EMBEDDED[step.op.removeprefix("lingc.")]
        args: list[Any] = []
        for index, arg in enumerate(step.args):
            if index in known.constants:
                assert isinstance(arg, Ref), "a weight stands there"
                args.append(self._lowering.weights[arg.name])
                self._made.embedded.add(arg.name)
            else:
                args.append(self._argument(arg))
        self._made.roles[step.outputs[0]] = known.role
        before = len(self._made.body.constants)
        self.values[step.outputs[0]] = known.function(self._made.body, *args)
        added = list(self._made.body.constants.values())[before:]
        for index in known.constants:
            arg, values = step.args[index], args[index]
            assert isinstance(arg, Ref), "a weight stands there"
            flip = next((f for f in (PLAIN, SIGNED) if _is_among(values, f, added)), None)
            if flip is not None:
                self._made.constants[arg.name] = (values, flip)

    def _plugin(self, step: Step, seen: int) -> None:
        plugin = self._plugins[seen]
        inputs = [self.values[arg.name].tensor for arg in step.args if isinstance(arg, Ref)]
        layer = self._lowering.backend.plugin(self._made.network, seen, plugin, inputs)
        self._made.body.named(layer, plugin.call.op)
        self._made.plugins[layer.name] = plugin
        for index, name in enumerate(step.outputs):
            self.values[name] = Value(layer.get_output(index), self._program.types[name])

    def _argument(self, arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return self.values[arg.name]
        if isinstance(arg, tuple):
            return tuple(self._argument(item) for item in arg)
        return arg


def _is_among(values: Array, flip: int, arrays: Sequence[Array]) -> bool:
    """Whether an array has the bytes of these values, each XORed with `flip`."""
    wanted = flipped(values, flip)
    return any(one.nbytes == len(wanted) and one.tobytes() == wanted for one in arrays)


def _constants(step: Step) -> tuple[int, ...]:
    """Numbers of the arguments that are constants, where the step is native."""
    known = EMBEDDED.get(step.op.removeprefix("lingc."))
    return () if known is None else known.constants


def _refuse_idle(program: Program, numbers: tuple[int | None, ...]) -> None:
    """Refuse a plugin without readers, with which TensorRT for RTX corrupts memory and aborts.

    Raises:
        StageError: There is one.
    """
    read = {name for step in program.steps for name in refs(step.args)}
    read |= {*program.outputs.values(), *program.updates.values()}
    for step, number in zip(program.steps, numbers, strict=True):
        if number is not None and not read.intersection(step.outputs):
            raise StageError(
                f"nobody reads {', '.join(map(repr, step.outputs))} of {step.op}",
                hint="a fault of the passes; please report it",
            )
