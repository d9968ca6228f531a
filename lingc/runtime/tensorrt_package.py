"""The code of a TensorRT engine: read from a package and checked before TensorRT sees a byte of it.

A package's bytes are those that were written, but who wrote them is not known: engines must be
whole and of the TensorRT that is installed, their plugins' table the one that they were built with,
and every kernel that it names must be there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lingc.device import Binary
from lingc.engine import Package
from lingc.errors import IncompatibleError, IntegrityError
from lingc.launch_table import Bucket, Place, is_whole, tactic_problems
from lingc.plan import PHASES, Plan
from lingc.plugin_table import Axis, Call, PluginTable, from_value
from lingc.runtime.cuda_code import KERNEL_BYTES, TABLE_BYTES, unpacked
from lingc.runtime.tensorrt_constants import Cut, Hole, holes_of, joined
from lingc.targets.spec import Target
from lingc.weights import open_weights

HINT = "its producer contradicts itself: build the engine again, and report it"
_REBUILD = "build the engine again with this version, or install that one"

_MAGIC, _SIZE, _VERSION = b"vtrt", slice(16, 24), slice(24, 28)
"""Of an engine of TensorRT for RTX: its first bytes, its length, and its version. Observed of 1.7;
standard engines begin otherwise, and are held to the package's digests alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorrtCode:
    """What runs a plan.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`.
        version: Of the library that wrote the engines.
        digest: SHA-256 of the table's JSON, by which plugins name it.
        engines: Phase -> the engine, put together.
        embedded: Weights that engines hold, and none is given.
        buckets: Sizes that plugins have launches for.
        kernel: A kernel by its number in the table.
    """

    plan: Plan
    module: str
    version: str
    table: PluginTable
    digest: str
    engines: Mapping[str, Callable[[], bytes]]
    buckets: tuple[Bucket, ...]
    kernel: Callable[[int], Binary]
    embedded: frozenset[str] = frozenset()

    @property
    def target(self) -> str:
        """What the engines are for; the plan names one of a package's targets, for all of them."""
        return self.table.target


def read_code(package: Package) -> TensorrtCode:
    """The code of a package for the target that was chosen.

    Raises:
        IntegrityError: Something is missing, cut, or of another build.
        IncompatibleError: The table is of another version.
    """
    code = package.code()
    info, folder = code.info, f"variants/{code.target}"
    try:
        name, wanted = str(info["table"]), str(info["table_sha256"])
        module, version = str(info["module"]), str(info["tensorrt"])
        files = {str(phase): str(file) for phase, file in info["engines"].items()}
        calls = {str(phase): [int(n) for n in numbers] for phase, numbers in info["calls"].items()}
        buckets = tuple(_bucket(one) for one in info["buckets"])
        embedded = frozenset(str(name) for name in info.get("embedded_weights", ()))
        cuts = {
            str(phase): (holes_of(value), str(value["sha256"]))
            for phase, value in info.get("constants", {}).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"the facts of the {code.target!r} variant cannot be read: {error!r}", hint=HINT
        ) from error
    data = unpacked(package.read(f"{folder}/{name}"), name, TABLE_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    if digest != wanted:
        raise IntegrityError(
            f"the engines' plugins launch from table {wanted[:12]}…, the package holds "
            f"{digest[:12]}…, which is of another build",
            hint="take both from one build: get the package again",
        )
    table = _table(data)
    made = TensorrtCode(
        plan=package.plan,
        module=module,
        version=version,
        table=table,
        digest=digest,
        engines={
            phase: partial(_engine, package, phase, f"{folder}/{file}", cuts.get(phase))
            for phase, file in files.items()
        },
        embedded=embedded,
        buckets=buckets,
        kernel=lambda index: _kernel(package, table, index),
    )
    _check(made, code.target, calls, {*package.names("kernel")})
    return made


def _engine(
    package: Package, phase: str, path: str, removed: tuple[tuple[Hole, ...], str] | None
) -> bytes:
    """An engine, with the constants that the package holds among its weights.

    Raises:
        IntegrityError: They do not make up the engine that was built.
    """
    rest = package.read(path)
    if removed is None:
        return rest
    holes, sha256 = removed
    weights = open_weights(package.shards()) if holes else {}
    return joined(phase, Cut(rest=rest, holes=holes, sha256=sha256), weights)


def check_engine(phase: str, data: bytes, version: str) -> None:
    """Refuse an engine that is cut off or of another TensorRT.

    Raises:
        IntegrityError: It is not whole.
        IncompatibleError: It was written by another version.
    """
    if not data.startswith(_MAGIC):
        return
    size = int.from_bytes(data[_SIZE], "little")
    if size != len(data):
        raise IntegrityError(
            f"the {phase} engine says that it has {size} bytes, and has {len(data)}",
            hint="it was cut off; get the package again",
        )
    wrote = ".".join(str(byte) for byte in data[_VERSION])
    if wrote != version:
        raise IncompatibleError(
            f"the {phase} engine was written by TensorRT {wrote}, installed is {version}",
            hint=_REBUILD,
        )


def check_library(code: TensorrtCode, installed: str) -> None:
    """Refuse another TensorRT than the one that wrote the engines.

    Raises:
        IncompatibleError: It is another.
    """
    if installed != code.version:
        raise IncompatibleError(
            f"the engines were written by {code.module} {code.version}, installed is {installed}: "
            "engines are read by the very version that wrote them",
            hint=f"pip install {code.module.replace('_', '-')}=={code.version}, or build again",
        )


def check_capability(target: Target, name: str, have: tuple[int, int]) -> None:
    """Refuse a GPU of another compute capability.

    Raises:
        IncompatibleError: It is another.
    """
    want = target.compute_capability
    if have != want:
        listed = ".".join(map(str, want or ()))
        raise IncompatibleError(
            f"the engine is for {target.name!r} (compute capability {listed}); {name} has compute "
            f"capability {have[0]}.{have[1]}",
            hint="build it for this device: `lingc targets` lists what can be built for",
        )


def _check(
    code: TensorrtCode, target: str, calls: Mapping[str, list[int]], kernels: set[str]
) -> None:
    table, plan = code.table, code.plan
    lost = [phase for phase in plan.programs if phase not in code.engines]
    if lost:
        raise IntegrityError(f"there is no engine for the phases {', '.join(lost)}", hint=HINT)
    # Files are named by them.
    strange = [phase for phase in code.engines if phase not in plan.programs or phase not in PHASES]
    if strange:
        raise IntegrityError(
            f"the package has an engine of {strange[0]!r}, which is no phase of its plan", hint=HINT
        )
    if table.target != target or table.page_size != plan.page_size:
        raise IntegrityError(
            f"the plugin table is for {table.target!r} and pages of {table.page_size} tokens, the "
            f"engines are for {target!r} and {plan.page_size}",
            hint=HINT,
        )
    for phase, numbers in calls.items():
        over = [number for number in numbers if not 0 <= number < len(table.calls)]
        if over:
            raise IntegrityError(
                f"the {phase} engine has plugin {over[0]}, the table has {len(table.calls)}",
                hint=HINT,
            )
    _check_kernels(table, kernels)
    for number, call in enumerate(table.calls):
        try:
            problem = next(_call_problems(call, table), None)
        except (TypeError, ValueError, AttributeError) as error:
            problem = f"it cannot be read: {error!r}"
        if problem is not None:
            raise IntegrityError(f"plugin {number}, {call.op}: {problem}", hint=HINT)
    for number, tactic in enumerate(table.tactics):
        problem = next(tactic_problems(tactic, len(table.kernels)), None)
        if problem is not None:
            raise IntegrityError(f"tactic {number}, {tactic.op}: {problem}", hint=HINT)


def _check_kernels(table: PluginTable, kernels: set[str]) -> None:
    if len(table.images) != len(table.kernels):
        raise IntegrityError(
            f"the plugin table names {len(table.kernels)} kernels and the contents of "
            f"{len(table.images)}",
            hint=HINT,
        )
    lacking = [one for one in table.kernels if f"kernels/{one}.xz" not in kernels]
    if lacking:
        raise IntegrityError(
            f"the plugins launch {len(lacking)} kernels that the package does not hold, the first "
            f"{lacking[0][:12]}…",
            hint=HINT,
        )


def _call_problems(call: Call, table: PluginTable) -> Iterator[str]:
    """What of a call would fail, or read what is not meant, only when it is launched."""
    ranks = [rank for _, _, rank in call.inputs]
    dims = [dim for one in call.outputs for dim in one.shape]
    for axis in (*call.axes, *dims, *(one for one in (call.slots, call.rows) if one is not None)):
        if not isinstance(axis, Axis):
            is_right = is_whole(axis, 0)
        else:
            is_right = is_whole(axis.times, 1) and is_whole(axis.input, 0, len(ranks))
            is_right = is_right and is_whole(axis.axis, 0, ranks[axis.input])
        if not is_right:
            yield f"it reads a size from {axis}, which is not there"
    for one in call.outputs:
        if not is_whole(one.place, -1, len(ranks)):
            yield f"{one.name!r} is updated in input {one.place!r}, which is not there"
    absent = {name for name, value in call.literals.items() if value is None}
    names = {name for name, _, _ in call.inputs} | {one.name for one in call.outputs} | absent
    for sizes, index in call.choices.items():
        if len(sizes) != len(call.axes) or not all(is_whole(size, -1) for size in sizes):
            yield f"its sizes {list(sizes)} are not {len(call.axes)} numbers"
        if not is_whole(index, 0, len(table.tactics)):
            yield f"it names tactic {index!r}, which is not there"
            return
        tactic = table.tactics[index]
        known = names | {name for name, _ in (*tactic.workspaces, *tactic.counters)}
        for launch in tactic.launches:
            for operand in launch.operands:
                if isinstance(operand, Place) and operand.name not in known:
                    yield f"a launch takes {operand.name!r}, which is not there"


def _table(data: bytes) -> PluginTable:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"the engine's plugin table is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise IntegrityError("the engine's plugin table is not an object")
    return from_value(value)


def _kernel(package: Package, table: PluginTable, index: int) -> Binary:
    digest = table.kernels[index]
    name = f"kernels/{digest[:12]}….xz"
    try:
        data = unpacked(package.read(f"kernels/{digest}.xz"), name, KERNEL_BYTES)
        binary = Binary.from_bytes(data)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{name!r} is no kernel: {error}", hint=HINT) from error
    if hashlib.sha256(data).hexdigest() != table.images[index]:
        raise IntegrityError(f"{name!r} is not the kernel that the table names", hint=HINT)
    if binary.arch != table.arch:
        raise IntegrityError(
            f"{name!r} is compiled for {binary.arch}, the table is for {table.arch}", hint=HINT
        )
    return binary


def _bucket(value: Mapping[str, Any]) -> Bucket:
    sizes = {str(axis): int(size) for axis, size in value["sizes"].items()}
    return Bucket(
        phase=str(value["phase"]), sizes=sizes, tactics=(), offsets=(), scratch=(), arena_bytes=0
    )
