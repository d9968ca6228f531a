"""What the code of a CUDA engine is: kernels, launches with their arguments, and where values lie.

The table is all that a runtime needs beside the plan and the kernels' binaries: it knows no op. A
phase has one list of steps; a bucket is that phase for one set of sizes, with a tactic for each
step and a place for each value. Smaller inputs run in the next bucket, padded.

    phase    decode: steps with what each argument of an op is called in the program
    tactic   launches over an op's own argument names, for one set of sizes
    bucket   decode with B=1, P=8: a tactic for each step, an offset for each buffer

A buffer is a weight, a state, or memory of the bucket's arena. In the arena lie the inputs, which
nothing overwrites, the values that steps compute, which share room as they live, and the tactics'
workspaces. Counters, which every launch leaves at zero, lie apart.

One phase is of no program: `round` has the ops between the programs of a speculative round, over
memory that `lingc.round_memory` describes and the runtime lays out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any

from lingc.errors import IncompatibleError

FORMAT = 1
"""Version of the table's JSON form; a reader refuses a newer one."""

MOST_BYTES = 1 << 40
"""Of the workspaces and counters of a tactic."""


@dataclass(frozen=True, slots=True)
class Place:
    """The address of an argument, a result or a workspace of the op, by the op's own name."""

    name: str
    offset: int = 0
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Counted:
    """An integer that depends on how much state the runtime holds.

    It is `slots * (number of slots) + pages * (number of pages) + plus`, scratch not counted.
    """

    slots: int
    pages: int
    plus: int


Operand = Place | Counted | int | float | None
"""A launch argument; None is a null pointer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLaunch:
    """One kernel over one grid.

    Attributes:
        kernel: Index in the table's kernels.
        dependent: Whether it may begin before the one before it has ended.
    """

    kernel: int
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dependent: bool = False
    operands: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTactic:
    """How an op runs on arguments of known sizes.

    Attributes:
        key: The arguments, as `lingc.targets.cuda.tactics.key` writes them, open sizes by name.
        origin: `model`, or the device, its multiprocessors and the date of the measurement.
        microseconds: Predicted, or measured.
        moved_bytes: What the op must read and write.
        workspaces: (name, bytes), side by side from where the bucket puts the step's workspaces.
        counters: (name, bytes), side by side from the beginning of the counters.
    """

    op: str
    key: str
    tactic: str
    origin: str
    microseconds: float
    moved_bytes: float
    flops: float
    launches: tuple[TableLaunch, ...]
    workspaces: tuple[tuple[str, int], ...] = ()
    counters: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStep:
    """One step of a phase.

    Attributes:
        name: The first value that it makes, as in the plan.
        buffers: Argument or result of the op -> buffer; None for an argument that is absent.
    """

    name: str
    op: str
    buffers: Mapping[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePhase:
    """One program.

    Attributes:
        arena: Buffers of the arena in the order of a bucket's offsets: inputs first.
        values: Value of the program -> its buffer, for inputs and outputs.
    """

    steps: tuple[TableStep, ...]
    arena: tuple[str, ...]
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A phase for one set of sizes.

    Attributes:
        sizes: Symbolic axis -> most that fits.
        tactics: For each step its index in the table's tactics.
        offsets: For each buffer of the phase's arena.
        scratch: For each step, where its workspaces begin.
        arena_bytes: What the bucket needs in all, counters apart.
    """

    phase: str
    sizes: Mapping[str, int]
    tactics: tuple[int, ...]
    offsets: tuple[int, ...]
    scratch: tuple[int, ...]
    arena_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTable:
    """The code of one target.

    Attributes:
        arch: What the kernels were compiled for, e.g. `sm_90a`.
        kernels: Digests of the kernels' files.
        counter_bytes: The most that any tactic needs zeroed.
    """

    target: str
    arch: str
    kernels: tuple[str, ...]
    tactics: tuple[TableTactic, ...]
    phases: Mapping[str, TablePhase]
    buckets: tuple[Bucket, ...]
    counter_bytes: int
    format: int = field(default=FORMAT)

    def launches(self, bucket: Bucket) -> int:
        """Launches of one run of a bucket."""
        return sum(len(self.tactics[i].launches) for i in bucket.tactics)


# ------------------------------------------------------------------------------------------ checks


def tactic_problems(tactic: TableTactic, kernels: int) -> Iterator[str]:
    """What of a tactic no device could be told, whatever the op.

    Args:
        tactic: Of a table that was read: of any types.
        kernels: How many the table has.
    """
    room = 0
    for name, size in (*tactic.workspaces, *tactic.counters):
        if not is_whole(size, 0, MOST_BYTES + 1):
            yield f"the workspace {name!r} is of {size!r} bytes"
            return
        room += size
    if room > MOST_BYTES:
        yield f"its workspaces are of {room} bytes"
    for launch in tactic.launches:
        if not is_whole(launch.kernel, 0, kernels):
            yield f"there is no kernel {launch.kernel!r}"
        if not all(is_whole(size, 1, 1 << 31) for size in (*launch.grid, *launch.cluster)):
            yield f"the grid {launch.grid} in clusters of {launch.cluster} cannot be"
        for operand in launch.operands:
            if not _is_operand(operand):
                yield f"a launch takes {operand!r}, which is no operand"


def is_whole(value: Any, least: int, end: int | None = None) -> bool:
    """Whether it is an integer, from `least` on and below `end`."""
    return type(value) is int and least <= value and (end is None or value < end)


def _is_operand(value: Any) -> bool:
    """Whether it is one, its integers those of 64 bits."""
    match value:
        case Place(_, offset):
            return _is_word(offset)
        case Counted(slots, pages, plus):
            return _is_word(slots) and _is_word(pages) and _is_word(plus)
    return value is None or isinstance(value, float) or _is_word(value)


def _is_word(value: Any) -> bool:
    return is_whole(value, -(1 << 63), 1 << 63)


# ------------------------------------------------------------------------------------------- JSON


def to_value(table: LaunchTable) -> dict[str, Any]:
    """In JSON's types."""
    value = plain(table)
    assert isinstance(value, dict), "a dataclass becomes an object"
    return value


def from_value(value: Mapping[str, Any]) -> LaunchTable:
    """Read back an equal table.

    Raises:
        IncompatibleError: It is of another format, or not a table.
    """
    if value.get("format") != FORMAT:
        raise IncompatibleError(
            f"the engine's launch table has format {value.get('format')!r}, this version reads "
            f"{FORMAT}",
            hint="build the engine again, or update lingc",
        )
    try:
        return LaunchTable(
            target=value["target"],
            arch=value["arch"],
            kernels=tuple(value["kernels"]),
            tactics=tuple(tactic_from_value(entry) for entry in value["tactics"]),
            phases=MappingProxyType({k: _phase(v) for k, v in value["phases"].items()}),
            buckets=tuple(_bucket(entry) for entry in value["buckets"]),
            counter_bytes=value["counter_bytes"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IncompatibleError(
            f"the engine's launch table cannot be read: {error!r}",
            hint="it was written by another version of lingc; build the engine again",
        ) from error


def plain(value: Any) -> Any:
    """A table or a part of it in JSON's types."""
    match value:
        case Place(name, offset):
            return {"at": name, "offset": offset} if offset else {"at": name}
        case Counted(slots, pages, plus):
            return {"slots": slots, "pages": pages, "plus": plus}
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
        case tuple() | list():
            return [plain(item) for item in value]
    if is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    return value


def _operand(value: Any) -> Operand:
    if not isinstance(value, Mapping):
        return value  # type: ignore[no-any-return]
    if "at" in value:
        return Place(value["at"], value.get("offset", 0))
    return Counted(value["slots"], value["pages"], value["plus"])


def tactic_from_value(value: Mapping[str, Any]) -> TableTactic:
    """A tactic from what `plain` made of it."""
    launches = tuple(
        TableLaunch(
            kernel=one["kernel"],
            grid=tuple(one["grid"]),
            cluster=tuple(one["cluster"]),
            dependent=one["dependent"],
            operands=tuple(map(_operand, one["operands"])),
        )
        for one in value["launches"]
    )
    spaces = {
        name: tuple((each[0], each[1]) for each in value[name])
        for name in ("workspaces", "counters")
    }
    return TableTactic(**{**value, "launches": launches, **spaces})


def _phase(value: Mapping[str, Any]) -> TablePhase:
    return TablePhase(
        steps=tuple(TableStep(**step) for step in value["steps"]),
        arena=tuple(value["arena"]),
        values=value["values"],
    )


def _bucket(value: Mapping[str, Any]) -> Bucket:
    lists = {name: tuple(value[name]) for name in ("tactics", "offsets", "scratch")}
    return Bucket(**{**value, **lists})
