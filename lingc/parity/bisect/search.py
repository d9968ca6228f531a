"""A bisection from two words to a finding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingc.checkpoint import Checkpoint
from lingc.engine import Package
from lingc.errors import DataError, IncompatibleError, UsageError
from lingc.model.loading import from_source
from lingc.model.model import LingModel
from lingc.parity.bisect.checkpoints import COMPARED, CheckpointWalk
from lingc.parity.bisect.finding import Finding, finding, wrong_weights
from lingc.parity.bisect.judge import Judged
from lingc.parity.bisect.repro import (
    ENGINE,
    PLAN,
    Again,
    Reproducer,
    of_checkpoints,
    of_fault,
    read,
    run_step_again,
)
from lingc.parity.bisect.traced import TracedCuda, TracedOnnx
from lingc.parity.bisect.walk import EngineWalk, FoundError, PlanWalk, Traced, Walk
from lingc.parity.data import Row, read_rows
from lingc.parity.engine import EngineSide, phases
from lingc.parity.opening import INTERPRET, Subject, open_pair, refuse_other_weights
from lingc.parity.page import filled
from lingc.parity.run import Settings, ordered
from lingc.parity.side import MODES, Mode
from lingc.parity.weights import RoundedWeights
from lingc.runtime.backend import Limits
from lingc.runtime.load import OpenedEngine
from lingc.weights import open_weights

ROWS = 3
"""Rows of the data that are walked where nobody says how many."""

PREFILL_TOKENS, STEP_TOKENS = 160, 44
"""What rows are cut to, when fed whole and when fed step by step."""

CHUNK = 48

COLUMNS = ("compared", "calls", "results", "nearest to its limit", "not judged")
"""Of `Walked.cells`."""

Advance = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """What one walk saw.

    Attributes:
        compared: What was held against what.
        calls: Of the suspect's phases, or rows.
        judged: Results that were compared.
        largest: Op -> largest share of its limit that a sound result used.
        skipped: Op -> results that nothing could be said of.
    """

    compared: str
    calls: int
    judged: int
    largest: dict[str, float]
    skipped: dict[str, int]

    def cells(self) -> tuple[object, ...]:
        """A row of a table."""
        nearest = max(self.largest.items(), key=lambda pair: pair[1], default=("-", 0.0))
        skipped = ", ".join(f"{op} {count}" for op, count in self.skipped.items())
        share = f"{nearest[0]}, {nearest[1]:.1%} of it" if self.largest else "-"
        return self.compared, self.calls, self.judged, share, skipped or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """All that a bisection found.

    Attributes:
        modes: How the suspect was fed.
        finding: None where every step is sound.
        reproducer: What shows the fault again; None without one.
    """

    reference: str
    other: str
    data: str
    modes: tuple[Mode, ...]
    walked: tuple[Walked, ...]
    finding: Finding | None
    reproducer: Reproducer | None

    @property
    def ok(self) -> bool:
        return self.finding is None

    def document(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "kind": "bisection",
            "ok": self.ok,
            "reference": self.reference,
            "other": self.other,
            "data": self.data,
            "modes": list(self.modes),
            "walked": [
                {
                    "compared": walk.compared, "calls": walk.calls, "judged": walk.judged,
                    "largest": walk.largest, "skipped": walk.skipped,
                }
                for walk in self.walked
            ],
            "finding": None if self.finding is None else self.finding.to_json(),
        }  # fmt: skip

    def page(self, repro: Path) -> str:
        """As HTML; `repro` is where the reproducer was written."""
        return filled("bisect.html", result=self, columns=COLUMNS, repro=repro)

    def verdict(self) -> str:
        """One line."""
        if self.finding is not None:
            return self.finding.lines()[0]
        judged = sum(walk.judged for walk in self.walked)
        return f"no fault: {judged} results of {len(self.modes)} modes are what they should be"


def bisect(settings: Settings, advance: Advance = lambda _: None) -> Bisection:
    """Walk a pair until something differs by its own doing.

    Args:
        settings: As for a comparison; no modes means all that the suspect has.
        advance: Told of each mode that was walked.

    Raises:
        UsageError: The two have no step in common that could be compared.
    """
    pair = open_pair(
        settings.a, settings.b, cache_dir=settings.cache_dir, checkpoint=settings.checkpoint
    )
    reference, other = ordered(*pair)
    kinds = (reference.kind, other.kind)
    if "record" in kinds:
        raise UsageError(
            "a record says what came of the steps, and has none that could be walked",
            hint="give what it was recorded from",
        )
    are_checkpoints = kinds == ("eager", "eager")
    suspects = [] if are_checkpoints else _suspects(reference, other)
    rows = read_rows(
        settings.data,
        vocab=reference.config.vocab_size,
        tokenizer=reference.tokenizer or other.tokenizer,
        samples=settings.samples or ROWS,
        max_tokens=min(settings.max_tokens or PREFILL_TOKENS, PREFILL_TOKENS),
    )
    if are_checkpoints:
        modes, walked, found, repro = _checkpoints(settings, reference, other, rows)
    else:
        modes, walked, found, repro = _packages(settings, reference, suspects, rows, advance)
    return Bisection(
        reference=reference.title, other=other.title, data=settings.data.name, modes=modes,
        walked=tuple(walked), finding=found, reproducer=repro,
    )  # fmt: skip


_Walks = tuple[tuple[Mode, ...], list[Walked], Finding | None, Reproducer | None]


def _checkpoints(
    settings: Settings, reference: Subject, other: Subject, rows: Sequence[Row]
) -> _Walks:
    first, second = (_loaded(subject) for subject in (reference, other))
    walk = CheckpointWalk(first, second)
    found = walk.score([row.ids for row in rows])
    told = Walked(compared=COMPARED, calls=walk.calls, judged=walk.judged, largest={}, skipped={})
    repro = None
    if found is not None:
        row = rows[walk.calls].ids
        repro = of_checkpoints(found, settings.a, settings.b, row)
    return ("prefill",), [told], found, repro


def _loaded(subject: Subject) -> tuple[LingModel, Checkpoint]:
    assert isinstance(subject.opened, Checkpoint), "eager is a checkpoint"
    return from_source(subject.opened), subject.opened


def _packages(
    settings: Settings,
    reference: Subject,
    suspects: Sequence[tuple[str, Subject]],
    rows: Sequence[Row],
    advance: Advance,
) -> _Walks:
    if reference.kind == "eager" and settings.weights == "engine":
        refuse_other_weights(reference, suspects[0][1])
    plan = suspects[0][1].plan
    assert plan is not None, "a package has a plan"
    modes = tuple(
        mode
        for mode in settings.modes or MODES
        if all(phase in plan.programs for phase in phases(mode))
    )
    walked: list[Walked] = []
    for compared, suspect in suspects:
        backend, walk = _start(compared, suspect, reference, rows, settings.threads)
        try:
            mode = _walk(EngineSide(backend, suspect.title, chunk=CHUNK), rows, modes, advance)
            walked.append(_told(compared, walk))
            if mode is not None:
                found, repro = _found(compared, walk, suspect, reference)
                return modes, walked, found, repro
        finally:
            backend.close()
    return modes, walked, None, None


def _suspects(reference: Subject, other: Subject) -> list[tuple[str, Subject]]:
    """What is walked, in order: a plan that is wrong makes its engine wrong."""
    kinds = (reference.kind, other.kind)
    if kinds == ("eager", "plan"):
        return [(PLAN, other)]
    if kinds == ("eager", "engine"):
        return [(PLAN, other), (ENGINE, other)]
    engines = [subject for subject in (reference, other) if subject.kind == "engine"]
    if not engines:
        raise UsageError(
            "two interpreted plans are run by the same references, so no step can differ",
            hint="hold each against the checkpoint, or against its engine",
        )
    same = reference.facts.get("bundle_id") == other.facts.get("bundle_id")
    if "plan" in kinds and not same:
        raise UsageError(
            f"{reference.title} and {other.title} are of two packages, whose steps differ",
            hint="hold each against the checkpoint: lingc parity CHECKPOINT PACKAGE --bisect",
        )
    return [(ENGINE, subject) for subject in engines]


def _start(
    compared: str, suspect: Subject, reference: Subject, rows: Sequence[Row], threads: int | None
) -> tuple[PlanWalk | EngineWalk, Walk]:
    plan = suspect.plan
    assert plan is not None, "a package has a plan"
    limits = Limits.from_tokens(
        slots=len(rows),
        tokens_per_sequence=max(len(row.ids) for row in rows),
        page_size=plan.page_size,
    )
    package = package_of(suspect)
    weights = open_weights(package.shards())
    if compared == PLAN:
        assert isinstance(reference.opened, Checkpoint), "eager is a checkpoint"
        module = from_source(RoundedWeights(reference.opened, plan, plan.programs))
        made = PlanWalk(plan, weights, module, limits)
        return made, made.walk
    engine = EngineWalk(_traced(suspect, limits, threads), weights)
    return engine, engine.walk


def _traced(suspect: Subject, limits: Limits, threads: int | None) -> Traced:
    opened = suspect.opened
    assert isinstance(opened, OpenedEngine), "the suspect is an engine"
    if opened.package.code().engine == "onnx":
        weights = open_weights(opened.package.shards())
        return TracedOnnx(opened.package, weights, limits, threads=threads)
    if opened.package.code().engine != "cuda":
        raise IncompatibleError(
            f"{suspect.title} is of a kind whose steps cannot be looked at one by one",
            hint=f"its plan can: lingc parity CHECKPOINT {INTERPRET}{suspect.path} --bisect",
        )
    backend: Any = opened.start(limits, threads=threads)
    return TracedCuda(backend)


def package_of(subject: Subject) -> Package:
    """The package behind an engine or an interpreted plan."""
    match subject.opened:
        case OpenedEngine() as engine:
            return engine.package
        case Package() as package:
            return package
    raise AssertionError(f"{subject.title} has no package")


def _walk(
    side: EngineSide, rows: Sequence[Row], modes: Sequence[Mode], advance: Advance
) -> Mode | None:
    """The mode in which something was found."""
    for mode in modes:
        most = PREFILL_TOKENS if mode == "prefill" else STEP_TOKENS
        ids = [row.ids[:most] for row in rows if len(row.ids) > 1 or mode != "draft"]
        if not ids:
            raise DataError(
                f"mode {mode!r} needs a row of at least 2 tokens, and there is none",
                hint="give longer rows, or leave that mode out",
            )
        try:
            side.score(ids, mode)
        except FoundError:
            return mode
        advance(1)
    return None


def _told(compared: str, walk: Walk) -> Walked:
    return Walked(
        compared=compared, calls=walk.calls, judged=walk.judged, largest=dict(walk.largest),
        skipped=dict(walk.skipped),
    )  # fmt: skip


def _found(
    compared: str, walk: Walk, suspect: Subject, reference: Subject
) -> tuple[Finding, Reproducer]:
    plan, package = suspect.plan, package_of(suspect)
    assert plan is not None, "a package has a plan"
    weights = open_weights(package.shards())
    wrong = (
        wrong_weights(walk.faults[0], plan, weights, reference.opened)
        if isinstance(reference.opened, Checkpoint)
        else []
    )
    found = finding(compared, walk.faults, wrong)
    repro = of_fault(found, walk.faults[0], plan)
    return found, repro


def again(path: Path, *, cache_dir: Path) -> Again:
    """Run a reproducer.

    Raises:
        InputError: It is none, or names checkpoints that are not there.
    """
    repro = read(path)
    if repro.about["kind"] == "step":
        return run_step_again(repro)
    told = repro.about["finding"]
    first, second = open_pair(repro.about["a"], repro.about["b"], cache_dir=cache_dir)
    row: list[int] = repro.tensors["row"].tolist()
    found = CheckpointWalk(_loaded(first), _loaded(second)).score([row])
    judged = Judged(error=0.0, limit=told["limit"], rows=len(row), bad_rows=0)
    if found is not None:
        judged = Judged(
            error=found.error, limit=found.limit, rows=found.rows, bad_rows=found.bad_rows,
            elements=found.elements,
        )  # fmt: skip
    what = f"{first.title} and {second.title} on the row of {len(row)} tokens"
    return Again(what=what, finding=told, judged=judged)
