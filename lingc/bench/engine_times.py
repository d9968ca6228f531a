"""Where a CUDA engine's time goes: steps, requests, prompts, and what each kind of step adds."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lingc.bench.engine_checks import decode_inputs, own_steps, prefill_inputs, token
from lingc.bench.record import Spread, spread
from lingc.device import Graph
from lingc.launch_table import TableStep, TableTactic
from lingc.plan import Ref
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_bucket import BoundBucket
from lingc.runtime.generate import Generator
from lingc.runtime.sampling import Sampling, draws
from lingc.runtime.sequence import Acceptance, Request

WARM = 3
WARM_S = 0.05
"""Replays, and seconds, before those that count."""
SAMPLED = 4
"""Steps of a kind that are timed for a profile."""
TURNS_S = 0.3
"""Seconds that the turns of one of them may take, within limits."""
PROMPT = 8
"""Tokens of a request's prompt."""
REPEATS = 3
"""Runs of a step by itself that count."""
PREFILLS = 3
PREFILLS_S = 5.0
"""Runs of a prompt that count, and seconds after which one will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """Steps of one op and tactic.

    Attributes:
        measured: Microseconds that such a step adds to those before it.
        predicted: What the engine was built to expect.
        origin: What that goes back to.
        parts: What the model of time knows of each launch, as `tactics.features` gives it; none
            where this version has no such tactic.
    """

    op: str
    tactic: str
    steps: int
    launches: int
    measured: float
    predicted: float
    moved_bytes: float
    origin: str
    parts: tuple[Mapping[str, Any], ...] = ()


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
        run: Seconds until the token behind it is chosen, as generation has it.
        predicted: Seconds of its steps, as the engine was built to expect.
        last: Seconds of the last chunk's graph.
        profile: Of the last chunk, each kind of step by itself.
    """

    tokens: int
    chunks: int
    run: Spread
    predicted: float
    last: Spread | None = None
    profile: tuple[Profiled, ...] = ()

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
        drafts: Of a round, which the model judges; 0 decodes plainly.
        kept: Of a round and a request, on average.
    """

    batch: int
    prompt: int
    tokens: int
    tokens_per_s: float
    first_token: float
    drafts: int = 0
    kept: float = 0.0


def decode(
    backend: CudaBackend, batch: int, context: int, *, tokens: int,
    experts: tuple[int, ...] | None = None, profiled: bool = False,
) -> Decode:  # fmt: skip
    """Steps of a batch, and where their time goes.

    Args:
        tokens: Steps to time.
        experts: Distinct ones that were hit, of each layer that has some; None where not known.
        profiled: Whether each kind of step is timed too.
    """
    inputs = decode_inputs(backend, batch, context)
    bound = backend.prepare("decode", inputs)
    steps = own_steps(backend, bound)
    graph = bound.record({step.name for step, _ in steps})
    warm(graph)
    times = graph.seconds(tokens)
    graph.close()
    waits = []
    for _ in range(tokens + WARM):
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
        - not_hit(backend, bound, experts),
        launches=sum(len(tactic.launches) for _, tactic in steps),
        experts=experts,
        profile=tuple(profile(backend, bound, statistics.median(times))) if profiled else (),
    )


def warm(graph: Graph) -> None:
    """Replay for as long as clocks take to rise."""
    until = time.perf_counter() + WARM_S
    while True:
        graph.seconds(WARM)
        if time.perf_counter() > until:
            return


def not_hit(backend: CudaBackend, bound: BoundBucket, hit: tuple[int, ...] | None) -> float:
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


def generate(backend: CudaBackend, batch: int, *, tokens: int, drafts: int = 0) -> Generation:
    """Requests of a short prompt each, answered together."""
    prompts = [tuple(token(backend.plan, i, j) for j in range(PROMPT)) for i in range(batch)]
    tokens = min(tokens, backend.limits.pages // batch * backend.plan.page_size - PROMPT)
    asks = [Request(tokens=one, max_tokens=tokens, stop_ids=frozenset()) for one in prompts]
    generator = Generator(backend, drafts=drafts)
    generator.generate(asks)  # graphs are recorded when they are first asked for
    started = time.perf_counter()
    done = generator.generate(asks)
    took = time.perf_counter() - started
    first = max(one.first_token_s or 0.0 for one in done)
    made = sum(len(one.tokens) - 1 for one in done)
    kept = Acceptance.total([one.acceptance for one in done]).mean_accepted if drafts else 0.0
    return Generation(batch=batch, prompt=PROMPT, tokens=tokens, drafts=drafts, kept=kept,
                      tokens_per_s=made / (took - first), first_token=first)  # fmt: skip


def profile(backend: CudaBackend, bound: BoundBucket, seconds: float) -> Iterator[Profiled]:
    """What each kind of step adds to a program that ends with it, against one that ends before.

    A step cannot run without those before it: others use its inputs' memory later. Some steps of a
    kind stand for all.

    Args:
        seconds: Of the whole step.
    """
    steps = own_steps(backend, bound)
    turns = max(5, min(15, int(TURNS_S / seconds)))
    for places in _kinds(steps):
        count = min(len(places), SAMPLED)
        some = [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]
        took = statistics.mean(_added(bound, steps, i, turns) for i in some)
        yield _profiled(backend, bound, steps, places, took)


def alone(backend: CudaBackend, bound: BoundBucket) -> Iterator[Profiled]:
    """What the first step of each kind takes by itself, of steps that take long.

    One run of what is before it makes its inputs. It runs several times on them; what it does to
    the state meanwhile changes no time.
    """
    steps = own_steps(backend, bound)
    names = [step.name for step, _ in steps]
    done = 0
    for places in _kinds(steps):
        first = places[0]
        if first > done:
            before = bound.record(names[done:first])
            before.seconds(1)
            before.close()
        graph = bound.record(names[first : first + 1])
        took = statistics.median(graph.seconds(1 + REPEATS)[1:])
        graph.close()
        done = first + 1
        yield _profiled(backend, bound, steps, places, took)


def _kinds(steps: Sequence[tuple[TableStep, TableTactic]]) -> list[list[int]]:
    """Where the steps of each kind are: those of the same op, sizes and tactic."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for i, (_, tactic) in enumerate(steps):
        kinds.setdefault((tactic.op, tactic.key), []).append(i)
    return [*kinds.values()]


def _profiled(
    backend: CudaBackend, bound: BoundBucket, steps: Sequence[tuple[TableStep, TableTactic]],
    places: Sequence[int], seconds: float,
) -> Profiled:  # fmt: skip
    step, tactic = steps[places[0]]
    return Profiled(
        op=tactic.op,
        tactic=tactic.tactic,
        steps=len(places),
        launches=len(tactic.launches),
        measured=1e6 * seconds,
        predicted=tactic.microseconds,
        moved_bytes=tactic.moved_bytes,
        origin=tactic.origin,
        parts=_parts(backend, bound, step, tactic),
    )


def _parts(
    backend: CudaBackend, bound: BoundBucket, step: TableStep, tactic: TableTactic
) -> tuple[Mapping[str, Any], ...]:
    """What the model of time knows of a step's launches: they are made again from the plan."""
    from lingc import targets  # noqa: PLC0415
    from lingc.plugins.table import OPS  # noqa: PLC0415 (imports torch)
    from lingc.targets.cuda.schedule import arguments_of  # noqa: PLC0415
    from lingc.targets.cuda.tactics import features  # noqa: PLC0415

    plan, limits = backend.plan, backend.limits
    program = plan.programs[bound.bucket.phase]
    (planned,) = [one for one in program.steps if one.outputs[0] == step.name]
    sizes = {**bound.sizes, "S": limits.slots + 1, "R": limits.pages * plan.page_size + 1}
    arguments = arguments_of(program, planned, sizes)
    target = targets.get(backend.code.table.target)
    some = OPS[step.op].tactics(target, *arguments)
    found = [one for one in some if one.name == tactic.tactic]
    return tuple(features(launch) for one in found for launch in one.launches)


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


def prefill(backend: CudaBackend, length: int, *, profiled: bool = False) -> Prefill:
    """A prompt, chunk by chunk, until the token behind it is chosen."""
    chunks = prefill_inputs(backend, length)
    chosen = draws([(Sampling(), 0, length)])
    predicted = 0.0
    for chunk in chunks:
        bound = backend.prepare("prefill", chunk)
        predicted += sum(tactic.microseconds for _, tactic in own_steps(backend, bound))
    waits: list[float] = []
    while len(waits) < 2 or (len(waits) <= PREFILLS and sum(waits) < PREFILLS_S):
        started = time.perf_counter()
        for chunk in chunks:
            backend.draw("prefill", chunk, chosen)
        waits.append(time.perf_counter() - started)
    last: Spread | None = None
    kinds: tuple[Profiled, ...] = ()
    if profiled:
        bound = backend.prepare("prefill", chunks[-1])
        whole = bound.record([step.name for step, _ in own_steps(backend, bound)])
        last = spread(whole.seconds(REPEATS))
        whole.close()
        kinds = tuple(alone(backend, bound))
    return Prefill(
        tokens=length, chunks=len(chunks), run=spread(waits[1:]), predicted=1e-6 * predicted,
        last=last, profile=kinds,
    )  # fmt: skip
