"""Activations of all samples between two layers, in files that are mapped and not held in memory.

A file holds f32 [tokens, width], sample after sample. Pages of it are the page cache's: they leave
memory when others need it, however many tokens there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lingc.errors import InputError
from lingc.staging import writing

ROWS = 4096
"""Rows that are taken from a file at a time, where they need not be whole samples."""

LARGEST = 2.0**48
"""Of activations: squares of larger ones, added up over many tokens, leave f32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """How the rows of a file belong to samples.

    Attributes:
        origins: Of the samples, for messages.
        offsets: First row of each, and the end of the last.
    """

    origins: tuple[str, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, origins: Sequence[str], lengths: Sequence[int]) -> "Tokens":
        """Of samples with so many tokens each."""
        ends = np.cumsum([0, *lengths]).tolist()
        return cls(origins=tuple(origins), offsets=tuple(ends))

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.offsets[-1]

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and last row of each sample; none of an empty one."""
        pairs = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return (pair for pair in pairs if pair[0] < pair[1])

    def halves(self) -> Tensor:
        """Which half of the samples each row is of, bool [rows]: every other sample."""
        lengths = torch.tensor(self.offsets).diff()
        return (torch.arange(len(lengths)) % 2 == 1).repeat_interleave(lengths)

    def place(self, row: int) -> str:
        """Sample and position of a row, in words."""
        sample = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return f"sample {self.origins[sample]!r}, token {row - self.offsets[sample]}"


class Spill:
    """One file of activations.

    Args:
        path: Made anew, or opened where `is_there`.
        rows: Tokens in all.
        width: Values a token.
        is_there: Whether it was written before.
    """

    def __init__(self, path: Path, rows: int, width: int, *, is_there: bool = False) -> None:
        self.path = path
        self.shape = (rows, width)
        with writing(path):
            if not is_there:
                with path.open("wb") as file:
                    # Taken at once: a map that the disk has no room for ends in SIGBUS.
                    _allocate(file.fileno(), max(1, rows * width * 4))
            self._map = np.memmap(path, np.float32, "r+", shape=self.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        """A copy of some rows in memory: what is computed must not hang on where a page starts."""
        return torch.from_numpy(np.array(self._map[rows]))

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self._map[rows] = values.cpu().numpy()

    def take(self, rows: Tensor) -> Tensor:
        """A copy of the rows with these numbers."""
        return torch.from_numpy(self._map[rows.numpy()])

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add to rows, each named once."""
        self._map[rows.numpy()] += values.cpu().numpy()

    def flush(self) -> None:
        """Bring all of it to the disk."""
        with writing(self.path):
            self._map.flush()

    def rename(self, path: Path) -> None:
        """Give a finished file its name."""
        self.flush()
        self.path.replace(path)
        self.path = path

    def remove(self) -> None:
        """Let go of the file, and drop it."""
        self.path.unlink(missing_ok=True)


def _allocate(handle: int, length_bytes: int) -> None:
    import os  # noqa: PLC0415 beside the one call that not every system has

    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, length_bytes)
    else:
        os.truncate(handle, length_bytes)


def chunks(rows: Tensor) -> Iterator[Tensor]:
    """Numbers of rows, a bounded number at a time."""
    return iter(rows.split(ROWS))


def wild_row(x: Tensor) -> int | None:
    """The first row of [T, .] with a value that is NaN, infinite or beyond `LARGEST`."""
    sound = (x.abs() <= LARGEST).all(-1)
    return None if bool(sound.all()) else int(torch.nonzero(~sound)[0, 0])


def refuse_wild(x: Tensor, tokens: Tokens, first: int, layer: str, name: str) -> None:
    """Refuse activations that are NaN, infinite or too large to be squared and added up.

    Args:
        x: [T, .], rows of samples.
        tokens: Whose rows they are.
        first: Number of the first.
        layer: For the message: `layer 3`.
        name: What they are the input of.

    Raises:
        InputError: One is; layer, tensor, sample and token are named.
    """
    row = wild_row(x)
    if row is None:
        return
    channel = int(torch.nonzero(~(x[row].abs() <= LARGEST))[0, 0])
    raise InputError(
        f"an activation is {float(x[row, channel]):g}: {layer}, input of {name!r}, "
        f"{tokens.place(first + row)}, channel {channel}",
        hint="run `lingc parity CHECKPOINT CHECKPOINT` on that sample; a weight of this or an "
        "earlier layer is damaged, or too large for the model's arithmetic",
    )
