"""Where the values of a program lie in one arena, sharing room as they live.

Programs are long and alike from layer to layer, and few values live at once: going through the
steps in order and taking the smallest gap that fits is at most a few percent above what the values
of the fullest step need.

Room may be given again to the very next step although launches overlap: a dependent kernel waits
before it writes anything, and by then every launch before it is complete.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lingc.kernel import align


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Memory that is needed from one step to another, both included."""

    bytes: int
    first: int
    last: int


def place(lifetimes: Sequence[Lifetime]) -> tuple[tuple[int, ...], int]:
    """An offset for each lifetime, aligned, and the bytes that all need.

    What begins at one step is placed in the order of size, and of equal size in the given order.
    """
    offsets = [0] * len(lifetimes)
    order = sorted(
        range(len(lifetimes)), key=lambda i: (lifetimes[i].first, -lifetimes[i].bytes, i)
    )
    live: list[tuple[int, int, int]] = []  # (offset, bytes, last step), by offset
    total = 0
    for index in order:
        one = lifetimes[index]
        live = [taken for taken in live if taken[2] >= one.first]
        size = align(one.bytes)
        offset = _smallest_gap(live, size)
        offsets[index] = offset
        total = max(total, offset + size)
        live.append((offset, size, one.last))
        live.sort()
    return tuple(offsets), total


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


def _smallest_gap(live: Sequence[tuple[int, int, int]], size: int) -> int:
    """Where the smallest gap that fits begins, or the end of what is taken."""
    end, best, best_size = 0, -1, 0
    for offset, taken, _ in live:
        gap = offset - end
        if gap >= size and (best < 0 or gap < best_size):
            best, best_size = end, gap
        end = max(end, offset + taken)
    return end if best < 0 else best
