"""A whole comparison, from two words and a data file to a verdict."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from lingc.errors import DataError, IncompatibleError
from lingc.parity.budget import Budget, Check, judge, load_budget
from lingc.parity.compare import Comparison, Summary, Tokens, worst
from lingc.parity.data import SAMPLE, Row, read_rows, refuse_longer
from lingc.parity.engine import phases
from lingc.parity.experts import Routing
from lingc.parity.opening import (
    Recorded,
    Start,
    Subject,
    Weights,
    open_each,
    open_pair,
    refuse_other_weights,
)
from lingc.parity.record import About, write
from lingc.parity.side import Mode, Side
from lingc.parity.stored import StoredAs
from lingc.runtime.tokenizer import Tokenizer

WORST = 12
CONTEXT_TOKENS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to compare, and how.

    Attributes:
        a: A package, `interpret:PACKAGE`, a checkpoint directory, or a record.
        b: The same. Where it alone is a checkpoint it is the reference, else `a` is.
        checkpoint: Whose weights a package without weights gets; the other side's where None.
        data: JSONL rows.
        budget: A name or a path; None chooses by what is compared.
        weights: Whether eager gets the weights of the engine it is compared with.
        samples: How many rows; all where None.
        max_tokens: What rows are cut to.
        batch: Rows at once.
    """

    a: str
    b: str
    cache_dir: Path
    checkpoint: Path | None = None
    data: Path = SAMPLE
    budget: str | None = None
    weights: Weights = "engine"
    modes: tuple[Mode, ...] = ("prefill",)
    samples: int | None = None
    max_tokens: int | None = 512
    batch: int = 4
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A token with a large divergence, with what stood before it.

    Attributes:
        line: Line of the data file.
        context: Text up to and with the token; token ids where there is no tokenizer.
        reference: The token that the reference thinks likeliest next.
        other: The same of the other side.
    """

    line: int
    position: int
    kl: float
    max_abs: float
    margin: float
    context: str
    reference: str
    other: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeResult:
    """What one mode gave.

    Attributes:
        summary: In numbers.
        checks: Those numbers against the budget.
        tokens: Token by token.
    """

    summary: Summary
    checks: tuple[Check, ...]
    tokens: Tokens
    worst: tuple[WorstToken, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFacts:
    """Which side it was.

    Attributes:
        name: For a person.
        facts: Bundle id, precision, target, engine kind of a package.
        checkpoint: Identity of the checkpoint that the weights come from, where it is known.
        word: As it was given on the command line.
        stored: How its weights are stored.
    """

    name: str
    facts: Mapping[str, str]
    checkpoint: str | None
    word: str = ""
    stored: tuple[StoredAs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A whole comparison.

    Attributes:
        reference: The side that the other is held against.
        lines: Row index -> line of the data file.
    """

    reference: SideFacts
    other: SideFacts
    data: str
    weights: Weights
    budget: Budget
    lines: tuple[int, ...]
    modes: tuple[ModeResult, ...]

    @property
    def ok(self) -> bool:
        """Whether the budget is kept in every mode."""
        return all(mode.ok for mode in self.modes)


Advance = Callable[[int], object]


def run(settings: Settings, advance: Advance = lambda _: None) -> Result:
    """Compare as the settings say.

    Args:
        settings: What and how.
        advance: Told how many rows were scored more, each once in every mode.
    """
    budget = None if settings.budget is None else load_budget(settings.budget)
    pair = open_pair(
        settings.a, settings.b, cache_dir=settings.cache_dir, checkpoint=settings.checkpoint
    )
    reference, other = ordered(*pair)
    if settings.weights == "engine" and reference.kind == "eager" and other.plan is not None:
        refuse_other_weights(reference, other)
    budget = budget or load_budget(default_budget(reference, other, settings.weights))
    tokenizer = reference.tokenizer or other.tokenizer
    rows, data = _rows(settings, (reference, other), tokenizer)
    with ExitStack() as stack:
        sides = []
        for subject, opposite in ((reference, other), (other, reference)):
            side = subject.start(_start(settings, rows, opposite))
            stack.callback(side.close)
            sides.append(side)
        first, second = sides
        compared = compare(
            first, second, rows, settings.modes, reference.routing, settings.batch, advance
        )
    return Result(
        reference=_facts(reference, first),
        other=_facts(other, second),
        data=data,
        weights=settings.weights,
        budget=budget,
        lines=tuple(row.line for row in rows),
        modes=tuple(
            _result(comparison, budget, rows, tokenizer, mode) for mode, comparison in compared
        ),
    )


def _rows(
    settings: Settings, pair: Sequence[Subject], tokenizer: Tokenizer | None
) -> tuple[list[Row], str]:
    """Rows, and what they are called; those of a record where no others are asked for."""
    held = [one.opened.about for one in pair if isinstance(one.opened, Recorded)]
    if held and settings.data == SAMPLE:
        most = settings.max_tokens
        rows = [replace(row, ids=row.ids[:most]) for row in held[0].each()][: settings.samples]
        name = held[0].data
    else:
        name = settings.data.name
        rows = read_rows(
            settings.data,
            vocab=pair[0].config.vocab_size,
            tokenizer=tokenizer,
            samples=settings.samples,
            max_tokens=settings.max_tokens,
        )
    positions = min(one.config.max_position_embeddings for one in pair)
    for row in rows:
        refuse_longer(f"line {row.line} of {name!r}", len(row.ids), positions, "--max-tokens")
    return rows, name


def record(settings: Settings, path: Path, advance: Advance = lambda _: None) -> About:
    """Write what one side, `settings.a`, says of the rows.

    Raises:
        As `run`, and ResourceError where the file cannot be written.
    """
    (subject,) = open_each(
        [settings.a], cache_dir=settings.cache_dir, checkpoint=settings.checkpoint
    )
    rows, data = _rows(settings, (subject,), subject.tokenizer)
    about = About(
        name=subject.title,
        facts=dict(subject.facts),
        checkpoint=subject.identity,
        config=dict(subject.config.raw),
        stored=subject.stored(),
        data=data,
        modes=settings.modes,
        lines=tuple(row.line for row in rows),
        rows=tuple(row.ids for row in rows),
    )
    side = subject.start(_start(settings, rows, subject, rounds=False))
    try:
        write(path, side, about, batch=settings.batch, advance=advance)
    finally:
        side.close()
    return about


def compare(
    reference: Side,
    other: Side,
    rows: Sequence[Row],
    modes: Sequence[Mode],
    routing: Routing | None,
    batch: int,
    advance: Advance = lambda _: None,
) -> list[tuple[Mode, Comparison]]:
    """Score all rows on both sides in every mode.

    Raises:
        IncompatibleError: The sides have different vocabularies, or a mode is not possible.
        DataError: No row is long enough for a mode.
    """
    if reference.vocab != other.vocab:
        raise IncompatibleError(
            f"{reference.name} has {reference.vocab} tokens, {other.name} {other.vocab}",
            hint="two models can be compared only with one vocabulary",
        )
    found = [(mode, Comparison(mode, routing)) for mode in modes]
    for start in range(0, len(rows), batch):
        part = list(enumerate(rows))[start : start + batch]
        for mode, comparison in found:
            scored = [(i, row.ids) for i, row in part if mode != "draft" or len(row.ids) > 1]
            if not scored:
                continue
            ids = [tokens for _, tokens in scored]
            pairs = zip(reference.score(ids, mode), other.score(ids, mode), strict=True)
            for (index, tokens), (a, b) in zip(scored, pairs, strict=True):
                comparison.add(index, a, b, tokens[2 if mode == "draft" else 1 :])
        advance(len(part))
    for mode, comparison in found:
        if not comparison.rows:
            raise DataError(
                f"mode {mode!r} needs a row of at least 2 tokens, and there is none",
                hint="give longer rows, or leave that mode out",
            )
    return found


def default_budget(reference: Subject, other: Subject, weights: Weights) -> str:
    """The built-in budget that suits what is compared."""
    pair = (reference, other)
    plans = [subject.plan for subject in pair if subject.plan is not None]
    is_rounded = any(plan.activation != "f32" for plan in plans)
    if reference.kind == "eager" and other.plan is not None:
        is_same = weights == "engine"
    else:
        made_of = [(subject.identity, subject.facts.get("precision")) for subject in pair]
        is_same = bool(plans) and made_of[0] == made_of[1] and None not in made_of[0]
    return "engine-vs-eager" if is_same and not is_rounded else "quantized"


def ordered(a: Subject, b: Subject) -> tuple[Subject, Subject]:
    """The reference, and the side that is held against it."""
    return (b, a) if b.kind == "eager" and a.kind != "eager" else (a, b)


def _facts(subject: Subject, side: Side) -> SideFacts:
    return SideFacts(
        name=side.name,
        facts=subject.facts,
        checkpoint=subject.identity,
        word=subject.word,
        stored=subject.stored(),
    )


def _start(
    settings: Settings, rows: Sequence[Row], opposite: Subject, *, rounds: bool = True
) -> Start:
    programs = {phase for mode in settings.modes for phase in phases(mode)}
    return Start(
        slots=min(settings.batch, len(rows)),
        tokens=max(len(row.ids) for row in rows),
        phases=tuple(sorted(programs)),
        threads=settings.threads,
        rounding=opposite.plan if rounds and settings.weights == "engine" else None,
    )


def _result(
    comparison: Comparison,
    budget: Budget,
    rows: Sequence[Row],
    tokenizer: Tokenizer | None,
    mode: Mode,
) -> ModeResult:
    summary = comparison.summary(budget.margin)
    tokens = comparison.tokens
    return ModeResult(
        summary=summary,
        checks=judge(summary, budget),
        tokens=tokens,
        worst=tuple(_worst(tokens, rows, tokenizer, mode)),
    )


def _worst(
    tokens: Tokens, rows: Sequence[Row], tokenizer: Tokenizer | None, mode: Mode
) -> list[WorstToken]:
    def text(ids: Sequence[int]) -> str:
        shown = "" if tokenizer is None else tokenizer.decode(ids)
        return shown or " ".join(f"#{token}" for token in ids)

    found = []
    for one in worst(tokens, WORST).each():
        row = rows[one.row]
        end = one.position + (2 if mode == "draft" else 1)
        found.append(
            WorstToken(
                line=row.line,
                position=one.position,
                kl=one.kl,
                max_abs=one.max_abs,
                margin=one.margin,
                context=text(row.ids[max(0, end - CONTEXT_TOKENS) : end]),
                reference=text([one.reference]),
                other=text([one.other]),
            )
        )
    return found
