"""Perplexity and bits per byte of a text, with intervals, of one side or of two.

A text is cut into windows; each begins with an empty state and predicts all its tokens but the
first. With n(w) the surprise of window w in nats, t(w) its predictions and b(w) its bytes,

    perplexity = exp(sum n / sum t)        bits per byte = sum n / (ln 2 sum b).

The interval is the 2.5th to the 97.5th percentile over resamples of the units with replacement
(bootstrap): windows of a plain text, whole documents of a JSONL file. Two sides are resampled
together, so that what is hard for both does not blur their ratio.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.errors import DataError, InputError
from lingc.parity.compare import log_softmax, surprise
from lingc.parity.data import MAX_LINE_BYTES, read_rows
from lingc.parity.side import Side
from lingc.runtime.tokenizer import Tokenizer

F64 = NDArray[np.float64]
Advance = Callable[[int], object]

MAX_TEXT_BYTES = 256 << 20

LOW, HIGH = 2.5, 97.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A run of tokens that is scored by itself.

    Attributes:
        unit: What it is resampled with: its document, or itself.
        ids: At least two.
        bytes: Of its text; 0 where only ids are known.
    """

    unit: int
    ids: tuple[int, ...]
    bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure, and between what it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.5g} ({self.low:.5g} to {self.high:.5g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one side makes of a text.

    Attributes:
        bits_per_byte: None where the bytes are not known.
    """

    name: str
    nats: Interval
    perplexity: Interval
    bits_per_byte: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A whole evaluation.

    Attributes:
        predictions: Tokens that were predicted.
        sides: One, or the side and what it is held against.
        ratio: Of the first side's perplexity to the second's; None for one side.
    """

    text: str
    windows: int
    units: int
    predictions: int
    bytes: int
    resamples: int
    sides: tuple[Quality, ...]
    ratio: Interval | None

    def document(self) -> dict[str, Any]:
        """In JSON's types."""
        return {"kind": "evaluation", **asdict(self)}


def read_windows(
    path: Path, *, vocab: int, tokenizer: Tokenizer | None, window: int, limit: int | None = None
) -> list[Window]:
    """Cut a file into windows.

    Args:
        path: Plain text in UTF-8, or JSONL rows as `lingc.parity.data` has them.
        vocab: Token ids must lie below it.
        window: Tokens of each, the last of a text or document may have fewer.
        limit: How many to take.

    Raises:
        DataError: The file cannot be read, is empty or not UTF-8, has a line or a size beyond all
            measure, or tokens out of range.
    """
    if path.suffix == ".jsonl":
        rows = read_rows(path, vocab=vocab, tokenizer=tokenizer)
        documents = [(list(row.ids), float(row.bytes or 0)) for row in rows]
    else:
        documents = [_text(path, vocab, tokenizer)]
    found: list[Window] = []
    for unit, (ids, size) in enumerate(documents):
        parts = [tuple(ids[i : i + window]) for i in range(0, len(ids), window)]
        sizes = _share(parts, size, tokenizer)
        for part, held in zip(parts, sizes, strict=True):
            own = len(found) if len(documents) == 1 else unit
            found.append(Window(unit=own, ids=part, bytes=held))
    found = [one for one in found[:limit] if len(one.ids) > 1]
    if not found:
        raise DataError(
            f"{str(path)!r} has nothing to predict: fewer than 2 tokens",
            hint="give a text of a few thousand words",
        )
    return found


def _text(path: Path, vocab: int, tokenizer: Tokenizer | None) -> tuple[list[int], float]:
    if tokenizer is None:
        raise DataError(
            f"{str(path)!r} is text, and neither side has a tokenizer",
            hint="give a .jsonl file with 'input_ids'",
        )
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise DataError(
                f"{str(path)!r} has {size} bytes, more than the {MAX_TEXT_BYTES} that are read",
                hint="give a part of it; a few hundred kilobytes give narrow intervals",
            )
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"text {str(path)!r} cannot be read: {error.strerror or error}",
            hint="give a text file in UTF-8",
        ) from error
    for number, length in enumerate(map(len, raw.split(b"\n")), 1):
        if length > MAX_LINE_BYTES:
            raise DataError(
                f"line {number} of {str(path)!r} is longer than {MAX_LINE_BYTES >> 20} MiB",
                hint="that is no text; give one with lines",
            )
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{str(path)!r} is not UTF-8: byte {raw[error.start]:#04x} at {error.start}, "
            f"on line {number}",
            hint="convert it, for example with iconv -t utf-8",
        ) from error
    if not text.strip():
        raise DataError(f"{str(path)!r} holds no text", hint="give a text of a few thousand words")
    ids = tokenizer.encode(text)
    beyond = next((i for i, token in enumerate(ids) if not 0 <= token < vocab), None)
    if beyond is not None:
        raise DataError(
            f"token {ids[beyond]} at {beyond} of {str(path)!r} is out of range: the model has "
            f"{vocab} tokens",
            hint="the tokenizer is not the model's",
        )
    return ids, float(len(raw))


def _share(
    parts: Sequence[tuple[int, ...]], size: float, tokenizer: Tokenizer | None
) -> list[float]:
    """Bytes of each window: what its tokens say, and all of them together exactly."""
    if not size or tokenizer is None:
        return [0.0] * len(parts)
    said = [float(len(tokenizer.decode(part).encode())) or 1.0 for part in parts]
    whole = sum(said)
    return [one * size / whole for one in said]


def evaluate(
    sides: Sequence[Side],
    windows: Sequence[Window],
    *,
    text: str,
    batch: int,
    resamples: int,
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> Evaluation:
    """Score the windows on each side.

    Args:
        sides: One, or the side and what it is held against.
        text: What the windows are called.
        batch: Windows at once.
        advance: Told how many windows more are done.

    Raises:
        DataError: There is but one unit, and no interval without two.
        InputError: A logit is NaN or infinite.
    """
    units = np.unique([one.unit for one in windows], return_inverse=True)[1]
    count = int(units.max()) + 1
    if count < 2:
        raise DataError(
            f"{text!r} is one window or document: from one no interval follows",
            hint="give more text, or cut it with a smaller --window",
        )
    nats = [np.zeros(len(windows)) for _ in sides]
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        for side, found in zip(sides, nats, strict=True):
            for place, scores in enumerate(side.score([one.ids for one in part], "prefill")):
                came = part[place].ids[1:]
                told = surprise(log_softmax(scores.logits), came)[: len(came)]
                if not np.isfinite(told).all():
                    raise InputError(
                        f"{side.name} predicts what is NaN or infinite in window {start + place} "
                        f"of {text!r}",
                        hint="`lingc parity SOUND DAMAGED --bisect` finds the step, and weights "
                        "that are damaged",
                    )
                found[start + place] = told.sum()
        advance(len(part))

    def by_unit(values: F64) -> F64:
        return np.bincount(units, weights=values, minlength=count).astype(np.float64)

    predicted = by_unit(np.array([len(one.ids) - 1.0 for one in windows]))
    sizes = by_unit(np.array([one.bytes for one in windows]))
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    weights = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(np.float64)
    every = np.ones((1, count))
    qualities, rates = [], []
    for side, found in zip(sides, nats, strict=True):
        spent = by_unit(found)
        rate = [(w @ spent) / (w @ predicted) for w in (every, weights)]
        rates.append(rate)
        by_byte = None
        if sizes.all():
            by_byte = _interval([(w @ spent) / (w @ sizes) / math.log(2) for w in (every, weights)])
        qualities.append(
            Quality(
                name=side.name,
                nats=_interval(rate),
                perplexity=_interval([np.exp(x) for x in rate]),
                bits_per_byte=by_byte,
            )
        )
    ratio = None
    if len(rates) == 2:
        ratio = _interval([np.exp(a - b) for a, b in zip(*rates, strict=True)])
    return Evaluation(
        text=text, windows=len(windows), units=count, predictions=int(predicted.sum()),
        bytes=round(sizes.sum()), resamples=resamples, sides=tuple(qualities), ratio=ratio,
    )  # fmt: skip


def _interval(found: Sequence[F64]) -> Interval:
    """Of the value of all units, and those of the resamples."""
    (whole,), drawn = found
    low, high = np.percentile(drawn, [LOW, HIGH])
    return Interval(value=float(whole), low=float(low), high=float(high))
