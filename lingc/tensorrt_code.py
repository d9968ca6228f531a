"""The code of a TensorRT engine from its plan: networks built, kernels compiled, reports made."""

import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingc.compile import Compiled, Stage
from lingc.engine import canonical
from lingc.errors import FusionError, StageError
from lingc.plan import Plan
from lingc.runtime.tensorrt_constants import cut, to_value
from lingc.targets.cuda import binaries
from lingc.targets.cuda.lower import compressed
from lingc.targets.spec import Target
from lingc.targets.tensorrt import report
from lingc.targets.tensorrt.backend import Backend, StandardBackend, backend
from lingc.targets.tensorrt.lower import Array, Lowering, Network, Tabled, tabled
from lingc.targets.tensorrt.profile import sizes
from lingc.targets.tensorrt.timing import Timing

log = logging.getLogger("lingc")

TABLE = "plugins.json.xz"
REPORT = "report.json.xz"
"""What plugins launch, and what TensorRT says of the engines, among a variant's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What stands in a package for one target.

    Attributes:
        files: Of the variant, by name.
        info: For `variant.json`, `runs_on` included.
        kernels: Digest -> compressed device code.
        producer: Versions of what made it.
    """

    files: Mapping[str, bytes]
    info: Mapping[str, Any]
    kernels: Mapping[str, bytes]
    producer: Mapping[str, str]


def engine_file(phase: str) -> str:
    return f"{phase}.engine"


def make(
    compiled: Compiled,
    weights: Mapping[str, Array] | None,
    *,
    timing: Timing,
    cache_dir: Path | None,
    stage: Stage,
) -> Made:
    """Build the engines of a plan.

    Args:
        compiled: Whose plan to lower.
        weights: Of the plan, for layers of TensorRT that want constants; None leaves those to
            plugins.
        timing: What standard TensorRT measured before; those of lingc's own where it names no file.
        cache_dir: Where compiled kernels and measurements are kept; not at all where None.
        stage: How progress is shown.

    Raises:
        MissingExtraError: TensorRT, or what compiles kernels, is not installed.
        InputError: An op has no kernel for the target.
        IncompatibleError: Standard TensorRT is here without a GPU of the target's kind.
        StageError: TensorRT refuses a network.
    """
    plan, target = compiled.plan, compiled.target
    builder = backend(target)
    builder.ready(plan, target, timing, cache_dir)
    plugins = _plugins(plan, target, embeds=weights is not None, cache_dir=cache_dir, stage=stage)
    lowering = Lowering(builder, plan, target, plugins, weights=weights)
    files: dict[str, bytes] = {TABLE: plugins.data}
    reports: dict[str, Any] = {}
    faults: dict[str, list[str]] = {}
    constants: dict[str, Any] = {}
    embedded: set[str] = set()
    read: set[str] = set()
    engine_bytes = 0
    with stage("build engines", total=len(plan.programs), unit="phases") as advance:
        for phase in plan.programs:
            network = lowering.network(phase)
            begin = len(builder.log.messages)
            engine = lowering.engine(network)
            engine_bytes += len(engine)
            made = cut(engine, network.constants)
            files[engine_file(phase)] = made.rest
            constants[phase] = to_value(made)
            messages = [text for _, text in builder.log.messages[begin:]]
            found = _reported(messages, network, builder)
            reports |= found.report
            if found.faults:
                faults[phase] = found.faults
            embedded |= network.embedded
            read |= network.inputs
            advance(1)
    embedded -= read
    files[REPORT] = compressed(canonical.encode({"format": report.FORMAT, "phases": reports}))
    info = {
        "flavour": builder.flavour,
        "module": builder.trt.__name__,
        "tensorrt": builder.version,
        "table": TABLE,
        "table_sha256": plugins.digest,
        "report": REPORT,
        "faults": faults,
        "buckets": [{"phase": one.phase, "sizes": dict(one.axes)} for one in sizes(plan)],
        "calls": {
            phase: sorted({number for number in numbers if number is not None})
            for phase, numbers in plugins.numbers.items()
        },
        "engines": {phase: engine_file(phase) for phase in plan.programs},
        "embedded_weights": sorted(embedded),
        "constants": constants,
        "runs_on": _runs_on(target, builder, engine_bytes + _bound_bytes(plan, embedded)),
        **builder.facts(),
    }
    timing.write()
    compilers = binaries.installed()
    producer = {
        builder.trt.__name__: builder.version,
        "nvidia-cuda-nvrtc": compilers.nvrtc,
        "triton": compilers.triton,
    }
    return Made(files=files, info=info, kernels=plugins.kernels, producer=producer)


@dataclass(frozen=True, slots=True)
class _Reported:
    """What the log of a build said.

    Attributes:
        report: The layers, by the phase; empty where they cannot be read.
        faults: What was made otherwise than was meant, or cannot be told, in sentences.
    """

    report: Mapping[str, Any]
    faults: list[str]


def _reported(messages: Sequence[str], network: Network, builder: Backend) -> _Reported:
    """What TensorRT says of an engine; one of RTX that is not what was meant is none.

    How standard TensorRT lists layers was never seen: what cannot be read, or is not what its other
    flavour makes, is told, kept in the package, and does not end a build that takes a GPU.

    Raises:
        StageError: The log does not list the layers.
        FusionError: TensorRT made something else of a step.
    """
    is_known = not isinstance(builder, StandardBackend)
    try:
        found = report.parse(messages, network)
    except StageError as error:
        if is_known:
            raise
        log.warning("%s; the engine is kept, and how it was fused is not known", error.problem)
        return _Reported({}, [f"{error.problem}: how it was fused is not known"])
    faults = report.faults(found, network)
    try:
        _refuse(network.phase, faults)
    except FusionError as error:
        if is_known:
            raise
        log.warning("%s; the engine is kept, and `lingc inspect --layers` has all", error.problem)
    return _Reported({network.phase: report.to_value(found)}, faults)


def _refuse(phase: str, faults: Sequence[str]) -> None:
    """Refuse an engine that does otherwise than was meant.

    Raises:
        FusionError: TensorRT made something else of a step.
    """
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise FusionError(
            f"the {phase} engine is not what was lowered: {faults[0]}{more}",
            hint="this TensorRT fuses otherwise; docs/tensorrt.md names the versions known",
        )


def _plugins(
    plan: Plan, target: Target, *, embeds: bool, cache_dir: Path | None, stage: Stage
) -> Tabled:
    place = nullcontext(cache_dir) if cache_dir else tempfile.TemporaryDirectory(prefix="lingc-")
    with place as folder, stage("compile kernels") as advance:
        return tabled(
            plan,
            target,
            lambda kernels: binaries.compile_all(
                kernels, target.arch, Path(folder), advance=advance
            ),
            embeds=embeds,
        )


def _bound_bytes(plan: Plan, embedded: Collection[str]) -> int:
    """Of the weights that are bound: the others lie in the engines."""
    given = (spec for name, spec in plan.weights.items() if name not in embedded)
    return sum(spec.type.bytes() for spec in given)


def _runs_on(target: Target, builder: Backend, memory_bytes: int) -> dict[str, Any]:
    """What a machine must have; an engine is read by the very TensorRT that wrote it."""
    major, minor = target.compute_capability or (0, 0)
    return {
        "os": ["linux"],
        "arch": builder.hosts,
        "libraries": {"cuda.bindings": ">=13", builder.trt.__name__: f"=={builder.version}"},
        "gpu": {
            "capability": f"{major}.{minor}",
            "driver": ">=13.0",
            "memory_bytes": memory_bytes,
        },
    }
