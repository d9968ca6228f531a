"""Calibration data: rows of JSONL files, each once, mixed by weight, chosen by a seed.

A file is named `a.jsonl` or `a.jsonl:0.7`; the number is its share of the samples beside those of
the other files. Rows are those of `lingc.parity.data`: text, messages or token ids.
"""

import difflib
import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lingc.checkpoint.source import Source
from lingc.errors import DataError, UsageError
from lingc.parity.data import read_rows, refuse_longer
from lingc.runtime.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "data"
"""Short texts that come with lingc, by kind; for trying things out, not for a release."""

_BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One file, and how much of the samples it shall give."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row that was chosen.

    Attributes:
        origin: `a.jsonl:12`, the file's name and the line.
        ids: Its tokens, cut to the most that were asked for.
    """

    origin: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """What one file gave.

    Attributes:
        digest: SHA-256 of the file.
        rows: Lines that hold a row.
        repeated: Rows that an earlier one, of this file or another, says already.
        chosen: Rows that are among the samples.
        cut: Chosen rows that had more tokens than were asked for.
    """

    name: str
    digest: str
    weight: float
    rows: int
    repeated: int
    chosen: int
    cut: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The samples, and where they come from."""

    samples: tuple[Sample, ...]
    files: tuple[File, ...]

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(len(one.ids) for one in self.samples)

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens in order: what a calibration follows from."""
        text = json.dumps([one.ids for one in self.samples], separators=(",", ":"))
        return hashlib.sha256(f"lingc samples 1\n{text}".encode()).hexdigest()

    def histogram(self) -> list[tuple[str, int]]:
        """How many samples have how many tokens: `up to 64` and the count."""
        counts = dict.fromkeys((f"up to {edge}" for edge in _BINS), 0)
        more = f"over {_BINS[-1]}"
        counts[more] = 0
        for one in self.samples:
            fitting = (edge for edge in _BINS if len(one.ids) <= edge)
            edge = next(fitting, None)
            counts[more if edge is None else f"up to {edge}"] += 1
        return [(name, count) for name, count in counts.items() if count]


def parse_share(text: str) -> Share:
    """`a.jsonl`, `a.jsonl:0.7`, or the name of a shipped set.

    >>> parse_share("a.jsonl:0.7")
    Share(path=PosixPath('a.jsonl'), weight=0.7)
    >>> parse_share("code").path.name
    'code.jsonl'

    Raises:
        UsageError: The weight is no positive number.
        DataError: There is no such file, and nearly such a set.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or os.path.lexists(text):
        return Share(path=_path(text))
    try:
        share = float(weight)
    except ValueError:
        return Share(path=_path(text))
    if not 0 < share < float("inf"):
        raise UsageError(
            f"the weight of {name!r} is {weight!r}, not a positive number",
            hint=f"give its share beside the other files: {name}:0.7",
        )
    return Share(path=_path(name), weight=share)


def _path(name: str) -> Path:
    if name in shipped():
        return SHIPPED / f"{name}.jsonl"
    near = difflib.get_close_matches(name, shipped(), n=1)
    if near and not os.path.lexists(name):
        raise DataError(
            f"there is no file {name!r}",
            hint=f"did you mean {near[0]!r}? {', '.join(shipped())} come with lingc",
        )
    return Path(name)


def shipped() -> tuple[str, ...]:
    """Names of the sets that come with lingc."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.jsonl")))


def samples_for(
    source: Source,
    words: Sequence[str],
    *,
    tokenizer: Tokenizer | None,
    count: int | None,
    max_tokens: int,
    seed: int,
) -> Samples:
    """What a command's `--data`, as `parse_share` has them, gives for a model.

    Args:
        source: The model.
        words: At least one.
        tokenizer: And what follows: as for `read_samples`.

    Raises:
        UsageError: A weight is no positive number.
        DataError: As `read_samples`, or a row has more tokens than the model has positions.
    """
    found = read_samples(
        [parse_share(word) for word in words],
        vocab=source.config.vocab_size,
        tokenizer=tokenizer,
        count=count,
        max_tokens=max_tokens,
        seed=seed,
    )
    most = source.config.max_position_embeddings
    for one in found.samples:
        name, _, line = one.origin.rpartition(":")
        refuse_longer(f"line {line} of {name!r}", len(one.ids), most, "--max-tokens")
    return found


def read_samples(
    shares: Sequence[Share],
    *,
    vocab: int,
    tokenizer: Tokenizer | None,
    count: int | None,
    max_tokens: int,
    seed: int,
) -> Samples:
    """Read every file, drop what is said twice, and choose.

    Args:
        shares: At least one.
        vocab: Token ids must lie below it.
        tokenizer: For rows of text.
        count: Samples in all; where None, as many as the weights allow.
        max_tokens: What rows are cut to.
        seed: Decides which rows are chosen and in what order.

    Raises:
        DataError: A file cannot be read, holds no row, or has bad lines; they are numbered.
    """
    seen: set[tuple[int, ...]] = set()
    pools: list[list[Sample]] = []
    rows_in: list[int] = []
    long: list[set[str]] = []
    for share in shares:
        rows = read_rows(share.path, vocab=vocab, tokenizer=tokenizer, max_tokens=max_tokens + 1)
        pool, cut = [], set()
        for row in rows:
            ids = row.ids[:max_tokens]
            if ids in seen:
                continue
            seen.add(ids)
            origin = f"{share.path.name}:{row.line}"
            pool.append(Sample(origin=origin, ids=ids))
            if len(row.ids) > max_tokens:
                cut.add(origin)
        draw = random.Random(f"{seed} {len(pools)}")  # noqa: S311 a seeded choice of samples
        draw.shuffle(pool)
        pools.append(pool)
        rows_in.append(len(rows))
        long.append(cut)
    wanted = _allot([share.weight for share in shares], [len(pool) for pool in pools], count)
    chosen = [pool[:number] for pool, number in zip(pools, wanted, strict=True)]
    samples = [one for each in chosen for one in each]
    if not samples:
        raise DataError("the data gives no sample", hint="raise --samples or give more rows")
    random.Random(f"{seed} order").shuffle(samples)  # noqa: S311
    files = tuple(
        File(
            name=share.path.name,
            digest=_digest(share.path),
            weight=share.weight,
            rows=rows,
            repeated=rows - len(pool),
            chosen=len(each),
            cut=sum(one.origin in cut for one in each),
        )
        for share, rows, pool, each, cut in zip(shares, rows_in, pools, chosen, long, strict=True)
    )
    return Samples(samples=tuple(samples), files=files)


def _allot(weights: Sequence[float], sizes: Sequence[int], count: int | None) -> list[int]:
    """How many rows each file gives: in proportion to its weight, as far as it has them."""
    total = sum(weights)
    if count is None:
        # The file that runs out first, for its weight, decides; equal weights take all there is.
        if len(set(weights)) == 1:
            return list(sizes)
        count = int(min(size * total / weight for size, weight in zip(sizes, weights, strict=True)))
    exact = [count * weight / total for weight in weights]
    whole = [int(one) for one in exact]
    rest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in rest[: count - sum(whole)]:
        whole[i] += 1
    return [min(want, size) for want, size in zip(whole, sizes, strict=True)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lengths(samples: Iterable[Sample]) -> list[int]:
    """Tokens of each sample."""
    return [len(one.ids) for one in samples]
