"""How fast a CUDA engine is: against the bound of its own bytes, once it is shown to be right.

Right is an engine whose test vectors pass. One without weights has none that could pass; drawn
weights stand in, and then every op that its steps are made of is held to its reference on what the
steps give it. A step's time is that of its graph on the device; a run's is what a caller waits for.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lingc.bench import synthetic
from lingc.bench.record import Spread, about, machine, spread
from lingc.bench.synthetic import Routing
from lingc.device import Device, Graph
from lingc.errors import UsageError
from lingc.launch_table import TableStep, TableTactic
from lingc.plan import Plan, Ref, Size, TensorType
from lingc.runtime.backend import Array, Limits
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_bucket import SAMPLE, BoundBucket
from lingc.runtime.cuda_memory import Held
from lingc.runtime.generate import Generator
from lingc.runtime.load import OpenedEngine, run_vectors
from lingc.runtime.sequence import Request
from lingc.runtime.slots import Piece, SlotTable
from lingc.targets.cuda.binaries import Compilers, compile_all

Progress = Callable[[str], None]

FORMAT = 1
"""Version of a record."""

WARM = 3
WARM_S = 0.05
"""Replays, and seconds, before those that count."""
SAMPLED = 4
"""Steps of a kind that are timed for a profile."""
TURNS_S = 0.03
"""Seconds that the turns of one of them may take, within limits."""
PROMPT = 8
"""Tokens of a request's prompt."""
PREFILLS = 3
PREFILLS_S = 5.0
"""Runs of a prompt that count, and seconds after which one will do."""

_FEW = 256
"""Tokens of the prompt that the gate runs: the references are slow."""


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
    sms: int | None = None
    compilers: Compilers | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that the gate looked at."""

    name: str
    detail: str
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """Steps of one op and tactic.

    Attributes:
        measured: Microseconds that such a step adds to those before it.
        predicted: What the engine was built to expect.
        origin: What that goes back to.
    """

    op: str
    tactic: str
    steps: int
    launches: int
    measured: float
    predicted: float
    moved_bytes: float
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Steps of so many sequences.

    Attributes:
        step: Seconds of the step's graph.
        run: Seconds that a caller waits for logits.
        predicted: Seconds that the engine was built to expect.
        moved_bytes: What the step must read and write by the plan, of experts those that were hit;
            under uniform and independent routing where nobody looked.
        launches: In the graph.
        experts: Distinct experts hit, of each layer that has some; None where not looked at.
    """

    batch: int
    context: int
    bucket: Mapping[str, int]
    step: Spread
    run: Spread
    predicted: float
    moved_bytes: float
    launches: int
    experts: tuple[int, ...] | None
    profile: tuple[Profiled, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step.p50

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.step.p50

    @property
    def profiled(self) -> float:
        """Seconds of all its steps, each as it is alone."""
        return 1e-6 * sum(one.measured * one.steps for one in self.profile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One prompt, in chunks of what the engine takes at once.

    Attributes:
        run: Seconds until the logits of its last token.
        predicted: Seconds of its steps, as the engine was built to expect.
    """

    tokens: int
    chunks: int
    run: Spread
    predicted: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.run.p50


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Requests answered together, as a caller sees it: tokens chosen, host work and all.

    Attributes:
        tokens: New tokens of each request.
        tokens_per_s: Of all requests, from the first new token to the last.
        first_token: Seconds until the first new token, the most of all requests.
    """

    batch: int
    prompt: int
    tokens: int
    tokens_per_s: float
    first_token: float


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
    ceilings: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return all(check.problem is None for check in self.gate)


def run(opened: OpenedEngine, settings: Settings, tell: Progress = lambda _: None) -> Report:
    """Load, check, measure.

    Raises:
        UsageError: The engine has weights of its own and others are to be drawn, or has none.
    """
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
    report = Report(device=facts(device), loaded=0.0, gate=checks)
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
            measure(backend, settings, report, hit, tell)
        finally:
            backend.close()
    tell("measure what memory gives here")
    report.ceilings = ceilings(device, opened.plan, settings)
    return report


def limits_of(plan: Plan, settings: Settings, *, gate: bool = False) -> Limits:
    """Room for what is measured, or for what the gate looks at alone."""
    contexts = settings.contexts[:1] if gate else settings.contexts
    prompts = (_FEW,) if gate else (*settings.prefills, 1)

    def pages(tokens: int) -> int:
        return -(-(tokens + 1) // plan.page_size)

    most = max(batch * pages(context) for batch in settings.batches for context in contexts)
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


def facts(device: Device) -> dict[str, Any]:
    """The device in words and numbers."""
    return {"name": device.name, "sms": device.sms, "driver": device.driver_version,
            "l2_bytes": device.l2_bytes}  # fmt: skip


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
    length = min(settings.prefills[0], _FEW, backend.prefill_tokens)
    (chunk,) = prefill_inputs(backend, length)
    report.gate += step_checks(backend, "prefill", chunk)[0]
    return hit


def measure(
    backend: CudaBackend, settings: Settings, report: Report,
    hit: Mapping[int, tuple[int, ...]] = MappingProxyType({}), tell: Progress = lambda _: None,
) -> None:  # fmt: skip
    """All numbers; the engine was shown to be right."""
    for batch in settings.batches:
        for context in settings.contexts:
            tell(f"decode, batch {batch}, context {context}")
            report.decodes.append(decode(backend, settings, batch, context, hit.get(batch)))
    for batch in settings.batches:
        tell(f"generate, batch {batch}")
        report.generations.append(generate(backend, settings, batch))
    for length in settings.prefills:
        tell(f"prefill, {length} tokens")
        report.prefills.append(prefill(backend, length))


# ------------------------------------------------------------------------------------------ inputs


def decode_inputs(backend: CudaBackend, batch: int, context: int) -> dict[str, Array]:
    """A step of sequences with so many tokens each."""
    plan = backend.plan
    table = SlotTable(backend.limits, plan.page_size)
    pieces = [
        Piece(lease=table.admit(context + 1), position=context, tokens=(_token(plan, i, 0),))
        for i in range(batch)
    ]
    given = table.pack(pieces) | {"accepted": np.zeros(batch, np.int32)}
    return {name: given[name] for name in plan.programs["decode"].inputs}


def prefill_inputs(backend: CudaBackend, length: int) -> list[dict[str, Array]]:
    """A prompt in chunks; logits of each chunk's last token."""
    plan, most = backend.plan, backend.prefill_tokens
    table = SlotTable(backend.limits, plan.page_size)
    lease = table.admit(length + 1)
    found = []
    for start in range(0, length, most):
        tokens = tuple(_token(plan, 0, i) for i in range(start, min(start + most, length)))
        given = table.pack([Piece(lease=lease, position=start, tokens=tokens)])
        given["logit_rows"] = np.array([len(tokens) - 1], np.int32)
        found.append({name: given[name] for name in plan.programs["prefill"].inputs})
    return found


def _token(plan: Plan, sequence: int, place: int) -> int:
    return (7919 * (sequence + 1) + 104_729 * place + 11) % int(plan.config["vocab_size"])


# -------------------------------------------------------------------------------------------- gate


def vector_checks(opened: OpenedEngine) -> list[Check]:
    """The package's own test vectors."""
    return [
        Check(name="vectors", detail=one.case, problem="; ".join(one.problems) or None)
        for one in run_vectors(opened.package)
    ]


def step_checks(
    backend: CudaBackend, phase: str, inputs: Mapping[str, Array]
) -> tuple[list[Check], tuple[int, ...]]:
    """Run a phase step by step, one step of each kind held to its op's reference.

    Returns:
        What was found, and the distinct experts that each layer's tokens were sent to.
    """
    from lingc.bench.kernels import problem_of  # noqa: PLC0415 (imports torch)
    from lingc.plugins.table import OPS  # noqa: PLC0415

    bound = backend.prepare(phase, inputs)
    steps = _steps(backend, bound)
    checks: list[Check] = []
    hit: list[int] = []
    seen: set[str] = set()
    for step, tactic in steps:
        op = OPS[step.op]
        fresh = f"{tactic.op} {tactic.key}" not in seen
        seen.add(f"{tactic.op} {tactic.key}")
        given = _arguments(backend, bound, step) if fresh else []
        graph = bound.record({step.name})
        graph.replay()
        backend.device.synchronize()
        graph.close()
        if fresh:
            got = [_tensor(backend, bound, step, name).clone() for name in op.results]
            problem = problem_of(op, given, got)
            checks.append(Check(name=f"{phase}, {step.op}", detail=tactic.tactic, problem=problem))
        if step.op == "norm_router":
            ids = _tensor(backend, bound, step, "ids")
            rows = len(inputs["token_ids"])
            hit.append(int(ids[:rows].unique().numel()))
        del given
    _empty_cache()
    logits = backend.run(phase, inputs)["logits"]
    finite = bool(np.isfinite(logits).all())
    checks.append(
        Check(name=phase, detail="finite logits", problem=None if finite else "some are not")
    )
    return checks, tuple(hit)


def _empty_cache() -> None:
    """Give memory that torch keeps for itself back to the device."""
    import torch  # noqa: PLC0415

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _steps(backend: CudaBackend, bound: BoundBucket) -> list[tuple[TableStep, TableTactic]]:
    """The program's own steps; the one that draws tokens is not among them."""
    table = backend.code.table
    steps = table.phases[bound.bucket.phase].steps
    return [
        (step, table.tactics[index])
        for step, index in zip(steps, bound.bucket.tactics, strict=True)
        if step.op != SAMPLE
    ]


def _arguments(backend: CudaBackend, bound: BoundBucket, step: TableStep) -> list[Any]:
    """What a step's op is given now, as its reference takes it: copies, weights in plain order."""
    from lingc.bench.kernels import plain_tensor  # noqa: PLC0415
    from lingc.plugins.table import OPS  # noqa: PLC0415

    plan = backend.plan
    program = plan.programs[bound.bucket.phase]
    (planned,) = [one for one in program.steps if one.outputs[0] == step.name]
    found: list[Any] = []
    for name, arg in zip(OPS[step.op].arguments, planned.args, strict=True):
        if isinstance(arg, Ref):
            tensor = _tensor(backend, bound, step, name, arg.name)
            weight = plan.weights.get(arg.name)
            found.append(tensor.clone() if weight is None else plain_tensor(weight.layout, tensor))
        elif isinstance(arg, Size):
            found.append(bound.sizes[arg.name])
        else:
            found.append(list(arg) if isinstance(arg, tuple) else arg)
    return found


def _tensor(
    backend: CudaBackend, bound: BoundBucket, step: TableStep, name: str, value: str | None = None
) -> Any:
    """An argument or a result of a step where it lies."""
    from lingc.plugins.table import OPS  # noqa: PLC0415

    program = backend.plan.programs[bound.bucket.phase]
    if value is None:
        (planned,) = [one for one in program.steps if one.outputs[0] == step.name]
        value = planned.outputs[OPS[step.op].results.index(name)]
    buffer = step.buffers[name]
    assert buffer is not None, "an argument that is there"
    limits = backend.limits
    sizes = {**bound.sizes, "S": limits.slots + 1, "R": limits.pages * backend.plan.page_size + 1}
    kind = program.types[value]
    whole = TensorType(kind.dtype, kind.bind(sizes))
    return view(Held(kind=whole, address=bound.addresses[buffer], bytes=whole.bytes()))


def view(held: Held) -> Any:
    """Device memory as a tensor of torch; not a copy."""
    import torch  # noqa: PLC0415

    from lingc.op import TORCH_DTYPE  # noqa: PLC0415

    class Memory:
        __cuda_array_interface__: Mapping[str, Any] = {
            "shape": (held.bytes,), "typestr": "|u1", "data": (held.address, False), "version": 3,
        }  # fmt: skip

    raw = torch.as_tensor(Memory(), device="cuda")
    return raw.view(TORCH_DTYPE[held.kind.dtype]).view(held.kind.bind({}))


# ---------------------------------------------------------------------------------------- measures


def decode(
    backend: CudaBackend, settings: Settings, batch: int, context: int,
    experts: tuple[int, ...] | None = None,
) -> Decode:  # fmt: skip
    """Steps of a batch, and where their time goes."""
    inputs = decode_inputs(backend, batch, context)
    bound = backend.prepare("decode", inputs)
    steps = _steps(backend, bound)
    graph = bound.record({step.name for step, _ in steps})
    warm(graph)
    times = graph.seconds(settings.tokens)
    graph.close()
    waits = []
    for _ in range(settings.tokens + WARM):
        started = time.perf_counter()
        backend.run("decode", inputs)
        waits.append(time.perf_counter() - started)
    return Decode(
        batch=batch,
        context=context,
        bucket=dict(bound.bucket.sizes),
        step=spread(times),
        run=spread(waits[WARM:]),
        predicted=1e-6 * sum(tactic.microseconds for _, tactic in steps),
        moved_bytes=sum(tactic.moved_bytes for _, tactic in steps)
        - _not_hit(backend, bound, experts),
        launches=sum(len(tactic.launches) for _, tactic in steps),
        experts=experts,
        profile=tuple(profile(backend, bound, statistics.median(times)))
        if settings.profile
        else (),
    )


def warm(graph: Graph) -> None:
    """Replay for as long as clocks take to rise."""
    until = time.perf_counter() + WARM_S
    while True:
        graph.seconds(WARM)
        if time.perf_counter() > until:
            return


def _not_hit(backend: CudaBackend, bound: BoundBucket, hit: tuple[int, ...] | None) -> float:
    """Bytes of experts that the plan counts as hit under uniform routing, and that were not."""
    if not hit:
        return 0.0
    from lingc.plugins.table import OPS  # noqa: PLC0415

    program = backend.plan.programs[bound.bucket.phase]
    sizes = {**bound.sizes, "S": 1, "R": 1}
    layers = iter(hit)
    missed = found = 0.0
    for step in program.steps:
        op = step.op.removeprefix("lingc.")
        if op not in {"norm_router", "expert_up", "expert_down"}:
            continue
        given = dict(zip(OPS[op].arguments, step.args, strict=True))

        def shape(arg: Any) -> tuple[int, ...]:
            return program.types[arg.name].bind(sizes)

        if op == "norm_router":
            (experts,) = shape(given["bias"])
            tokens, top_k = shape(Ref(step.outputs[OPS[op].results.index("ids")]))
            missed = experts * (1 - (1 - top_k / experts) ** tokens) - next(layers)
            continue
        for arg in (given["gate_up" if op == "expert_up" else "down"], given["scale"]):
            if isinstance(arg, Ref):
                found += missed * program.types[arg.name].bytes(sizes) / shape(arg)[0]
    return found


def generate(backend: CudaBackend, settings: Settings, batch: int) -> Generation:
    """Requests of a short prompt each, answered together."""
    prompts = [tuple(_token(backend.plan, i, j) for j in range(PROMPT)) for i in range(batch)]
    tokens = min(settings.tokens, backend.limits.pages // batch * backend.plan.page_size - PROMPT)
    asks = [Request(tokens=one, max_tokens=tokens, stop_ids=frozenset()) for one in prompts]
    generator = Generator(backend)
    generator.generate(asks)  # graphs are recorded when they are first asked for
    started = time.perf_counter()
    done = generator.generate(asks)
    took = time.perf_counter() - started
    first = max(one.first_token_s or 0.0 for one in done)
    made = sum(len(one.tokens) - 1 for one in done)
    return Generation(batch=batch, prompt=PROMPT, tokens=tokens,
                      tokens_per_s=made / (took - first), first_token=first)  # fmt: skip


def profile(backend: CudaBackend, bound: BoundBucket, seconds: float) -> Iterator[Profiled]:
    """What each kind of step adds to a program that ends with it, against one that ends before.

    A step cannot run without those before it: others use its inputs' memory later. Some steps of a
    kind stand for all.

    Args:
        seconds: Of the whole step.
    """
    steps = _steps(backend, bound)
    kinds: dict[tuple[str, str], list[int]] = {}
    for i, (_, tactic) in enumerate(steps):
        kinds.setdefault((tactic.op, tactic.key), []).append(i)
    turns = max(5, min(15, int(TURNS_S / seconds)))
    for places in kinds.values():
        tactic = steps[places[0]][1]
        count = min(len(places), SAMPLED)
        some = [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]
        yield Profiled(
            op=tactic.op,
            tactic=tactic.tactic,
            steps=len(places),
            launches=len(tactic.launches),
            measured=1e6 * statistics.mean(_added(bound, steps, i, turns) for i in some),
            predicted=tactic.microseconds,
            moved_bytes=tactic.moved_bytes,
            origin=tactic.origin,
        )


def _added(
    bound: BoundBucket, steps: Sequence[tuple[TableStep, TableTactic]], place: int, turns: int
) -> float:
    """Seconds that a step adds: programs up to it and before it take turns."""
    names = [step.name for step, _ in steps[: place + 1]]
    with_it = bound.record(names)
    if place == 0:
        found = statistics.median(with_it.seconds(turns))
        with_it.close()
        return found
    before = bound.record(names[:-1])
    pairs = [(with_it.seconds(1)[0], before.seconds(1)[0]) for _ in range(turns + 1)]
    for graph in (with_it, before):
        graph.close()
    return statistics.median(a - b for a, b in pairs[1:])


def prefill(backend: CudaBackend, length: int) -> Prefill:
    """A prompt, chunk by chunk, until its last logits are there."""
    chunks = prefill_inputs(backend, length)
    predicted = 0.0
    for chunk in chunks:
        bound = backend.prepare("prefill", chunk)
        predicted += sum(tactic.microseconds for _, tactic in _steps(backend, bound))
    waits: list[float] = []
    while len(waits) < 2 or (len(waits) <= PREFILLS and sum(waits) < PREFILLS_S):
        started = time.perf_counter()
        for chunk in chunks:
            backend.run("prefill", chunk)
        waits.append(time.perf_counter() - started)
    return Prefill(
        tokens=length, chunks=len(chunks), run=spread(waits[1:]), predicted=1e-6 * predicted
    )


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
            "target": opened.plan.target,
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
    }  # fmt: skip
