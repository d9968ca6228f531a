"""The plugin of a TensorRT engine: a call of an op, launched from its plugin table.

One class serves every op and both flavours of TensorRT. What it serializes is the hash of its table
and its number there, so an engine holds no device code; a creator looks both up among the tables
that were handed to it, and refuses a table that it does not have. Launches go through the CUDA
driver, on the stream that TensorRT gives.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lingc.device import Binary, Device
from lingc.errors import IncompatibleError
from lingc.kernel import align
from lingc.launch_table import Counted, Operand, Place, TableTactic
from lingc.plugin_table import Axis, Call, PluginTable, shape_of, size_of

NAMESPACE = "lingc"
VERSION = "1"

OPS_FIELD, TABLE_FIELD, CALL_FIELD = "op", "table", "call"
"""What a plugin serializes: name of its op, SHA-256 of its table, its number there."""

DTYPE: Mapping[str, str] = {
    "f32": "FLOAT", "bf16": "BF16", "f8e4m3": "FP8", "i32": "INT32", "i64": "INT64", "u8": "UINT8",
}  # fmt: skip
"""Element types as TensorRT's `DataType` calls them."""


def plugin_name(op: str) -> str:
    """`LingMlaLatent` of `mla_latent`."""
    return "Ling" + "".join(part.capitalize() for part in op.split("_"))


@dataclass(slots=True)
class Launcher:
    """A plugin table with its kernels, on a device.

    Attributes:
        digest: SHA-256 of the table's JSON, by which engines name it.
        kernel: Number in the table's kernels -> the binary; only asked for when it is launched.
        device: Where to launch; None where engines are only built.
        aliased: Whether results that are updated in place are the same tensor to TensorRT.
    """

    table: PluginTable
    digest: str
    kernel: Callable[[int], Binary] | None = None
    device: Device | None = None
    aliased: bool = False
    _binaries: dict[int, Binary] = field(default_factory=dict)
    _timing: dict[int, str] = field(default_factory=dict)

    def timing_id(self, number: int) -> str:
        """`timing_id` of a call by its number: many plugins are of one call."""
        if number not in self._timing:
            self._timing[number] = timing_id(self.table, self.table.calls[number])
        return self._timing[number]

    def run(
        self,
        call: Call,
        shapes: Sequence[Sequence[int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: Any,
    ) -> None:
        """Put a call's launches on a stream.

        Args:
            call: Of the table.
            shapes: Of the inputs.
            inputs: Their device addresses.
            outputs: Device addresses of the results. One that the op updates in place is copied
                first, unless it lies where its input does.
            workspace: Device address of `PluginTable.workspace_bytes`, holding anything.
            stream: A CUDA stream.

        Raises:
            UsageError: The table has no launches for such sizes.
        """
        assert self.device is not None, "an engine that is only built runs nothing"
        tactic = self.table.tactic(call, shapes)
        with _on(self.device, stream):
            places = {one[0]: address for one, address in zip(call.inputs, inputs, strict=True)}
            for one, address in zip(call.outputs, outputs, strict=True):
                if one.place >= 0 and inputs[one.place] != address:
                    size = byte_size(one.dtype, shape_of(one, shapes))
                    self.device.copy(address, inputs[one.place], size)
                places[one.name] = address
            at = workspace
            for name, size in tactic.workspaces:
                places[name] = at
                at += align(size)
            for name, size in tactic.counters:
                places[name] = at
                self.device.clear(at, size)
                at += align(size)
            self._launch(call, tactic, shapes, places)

    def _launch(
        self,
        call: Call,
        tactic: TableTactic,
        shapes: Sequence[Sequence[int]],
        places: Mapping[str, int],
    ) -> None:
        assert self.device is not None
        slots = 0 if call.slots is None else size_of(call.slots, shapes) - 1
        rows = 0 if call.rows is None else size_of(call.rows, shapes) - 1
        room = (slots, rows // self.table.page_size)
        for index, one in enumerate(tactic.launches):
            self.device.put(
                self._binary(one.kernel),
                [_value(operand, places, room) for operand in one.operands],
                grid=one.grid,
                cluster=one.cluster,
                # What TensorRT ran before is not known to let another launch begin early.
                dependent=one.dependent and index > 0,
            )

    def _binary(self, index: int) -> Binary:
        if index not in self._binaries:
            assert self.kernel is not None, "an engine that is only built runs nothing"
            self._binaries[index] = self.kernel(index)
        return self._binaries[index]


def timing_id(table: PluginTable, call: Call) -> str:
    """What TensorRT keeps a call's time under, beside the layer's shapes and types.

    It is of all that the call launches, for any sizes, but for numbers that are not whole, which
    decide nothing: so a call has one wherever it stands, and after another build too.
    """
    told = [table.arch, str(table.page_size), *map(_written, call.axes)]
    told += [_written(axis) for axis in (call.slots, call.rows)]
    told += [str(one.place) for one in call.outputs]
    for sizes, index in sorted(call.choices.items()):
        tactic = table.tactics[index]
        told.append(_listed(sizes) + ":")
        told += [f"{name}={size}" for name, size in (*tactic.workspaces, *tactic.counters)]
        for one in tactic.launches:
            told += [table.images[one.kernel], _listed(one.grid), _listed(one.cluster)]
            told += [str(int(one.dependent)), *map(_written, one.operands)]
    return f"{call.op}-{hashlib.sha256(' '.join(told).encode()).hexdigest()}"


def _written(value: Operand | Axis) -> str:
    match value:
        case Axis(number, axis, times):
            return f"{number}.{axis}*{times}"
        case Place(name, offset):
            return f"{name}+{offset}"
        case Counted(slots, pages, plus):
            return f"{slots},{pages},{plus}"
        case float():
            return "~"
    return "-" if value is None else str(value)


def _listed(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


_BYTES: Mapping[str, int] = {"f32": 4, "bf16": 2, "f8e4m3": 1, "i32": 4, "i64": 8, "u8": 1}


def byte_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return _BYTES[dtype] * math.prod(shape)


def _value(operand: Operand, places: Mapping[str, int], room: tuple[int, int]) -> Any:
    match operand:
        case None:
            return 0
        case Place(name, offset):
            # An optional argument that is absent is a null pointer; loading checked the names.
            return places[name] + offset if name in places else 0
        case Counted(slots, pages, plus):
            return slots * room[0] + pages * room[1] + plus
    return operand


@contextmanager
def _on(device: Device, stream: Any) -> Iterator[None]:
    """Have a device put launches on another stream."""
    own = device.stream
    device.stream = stream
    try:
        yield
    finally:
        device.stream = own


class OpPlugin:
    """A plugin without TensorRT's base classes, which `plugin_class` adds.

    Args:
        launcher: The table with the call.
        number: Of the call in the table.
    """

    trt: Any = None

    def __init__(self, launcher: Launcher, number: int) -> None:
        self.launcher = launcher
        self.number = number
        self.call = launcher.table.calls[number]
        self.plugin_name = plugin_name(self.call.op)
        self.plugin_version = VERSION
        self.plugin_namespace = NAMESPACE
        self.num_outputs = len(self.call.outputs)
        # Without one TensorRT times it in every build, which one that is held to a cache may not.
        self.timing_cache_id = launcher.timing_id(number)
        self.held: list[Any] = []
        self._serialized: list[Any] = []
        self._collection: Any = None

    # ------------------------------------------------------------------------------------- building

    def get_capability_interface(self, _kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        return type(self)(self.launcher, self.number)

    def get_output_data_types(self, _types: Any) -> list[Any]:
        return [getattr(self.trt.DataType, DTYPE[one.dtype]) for one in self.call.outputs]

    def get_output_shapes(self, inputs: Any, _shape_inputs: Any, expressions: Any) -> list[Any]:
        trt = self.trt
        made = []
        for one in self.call.outputs:
            shape = trt.DimsExprs(len(one.shape))
            for i, dim in enumerate(one.shape):
                if isinstance(dim, int):
                    shape[i] = expressions.constant(dim)
                elif dim.times == 1:
                    shape[i] = inputs[dim.input][dim.axis]
                else:
                    times = expressions.constant(dim.times)
                    size = inputs[dim.input][dim.axis]
                    shape[i] = expressions.operation(trt.DimensionOperation.PROD, size, times)
            made.append(shape)
        return made

    def get_aliased_input(self, output: int) -> int:
        return self.call.outputs[output].place if self.launcher.aliased else -1

    def supports_format_combination(self, position: int, given: Any, _inputs: int) -> bool:
        wanted = [one[1] for one in self.call.inputs] + [one.dtype for one in self.call.outputs]
        desc = given[position].desc
        dtype = getattr(self.trt.DataType, DTYPE[wanted[position]])
        return bool(desc.format == self.trt.TensorFormat.LINEAR and desc.type == dtype)

    def configure_plugin(self, _inputs: Any, _outputs: Any) -> None: ...

    def get_workspace_size(self, _inputs: Any, _outputs: Any) -> int:
        return self.launcher.table.workspace_bytes(self.call)

    def get_valid_tactics(self) -> list[int]:
        return [1]

    def set_tactic(self, _tactic: int) -> None: ...

    def get_fields_to_serialize(self) -> Any:
        # TensorRT reads them after the call, from where they lie.
        self._serialized = fields(self.trt, self.call.op, self)
        self._collection = self.trt.PluginFieldCollection(self._serialized)
        return self._collection

    # -------------------------------------------------------------------------------------- running

    def on_shape_change(self, _inputs: Any, _outputs: Any) -> int:
        return 0

    def attach_to_context(self, _context: Any) -> Any:
        return self.clone()

    def enqueue(
        self,
        input_desc: Any,
        output_desc: Any,
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Called by TensorRT for each run of the layer."""
        del output_desc
        if self.launcher.device is None:
            return  # a builder times layers, and there is one way to run this one
        shapes = [tuple(one.dims) for one in input_desc]
        self.launcher.run(self.call, shapes, inputs, outputs, workspace, stream)


def fields(trt: Any, op: str, plugin: OpPlugin) -> list[Any]:
    """What a plugin serializes."""
    kinds = trt.PluginFieldType
    values = (
        (OPS_FIELD, np.frombuffer(op.encode(), np.int8).copy(), kinds.CHAR),
        (TABLE_FIELD, np.frombuffer(plugin.launcher.digest.encode(), np.int8).copy(), kinds.CHAR),
        (CALL_FIELD, np.array([plugin.number], np.int32), kinds.INT32),
    )
    plugin.held = [data for _, data, _ in values]
    return [trt.PluginField(*one) for one in values]


def plugin_class(trt: Any) -> type[OpPlugin]:
    """`OpPlugin` as a plugin of `trt`, which is `tensorrt` or `tensorrt_rtx`."""
    bases = (
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuildV2,
        trt.IPluginV3OneRuntime,
    )

    def start(self: Any, launcher: Launcher, number: int) -> None:
        for base in bases:
            base.__init__(self)
        OpPlugin.__init__(self, launcher, number)

    return type("LingPlugin", (OpPlugin, *bases), {"__init__": start, "trt": trt})


_OTHER = "the engine is of another build than the package; get the package again"

_TABLES: dict[str, Launcher] = {}
"""By digest: TensorRT's registry is one of the process, and so is what its creators look up."""

_CREATORS: dict[tuple[str, str], Any] = {}
"""By module and op; TensorRT does not keep them alive."""


def register(trt: Any, launcher: Launcher) -> None:
    """Have engines that name a table make their plugins from it, from now on.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        launcher: The table, by its digest; one of the same digest is replaced, and plugins that it
            has made stay its own.

    Raises:
        IncompatibleError: TensorRT has plugins of the same names from elsewhere, which are C++.
    """
    _TABLES[launcher.digest] = launcher
    for op in sorted({call.op for call in launcher.table.calls}):
        if (trt.__name__, op) not in _CREATORS:
            creator = creator_class(trt)(op)
            if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
                raise IncompatibleError(
                    f"TensorRT has a plugin {plugin_name(op)!r} of another library, and takes no "
                    "second one",
                    hint="run engines by Python's plugins in a process that has not loaded C++ "
                    "ones",
                )
            _CREATORS[trt.__name__, op] = creator


def has_registered(trt: Any) -> bool:
    """Whether Python's plugins are in this process."""
    return any(module == trt.__name__ for module, _ in _CREATORS)


def creator_class(trt: Any) -> type[Any]:
    """What makes plugins of one op from what they serialized."""
    kind = plugin_class(trt)

    def start(self: Any, op: str) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = plugin_name(op), VERSION, NAMESPACE
        empty = np.array([], np.int8)
        char, integer = trt.PluginFieldType.CHAR, trt.PluginFieldType.INT32
        self.field_names = trt.PluginFieldCollection(
            [
                trt.PluginField(OPS_FIELD, empty, char),
                trt.PluginField(TABLE_FIELD, empty, char),
                trt.PluginField(CALL_FIELD, empty, integer),
            ]
        )

    def create(self: Any, name: str, given: Any, _phase: Any) -> Any:
        values = {one.name: one.data for one in given}
        lost = [field for field in (TABLE_FIELD, CALL_FIELD) if field not in values]
        if lost:
            raise IncompatibleError(f"plugin {name!r} has no field {lost[0]!r}", hint=_OTHER)
        digest = _text(values[TABLE_FIELD])
        if digest not in _TABLES:
            raise IncompatibleError(
                f"plugin {name!r} launches from table {digest[:12]}…, which was not loaded",
                hint=_OTHER,
            )
        number = int(np.asarray(values[CALL_FIELD]).reshape(-1)[0])
        calls = _TABLES[digest].table.calls
        if not 0 <= number < len(calls) or plugin_name(calls[number].op) != self.name:
            raise IncompatibleError(
                f"plugin {name!r} is call {number} of table {digest[:12]}…, which is none of "
                f"{self.name!r}",
                hint=_OTHER,
            )
        return kind(_TABLES[digest], number)

    return type(
        "LingCreator",
        (trt.IPluginCreatorV3One,),
        {"__init__": start, "create_plugin": create},
    )


def _text(data: Any) -> str:
    """A CHAR field; parsers differ in whether a zero ends it."""
    raw = data if isinstance(data, bytes) else np.asarray(data).tobytes()
    return raw.rstrip(b"\0").decode()
