"""`lingc bench-ops`: every op's kernels held to their references on this device, then timed."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lingc.bench import kernels
from lingc.bench.ceilings import ceiling_kernels, ceilings_of
from lingc.bench.kernels import Fault, Timing
from lingc.bench.peer_clock import DeviceClock
from lingc.bench.peers import PeerTiming, time_peers
from lingc.bench.record import device_facts
from lingc.compile import Stage
from lingc.device import Binary, Device
from lingc.errors import IncompatibleError, UsageError
from lingc.kernel import Kernel, Tactic
from lingc.op import OPS, Benchmark, Op, type_of
from lingc.targets.cuda.binaries import Compilers, compile_all
from lingc.targets.cuda.binaries import kernels as kernels_of
from lingc.targets.spec import Target

FORMAT = 1
"""Version of a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run.

    Attributes:
        ops: Names; all that have kernels where empty.
        tokens: Numbers of tokens to time, in place of each benchmark's own.
        match: Only benchmarks whose name contains one of these; all where empty.
        cases: Whether the ops' small cases go through the gate too.
        timed: Whether anything is timed.
        jobs: Processes that compile.
        compilers: Whose binaries to take from the cache; those installed here where None.
        peers: Whether kernels of other projects that are installed run beside ours.
    """

    target: Target
    cache_dir: Path
    ops: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    match: tuple[str, ...] = ()
    cases: bool = True
    timed: bool = True
    jobs: int | None = None
    compilers: Compilers | None = None
    peers: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One set of arguments, not drawn yet, and what it is for."""

    op: Op
    label: str
    case: tuple[Any, ...]
    benchmark: Benchmark | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        gated: Tactics and arguments that went through the gate.
        refused: (op, case, reason) that own kernels do not run.
        crowded: (op, case) whose reference the device has no room for.
        ceilings: Bytes a second that reading and copying reach here.
    """

    device: dict[str, Any]
    gated: int
    faults: tuple[Fault, ...]
    refused: tuple[tuple[str, str, str], ...]
    timings: tuple[Timing, ...]
    ceilings: dict[str, float]
    peers: tuple[PeerTiming, ...] = ()
    crowded: tuple[tuple[str, str], ...] = ()


def run(settings: Settings, stage: Stage) -> Report:
    """Compile, gate, time.

    Raises:
        UsageError: No op of a name, or none that has kernels.
        IncompatibleError: No device, or another architecture than the target's.
        StageError: A kernel does not compile.
    """
    found, refused = tactics_of(settings)  # what was asked for wrongly is told without a device too
    device = Device()
    same_architecture(device, settings.target)
    binaries = _compiled(settings, found, stage)
    with stage("run", total=len(found), unit="shapes") as advance:
        report = _measure(settings, device, found, binaries, advance)
    return replace(
        report,
        refused=tuple(refused),
        ceilings=ceilings_of(device, binaries) if settings.timed else {},
    )


Found = list[tuple[Work, Sequence[Tactic]]]


def compile_kernels(settings: Settings, stage: Stage) -> int:
    """Compile everything that `run` would, which needs no device; how many kernels that is."""
    found, _ = tactics_of(settings)
    return len(_compiled(settings, found, stage))


def compile_some(
    settings: Settings, wanted: Iterable[Kernel], stage: Stage
) -> dict[Kernel, Binary]:
    """Compile kernels, or take them from the cache, each once."""
    distinct = list(dict.fromkeys(wanted))
    with stage("compile", total=len(distinct), unit="kernels") as advance:
        return compile_all(
            distinct,
            settings.target.arch,
            settings.cache_dir,
            compilers=settings.compilers,
            jobs=settings.jobs,
            advance=advance,
        )


def tactics_of(settings: Settings) -> tuple[Found, list[tuple[str, str, str]]]:
    """What to run, and (op, case, reason) of what own kernels refuse."""
    wanted = list(_work(settings))
    if not wanted:
        raise UsageError(
            "nothing matches what was asked for",
            hint="`lingc bench-ops` alone runs every op that has kernels",
        )
    found: Found = []
    refused: list[tuple[str, str, str]] = []
    for one in wanted:
        types = _types(one)
        reason = one.op.refusal(settings.target, *types)
        if reason is None:
            found.append((one, one.op.tactics(settings.target, *types)))
        else:
            refused.append((one.op.name, one.label, reason))
    return found, refused


def _compiled(settings: Settings, found: Found, stage: Stage) -> dict[Kernel, Binary]:
    return compile_tactics(settings, (one for _, tactics in found for one in tactics), stage)


def compile_tactics(
    settings: Settings, tactics: Iterable[Tactic], stage: Stage
) -> dict[Kernel, Binary]:
    """Their kernels, and those that have nothing to compute."""
    return compile_some(settings, [*kernels_of(tactics), *ceiling_kernels()], stage)


def _measure(
    settings: Settings, device: Device, found: Sequence[tuple[Work, Sequence[Tactic]]],
    binaries: dict[Kernel, Binary], advance: Callable[[int], None],
) -> Report:  # fmt: skip
    faults: list[Fault] = []
    crowded: list[tuple[str, str]] = []
    timings: list[Timing] = []
    peers: list[PeerTiming] = []
    gated = 0
    for one, tactics in found:
        arguments = one.op.inputs(*one.case, dtype="bf16", device="cuda")
        wrong: set[str] = set()
        bad = kernels.faults_of(device, one.op, arguments, tactics, binaries, one.label)
        if bad is None:
            crowded.append((one.op.name, one.label))
        else:
            wrong = {fault.tactic for fault in bad}
            faults += bad
            gated += len(tactics)
        if one.benchmark is not None and settings.timed:
            arranged = kernels.arrange_all(one.op, arguments)
            timings += [
                kernels.time_tactic(
                    device, one.op, one.benchmark, one.tokens, arguments, tactic, binaries,
                    arranged, gated=bad is not None,
                )
                for tactic in tactics
                if tactic.name not in wrong
            ]  # fmt: skip
            del arranged
            if settings.peers:
                peers += time_peers(
                    one.op, one.benchmark, one.tokens, arguments, device.l2_bytes,
                    DeviceClock(device),
                )  # fmt: skip
        del arguments
        torch.cuda.empty_cache()
        advance(1)
    return Report(
        device=device_facts(device),
        gated=gated,
        faults=tuple(faults),
        refused=(),
        timings=tuple(timings),
        ceilings={},
        peers=tuple(peers),
        crowded=tuple(crowded),
    )


def _work(settings: Settings) -> Iterator[Work]:
    for op in _ops(settings):
        if settings.cases and not settings.match:
            for case in op.cases:
                yield Work(op=op, label=f"case {case}", case=case)
        for benchmark in op.benchmarks:
            known = benchmark.name.lower()
            if settings.match and not any(one.lower() in known for one in settings.match):
                continue
            for tokens in settings.tokens or benchmark.tokens:
                yield Work(
                    op=op,
                    label=f"{benchmark.name}, {tokens} tokens",
                    case=benchmark.case(tokens),
                    benchmark=benchmark,
                    tokens=tokens,
                )


def _ops(settings: Settings) -> list[Op]:
    from lingc.plugins import table  # noqa: PLC0415 (registers them)

    for name in settings.ops:
        if name not in table.OPS:
            raise UsageError(
                f"no op is called {name!r}", hint=f"known: {', '.join(sorted(table.OPS))}"
            )
    return [OPS[name] for name in settings.ops or OPS]


def _types(one: Work) -> list[Any]:
    """Types of the arguments without their numbers, which may be gigabytes."""
    arguments = one.op.inputs(*one.case, dtype="bf16", device="meta")
    return [type_of(value) for value in arguments]


def same_architecture(device: Device, target: Target) -> None:
    """Refuse a device of another architecture than the target's.

    Raises:
        IncompatibleError: It is one.
    """
    if target.compute_capability != device.capability:
        major, minor = device.capability
        raise IncompatibleError(
            f"the target {target.name} is {target.arch}, this device is sm_{major}{minor}",
            hint="choose a target of this device's architecture with --target",
        )


def best(timings: Sequence[Timing]) -> list[Timing]:
    """The fastest tactic of every shape, in order."""
    found: dict[tuple[str, str, int], Timing] = {}
    for one in timings:
        key = (one.op, one.benchmark, one.tokens)
        if key not in found or one.microseconds[1] < found[key].microseconds[1]:
            found[key] = one
    return list(found.values())


def document(report: Report, settings: Settings, about: dict[str, Any]) -> dict[str, Any]:
    """The record in JSON's types. Nothing in it names a place on this machine."""
    read = report.ceilings.get("read", math.nan)
    copy = report.ceilings.get("copy", math.nan)
    rows = []
    for one in report.timings:
        row = asdict(one)
        row["bytes_per_s"] = one.bytes_per_s
        row["flops_per_s"] = one.flops_per_s
        if report.ceilings:
            row["share_of_read"] = one.bytes_per_s / read
            row["share_of_copy"] = one.bytes_per_s / copy
        rows.append(row)
    return {
        "kind": "bench-ops",
        "format": FORMAT,
        **about,
        "target": settings.target.name,
        "device": report.device,
        "ceilings": report.ceilings,
        "gate": {
            "ok": not report.faults,
            "runs": report.gated,
            "faults": [asdict(fault) for fault in report.faults],
        },
        "refused": [list(entry) for entry in report.refused],
        "crowded": [list(entry) for entry in report.crowded],
        "timings": rows,
        "peers": [asdict(one) for one in report.peers],
    }
