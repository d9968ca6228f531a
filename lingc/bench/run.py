"""Open, gate, measure."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lingc.bench.contenders import Contender, Eager, Engine, Tokens
from lingc.bench.record import GateRow, Measure, OtherLoad, Record, Settings, measure
from lingc.bench.starting import Started, start_eager, start_engine
from lingc.checkpoint import Checkpoint
from lingc.errors import UsageError
from lingc.model.loading import from_source
from lingc.parity.budget import judge, load_budget
from lingc.parity.data import SAMPLE, Row, read_rows
from lingc.parity.engine import phases
from lingc.parity.opening import INTERPRET, Start, Subject, open_pair, refuse_other_weights
from lingc.parity.run import compare, default_budget
from lingc.parity.side import Mode
from lingc.parity.weights import RoundedWeights
from lingc.runtime.backend import Backend, Limits
from lingc.runtime.generate import Generator
from lingc.runtime.load import OpenedEngine
from lingc.runtime.sequence import Acceptance, Request

Progress = Callable[[str], None]
"""Told what is done next."""

GATE_ROWS, GATE_TOKENS = 4, 64
BLOCK = 16
"""Decode steps of one side before it is the other's turn."""
UNCOUNTED = 2
"""Steps at the start of a block that are not counted: the other side's data is in the caches."""
PREFILLS = 5
SPOKEN = 4
"""Prompts to speculate on."""
SPOKEN_TOKENS = 64


def run(settings: Settings, tell: Progress = lambda _: None) -> Record:
    """Measure as the settings say; no numbers where the gate is red.

    Raises:
        UsageError: There is nothing to compare with, or a size is out of range.
        IntegrityError: The checkpoint is not the one that the engine was built from.
    """
    _check(settings)
    torch.set_num_threads(settings.cores)
    pair = _open(settings)
    prompts = _prompts(pair.engine, max(settings.prefill, settings.context))
    tell("check that it is right")
    gate = tuple(_gate(settings, pair, prompts))
    measures: tuple[Measure, ...] = ()
    load = OtherLoad()
    timing = _Timing(settings=settings, pair=pair, prompts=prompts)
    if all(row.ok for row in gate):
        measures = tuple(timing.measures(tell))
    return Record(
        engine=_facts(pair.engine),
        baseline=_facts(pair.baseline),
        settings=settings,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        gate=gate,
        measures=measures,
        acceptance=timing.acceptance,
        other_cores=load.cores(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """What is measured.

    Attributes:
        baseline: Eager, or another engine.
        eager: The checkpoint, where one is given.
    """

    engine: Subject
    baseline: Subject
    eager: Subject | None


def _check(settings: Settings) -> None:
    if settings.checkpoint is None and settings.against is None:
        raise UsageError(
            "there is nothing to compare with",
            hint="give --checkpoint DIR for eager, or --against ENGINE",
        )
    sizes = {
        "batch": min(settings.batches, default=0),
        "context": settings.context,
        "prefill": settings.prefill,
        "tokens": settings.tokens,
        "starts": settings.starts,
    }
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} is {value}, at least 1 is needed")


def _open(settings: Settings) -> _Pair:
    def pair(a: Path, b: Path) -> tuple[Subject, Subject]:
        return open_pair(
            str(a), str(b), cache_dir=settings.cache_dir, checkpoint=settings.checkpoint
        )

    if settings.against is None:
        assert settings.checkpoint is not None, "checked before"
        engine, eager = pair(settings.engine, settings.checkpoint)
        found = _Pair(engine=engine, baseline=eager, eager=eager)
    else:
        engine, other = pair(settings.engine, settings.against)
        given = settings.checkpoint
        eager_too = None if given is None else pair(settings.engine, given)[1]
        found = _Pair(engine=engine, baseline=other, eager=eager_too)
    for subject in {id(s): s for s in (found.engine, found.baseline)}.values():
        if subject.kind != "engine" and subject is not found.eager:
            raise UsageError(
                f"{str(subject.path)!r} is not an engine",
                hint="give packages; a checkpoint is given by --checkpoint",
            )
    if found.engine.kind != "engine":
        raise UsageError(f"{str(settings.engine)!r} is not an engine", hint="give a package")
    return found


def _facts(subject: Subject) -> dict[str, Any]:
    return {"name": subject.title, "checkpoint": subject.identity, **subject.facts}


def _prompts(engine: Subject, length: int) -> list[tuple[int, ...]]:
    """Prompts of that length: running text of the sample, or ids by a fixed rule."""
    vocab = engine.config.vocab_size
    if engine.tokenizer is None:
        ids = [(7919 * (i + 1)) % vocab for i in range(GATE_ROWS * length)]
    else:
        rows = read_rows(SAMPLE, vocab=vocab, tokenizer=engine.tokenizer)
        text = [token for row in rows for token in row.ids]
        ids = text * -(-GATE_ROWS * length // len(text))
    return [tuple(ids[i * length : (i + 1) * length]) for i in range(GATE_ROWS)]


# ------------------------------------------------------------------------------------------ gate


def _gate(settings: Settings, pair: _Pair, prompts: Sequence[tuple[int, ...]]) -> Iterator[GateRow]:
    """Every engine against eager, or without one against its own plan, run by the references."""
    rows = [Row(line=i + 1, ids=ids[:GATE_TOKENS]) for i, ids in enumerate(prompts)]
    for subject in (pair.engine, pair.baseline):
        if subject.kind != "engine":
            continue
        reference = pair.eager
        if reference is None:
            words = f"{INTERPRET}{subject.path}", str(subject.path)
            reference, subject = open_pair(  # noqa: PLW2901 the same package, opened twice
                *words, cache_dir=settings.cache_dir, checkpoint=settings.checkpoint
            )
        else:
            refuse_other_weights(reference, subject)
        yield from _judge(settings, reference, subject, rows)


def _judge(
    settings: Settings, reference: Subject, subject: Subject, rows: list[Row]
) -> Iterator[GateRow]:
    assert subject.plan is not None, "it is an engine"
    modes: list[Mode] = ["prefill", "decode"]
    if settings.drafts:
        modes += ["verify", "draft"]
    start = Start(
        slots=len(rows),
        tokens=GATE_TOKENS,
        phases=tuple({phase for mode in modes for phase in phases(mode)}),
        threads=settings.cores,
        rounding=subject.plan,
    )
    budget = load_budget(default_budget(reference, subject, "engine"))
    a, b = reference.start(start), subject.start(start)
    try:
        found = compare(a, b, rows, modes, reference.routing, len(rows))
        for mode, comparison in found:
            summary = comparison.summary(budget.margin)
            yield GateRow(
                side=b.name,
                reference=a.name,
                mode=mode,
                summary=summary,
                checks=judge(summary, budget),
            )
    finally:
        a.close()
        b.close()


# ---------------------------------------------------------------------------------------- timing


class _Timing:
    """Every measure, side by side."""

    def __init__(
        self, *, settings: Settings, pair: _Pair, prompts: Sequence[tuple[int, ...]]
    ) -> None:
        self.settings = settings
        self.pair = pair
        self.prompts = prompts
        self.acceptance: tuple[float | None, ...] = ()

    def measures(self, tell: Progress) -> Iterator[Measure]:
        tell("start each side in a process of its own")
        yield from self._starts()
        backends = [self._backend(self.pair.engine)]
        engine = Engine(backends[0])
        baseline: Contender
        if self.pair.baseline.kind == "eager":
            baseline = self._eager()
        else:
            backends.append(self._backend(self.pair.baseline))
            baseline = Engine(backends[1])
        try:
            tell("prefill")
            yield from self._prefills(engine, baseline)
            for batch in self.settings.batches:
                tell(f"decode, batch {batch}")
                yield self._decode(engine, baseline, batch)
            if self.settings.drafts:
                tell("speculate")
                yield self._speculate(backends[0])
        finally:
            for backend in backends:
                backend.close()

    def _starts(self) -> Iterator[Measure]:
        sides: list[list[Started]] = [[], []]
        for _ in range(self.settings.starts):
            for subject, found in zip((self.pair.engine, self.pair.baseline), sides, strict=True):
                found.append(self._start(subject))
        times = [[s.seconds for s in found] for found in sides]
        yield measure("start", "to the first token, a new process", "s", *times)
        for name, field in (("memory", "anonymous_bytes"), ("mapped files", "file_bytes")):
            sizes = [[getattr(s, field) for s in found] for found in sides]
            if all(size is not None for found in sizes for size in found):
                detail = "of its own" if name == "memory" else "shared, can be dropped"
                yield measure(name, detail, "B", *sizes)

    def _start(self, subject: Subject) -> Started:
        settings = self.settings
        if subject.kind == "eager":
            return start_eager(subject.path, threads=settings.cores)
        assert isinstance(subject.opened, OpenedEngine), "an engine is opened as one"
        has_weights = subject.opened.package.manifest.has_weights
        return start_engine(
            subject.path,
            checkpoint=None if has_weights else settings.checkpoint,
            cache_dir=settings.cache_dir,
            room=self._room,
            threads=settings.cores,
        )

    @property
    def _room(self) -> int:
        """Tokens that a sequence grows to."""
        settings = self.settings
        steps = -(-settings.tokens // (BLOCK - UNCOUNTED)) * BLOCK
        spoken = min(settings.context, SPOKEN_TOKENS) + SPOKEN_TOKENS + settings.drafts
        return max(settings.context + steps, settings.prefill, spoken) + 1

    def _backend(self, subject: Subject) -> Backend:
        assert isinstance(subject.opened, OpenedEngine), "an engine is opened as one"
        limits = Limits.from_tokens(
            slots=max(self.settings.batches),
            tokens_per_sequence=self._room,
            page_size=subject.opened.plan.page_size,
        )
        return subject.opened.start(limits, threads=self.settings.cores)

    def _eager(self) -> Eager:
        """Eager as it was gated: with the engine's weights, widened."""
        opened, plan = self.pair.baseline.opened, self.pair.engine.plan
        assert isinstance(opened, Checkpoint), "eager is a checkpoint"
        assert plan is not None, "it is an engine"
        return Eager(from_source(RoundedWeights(opened, plan, ("prefill", "decode"))))

    def _prefills(self, engine: Contender, baseline: Contender) -> Iterator[Measure]:
        length = self.settings.prefill
        seconds: list[list[float]] = [[], []]
        for turn in range(PREFILLS + 1):
            prompt = self.prompts[turn % len(self.prompts)][:length]
            for side, found in zip((engine, baseline), seconds, strict=True):
                found.append(_timed(lambda side=side, prompt=prompt: side.prefill(prompt).argmax()))  # type: ignore[misc]
        warm = [found[1:] for found in seconds]
        rates = [[length / s for s in found] for found in warm]
        yield measure("prefill", f"{length} tokens", "tokens/s", *rates)
        yield measure("first token", f"after {length} tokens", "s", *warm)

    def _decode(self, engine: Contender, baseline: Contender, batch: int) -> Measure:
        settings = self.settings
        rows = [self.prompts[i % len(self.prompts)][: settings.context] for i in range(batch)]
        sides = (engine, baseline)
        for side in sides:
            side.begin(rows)
        seconds: list[list[float]] = [[], []]
        tokens = [row[0] for row in rows]
        while len(seconds[0]) < settings.tokens:
            for side, found in zip(sides, seconds, strict=True):
                found.extend(_block(side, tokens))
        rates = [[batch / s for s in found[: settings.tokens]] for found in seconds]
        detail = f"batch {batch} after {settings.context} tokens"
        return measure("decode", detail, "tokens/s", *rates)

    def _speculate(self, backend: Backend) -> Measure:
        """The engine with drafts against itself without, over the same prompts."""
        drafts = self.settings.drafts
        with_drafts, plain = Generator(backend, drafts=drafts), Generator(backend)
        rates: list[list[float]] = [[], []]
        accepted: list[Acceptance] = []
        for turn in range(SPOKEN + 1):
            prompt = self.prompts[turn % len(self.prompts)][: min(self.settings.context, 64)]
            ask = Request(tokens=prompt, max_tokens=SPOKEN_TOKENS, stop_ids=frozenset())
            for generator, found in zip((with_drafts, plain), rates, strict=True):
                started = time.perf_counter()
                (done,) = generator.generate([ask])
                first = done.first_token_s or 0.0
                took = time.perf_counter() - started - first
                found.append((len(done.tokens) - 1) / took)
                if generator is with_drafts and turn:
                    accepted.append(done.acceptance)
        self.acceptance = Acceptance.total(accepted).rates
        warm = [found[1:] for found in rates]
        return measure("speculative", f"{drafts} drafts, against none", "tokens/s", *warm)


def _block(side: Contender, tokens: Tokens) -> list[float]:
    seconds = [_timed(lambda: side.step(tokens).argmax(-1)) for _ in range(BLOCK)]
    return seconds[UNCOUNTED:]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
