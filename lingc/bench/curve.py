"""How fast kernels are on a part of a device's multiprocessors: what each of them draws.

A GPU with the same memory and fewer multiprocessors is another device for every grid. Parts of one
device, green contexts, show how much of the bandwidth real kernels keep, with the tactics that a
target of so many multiprocessors has.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lingc.bench import kernels, ops
from lingc.bench.ceilings import ceilings_of
from lingc.bench.kernels import Fault
from lingc.bench.limited import open_device
from lingc.bench.ops import Settings, Work
from lingc.bench.record import device_facts
from lingc.compile import Stage
from lingc.device import Binary, Device
from lingc.kernel import Kernel, Tactic
from lingc.targets.spec import Target

FORMAT = 1
"""Version of a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The fastest tactic of a shape on so many multiprocessors.

    Attributes:
        sms: Multiprocessors that were used; the driver may have rounded what was asked for.
        seconds: Median of one call in a recorded series.
        moved_bytes: What a call must read and write.
    """

    op: str
    benchmark: str
    tokens: int
    sms: int
    tactic: str
    seconds: float
    moved_bytes: float

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Everything that was measured.

    Attributes:
        device: The whole device.
        read: Multiprocessors -> bytes a second of a kernel that only reads.
        gated: Tactics and shapes that were held to a reference.
    """

    device: Mapping[str, Any]
    read: Mapping[int, float]
    points: tuple[Point, ...]
    faults: tuple[Fault, ...]
    gated: int


def targets_of(target: Target, counts: Sequence[int]) -> dict[int, Target]:
    """The target as it would be with so many multiprocessors, most first."""
    return {count: replace(target, sms=count) for count in sorted(set(counts), reverse=True)}


Wanted = list[tuple[Work, dict[int, Sequence[Tactic]]]]
"""Shapes, and the tactics that each has for a count of multiprocessors."""


def all_tactics(settings: Settings, counts: Sequence[int]) -> Wanted:
    """Benchmark shapes of the settings with the tactics of every count.

    Raises:
        UsageError: No op of a name, or nothing to time.
    """
    found: dict[tuple[str, str], tuple[Work, dict[int, Sequence[Tactic]]]] = {}
    for count, target in targets_of(settings.target, counts).items():
        some, _ = ops.tactics_of(replace(settings, target=target, cases=False))
        for work, tactics in some:
            found.setdefault((work.op.name, work.label), (work, {}))[1][count] = tactics
    return [*found.values()]


def compile_kernels(
    settings: Settings, counts: Sequence[int], stage: Stage
) -> dict[Kernel, Binary]:
    """Binaries for all of them, which needs no device."""
    some = [
        tactic
        for _, by_count in all_tactics(settings, counts)
        for tactics in by_count.values()
        for tactic in tactics
    ]
    return ops.compile_tactics(settings, some, stage)


def run(
    settings: Settings, counts: Sequence[int], stage: Stage,
    open_part: Callable[[int | None], Device] = open_device,
) -> Curve:  # fmt: skip
    """Gate every tactic on the whole device, then time it on its part.

    Args:
        settings: Ops, tokens and the target; its own cases are not run.
        counts: Multiprocessors; as many as the device has is the whole device.
        stage: How progress is shown.
        open_part: Makes a part of the device of so many multiprocessors, or the whole.

    Raises:
        UsageError: A count is more than the device has, or there is nothing to time.
        IncompatibleError: No device, another architecture, or no such part.
    """
    wanted = all_tactics(settings, counts)
    with ExitStack() as opened:
        whole = opened.enter_context(closing(open_part(None)))
        ops.same_architecture(whole, settings.target)
        binaries = compile_kernels(settings, counts, stage)
        parts = {
            count: whole if count == whole.sms else opened.enter_context(closing(open_part(count)))
            for count in targets_of(settings.target, counts)
        }
        points: list[Point] = []
        faults: list[Fault] = []
        gated = 0
        with stage("run", total=len(wanted), unit="shapes") as advance:
            for work, by_count in wanted:
                arguments = work.op.inputs(*work.case, dtype="bf16", device="cuda")
                bad, number = _gate(whole, work, arguments, by_count, binaries)
                faults += bad
                gated += number
                wrong = {fault.tactic for fault in bad}
                for count, tactics in by_count.items():
                    right = [one for one in tactics if _named(count, one) not in wrong]
                    points += _fastest(parts[count], work, arguments, right, binaries)
                del arguments
                torch.cuda.empty_cache()
                advance(1)
        read = {part.sms: ceilings_of(part, binaries, ("read",))["read"] for part in parts.values()}
        return Curve(
            device=device_facts(whole), read=read, points=tuple(points), faults=tuple(faults),
            gated=gated,
        )  # fmt: skip


def _named(count: int, tactic: Tactic) -> str:
    return f"{tactic.name} for {count}"


def _gate(
    device: Device, work: Work, arguments: Sequence[Any],
    by_count: Mapping[int, Sequence[Tactic]], binaries: Mapping[Kernel, Binary],
) -> tuple[list[Fault], int]:  # fmt: skip
    """One reference for the tactics of all counts: their grids differ."""
    some = [
        replace(tactic, name=_named(count, tactic))
        for count, tactics in by_count.items()
        for tactic in tactics
    ]
    return [*kernels.check(device, work.op, arguments, some, binaries, work.label)], len(some)


def _fastest(
    device: Device, work: Work, arguments: Sequence[Any], tactics: Sequence[Tactic],
    binaries: Mapping[Kernel, Binary],
) -> list[Point]:  # fmt: skip
    """The fastest of the tactics; none where there is none."""
    assert work.benchmark is not None, "only benchmarks are asked for"
    arranged = kernels.arrange_all(work.op, arguments)
    times = [
        kernels.time_tactic(
            device, work.op, work.benchmark, work.tokens, arguments, tactic, binaries, arranged,
            gated=True,
        )
        for tactic in tactics
    ]  # fmt: skip
    best = min(times, key=lambda one: one.microseconds[1], default=None)
    if best is None:
        return []
    return [
        Point(
            op=work.op.name, benchmark=work.benchmark.name, tokens=work.tokens, sms=device.sms,
            tactic=best.tactic, seconds=1e-6 * best.microseconds[1], moved_bytes=best.moved_bytes,
        )
    ]  # fmt: skip


def table(curve: Curve) -> tuple[list[str], list[list[str]]]:
    """A row for each count: terabytes a second of every shape, and of a kernel that only reads."""
    shapes = list(dict.fromkeys((one.benchmark, one.tokens) for one in curve.points))
    rate = {(one.sms, one.benchmark, one.tokens): one.bytes_per_s for one in curve.points}
    head = ["SMs", "reading", *(f"{name}, {tokens}" for name, tokens in shapes)]
    rows = []
    for sms in sorted(curve.read):
        found = [rate.get((sms, *shape)) for shape in shapes]
        told = ["" if one is None else f"{1e-12 * one:.2f}" for one in found]
        rows.append([str(sms), f"{1e-12 * curve.read[sms]:.2f}", *told])
    return head, rows


def document(curve: Curve, settings: Settings, about: Mapping[str, Any]) -> dict[str, Any]:
    """The record in JSON's types. Nothing in it names a place on this machine."""
    return {
        "kind": "bench-ops-sms",
        "format": FORMAT,
        **about,
        "target": settings.target.name,
        "device": dict(curve.device),
        "read_bytes_per_s": {str(sms): rate for sms, rate in sorted(curve.read.items())},
        "gate": {
            "ok": not curve.faults,
            "runs": curve.gated,
            "faults": [asdict(fault) for fault in curve.faults],
        },
        "points": [{**asdict(one), "bytes_per_s": one.bytes_per_s} for one in curve.points],
    }
