"""Scores in a file, so that a side need not be there when another is held against it.

A safetensors file whose metadata say what was scored: the side, its model's config, the rows and
the modes. The tensors of row r in mode m are

    m.r.logits  m.r.experts.LAYER.ids, .biased  m.r.layers.LAYER  m.r.states.LAYER.POSITION

A row that was recorded also answers for its beginnings.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from lingc.checkpoint.tensorfile import Maps, Stored, TensorWriter, read_header, read_note
from lingc.errors import DataError, IncompatibleError, InputError, LingcError
from lingc.parity.data import Row
from lingc.parity.side import Choice, Mode, Scores, Side, Tokens
from lingc.parity.stored import StoredAs
from lingc.staging import sync, writing

FORMAT = 1
_KEY = "lingc_record"
_TAGS = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32"}

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a record says of itself.

    Attributes:
        name: The side's, for a person.
        facts: Bundle id, precision, target of a package.
        checkpoint: Identity of the checkpoint that its weights come from, where it is known.
        config: The model's `config.json`.
        stored: How its weights are stored.
        lines: Of the data file, row by row.
        rows: Their tokens.
    """

    name: str
    facts: Mapping[str, str]
    checkpoint: str | None
    config: Mapping[str, Any]
    stored: tuple[StoredAs, ...]
    data: str
    modes: tuple[Mode, ...]
    lines: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    def each(self) -> list[Row]:
        """The rows as a data file would give them."""
        return [Row(line=n, ids=ids) for n, ids in zip(self.lines, self.rows, strict=True)]


def write(
    path: Path,
    side: Side,
    about: About,
    *,
    batch: int,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Score the rows of `about` in its modes, and write what comes; whole or not at all.

    Raises:
        DataError: A row is too short for a mode.
        ResourceError: The file cannot be written.
    """
    tensors: dict[str, Array] = {}
    for mode in about.modes:
        if mode == "draft" and any(len(row) < 2 for row in about.rows):
            raise DataError("mode 'draft' needs rows of at least 2 tokens to be recorded")
        for start in range(0, len(about.rows), batch):
            part = about.rows[start : start + batch]
            for place, scores in enumerate(side.score(part, mode)):
                tensors |= _tensors(f"{mode}.{start + place}", scores)
            advance(len(part))
    shapes = {name: (_TAGS[array.dtype], array.shape) for name, array in tensors.items()}
    metadata = {_KEY: json.dumps({"format": FORMAT, **asdict(about)}, sort_keys=True)}
    staged = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with writing(path):
            with TensorWriter(staged, shapes, metadata) as writer:
                for name, array in tensors.items():
                    writer.write(name, array)
                writer.finish()
            staged.replace(path)
            sync(path.absolute().parent)
    finally:
        staged.unlink(missing_ok=True)


def read(path: Path) -> tuple[About, Mapping[str, Stored]]:
    """What a record says, and where its tensors lie.

    Raises:
        InputError: It is no record, or of a newer format.
    """
    try:
        value = read_note(path, _KEY)
        tensors = read_header(path)
        if not isinstance(value, dict):
            raise InputError(
                f"{str(path)!r} is not a record: it tells a {type(value).__name__}",
                hint="`lingc parity A --record FILE` writes one",
            )
        if value.pop("format") != FORMAT:
            raise InputError(
                f"record {str(path)!r} is of another format than {FORMAT}",
                hint="record it again with this lingc",
            )
        about = About(
            **{
                **value,
                "stored": tuple(
                    StoredAs(**{**one, "modules": tuple(one["modules"])}) for one in value["stored"]
                ),
                "modes": tuple(value["modes"]),
                "lines": tuple(value["lines"]),
                "rows": tuple(tuple(row) for row in value["rows"]),
            }
        )
        _check(about, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} is not a record: {error}",
            hint="`lingc parity A --record FILE` writes one",
        ) from error
    except LingcError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} is not a record: {error.problem}") from error
    return about, tensors


def _check(about: About, tensors: Mapping[str, Stored]) -> None:
    """Refuse with a ValueError what could not answer for its rows."""
    if not all(isinstance(value, Mapping) for value in (about.config, about.facts)):
        raise ValueError("its config or its facts are no objects")
    if len(about.lines) != len(about.rows):
        raise ValueError(f"{len(about.lines)} lines, {len(about.rows)} rows")
    for mode in about.modes:
        for place, row in enumerate(about.rows):
            name = f"{mode}.{place}.logits"
            shape = tensors[name].shape if name in tensors else None
            if shape is None or len(shape) != 2 or shape[0] < len(row) - (mode == "draft"):
                raise ValueError(f"tensor {name!r} is missing or too short")
    for name in tensors:
        stem, _, end = name.rpartition(".")
        if end == "biased" and f"{stem}.ids" not in tensors:
            raise ValueError(f"tensor {stem + '.ids'!r} is missing")


class RecordSide:
    """Implements `lingc.parity.side.Side` with a file.

    Args:
        about: What `read` gave.
        tensors: Likewise; mapped when they are asked for.
    """

    def __init__(self, about: About, tensors: Mapping[str, Stored]) -> None:
        self.name = f"record of {about.name}"
        self.vocab = int(about.config["vocab_size"])
        self._about = about
        self._tensors = tensors
        self._maps = Maps()

    def score(self, rows: Sequence[Tokens], mode: Mode) -> list[Scores]:
        if mode not in self._about.modes:
            raise IncompatibleError(
                f"{self.name} has no mode {mode!r}",
                hint=f"it has {', '.join(self._about.modes)}; record it again with --mode {mode}",
            )
        return [self._row(tuple(row), mode) for row in rows]

    def close(self) -> None:
        self._tensors = {}

    def _row(self, row: tuple[int, ...], mode: Mode) -> Scores:
        places = (place for place, held in enumerate(self._about.rows) if held[: len(row)] == row)
        place = next(places, None)
        if place is None:
            raise DataError(
                f"{self.name} has no row that begins with these {len(row)} tokens",
                hint="compare on the rows that were recorded: leave --data out",
            )
        count = len(row) - (mode == "draft")
        stem = f"{mode}.{place}."
        experts: dict[int, dict[str, Array]] = {}
        layers, states = {}, {}
        for name in (name for name in self._tensors if name.startswith(stem)):
            kind, *rest = name.removeprefix(stem).split(".")
            if kind == "experts":
                experts.setdefault(int(rest[0]), {})[rest[1]] = self._read(name)[:count]
            elif kind == "layers":
                layers[int(rest[0])] = self._read(name)[:count]
            elif kind == "states" and int(rest[1]) <= len(row):
                states[int(rest[0]), int(rest[1])] = self._read(name)
        return Scores(
            logits=self._read(f"{stem}logits")[:count],
            experts={
                layer: Choice(ids=found["ids"], biased=found.get("biased"))
                for layer, found in sorted(experts.items())
            },
            layers=layers,
            states=states,
        )

    def _read(self, name: str) -> Array:
        return self._maps.read(self._tensors[name])


def _tensors(stem: str, scores: Scores) -> dict[str, Array]:
    return {
        f"{stem}.{name}": np.ascontiguousarray(array, np.int32 if name.endswith("ids") else None)
        for name, array in _named(scores)
    }


def _named(scores: Scores) -> Iterator[tuple[str, Array]]:
    yield "logits", scores.logits.astype(np.float32, copy=False)
    for layer, choice in scores.experts.items():
        yield f"experts.{layer}.ids", choice.ids
        if choice.biased is not None:
            yield f"experts.{layer}.biased", choice.biased.astype(np.float32, copy=False)
    for layer, stream in scores.layers.items():
        yield f"layers.{layer}", stream.astype(np.float32, copy=False)
    for (layer, position), state in scores.states.items():
        yield f"states.{layer}.{position}", state.astype(np.float32, copy=False)
