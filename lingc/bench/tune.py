"""`lingc tune`: which tactic is fastest on this device, for every op of a model's steps.

A step of each bucket is run over weights drawn at random, so that every op is measured on what the
ops before it made: routed ids, lists, pages. A tactic is gated on these values before it is timed,
as a node of a graph over cold data. Layers are alike, so a few of them stand for all.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lingc.bench import kernels, synthetic
from lingc.bench.ceilings import ceiling_kernels, ceilings_of
from lingc.bench.limited import open_device
from lingc.bench.record import device_facts
from lingc.bench.step import DeviceStep, Drawn, sizes_of
from lingc.bench.work import Work, inputs_of
from lingc.compile import Stage
from lingc.device import Binary, Device
from lingc.errors import IncompatibleError
from lingc.kernel import Kernel, Tactic
from lingc.math import expert_lists
from lingc.model.config import ModelConfig
from lingc.op import TORCH_DTYPE, Benchmark
from lingc.plan import Plan, Ref, Size
from lingc.quantize.layouts import PLAIN
from lingc.targets.cuda.binaries import Compilers, compile_all
from lingc.targets.cuda.binaries import kernels as kernels_of
from lingc.targets.cuda.schedule import OPEN, Scheduled, arguments_of, schedule
from lingc.targets.cuda.tactics import Row, arithmetic, features, key, predict, rank
from lingc.targets.spec import Target

FORMAT = 1
"""Version of a record."""

NOISE = 0.02
"""By how much another tactic must beat the model's choice to be called the faster one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        target: Whose tactics; its architecture must be the device's.
        ops: Names; all where empty.
        every: Also what has one tactic alone, for the record.
        sms: Multiprocessors to use, where not all.
        seconds: After so long no further shape is begun.
        large: Tokens from which on there is no gate, since its reference would not fit.
        jobs: Processes that compile.
        command: What was run, for the rows.
        date: ISO date, for the rows.
    """

    target: Target
    cache_dir: Path
    work: tuple[Work, ...]
    command: str
    date: str
    ops: tuple[str, ...] = ()
    every: bool = False
    sms: int | None = None
    seconds: float | None = None
    large: int = 2048
    jobs: int | None = None
    compilers: Compilers | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An op on arguments of known sizes: what a row is about.

    Attributes:
        index: Of the first such step in the work's schedule.
        calls: Steps of this shape in the work's phase of the model that is measured.
        known_as: The arguments' key, sizes of the runtime's state by their letters.
        chosen: What the model of time would take.
    """

    work: Work
    index: int
    calls: int
    op: str
    known_as: str
    tactics: tuple[Tactic, ...]
    chosen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One tactic of a shape, measured or found wrong.

    Attributes:
        microseconds: 10th, 50th and 90th percentile; None where the gate was red.
        predicted: Microseconds by the model.
        least: Microseconds that the target's arithmetic needs, which this device may do faster.
        launches: What the model knows of each launch.
    """

    tactic: str
    microseconds: tuple[float, float, float] | None
    predicted: float
    least: float
    launches: tuple[Mapping[str, Any], ...]
    problem: str | None = None

    @property
    def score(self) -> float:
        """Microseconds to rank by."""
        return max(self.microseconds[1], self.least) if self.microseconds else float("inf")


@dataclass(slots=True)
class Found:
    """A shape and what was measured."""

    shape: Shape
    gated: bool
    moved_bytes: float
    flops: float
    candidates: list[Candidate] = field(default_factory=list)


def reduced(config: ModelConfig) -> ModelConfig:
    """The same model with one group of layers: every kind of layer is in it."""
    layers = min(config.num_hidden_layers, config.layer_group_size)
    return ModelConfig.from_dict({**config.raw, "num_hidden_layers": layers})


# ---------------------------------------------------------------------------------------- shapes


def shapes(plan: Plan, settings: Settings) -> list[Shape]:
    """Every distinct op and arguments of the work, in its order."""
    found: dict[tuple[str, str], Shape] = {}
    for work in settings.work:
        here: dict[tuple[str, str], Shape] = {}
        inputs, limits = inputs_of(plan, work)
        sizes = sizes_of(plan, work.phase, inputs, limits)
        program = plan.programs[work.phase]
        for i, one in enumerate(schedule(plan, work.phase, sizes, settings.target).steps):
            if settings.ops and one.op.name not in settings.ops:
                continue
            known_as = key(arguments_of(program, one.step, sizes, OPEN))
            if (one.op.name, known_as) in here:
                before = here[one.op.name, known_as]
                here[one.op.name, known_as] = replace(before, calls=before.calls + 1)
                continue
            tactics = tuple(one.op.tactics(settings.target, *one.arguments))
            if len(tactics) > 1 or settings.every:
                here[one.op.name, known_as] = Shape(
                    work=work, index=i, calls=1, op=one.op.name, known_as=known_as,
                    tactics=tactics, chosen=rank(tactics, settings.target)[0].tactic.name,
                )  # fmt: skip
        found = found | {name: one for name, one in here.items() if name not in found}
    return list(found.values())


def all_kernels(plan: Plan, settings: Settings, wanted: Sequence[Shape]) -> list[Kernel]:
    """The tactics to measure, those that make their inputs, and the kernels of benchmarks."""
    needed = [tactic for shape in wanted for tactic in shape.tactics]
    for work in dict.fromkeys(shape.work for shape in wanted):
        inputs, limits = inputs_of(plan, work)
        sizes = sizes_of(plan, work.phase, inputs, limits)
        made = schedule(plan, work.phase, sizes, settings.target)
        needed += [one.choice.tactic for one in made.steps]
    return [*kernels_of(needed), *ceiling_kernels(), *synthetic.kernels().values()]


def compile_kernels(
    plan: Plan, settings: Settings, wanted: Sequence[Shape], stage: Stage
) -> dict[Kernel, Binary]:
    """Binaries for the shapes, which needs no device."""
    distinct = list(dict.fromkeys(all_kernels(plan, settings, wanted)))
    with stage("compile", total=len(distinct), unit="kernels") as advance:
        return compile_all(
            distinct, settings.target.arch, settings.cache_dir, compilers=settings.compilers,
            jobs=settings.jobs, advance=advance,
        )  # fmt: skip


# --------------------------------------------------------------------------------------- measure


def run(
    plan: Plan, settings: Settings, wanted: Sequence[Shape], stage: Stage,
    keep: Callable[[Found, Device], None],
) -> dict[str, Any]:  # fmt: skip
    """Gate and time every tactic of every shape.

    Args:
        plan: Of a model with every kind of layer, for the target.
        wanted: Shapes of the plan.
        keep: Called with what was found of each shape, as it comes.

    Returns:
        The device, its ceilings, and how many shapes were left when the time was over.

    Raises:
        IncompatibleError: No device, or another architecture than the target's.
    """
    device = open_device(settings.sms)
    if settings.target.compute_capability != device.capability:
        major, minor = device.capability
        raise IncompatibleError(
            f"the target {settings.target.name} is {settings.target.arch}, "
            f"this device is sm_{major}{minor}",
            hint="choose a target of this device's architecture with --target",
        )
    binaries = compile_kernels(plan, settings, wanted, stage)
    deadline = time.monotonic() + (settings.seconds or float("inf"))
    ceilings = ceilings_of(device, binaries)
    left = len(wanted)
    drawn = Drawn()
    with stage("measure", total=len(wanted), unit="shapes") as advance:
        for work in dict.fromkeys(shape.work for shape in wanted):
            mine = [shape for shape in wanted if shape.work == work]
            if time.monotonic() > deadline:
                break
            for found in _measure(plan, settings, work, mine, device, binaries, drawn, deadline):
                keep(found, device)
                left -= 1
                advance(1)
            torch.cuda.empty_cache()
    return {"device": device_facts(device), "ceilings": ceilings, "left": left}


def _measure(
    plan: Plan, settings: Settings, work: Work, wanted: Sequence[Shape], device: Device,
    binaries: Mapping[Kernel, Binary], drawn: Drawn, deadline: float,
) -> Iterator[Found]:  # fmt: skip
    inputs, limits = inputs_of(plan, work)
    sizes = sizes_of(plan, work.phase, inputs, limits)
    made = schedule(plan, work.phase, sizes, settings.target)
    last = max(shape.index for shape in wanted)
    names = [name for name in made.buffers if name in plan.weights or name in plan.states]
    used = {buffer for one in made.steps[: last + 1] for buffer in one.buffers.values()}
    held: dict[str, torch.Tensor] = {}
    for name in names:
        kind = made.buffers[name]
        shape = kind.bind({}) if name in used else (1,) * len(kind.shape)
        held[name] = torch.empty(shape, dtype=TORCH_DTYPE[kind.dtype], device=device.memory)
        drawn.fill(name, held[name])
    torch.cuda.synchronize()
    step = DeviceStep(device, made, binaries, held)
    step.give(inputs)
    torch.cuda.synchronize()
    by_index = {shape.index: shape for shape in wanted}
    for i, one in enumerate(made.steps[: last + 1]):
        if i in by_index and time.monotonic() < deadline:
            plain = _plain_weights(plan, one, held, drawn)
            arguments = [_argument(arg, step, plain) for arg in one.step.args]
            torch.cuda.synchronize()
            yield _shape(settings, by_index[i], one, arguments, device, binaries)
            del arguments, plain
        step.launch_one(i)
        device.synchronize()
        _spread(one, step)


def _spread(one: Scheduled, step: DeviceStep) -> None:
    """Send tokens to experts evenly and independently, as the model counts on: after a router.

    Drawn weights alone send them to fewer, for what precedes a router makes tokens alike.
    """
    if one.op.name != "norm_router":
        return
    ids, starts = (step.tensors[one.buffers[name] or ""] for name in ("ids", "starts"))
    experts = starts.numel() - 1
    scores = torch.rand((len(ids), experts), device=ids.device)
    ids.copy_(scores.argsort(dim=-1)[:, : ids.shape[1]])
    lists = expert_lists(ids, experts)
    for name, value in zip(("pairs", "starts"), lists, strict=True):
        step.tensors[one.buffers[name] or ""].copy_(value)


def _plain_weights(
    plan: Plan, one: Scheduled, held: Mapping[str, torch.Tensor], drawn: Drawn
) -> dict[str, torch.Tensor]:
    """Weights of a step in the plan's own order, drawn; in its buffers they get their layout."""
    found = {}
    for arg in one.step.args:
        if isinstance(arg, Ref) and arg.name in plan.weights:
            spec = plan.weights[arg.name]
            plain = torch.empty_like(held[arg.name])
            drawn.fill(arg.name, plain)
            if spec.layout != PLAIN:
                held[arg.name].copy_(kernels.arranged_tensor(spec.layout, plain))
            found[arg.name] = plain
    return found


def _argument(arg: Any, step: DeviceStep, plain: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(arg, Ref):
        name = step.schedule.of[arg.name]
        return plain[name] if name in plain else step.tensors[name].clone()
    if isinstance(arg, Size):
        return step.schedule.sizes[arg.name]
    return list(arg) if isinstance(arg, tuple) else arg


def _shape(
    settings: Settings, shape: Shape, one: Scheduled, arguments: Sequence[Any], device: Device,
    binaries: Mapping[Kernel, Binary],
) -> Found:  # fmt: skip
    op, target = one.op, settings.target
    faults = kernels.faults_of(
        device, op, arguments, shape.tactics, binaries, shape.known_as, similar=kernels.SIMILAR
    )
    gated, problems = faults is not None, {one.tactic: one.problem for one in faults or ()}
    arranged = kernels.arrange_all(op, arguments)
    vary = next((bench.vary for bench in op.benchmarks if bench.vary is not None), None)
    benchmark = Benchmark(name=shape.work.name, case=lambda _: (), vary=vary)
    cost = op.cost(*one.arguments)
    found = Found(shape=shape, gated=gated, moved_bytes=cost.moved_bytes, flops=cost.flops)
    for tactic in shape.tactics:
        timing = None
        if tactic.name not in problems:
            timing = kernels.time_tactic(
                device, op, benchmark, shape.work.tokens, arguments, tactic, binaries, arranged,
                gated=gated,
            )  # fmt: skip
        found.candidates.append(
            Candidate(
                tactic=tactic.name,
                microseconds=None if timing is None else timing.microseconds,
                predicted=1e6 * sum(predict(launch, target) for launch in tactic.launches),
                least=1e6 * sum(arithmetic(launch, target) for launch in tactic.launches),
                launches=tuple(features(launch) for launch in tactic.launches),
                problem=problems.get(tactic.name),
            )
        )
    return found


# ------------------------------------------------------------------------------------------ rows


def row_of(found: Found, settings: Settings, device: Device) -> Row | None:
    """The row of a shape; None where no tactic passed the gate."""
    right = [one for one in found.candidates if one.microseconds is not None]
    if not right:
        return None
    best = min(right, key=lambda one: one.score)
    chosen = next((one for one in right if one.tactic == found.shape.chosen), None)
    if chosen is not None and best.score > (1 - NOISE) * chosen.score:
        best = chosen  # no faster than noise is: the model may keep its choice
    return Row(
        op=found.shape.op,
        key=found.shape.known_as,
        tactic=best.tactic,
        microseconds=round(best.score, 3),
        model=found.shape.chosen,
        model_microseconds=None if chosen is None else round(chosen.score, 3),
        device=device.name,
        sms=device.sms,
        date=settings.date,
        command=settings.command,
    )


def rows_text(rows: Mapping[tuple[str, str], Row]) -> str:
    """A file of rows: sorted, a row a line, so that a new measurement is a small change."""
    lines = [json.dumps(asdict(rows[name]), sort_keys=True) for name in sorted(rows)]
    return '{"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def entry_of(found: Found) -> dict[str, Any]:
    """What was measured of a shape, in JSON's types."""
    shape = found.shape
    return {
        "op": shape.op,
        "key": shape.known_as,
        "phase": shape.work.phase,
        "work": shape.work.name,
        "tokens": shape.work.tokens,
        "calls": shape.calls,
        "chosen": shape.chosen,
        "gated": found.gated,
        "moved_bytes": found.moved_bytes,
        "flops": found.flops,
        "candidates": [
            {
                "tactic": one.tactic,
                "microseconds": one.microseconds,
                "predicted": one.predicted,
                "problem": one.problem,
                "launches": [dict(each) for each in one.launches],
            }
            for one in found.candidates
        ],
    }
