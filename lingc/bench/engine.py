"""How fast a CUDA engine is: against the bound of its own bytes, once it is shown to be right.

Right is an engine whose test vectors pass. One without weights has none that could pass; drawn
weights stand in, and then every op that its steps are made of is held to its reference on what the
steps give it. A step's time is that of its graph on the device; a run's is what a caller waits for.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lingc.bench import synthetic
from lingc.bench.engine_checks import (
    Check,
    decode_inputs,
    prefill_inputs,
    step_checks,
    vector_checks,
)
from lingc.bench.engine_times import Decode, Generation, Prefill, decode, generate, prefill
from lingc.bench.record import about, device_facts, machine
from lingc.bench.speculation import (
    Part,
    Speculation,
    part_inputs,
    part_sizes,
    parts,
    room,
    speculate,
)
from lingc.bench.synthetic import Routing
from lingc.device import Device
from lingc.errors import UsageError
from lingc.plan import Plan
from lingc.runtime.backend import Limits
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.load import OpenedEngine
from lingc.runtime.speculative import check_drafts
from lingc.targets.cuda.binaries import Compilers, compile_all

Progress = Callable[[str], None]

FORMAT = 1
"""Version of a record."""

_FEW, _MANY = 256, 8192
"""Tokens of the prompts that the gate runs: a short one that is compared everywhere, and as much of
the longest as has room for its references beside a model's weights, compared at some rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        batches: Sequences at once, for decoding.
        contexts: Tokens in the cache before a step, each with every batch.
        prefills: Tokens of a prompt.
        tokens: Steps to time of each batch and context.
        seed: Of weights to draw; None where the engine has its own.
        routing: How drawn weights spread tokens over experts.
        profile: Whether every kind of step is timed alone too.
        drafts: Numbers of drafts a round to speculate with; none where empty.
        acceptances: Shares of drafts to keep by force; None lets the model judge.
        sms: Multiprocessors to use, where not all.
    """

    cache_dir: Path
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (4096,)
    prefills: tuple[int, ...] = (512,)
    tokens: int = 64
    seed: int | None = None
    routing: Routing = "uniform"
    profile: bool = False
    drafts: tuple[int, ...] = ()
    acceptances: tuple[float | None, ...] = (None,)
    sms: int | None = None
    compilers: Compilers | None = None


@dataclass(slots=True)
class Report:
    """A whole run; without numbers where the gate is red.

    Attributes:
        loaded: Seconds until weights and state were there.
        ceilings: Bytes a second that reading and copying reach here.
    """

    device: Mapping[str, Any]
    loaded: float
    gate: list[Check] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    speculations: list[Speculation] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    ceilings: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return all(check.problem is None for check in self.gate)


def run(
    opened: OpenedEngine, settings: Settings, tell: Progress = lambda _: None,
    measured: Callable[[Report], None] = lambda _: None,
) -> Report:  # fmt: skip
    """Load, check, measure.

    Args:
        measured: Called with what there is so far, each time that there is more.

    Raises:
        UsageError: The engine has weights of its own and others are to be drawn, or has none; or
            it cannot make so many drafts.
    """
    for drafts in settings.drafts:
        check_drafts(opened.plan, drafts)
    has_weights = opened.package.manifest.has_weights
    if settings.seed is not None and has_weights:
        raise UsageError("the engine has weights of its own", hint="leave --synthetic-weights out")
    if settings.seed is None and not has_weights:
        raise UsageError(
            "the engine has no weights to run with",
            hint="draw some with --synthetic-weights SEED, or give --checkpoint",
        )
    checks: list[Check] = []
    if has_weights:
        tell("run the test vectors")
        checks += vector_checks(opened)
    from lingc.bench.limited import open_device  # noqa: PLC0415 (loads the driver)

    device = open_device(settings.sms)
    report = Report(device=device_facts(device), loaded=0.0, gate=checks)
    hit: dict[int, tuple[int, ...]] = {}
    if not has_weights:
        # With as little state as will do: references make FP64 copies of it.
        tell("load, to check that it is right")
        backend = start(opened, settings, device, limits_of(opened.plan, settings, gate=True))
        try:
            tell("check that it is right")
            hit = gate(backend, settings, report)
        finally:
            backend.close()
    if report.is_right:
        tell("load")
        started = time.perf_counter()
        backend = start(opened, settings, device, limits_of(opened.plan, settings))
        try:
            device.synchronize()
            report.loaded = time.perf_counter() - started
            measure(backend, settings, report, hit, tell, measured)
        finally:
            backend.close()
    tell("measure what memory gives here")
    report.ceilings = ceilings(device, opened.plan, settings)
    return report


def limits_of(plan: Plan, settings: Settings, *, gate: bool = False) -> Limits:
    """Room for what is measured, or for what the gate looks at alone."""
    contexts = settings.contexts[:1] if gate else settings.contexts
    prompts = (_FEW, min(max(settings.prefills), _MANY)) if gate else (*settings.prefills, 1)

    def pages(tokens: int) -> int:
        return -(-(tokens + 1) // plan.page_size)

    drafts = max(settings.drafts, default=0)
    rounds = 0 if gate or not drafts else room(0, drafts, settings.tokens)
    most = max(
        batch * pages(context + drafts + rounds)
        for batch in settings.batches
        for context in contexts
    )
    return Limits(slots=max(settings.batches), pages=max(most, *map(pages, prompts)))


def start(opened: OpenedEngine, settings: Settings, device: Device, limits: Limits) -> CudaBackend:
    """The engine's backend with its own weights or drawn ones."""
    from lingc.weights import open_weights  # noqa: PLC0415

    weights = None if settings.seed is not None else open_weights(opened.package.shards())
    backend = CudaBackend(opened.package, weights, limits, device=device)
    if settings.seed is not None:
        draw(backend, settings)
    return backend


def draw(backend: CudaBackend, settings: Settings) -> None:
    """Weights and state from the seed."""
    assert settings.seed is not None, "a seed was given"
    arch = backend.code.table.arch
    code = synthetic.binaries(arch, settings.cache_dir, settings.compilers)
    drawn = synthetic.Drawn(backend.device, settings.seed, code)
    plan = backend.plan
    where = {name: backend.weight(name) for name in plan.weights}
    synthetic.draw_weights(plan, where, drawn, settings.routing, settings.seed)
    for name in plan.states:
        held = backend.held_state(name)
        drawn.tensor(name, held, synthetic.state_fill(held.kind))
    backend.device.synchronize()


def gate(backend: CudaBackend, settings: Settings, report: Report) -> dict[int, tuple[int, ...]]:
    """Hold steps of every kind to their references.

    Returns:
        Of each batch the distinct experts that each layer's tokens were sent to.
    """
    hit: dict[int, tuple[int, ...]] = {}
    for batch in settings.batches:
        inputs = decode_inputs(backend, batch, settings.contexts[0])
        found, hit[batch] = step_checks(backend, "decode", inputs)
        report.gate += found
        for phase, each in dict.fromkeys(
            size for one in settings.drafts for size in part_sizes(one)
        ):
            given = part_inputs(backend, phase, batch, settings.contexts[0], each)
            report.gate += step_checks(backend, phase, given)[0]
    prompts = min(settings.prefills[0], _FEW), min(max(settings.prefills), _MANY)
    for length in dict.fromkeys(prompts):
        (chunk,) = prefill_inputs(backend, min(length, backend.prefill_tokens))
        report.gate += step_checks(backend, "prefill", chunk)[0]
    return hit


def measure(
    backend: CudaBackend, settings: Settings, report: Report,
    hit: Mapping[int, tuple[int, ...]] = MappingProxyType({}), tell: Progress = lambda _: None,
    measured: Callable[[Report], None] = lambda _: None,
) -> None:  # fmt: skip
    """All numbers, `measured` called behind each; the engine was shown to be right."""
    for batch in settings.batches:
        for context in settings.contexts:
            tell(f"decode, batch {batch}, context {context}")
            found = decode(
                backend, batch, context, tokens=settings.tokens, experts=hit.get(batch),
                profiled=settings.profile,
            )  # fmt: skip
            report.decodes.append(found)
            measured(report)
    for batch in settings.batches:
        for drafts in (0, *settings.drafts):
            tell(f"generate, batch {batch}" + (f", {drafts} drafts" if drafts else ""))
            made = generate(backend, batch, tokens=settings.tokens, drafts=drafts)
            report.generations.append(made)
            measured(report)
    for drafts, batch, context in product(settings.drafts, settings.batches, settings.contexts):
        if not backend.rounds(drafts).fits(batch, 1):
            tell(f"no code for rounds of {batch} sequences, {drafts} drafts: not timed")
            continue
        tell(f"{drafts} drafts, batch {batch}, context {context}")
        for acceptance in settings.acceptances:
            one = speculate(
                backend, batch, context, drafts, rounds=settings.tokens, acceptance=acceptance
            )
            report.speculations.append(one)
            measured(report)
        report.parts += parts(
            backend, batch, context, drafts, tokens=settings.tokens, profiled=settings.profile
        )
        measured(report)
    for length in settings.prefills:
        tell(f"prefill, {length} tokens")
        report.prefills.append(prefill(backend, length, profiled=settings.profile))
        measured(report)


def ceilings(device: Device, plan: Plan, settings: Settings) -> dict[str, float]:
    """What kernels with nothing to compute reach in this process."""
    from lingc import targets  # noqa: PLC0415
    from lingc.bench.ceilings import ceiling_kernels, ceilings_of  # noqa: PLC0415 (imports torch)

    arch = targets.get(plan.target).arch
    some = ceiling_kernels()
    made = compile_all(some, arch, settings.cache_dir, compilers=settings.compilers)
    return ceilings_of(device, made)


# -------------------------------------------------------------------------------------------- told


def document(
    report: Report, opened: OpenedEngine, settings: Settings, versions: Mapping[str, str | None],
    date: str,
) -> dict[str, Any]:  # fmt: skip
    """The record in JSON's types. Nothing in it names a place on this machine."""
    manifest = opened.package.manifest
    read = report.ceilings.get("read")
    return {
        "kind": "bench-engine",
        "format": FORMAT,
        **about(versions, date),
        "machine": machine(),
        "device": dict(report.device),
        "engine": {
            "bundle": manifest.bundle_id,
            "target": opened.package.code().target,
            "precision": opened.plan.precision,
            "layers": opened.plan.config["num_hidden_layers"],
        },
        "weights": None if settings.seed is None else {"seed": settings.seed,
                                                       "routing": settings.routing},
        "loaded_s": report.loaded,
        "ceilings": dict(report.ceilings),
        "gate": {"ok": report.is_right, "checks": [asdict(check) for check in report.gate]},
        "decode": [
            {
                **asdict(one),
                "tokens_per_s": one.tokens_per_s,
                "bytes_per_s": one.bytes_per_s,
                "share_of_read": None if read is None else one.bytes_per_s / read,
                "profiled_s": one.profiled if one.profile else None,
            }
            for one in report.decodes
        ],
        "generate": [asdict(one) for one in report.generations],
        "prefill": [{**asdict(one), "tokens_per_s": one.tokens_per_s} for one in report.prefills],
        "speculate": [asdict(one) for one in report.speculations],
        "parts": [asdict(one) for one in report.parts],
    }  # fmt: skip
