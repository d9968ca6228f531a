"""The code of an engine from its plan, by the kind of engine.

What a kind needs is imported where that kind is made: building one asks for no library of another.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from lingc import launch_table, targets
from lingc.compile import Compiled, Request, Stage
from lingc.engine import canonical
from lingc.errors import UsageError
from lingc.plan import Plan
from lingc.runtime import tensorrt_library
from lingc.targets.spec import EngineKind, Target

Array = NDArray[Any]

TABLE = "table.json.xz"
"""The launch table of a CUDA engine among its variant's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What stands in a package for one target.

    Attributes:
        plan: With the layouts that the code wants weights in.
        files: Of the variant, by name.
        info: For `variant.json`, `runs_on` included.
        request: What was asked for of this kind alone, resolved.
        producer: Versions of what made it.
        kernels: Digest -> compressed device code.
    """

    kind: EngineKind
    plan: Plan
    files: Mapping[str, bytes]
    info: Mapping[str, Any]
    request: Mapping[str, Any]
    producer: Mapping[str, str]
    kernels: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))


def make(
    compiled: Compiled,
    kind: EngineKind,
    request: Request,
    *,
    weights: Mapping[str, Array] | None,
    cache_dir: Path | None,
    stage: Stage,
) -> Code:
    """Lower a plan to an engine of a kind that `lingc.compile.engine_kind` let through.

    Args:
        compiled: Whose plan to lower.
        kind: Of the engine.
        request: Whose options that kind may read.
        weights: Of the plan, for engines that hold some as constants; None where they come later.
        cache_dir: Where compiled kernels are kept; not at all where None.
        stage: How progress is shown.
    """
    if kind == "cuda":
        return _cuda(compiled, request, cache_dir, stage)
    if kind == "tensorrt":
        return _tensorrt(compiled, request, weights, cache_dir, stage)
    return _onnx(compiled, request, stage)


def refuse(kind: EngineKind, request: Request) -> None:
    """Refuse what a kind of engine has no use for.

    Raises:
        UsageError: It would be ignored.
    """
    if kind != "onnx" and request.widen != "auto":
        raise UsageError(
            f"--widen {request.widen} is for CPU engines: a GPU multiplies weights as stored",
            hint="leave --widen out",
        )
    if kind != "cuda" and request.batch_invariant:
        raise UsageError(
            f"--batch-invariant is for engines of the kind 'cuda', not {kind!r}",
            hint="leave it out, or build for a GPU: `lingc targets` lists them",
        )
    option = "--timing-cache" if request.timing_cache is not None else "--lock-tactics"
    if request.timing_cache is None and not request.lock_tactics:
        return
    target = targets.get(request.target)
    if kind != "tensorrt" or tensorrt_library.module_of(target) != tensorrt_library.STANDARD:
        raise UsageError(
            f"{option} is for standard TensorRT, and an engine of the kind {kind!r} for "
            f"{target.name!r} is not chosen by measurements",
            hint="leave it out",
        )
    if request.timing_cache is None:
        raise UsageError(
            "--lock-tactics chooses by what a file holds, and none is named",
            hint="name it with --timing-cache FILE",
        )


def require(kind: EngineKind, wanted: Sequence[Target]) -> None:
    """Ask for what builds a kind of engine before anything is compiled.

    Raises:
        MissingExtraError: It is not installed.
    """
    if kind == "tensorrt":
        for target in wanted:
            tensorrt_library.require(target)


def _onnx(compiled: Compiled, request: Request, stage: Stage) -> Code:
    from lingc.targets.onnx.lower import lower  # noqa: PLC0415

    with stage("lower to ONNX"):
        engine = lower(compiled.plan, widen=request.widen)
    layouts = {weight.name: weight.layout for weight in engine.weights}
    weights = {
        name: replace(spec, layout=layouts.get(name, spec.layout))
        for name, spec in compiled.plan.weights.items()
    }
    return Code(
        kind="onnx",
        plan=replace(compiled.plan, weights=weights),
        files={f"{phase}.onnx": data for phase, data in engine.models.items()},
        info={
            "runs_on": {
                "os": ["linux"],
                "arch": ["x86_64", "aarch64"],
                "libraries": {"onnxruntime": ">=1.31"},
            },
            **engine.info,
        },
        request={"widen": engine.info.get("widen", request.widen)},
        producer={"onnx": version("onnx")},
    )


def _cuda(compiled: Compiled, request: Request, cache_dir: Path | None, stage: Stage) -> Code:
    from lingc.targets.cuda import binaries  # noqa: PLC0415
    from lingc.targets.cuda.buckets import buckets  # noqa: PLC0415
    from lingc.targets.cuda.lower import compressed, schedule_all, with_kernels  # noqa: PLC0415

    plan, target, invariant = compiled.plan, compiled.target, request.batch_invariant
    compilers = binaries.installed()
    sizes = buckets(plan, invariant=invariant)
    with stage("choose tactics", total=len(sizes), unit="buckets") as advance:
        scheduled = schedule_all(plan, target, sizes=sizes, advance=advance, invariant=invariant)
    wanted = scheduled.wanted
    place = nullcontext(cache_dir) if cache_dir else tempfile.TemporaryDirectory(prefix="lingc-")
    with place as folder, stage("compile kernels", total=len(wanted), unit="kernels") as advance:
        made = binaries.compile_all(wanted, target.arch, Path(folder), advance=advance)
    with stage("compress kernels"):
        engine = with_kernels(scheduled, made)
        table = canonical.encode(launch_table.to_value(engine.table))
        files = {TABLE: compressed(table)}
    most = target.compute_capability or (0, 0)
    return Code(
        kind="cuda",
        plan=plan,
        files=files,
        info={
            "runs_on": {
                "os": ["linux"],
                "arch": ["x86_64", "aarch64"],
                "libraries": {"cuda.bindings": ">=13"},
                "gpu": {
                    "capability": f"{most[0]}.{most[1]}",
                    "driver": f">={compilers.nvrtc.partition('.')[0]}.0",
                    "memory_bytes": _least_bytes(plan, engine.table),
                },
            },
            "table": TABLE,
            "batch_invariant": invariant,
        },
        request={"batch_invariant": invariant},
        producer={"nvidia-cuda-nvrtc": compilers.nvrtc, "triton": compilers.triton},
        kernels=engine.kernels,
    )


def _tensorrt(
    compiled: Compiled,
    request: Request,
    weights: Mapping[str, Array] | None,
    cache_dir: Path | None,
    stage: Stage,
) -> Code:
    from lingc import tensorrt_code  # noqa: PLC0415
    from lingc.targets.tensorrt.timing import Timing  # noqa: PLC0415

    timing = Timing(path=request.timing_cache, locked=request.lock_tactics)
    made = tensorrt_code.make(compiled, weights, timing=timing, cache_dir=cache_dir, stage=stage)
    return Code(
        kind="tensorrt",
        plan=compiled.plan,
        files=made.files,
        info=made.info,
        request={},
        producer=made.producer,
        kernels=made.kernels,
    )


def _least_bytes(plan: Plan, table: launch_table.LaunchTable) -> int:
    """Weights, and the arena of the smallest bucket of the phase that needs most; no state."""
    least: dict[str, int] = {}
    for bucket in table.buckets:
        known = least.get(bucket.phase, bucket.arena_bytes)
        least[bucket.phase] = min(known, bucket.arena_bytes)
    weights = sum(spec.type.bytes() for spec in plan.weights.values())
    return weights + table.counter_bytes + max(least.values(), default=0)
