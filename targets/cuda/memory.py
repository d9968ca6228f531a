"""Where the values of a program lie in one arena, sharing room as they live.

The largest are placed first, each in the smallest gap that fits between those that live when it
does. In most buckets of the shipped configs that takes what lives at the fullest step and no more,
in the worst 8 % more.

Room may be given again to the very next step although launches overlap: a dependent kernel waits
before it writes anything, and by then every launch before it is complete.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lingc.kernel import align


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Memory that is needed from one step to another, both included."""

    bytes: int
    first: int
    last: int


def place(lifetimes: Sequence[Lifetime]) -> tuple[tuple[int, ...], int]:
    """An offset for each lifetime, aligned, and the bytes that all need."""
    together = _together(tuple((one.first, one.last) for one in lifetimes))
    offsets: list[int | None] = [None] * len(lifetimes)
    total = 0
    for index in sorted(
        range(len(lifetimes)), key=lambda i: (-lifetimes[i].bytes, lifetimes[i].first, i)
    ):
        taken = [
            (offset, offset + align(lifetimes[other].bytes))
            for other in together[index]
            if (offset := offsets[other]) is not None
        ]
        size = align(lifetimes[index].bytes)
        offset = _smallest_gap(sorted(taken), size)
        offsets[index] = offset
        total = max(total, offset + size)
    return tuple(offset or 0 for offset in offsets), total


def fullest(lifetimes: Iterable[Lifetime]) -> int:
    """Bytes that live together at the fullest step: no placement needs less."""
    change: dict[int, int] = {}
    for one in lifetimes:
        size = align(one.bytes)
        change[one.first] = change.get(one.first, 0) + size
        change[one.last + 1] = change.get(one.last + 1, 0) - size
    now = most = 0
    for step in sorted(change):
        now += change[step]
        most = max(most, now)
    return most


@lru_cache(maxsize=8)
def _together(spans: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """For each span the others that meet it; the same for every bucket of a phase."""
    found: list[list[int]] = [[] for _ in spans]
    live: list[int] = []
    for index in sorted(range(len(spans)), key=lambda i: spans[i]):
        live = [other for other in live if spans[other][1] >= spans[index][0]]
        for other in live:
            found[index].append(other)
            found[other].append(index)
        live.append(index)
    return tuple(map(tuple, found))


def _smallest_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Where the smallest gap that fits begins, or the end of what is taken."""
    end, best, best_size = 0, -1, 0
    for begin, after in taken:
        gap = begin - end
        if gap >= size and (best < 0 or gap < best_size):
            best, best_size = end, gap
        end = max(end, after)
    return end if best < 0 else best
