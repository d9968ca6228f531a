"""What the words of a command mean, and how a side is made of them.

`tiny.ling` is an engine, run by the runtime; `interpret:tiny.ling` its plan and weights, run by the
references; a checkpoint directory is eager, on the engine's weights where the other side has some;
a file is a record of what one of these said.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lingc.checkpoint import Checkpoint, open_checkpoint, validate
from lingc.checkpoint.tensorfile import Stored
from lingc.engine import Package, open_package, read_manifest
from lingc.engine.bind import with_weights
from lingc.errors import InputError, IntegrityError
from lingc.model.config import ModelConfig
from lingc.parity.engine import EngineSide, tap_outputs, taps
from lingc.parity.experts import Routing
from lingc.parity.record import About, RecordSide, read
from lingc.parity.side import Side
from lingc.parity.stored import StoredAs, of_plan, of_source
from lingc.parity.weights import RoundedWeights
from lingc.plan import Plan
from lingc.runtime.backend import Limits
from lingc.runtime.load import OpenedEngine, open_engine
from lingc.runtime.tokenizer import FILES, Tokenizer
from lingc.weights import open_weights

INTERPRET = "interpret:"

Kind = Literal["engine", "plan", "eager", "record"]
Weights = Literal["engine", "checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a side is started with.

    Attributes:
        slots: Rows at once.
        tokens: Room for each.
        phases: The programs that will be run.
        threads: For engines; their own choice where None.
        rounding: The plan whose weights eager shall have; None leaves the checkpoint's.
    """

    slots: int
    tokens: int
    phases: tuple[str, ...]
    threads: int | None = None
    rounding: Plan | None = None

    def limits(self, plan: Plan) -> Limits:
        """As much state as that takes."""
        return Limits.from_tokens(
            slots=self.slots, tokens_per_sequence=self.tokens, page_size=plan.page_size
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A record, as `lingc.parity.record.read` gives it."""

    about: About
    tensors: Mapping[str, Stored]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One of the two that are compared, opened and checked but not started.

    Attributes:
        path: As given, without `interpret:`.
        plan: None for a checkpoint and a record.
        identity: Of the checkpoint that the weights come from, where it is known.
        facts: For the report: bundle id, precision, target.
    """

    kind: Kind
    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    plan: Plan | None
    identity: str | None
    facts: Mapping[str, str]
    opened: "OpenedEngine | Package | Checkpoint | Recorded"

    @property
    def title(self) -> str:
        """What it is called in reports."""
        name = self.path.absolute().name
        match self.kind:
            case "engine":
                kind, precision = self.facts["engine"], self.facts["precision"]
                return f"engine {name} ({kind}, {precision}, {self.facts['target']})"
            case "plan":
                return f"interpreted plan of {name} ({self.facts['precision']})"
            case "eager":
                return f"eager {name}"
            case "record":
                return f"record {name}"

    @property
    def word(self) -> str:
        """What it is called on the command line."""
        return f"{INTERPRET}{self.path}" if self.kind == "plan" else str(self.path)

    def stored(self) -> tuple[StoredAs, ...]:
        """How its weights are stored."""
        if self.plan is not None:
            return of_plan(self.plan)
        if isinstance(self.opened, Recorded):
            return self.opened.about.stored
        assert isinstance(self.opened, Checkpoint), "eager is a checkpoint"
        return of_source(self.opened)

    @property
    def routing(self) -> Routing:
        """How the model chooses experts."""
        config = self.config
        return Routing(
            groups=config.n_group,
            kept_groups=config.topk_group,
            top_k=config.num_experts_per_tok,
            experts=config.num_experts,
        )

    def start(self, given: Start) -> Side:
        """Load the weights, and be ready to score."""
        match self.opened:
            case OpenedEngine() as engine:
                return _engine(engine, given, self.title)
            case Package() as package:
                return _interpreted(package, given, self.title)
            case Checkpoint() as checkpoint:
                return _eager(checkpoint, given, self.title)
            case Recorded() as recorded:
                return RecordSide(recorded.about, recorded.tensors)


def open_pair(
    a: str, b: str, *, cache_dir: Path, checkpoint: Path | None = None
) -> tuple[Subject, Subject]:
    """Open both; a package without weights gets those of `checkpoint`, or of the other side.

    Raises:
        InputError: One is neither a package nor a checkpoint, or weights are not to be found.
        IntegrityError: A package is not what was written, or is of another checkpoint.
    """
    first, second = open_each((a, b), cache_dir=cache_dir, checkpoint=checkpoint)
    return first, second


def open_each(
    words: Sequence[str], *, cache_dir: Path, checkpoint: Path | None = None
) -> tuple[Subject, ...]:
    """Open one or more; see `open_pair`."""
    kinds = [_kind(word) for word in words]
    given = [path for kind, path in kinds if kind == "eager"]
    source = checkpoint or (given[0] if given else None)
    return tuple(_open(kind, path, cache_dir, source) for kind, path in kinds)


def has_package(*words: str | None) -> bool:
    """Whether a side is an engine, or the plan of one.

    Raises:
        InputError: One is neither a package nor a checkpoint.
    """
    return any(_kind(word)[0] in ("engine", "plan") for word in words if word is not None)


def _kind(word: str) -> tuple[Kind, Path]:
    if word.startswith(INTERPRET):
        return "plan", Path(word.removeprefix(INTERPRET))
    path = Path(word)
    # Of os.path, which answers of names that are too long for a file, too.
    if os.path.exists(path / "manifest.json"):  # noqa: PTH110
        return "engine", path
    if os.path.exists(path / "config.json"):  # noqa: PTH110
        return "eager", path
    if os.path.isfile(path):  # noqa: PTH113
        return "record", path
    is_folder = os.path.isdir(path)  # noqa: PTH112
    what = "has neither manifest.json nor config.json" if is_folder else "is not a directory"
    raise InputError(
        f"{word!r} is neither a package nor a checkpoint: it {what}",
        hint="give a .ling package, interpret:PACKAGE, a checkpoint directory, or a record",
    )


def _open(kind: Kind, path: Path, cache_dir: Path, source: Path | None) -> Subject:
    if kind == "eager":
        return _open_checkpoint(path)
    if kind == "record":
        return _open_record(path)
    manifest = read_manifest(path)
    if manifest.has_weights:
        source = None
    opened: OpenedEngine | Package
    if kind == "engine":
        opened = open_engine(path, checkpoint=source, cache_dir=cache_dir)
        package, tokenizer = opened.package, opened.tokenizer
    else:
        package = opened = with_weights(
            open_package(path, level="integrity"), cache_dir=cache_dir, checkpoint=source
        )
        tokenizer = _tokenizer(package)
    bound = package.weights
    runs = package.target or manifest.target
    return Subject(
        kind=kind,
        path=path,
        config=ModelConfig.from_dict(package.plan.config),
        tokenizer=tokenizer,
        plan=package.plan,
        identity=manifest.checkpoint_identity if bound is None else bound.checkpoint_identity,
        facts={
            "bundle_id": manifest.bundle_id,
            "precision": manifest.precision,
            "target": runs,
            "engine": package.manifest.variants[runs].engine,
        },
        opened=opened,
    )


def _open_checkpoint(path: Path) -> Subject:
    checkpoint = open_checkpoint(path)
    validate(checkpoint)
    return Subject(
        kind="eager",
        path=path,
        config=checkpoint.config,
        tokenizer=Tokenizer.from_directory(path),
        plan=None,
        identity=checkpoint.identity(),
        facts={},
        opened=checkpoint,
    )


def _open_record(path: Path) -> Subject:
    about, tensors = read(path)
    return Subject(
        kind="record",
        path=path,
        config=ModelConfig.from_dict(about.config, source=str(path)),
        tokenizer=None,
        plan=None,
        identity=about.checkpoint,
        facts=about.facts,
        opened=Recorded(about=about, tensors=tensors),
    )


def _tokenizer(package: Package) -> Tokenizer | None:
    files = {name: data for name in FILES if (data := package.model_file(name)) is not None}
    return Tokenizer(files) if "tokenizer.json" in files else None


def _engine(engine: OpenedEngine, given: Start, title: str) -> Side:
    limits = given.limits(engine.plan)
    if engine.package.code().engine != "onnx":
        return EngineSide(engine.start(limits, threads=given.threads), title)
    # This kind of engine can tell its experts, if it is asked before it starts.
    from lingc.runtime.onnx_backend import OnnxBackend  # noqa: PLC0415

    backend = OnnxBackend(
        engine.package,
        open_weights(engine.package.shards()),
        limits,
        threads=given.threads,
        taps=taps(engine.plan),
    )
    return EngineSide(backend, title, tap=tap_outputs(engine.plan))


def _interpreted(package: Package, given: Start, title: str) -> Side:
    # Here and below: what needs torch is imported when a side needs it.
    from lingc.interpret import InterpreterBackend  # noqa: PLC0415
    from lingc.parity.interpreted import PlanWatch  # noqa: PLC0415

    plan = package.plan
    backend = InterpreterBackend(plan, open_weights(package.shards()), given.limits(plan))
    return EngineSide(backend, title, tap=PlanWatch(backend))


def _eager(checkpoint: Checkpoint, given: Start, title: str) -> Side:
    from lingc.model.loading import from_source  # noqa: PLC0415
    from lingc.parity.eager import EagerSide  # noqa: PLC0415

    if given.rounding is None:
        return EagerSide(from_source(checkpoint), title)
    rounded = RoundedWeights(checkpoint, given.rounding, given.phases)
    precision = given.rounding.precision
    return EagerSide(from_source(rounded), f"{title} on the engine's weights ({precision})")


def refuse_other_weights(eager: Subject, engine: Subject) -> None:
    """Refuse to call the weights of two checkpoints the same.

    Raises:
        IntegrityError: The engine was not made from this checkpoint.
    """
    if None not in (eager.identity, engine.identity) and eager.identity != engine.identity:
        raise IntegrityError(
            f"{engine.title} has the weights of checkpoint {str(engine.identity)[:16]}, "
            f"{eager.title} is checkpoint {str(eager.identity)[:16]}",
            hint="give the checkpoint that the engine was built from, or --weights checkpoint "
            "to see how far two different sets of weights are apart",
        )
