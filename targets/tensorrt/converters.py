"""Our ops in modules that Torch-TensorRT compiles: converters, registered by one function.

    converters = register_converters("h100-sxm", sizes=(1, 8, 64))
    torch_tensorrt.dynamo.compile(torch.export.export(module, inputs), inputs)

An op becomes what it becomes in our own engines, by the same functions: native layers, or a plugin
with a table of its own. A plugin has launches for the sizes that were asked for and no others, so a
module of open sizes must be called with those. For standard TensorRT: a network of TensorRT for RTX
takes plugins from its parser alone.
"""

import functools
import importlib
import itertools
import logging
import operator
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from lingc import targets
from lingc.device import Binary, Device
from lingc.errors import InputError, LingcError, MissingExtraError, UnsupportedError, UsageError
from lingc.kernel import Kernel
from lingc.op import DTYPE_NAME, OPS, Op
from lingc.plan import Arg, Plan, Program, Ref, Step, TensorType
from lingc.plugins import table as _table
from lingc.quantize.layouts import PLAIN
from lingc.runtime.tensorrt_deploy import write_bundle
from lingc.runtime.tensorrt_library import STANDARD
from lingc.runtime.tensorrt_plugin import DTYPE, Launcher, register
from lingc.targets.cuda.binaries import compile_all
from lingc.targets.cuda.buckets import Sizes
from lingc.targets.cuda.tactics import offered
from lingc.targets.spec import Target
from lingc.targets.tensorrt.backend import StandardBackend
from lingc.targets.tensorrt.body import Body, Value
from lingc.targets.tensorrt.lower import Lowering, Network, Tabled, tabled
from lingc.targets.tensorrt.native import EMBEDDED, is_native

assert _table.OPS is OPS  # the table is filled by its import

Array = NDArray[Any]
Compile = Callable[[tuple[Kernel, ...]], Mapping[Kernel, Binary]]

PHASE = "eager"
"""Of the one program of a converted op."""

MOST_SETS = 1024
"""Sets of sizes that a plugin has launches for."""

_LOG = logging.getLogger(__name__)


def register_converters(
    target: str | Target,
    *,
    sizes: Sequence[int] = (),
    cache_dir: Path | None = None,
    compile_kernels: Compile | None = None,
    device: Callable[[], Device] = Device,
) -> "Converters":
    """Have Torch-TensorRT convert our ops from now on, before its own converters.

    Args:
        target: What kernels are compiled for: the GPU's (`lingc targets`).
        sizes: What each open size of a module may be when it runs; only modules of fixed sizes are
            converted where none is given.
        cache_dir: Where compiled kernels are kept; not at all where None.
        compile_kernels: Compiles kernels in another way.
        device: Makes what launches them, once.

    Returns:
        What was registered; it must be kept as long as an engine that was compiled with it runs.

    Raises:
        MissingExtraError: Torch-TensorRT, or the TensorRT that it is for, is not installed.
        UsageError: There is no such target, or a size is none.
    """
    for size in sizes:
        if type(size) is not int or size < 1:
            raise UsageError(
                f"sizes has {size!r}, and a plugin has launches for whole sizes from 1 on",
                hint="leave it out: what has no elements needs no engine",
            )
    try:
        trt: Any = importlib.import_module(STANDARD)
        conversion: Any = importlib.import_module("torch_tensorrt.dynamo.conversion")
    except ImportError as error:
        raise MissingExtraError(
            f"converters are for Torch-TensorRT and standard TensorRT, and {error.name!r} is not "
            "installed here",
            hint="on a host with a GPU: pip install 'lingc[build,tensorrt,torch-tensorrt]'; "
            "elsewhere `lingc build` needs neither",
        ) from error
    found = targets.get(target) if isinstance(target, str) else target
    make: Compile = compile_kernels or functools.partial(_compile, target=found, folder=cache_dir)
    made = Converters(StandardBackend(trt), found, tuple(sizes), make, device)
    for op in OPS.values():
        conversion.dynamo_tensorrt_converter(
            op.overload,
            capability_validator=made.can_convert,
            priority=conversion.ConverterPriority.HIGH,
            supports_dynamic_shapes=True,
        )(made.convert)
    return made


def _compile(
    kernels: tuple[Kernel, ...], *, target: Target, folder: Path | None
) -> Mapping[Kernel, Binary]:
    place = nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="lingc-")
    with place as where:
        return compile_all(kernels, target.arch, Path(where))


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A kind of call of an op: its plan of one step, and what its plugin launches.

    Attributes:
        binaries: Kernels in the order of the table.
    """

    plan: Plan
    plugins: Tabled
    binaries: tuple[Binary, ...]


@dataclass(slots=True)
class Converters:
    """Converts nodes of our ops; `register_converters` makes one."""

    backend: StandardBackend
    target: Target
    sizes: tuple[int, ...]
    compile_kernels: Compile
    make_device: Callable[[], Device]
    _known: dict[Any, Converted] = field(default_factory=dict)
    _kept: list[Network] = field(default_factory=list)
    _device: Device | None = None

    def can_convert(self, node: Any, _settings: Any = None) -> bool:
        """Whether a node can be converted; the log says why not."""
        reason = self.refusal(node)
        if reason is not None:
            _LOG.warning("%s stays in PyTorch: %s", node.name, reason)
        return reason is None

    def refusal(self, node: Any) -> str | None:
        """Why a node cannot be converted, or None."""
        op = _op_of(node.target)
        known = EMBEDDED.get(op.name)
        try:
            given = _in_order(op, node.args, node.kwargs)
            args, results = _typed(given), _results(node)
        except UnsupportedError as error:
            return error.problem
        embeds = known is not None and all(_is_constant(given[i]) for i in known.constants)
        return self._refusal(node.name, op, args, results, embeds=embeds)

    def refusal_of(self, op: Op, arguments: Sequence[Any]) -> str | None:
        """Why a call of an op could not be converted, its tensors inputs of the module, or None."""
        held = [one.to("meta") if isinstance(one, torch.Tensor) else one for one in arguments]
        made = op.overload(*held)
        results = (made,) if isinstance(made, torch.Tensor) else tuple(made)
        return self._refusal(op.name, op, held, results, embeds=False)

    def _refusal(
        self, name: str, op: Op, args: list[Any], results: Sequence[Any], *, embeds: bool
    ) -> str | None:
        try:
            plan, letters = self._planned(name, op, args, results)
            program = plan.programs[PHASE]
            step = program.steps[0]
            if is_native(step, program, embeds=embeds):
                return None
            _refuse_empty(program)
            for one in letters.sets(self.sizes):
                given = [_bound(arg, program, dict(one)) for arg in step.args]
                offered(op, self.target, given)
                laid = {*op.layouts(self.target, *given).values()}
                if laid - {PLAIN}:
                    return f"its kernels want weights in another order ({', '.join(sorted(laid))})"
        except LingcError as error:
            return error.problem
        return None

    def convert(
        self, ctx: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
    ) -> Any:
        """A converter as Torch-TensorRT calls it.

        Args:
            ctx: Its context; `net` is the network, `current_node` the node.
            target: The op's overload.
            args: Tensors of the network, weights as torch or NumPy have them, and literals.
            name: Of the node, unique.

        Returns:
            The result's tensor, or a tuple of them.

        Raises:
            UnsupportedError: A size is open in a way that no table can say, or a tensor that a
                plugin takes or makes is empty.
            InputError: The op has no kernel for a size.
        """
        op, node = _op_of(target), ctx.current_node
        given = _in_order(op, args, kwargs)
        typed = _typed(_in_order(op, node.args, node.kwargs))
        plan, letters = self._planned(name, op, typed, _results(node))
        program = plan.programs[PHASE]
        arrays = {
            f"{name}.{argument}": _array(value)
            for argument, value in zip(op.arguments, given, strict=True)
            if _is_array(value)
        }
        known = EMBEDDED.get(op.name)
        inside = () if known is None else tuple(op.arguments[i] for i in known.constants)
        embeds = known is not None and all(f"{name}.{one}" in arrays for one in inside)
        converted = self._converted(op, plan, letters, embeds=embeds)
        # A network by itself: names of steps and values are those of this node.
        lowering = Lowering(self.backend, plan, self.target, converted.plugins, weights=arrays)
        if converted.plugins.table.calls:
            register(self.backend.trt, self._launcher(converted))
        body = Body(self.backend, ctx.net)
        made = Network(phase=PHASE, builder=None, network=ctx.net, body=body)
        body.begin(program.steps[0])
        values = {}
        for argument, value in zip(op.arguments, given, strict=True):
            own = f"{name}.{argument}"
            if own not in program.types or (embeds and argument in inside):
                continue
            kind = program.types[own]
            if own in arrays:
                shape = tuple(int(size) for size in kind.shape)
                values[own] = body.constant(arrays[own], kind.dtype, shape)
            else:
                values[own] = Value(value, kind)
        found = lowering.into(made, values)
        self._keep(ctx, made)
        results = tuple(found[one].tensor for one in program.steps[0].outputs)
        return results[0] if len(results) == 1 else results

    @property
    def plugins(self) -> tuple[Converted, ...]:
        """Those calls that became plugins, of which alike ones have one table."""
        return tuple(one for one in self._known.values() if one.plugins.table.calls)

    def save(self, folder: Path) -> None:
        """Write the tables and kernels of all that was converted, for the C++ plugins.

        Args:
            folder: What `LINGC_PLUGINS` names where an engine shall run without Python.
        """
        for one in self.plugins:
            table, digest = one.plugins.table, one.plugins.digest
            write_bundle(folder, table, digest, one.binaries.__getitem__)

    # ------------------------------------------------------------------------------------ in parts

    def _planned(
        self, name: str, op: Op, args: list[Any], results: Sequence[Any]
    ) -> "tuple[Plan, _Letters]":
        """A plan of one step, and its open sizes.

        Args:
            args: Tensors as torch's fake ones, literals as they are.
            results: Fake tensors.
        """
        letters = _Letters()
        types: dict[str, TensorType] = {}
        made: list[Arg] = []
        for argument, value in zip(op.arguments, args, strict=True):
            if isinstance(value, torch.Tensor):
                own = f"{name}.{argument}"
                types[own] = letters.type_of(value)
                made.append(Ref(own))
            else:
                made.append(tuple(value) if isinstance(value, list) else value)
        outputs = tuple(f"{name}.{one}.made" for one in op.results)
        types |= {
            own: letters.type_of(value, made=True)
            for own, value in zip(outputs, results, strict=True)
        }
        step = Step(op=f"lingc.{op.name}", args=tuple(made), outputs=outputs, source=name)
        program = Program(
            inputs=tuple(one.name for one in made if isinstance(one, Ref)),
            states=(), outputs={one: one for one in outputs}, updates={}, weights=(),
            types=types, steps=(step,),
        )  # fmt: skip
        plan = Plan(
            config={}, precision="", target=self.target.name, activation="bf16", page_size=1,
            max_draft=0, states={}, weights={}, programs={PHASE: program},
        )  # fmt: skip
        return plan, letters

    def _converted(self, op: Op, plan: Plan, letters: "_Letters", *, embeds: bool) -> Converted:
        """The plan with its plugin's table; made once for calls that are alike."""
        program = plan.programs[PHASE]
        step = program.steps[0]
        typed = [program.types[a.name] if isinstance(a, Ref) else a for a in step.args]
        is_layer = is_native(step, program, embeds=embeds)
        if not is_layer:
            _refuse_empty(program)
        sets = () if is_layer else tuple(letters.sets(self.sizes))
        alike = (op.name, tuple(typed), embeds, sets)
        if alike not in self._known:
            binaries: list[Binary] = []

            def compiled(kernels: tuple[Kernel, ...]) -> Mapping[Kernel, Binary]:
                made = self.compile_kernels(kernels)
                binaries.extend(made[one] for one in kernels)
                return made

            buckets = tuple(Sizes(phase=PHASE, axes=dict(one)) for one in sets)
            plugins = tabled(plan, self.target, compiled, embeds=embeds, buckets=buckets)
            self._known[alike] = Converted(plan=plan, plugins=plugins, binaries=tuple(binaries))
        return self._known[alike]

    def _launcher(self, converted: Converted) -> Launcher:
        if self._device is None:
            self._device = self.make_device()
        table = converted.plugins
        return Launcher(
            table=table.table,
            digest=table.digest,
            kernel=converted.binaries.__getitem__,
            device=self._device,
        )

    def _keep(self, ctx: Any, made: Network) -> None:
        """Have weights live until TensorRT has read them, and plugins as long as this."""
        for array in made.body.constants.values():
            raw = np.atleast_1d(array).reshape(-1).view(np.uint8)
            ctx.cpu_weights_reference_holder.append(torch.from_numpy(raw))
        made.body.constants.clear()
        self._kept.append(made)


# ------------------------------------------------------------------------------------------ types


class _Letters:
    """Names of open sizes: one for each that inputs have."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}

    def type_of(self, value: torch.Tensor, *, made: bool = False) -> TensorType:
        """The type of a fake tensor; `made` says that its sizes follow from those before.

        Raises:
            UnsupportedError: The type, or a size, is none that plugins have.
        """
        dtype = DTYPE_NAME.get(value.dtype, str(value.dtype))
        if dtype not in DTYPE:
            raise UnsupportedError(f"a tensor of {dtype} has no form in TensorRT engines")
        return TensorType(dtype, tuple(self._dim(size, made=made) for size in value.shape))

    def sets(self, sizes: Sequence[int]) -> Iterator[tuple[tuple[str, int], ...]]:
        """All letters with their values, for each set of values of torch's symbols.

        Raises:
            InputError: There is none, there are too many, or one leaves nothing of a size.
        """
        symbols = sorted({one for expr in self._known for one in expr.free_symbols}, key=str)
        count = len(sizes) ** len(symbols)
        if not 0 < count <= MOST_SETS:
            raise InputError(
                f"{len(symbols)} open sizes of {len(sizes)} values each make {count} sets, a "
                f"plugin has launches for 1 to {MOST_SETS}",
                hint="register_converters(target, sizes=...) names the values",
            )
        for values in itertools.product(sizes, repeat=len(symbols)):
            given = dict(zip(symbols, values, strict=True))
            found = {expr: int(expr.subs(given)) for expr in self._known}
            for expr, size in found.items():
                if size < 1:
                    told = ", ".join(f"{symbol} is {value}" for symbol, value in given.items())
                    raise InputError(
                        f"a size of {expr} is {size} where {told}, and a plugin has no launches "
                        "for it",
                        hint="register_converters(target, sizes=...) names the values",
                    )
            yield tuple((letter, found[expr]) for expr, letter in self._known.items())

    def _dim(self, size: Any, *, made: bool) -> int | str:
        expr = size.node.expr if isinstance(size, torch.SymInt) else size
        if isinstance(expr, int) or expr.is_Integer:
            return int(expr)
        if expr in self._known:
            return self._known[expr]
        if not made:
            return self._known.setdefault(expr, f"d{len(self._known)}")
        for known, letter in self._known.items():
            times = expr / known
            if times.is_Integer:
                return f"{int(times)}*{letter}"
        raise UnsupportedError(f"a result has a size of {expr}, which is no multiple of an input's")


def _op_of(target: Any) -> Op:
    return OPS[target._schema.name.partition("::")[2]]


def _in_order(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """A call's arguments in the order of the schema, by place or by name.

    Other names are passed over: Torch-TensorRT adds one of its own while it converts.

    Raises:
        UnsupportedError: It is no call of the op.
    """
    first, more = op.arguments[: len(args)], op.arguments[len(args) :]
    twice = [name for name in first if name in kwargs]
    missing = [name for name in more if name not in kwargs]
    if twice or missing or len(args) > len(op.arguments):
        told = (
            f"{twice[0]!r} is given twice" if twice
            else f"{missing[0]!r} is missing" if missing
            else f"{len(args)} are given"
        )  # fmt: skip
        raise UnsupportedError(f"{op.name} takes ({', '.join(op.arguments)}), and {told}")
    return [*args, *(kwargs[name] for name in more)]


def _typed(given: Sequence[Any]) -> list[Any]:
    """A node's arguments, other nodes as the fake tensors that stand for them."""
    return [_fake(value) if isinstance(value, fx.Node) else value for value in given]


def _refuse_empty(program: Program) -> None:
    """Refuse what a plugin cannot launch: TensorRT's own layers take tensors of no elements.

    Raises:
        UnsupportedError: A tensor has none.
    """
    for name, kind in program.types.items():
        if 0 in kind.shape:
            raise UnsupportedError(
                f"{name!r} is empty, {list(kind.shape)}, and a plugin has no launches for that"
            )


def _fake(node: fx.Node) -> Any:
    """What stands for a node's value; a weight's own where passes left it without.

    Raises:
        UnsupportedError: Nothing does.
    """
    found = node.meta.get("val")
    if found is None and node.op == "get_attr":
        found = operator.attrgetter(str(node.target))(node.graph.owning_module)
    if found is None:
        raise UnsupportedError(f"nothing tells the type of {node.name!r}")
    return found


def _results(node: Any) -> tuple[Any, ...]:
    value = _fake(node)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _is_constant(value: Any) -> bool:
    """Whether an argument of a node is known when the engine is built."""
    return getattr(value, "op", None) == "get_attr"


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _array(value: Any) -> Array:
    """Its bits, as a NumPy type of the same size."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    held = value.detach().cpu().contiguous()
    raw = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}.get(held.dtype)
    found: Array = (held if raw is None else held.view(raw)).numpy()
    return found


def _bound(arg: Arg, program: Program, sizes: Mapping[str, int]) -> Any:
    if not isinstance(arg, Ref):
        return list(arg) if isinstance(arg, tuple) else arg
    kind = program.types[arg.name]
    return TensorType(kind.dtype, kind.bind(sizes))
