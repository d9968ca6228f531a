"""The code of a CUDA engine: its launch table, held to its plan, and its kernels.

A package's bytes are those that were written, but who wrote them is not known: what the table names
must be there, and every place must lie inside the memory that it is said to be in.
"""

import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lingc.device import Binary
from lingc.engine import Package
from lingc.errors import IntegrityError
from lingc.kernel import align
from lingc.launch_table import (
    Bucket,
    LaunchTable,
    Place,
    TablePhase,
    TableTactic,
    from_value,
    tactic_problems,
)
from lingc.plan import Plan, Program, TensorType
from lingc.round_memory import ROUND, round_program

TABLE = "table.json.xz"

TABLE_BYTES = 1 << 28
KERNEL_BYTES = 1 << 26
"""The most that a file may hold when it is unpacked."""

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaCode:
    """What runs a plan.

    Attributes:
        kernel: The file of a kernel, by the digest in the table.
        driver: CUDA versions of drivers that can load the kernels, such as `>=13.0`; empty where
            that is not known.
        batch_invariant: Whether a row's bits are the same in every bucket.
    """

    plan: Plan
    table: LaunchTable
    kernel: Callable[[str], bytes]
    driver: str = ""
    batch_invariant: bool = False


def read_code(package: Package) -> CudaCode:
    """The code of a package for the target that its plan was made for.

    Raises:
        IncompatibleError: The table is of another version.
        IntegrityError: The table cannot be read.
    """
    code = package.code()
    name = code.info.get("table", TABLE)
    data = unpacked(package.read(f"variants/{code.target}/{name}"), name, TABLE_BYTES)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"the engine's launch table is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise IntegrityError("the engine's launch table is not an object")
    return CudaCode(
        plan=package.plan,
        table=from_value(value),
        kernel=lambda digest: package.read(f"kernels/{digest}.xz"),
        driver=code.info["runs_on"].get("gpu", {}).get("driver", ""),
        batch_invariant=bool(code.info.get("batch_invariant", False)),
    )


def unpacked(data: bytes, name: str, most: int) -> bytes:
    """The contents of an xz file of at most so many bytes.

    Raises:
        IntegrityError: It is no such file, or holds more.
    """
    reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
    try:
        found = reader.decompress(data, max_length=most)
    except lzma.LZMAError as error:
        raise IntegrityError(f"{name!r} of the engine cannot be unpacked: {error}") from error
    if not reader.eof:
        raise IntegrityError(f"{name!r} of the engine is cut off, or holds more than {most} bytes")
    return found


def read_kernel(code: CudaCode, index: int) -> Binary:
    """A kernel of the table.

    Raises:
        IntegrityError: The file is no kernel, or one for another architecture.
    """
    digest = code.table.kernels[index]
    name = f"kernels/{digest[:12]}….xz"
    try:
        binary = Binary.from_bytes(unpacked(code.kernel(digest), name, KERNEL_BYTES))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{name!r} of the engine is no kernel: {error}", hint="build the engine again"
        ) from error
    if binary.arch != code.table.arch:
        raise IntegrityError(
            f"{name!r} is compiled for {binary.arch}, the table is for {code.table.arch}",
            hint="build the engine again",
        )
    return binary


# ------------------------------------------------------------------------------------------ checks


def check(code: CudaCode) -> None:
    """Hold a table to its plan.

    Raises:
        IntegrityError: What is wrong with it.
    """
    problems = [*_problems(code)]
    if problems:
        listed = "".join(f"\n  - {one}" for one in problems[:_SHOWN])
        more = f"\n  - and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise IntegrityError(
            f"the engine's launch table does not go with its plan:{listed}{more}",
            hint="build the engine again, and report it if that does not help",
        )


def _problems(code: CudaCode) -> Iterator[str]:
    table, plan = code.table, code.plan
    for index, tactic in enumerate(table.tactics):
        yield from (f"tactic {index}: {one}" for one in _tactic_problems(tactic, table))
    programs = dict(plan.programs)
    if ROUND in table.phases and {"verify", "draft"} <= programs.keys():
        programs[ROUND] = round_program(plan)
    if table.phases.keys() != programs.keys():
        yield f"it has the phases {[*table.phases]}, the plan {[*plan.programs]}"
        return
    sound = True
    for name, phase in table.phases.items():
        given = programs[name].inputs if name == ROUND else ()
        for one in _phase_problems(phase, plan, programs[name], given):
            sound = False
            yield f"{name}: {one}"
        if not any(bucket.phase == name for bucket in table.buckets):
            yield f"{name} has no bucket"
    facts = [_facts(tactic) for tactic in table.tactics]
    for index, bucket in enumerate(table.buckets if sound else ()):
        if bucket.phase not in table.phases:
            yield f"bucket {index} is of a phase {bucket.phase!r}"
            continue
        program, phase = programs[bucket.phase], table.phases[bucket.phase]
        found = _bucket_problems(bucket, phase, program, facts)
        yield from (f"bucket {index}: {one}" for one in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """Of a tactic: its op, bytes of its workspaces, names that its launches take from the step."""

    op: str
    room: int
    taken: frozenset[str]


def _facts(tactic: TableTactic) -> _Facts:
    own = {name for name, _ in (*tactic.workspaces, *tactic.counters)}
    operands = (one for launch in tactic.launches for one in launch.operands)
    return _Facts(
        op=tactic.op,
        room=sum(align(size) for _, size in tactic.workspaces),
        taken=frozenset(one.name for one in operands if isinstance(one, Place)) - own,
    )


def _tactic_problems(tactic: TableTactic, table: LaunchTable) -> Iterator[str]:
    if sum(align(size) for _, size in tactic.counters) > table.counter_bytes:
        yield f"its counters need more than {table.counter_bytes} bytes"
    yield from tactic_problems(tactic, len(table.kernels))


def _phase_problems(
    phase: TablePhase, plan: Plan, program: Program, elsewhere: Sequence[str]
) -> Iterator[str]:
    """`elsewhere` are inputs that do not lie in the arena."""
    buffers = [*phase.arena, *plan.weights, *plan.states, *elsewhere]
    known = {*buffers}
    if len(known) != len(buffers):
        yield "two buffers have one name"
    for step in phase.steps:
        for buffer in {*step.buffers.values()} - known - {None}:
            yield f"step {step.name!r} uses {buffer!r}, which is no buffer"
    for value in (*program.inputs, *program.outputs.values()):
        if value not in elsewhere and phase.values.get(value) not in phase.arena:
            yield f"{value!r} lies nowhere"


def _bucket_problems(
    bucket: Bucket, phase: TablePhase, program: Program, facts: Sequence[_Facts]
) -> Iterator[str]:
    if not len(bucket.tactics) == len(bucket.scratch) == len(phase.steps):
        yield "its steps are not those of its phase"
        return
    if len(bucket.offsets) != len(phase.arena):
        yield "its buffers are not those of its phase"
        return
    sizes = all_sizes(bucket.sizes)
    missing = {
        dim
        for name in program.inputs
        for dim in program.types[name].shape
        if isinstance(dim, str) and dim not in sizes
    }
    if missing:
        yield f"it does not say {', '.join(sorted(missing))}"
        return
    known: dict[TensorType | None, int] = {None: 0}
    ends: list[tuple[str, int, int]] = []
    for name, offset in zip(phase.arena, bucket.offsets, strict=True):
        kind = program.types.get(name)
        if kind not in known and kind is not None:
            known[kind] = kind.bytes(sizes)
        ends.append((name, offset, known[kind]))
    for step, index, scratch in zip(phase.steps, bucket.tactics, bucket.scratch, strict=True):
        if not 0 <= index < len(facts):
            yield f"there is no tactic {index}"
            continue
        tactic = facts[index]
        if tactic.op != step.op:
            yield f"step {step.name!r} is {step.op}, its tactic is for {tactic.op}"
        for name in tactic.taken - step.buffers.keys():
            yield f"a launch of {tactic.op} takes {name!r}, which is not there"
        ends.append((step.name, scratch, tactic.room))
    for name, offset, size in ends:
        if offset % 16 or not 0 <= offset <= offset + size <= bucket.arena_bytes:
            yield f"{name!r} at {offset}, {size} bytes, lies outside of {bucket.arena_bytes}"


def all_sizes(sizes: Mapping[str, int]) -> dict[str, Any]:
    """The symbolic axes of a bucket, `B+1` with `B`."""
    found = dict(sizes)
    if "B" in found:
        found.setdefault("B+1", found["B"] + 1)
    return found
