"""What the plugins of a TensorRT engine launch: plain data beside it, named by its hash.

A plugin of the engine is one call of an op. It holds its number in this table and what TensorRT
asks of it while building (types and shapes); everything else is looked up when it runs:

    call     router of bf16[T, 4096], …: where each open size is read, a tactic for each set of them
    tactic   launches over the op's own argument names, as in a launch table
    kernels  digests of compiled kernels, files of the package
    images   digests of the same when unpacked

So a table serves every phase, a kernel is stored once whatever launches it, and code in any
language can run a plugin by evaluating its tactic. An engine names its table by the SHA-256 of its
canonical JSON, and the table its kernels by theirs: who has both unpacked can check both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lingc.errors import IncompatibleError, UsageError
from lingc.kernel import align
from lingc.launch_table import TableTactic, plain, tactic_from_value

FORMAT = 2
"""Version of the table's JSON form; a reader refuses a newer one."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A size of an input, times a number: how shapes of results depend on inputs."""

    input: int
    axis: int
    times: int = 1


Dim = int | Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A result.

    Attributes:
        place: Number of the input that the op updates in place and this is, else -1.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    place: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One kind of call of an op: the same for all layers that are alike.

    Attributes:
        key: The arguments as measured rows name them, open sizes by their letters.
        literals: The arguments of the op that are no tensors, by name.
        inputs: (name of the argument, dtype, rank) of the tensors that are given, in order.
        axes: Open sizes that tactics are chosen by: where each is read.
        choices: Values of those sizes -> index of the tactic.
        slots: Where the size of the states is read, scratch included; None where none is.
        rows: The same of the latent cache.
    """

    op: str
    key: str
    literals: Mapping[str, Any]
    inputs: tuple[tuple[str, str, int], ...]
    outputs: tuple[Output, ...]
    axes: tuple[Axis, ...]
    choices: Mapping[tuple[int, ...], int]
    slots: Axis | None = None
    rows: Axis | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginTable:
    """The launches of all plugins.

    Attributes:
        arch: What the kernels were compiled for.
        kernels: Digests of the kernels' files.
        images: Digests of the same files when unpacked.
        page_size: Tokens a page of the latent cache.
    """

    target: str
    arch: str
    page_size: int
    kernels: tuple[str, ...]
    images: tuple[str, ...]
    tactics: tuple[TableTactic, ...]
    calls: tuple[Call, ...]
    format: int = field(default=FORMAT)

    def workspace_bytes(self, call: Call) -> int:
        """The most that any choice of a call needs, counters included."""
        return max((workspace_bytes(self.tactics[i]) for i in call.choices.values()), default=0)

    def tactic(self, call: Call, shapes: Sequence[Sequence[int]]) -> TableTactic:
        """The tactic for inputs of these shapes.

        Raises:
            UsageError: There is none for such sizes.
        """
        sizes = tuple(size_of(axis, shapes) for axis in call.axes)
        if sizes not in call.choices:
            known = ", ".join("x".join(map(str, one)) for one in list(call.choices)[:8])
            raise UsageError(
                f"plugin {call.op!r} has no launches for sizes {list(sizes)}",
                hint=f"pad the step to one of the engine's buckets: {known}, …",
            )
        return self.tactics[call.choices[sizes]]


def size_of(axis: Axis, shapes: Sequence[Sequence[int]]) -> int:
    """A size of inputs of these shapes."""
    return shapes[axis.input][axis.axis] * axis.times


def shape_of(output: Output, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Shape of a result for inputs of these shapes."""
    return tuple(d if isinstance(d, int) else size_of(d, shapes) for d in output.shape)


def workspace_bytes(tactic: TableTactic) -> int:
    """Bytes of a tactic's workspaces and counters, side by side."""
    return sum(align(size) for _, size in (*tactic.workspaces, *tactic.counters))


# ------------------------------------------------------------------------------------------- JSON


def to_value(table: PluginTable) -> dict[str, Any]:
    """In JSON's types."""
    return {
        "format": table.format,
        "target": table.target,
        "arch": table.arch,
        "page_size": table.page_size,
        "kernels": list(table.kernels),
        "images": list(table.images),
        "tactics": [plain(one) for one in table.tactics],
        "calls": [_call_value(one) for one in table.calls],
    }


def from_value(value: Mapping[str, Any]) -> PluginTable:
    """Read back an equal table.

    Raises:
        IncompatibleError: It is of another format, or not a table.
    """
    if value.get("format") != FORMAT:
        raise IncompatibleError(
            f"the engine's plugin table has format {value.get('format')!r}, this version reads "
            f"{FORMAT}",
            hint="build the engine again, or update lingc",
        )
    try:
        return PluginTable(
            target=value["target"],
            arch=value["arch"],
            page_size=value["page_size"],
            kernels=tuple(value["kernels"]),
            images=tuple(value["images"]),
            tactics=tuple(tactic_from_value(one) for one in value["tactics"]),
            calls=tuple(_call(one) for one in value["calls"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IncompatibleError(
            f"the engine's plugin table cannot be read: {error!r}",
            hint="it was written by another version of lingc; build the engine again",
        ) from error


def _call_value(call: Call) -> dict[str, Any]:
    return {
        "op": call.op,
        "key": call.key,
        "literals": plain(dict(call.literals)),
        "inputs": [list(one) for one in call.inputs],
        "outputs": [
            {
                "name": one.name,
                "dtype": one.dtype,
                "shape": [_dim_value(dim) for dim in one.shape],
                "place": one.place,
            }
            for one in call.outputs
        ],
        "axes": [_dim_value(axis) for axis in call.axes],
        "choices": [[*sizes, index] for sizes, index in call.choices.items()],
        "slots": _dim_value(call.slots),
        "rows": _dim_value(call.rows),
    }


def _dim_value(dim: Dim | None) -> Any:
    return [dim.input, dim.axis, dim.times] if isinstance(dim, Axis) else dim


def _dim(value: Any) -> Dim:
    return Axis(*value) if isinstance(value, list) else int(value)


def _axis(value: Any) -> Axis | None:
    return None if value is None else Axis(*value)


def _call(value: Mapping[str, Any]) -> Call:
    outputs = (
        Output(
            name=one["name"],
            dtype=one["dtype"],
            shape=tuple(map(_dim, one["shape"])),
            place=one["place"],
        )
        for one in value["outputs"]
    )
    return Call(
        op=value["op"],
        key=value["key"],
        literals=value["literals"],
        inputs=tuple((one[0], one[1], one[2]) for one in value["inputs"]),
        outputs=tuple(outputs),
        axes=tuple(Axis(*one) for one in value["axes"]),
        choices={tuple(one[:-1]): one[-1] for one in value["choices"]},
        slots=_axis(value["slots"]),
        rows=_axis(value["rows"]),
    )
