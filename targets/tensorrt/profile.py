"""Sizes that an engine is built for: one optimization profile a phase, which holds every bucket."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lingc.plan import Plan, TensorType
from lingc.targets.cuda.buckets import Sizes, buckets

MOST_TOKENS = 4096
"""Of a prefill step. Plugins of experts keep a row of f32 for each token and expert, which TensorRT
makes room for once: half a gigabyte for the full-size model."""

MOST_ROWS = 1024
"""Tokens of a step that may want the logits of each."""

MOST_SLOTS = 1024
"""Sequences whose state an engine can hold."""

MOST_ELEMENTS = (1 << 31) - 1
"""Of one tensor."""


@dataclass(frozen=True, slots=True)
class Range:
    """Least, usual and most."""

    low: int
    usual: int
    high: int


def sizes(plan: Plan) -> tuple[Sizes, ...]:
    """The buckets that engines are built for, by phase, small to large.

    A step that wants logits of all its tokens, as comparisons do, has a bucket of its own: unlike a
    CUDA engine's, the head does not run again by itself.
    """
    made: list[Sizes] = []
    for one in buckets(plan):
        tokens, rows = one.axes.get("T", 0), one.axes.get("N", 0)
        if one.phase not in plan.programs or tokens > MOST_TOKENS:
            continue
        made.append(one)
        if 0 < rows < tokens <= MOST_ROWS:
            made.append(Sizes(phase=one.phase, axes={**one.axes, "N": tokens}))
    return tuple(made)


def ranges(plan: Plan, phase: str) -> dict[str, Range]:
    """The range of every open axis of a phase's inputs and states."""
    found: dict[str, list[int]] = {}
    for one in sizes(plan):
        if one.phase == phase:
            for axis, size in one.axes.items():
                found.setdefault(axis, []).append(size)
    made = {axis: Range(min(s), sorted(s)[len(s) // 2], max(s)) for axis, s in found.items()}
    caches = [kind for kind in plan.states.values() if kind.shape[0] == "R"]
    width = max((int(kind.shape[1]) for kind in caches), default=1)
    most_rows = MOST_ELEMENTS // width // plan.page_size * plan.page_size
    made["R"] = Range(plan.page_size + 1, 64 * plan.page_size + 1, most_rows + 1)
    made["S"] = Range(2, 9, MOST_SLOTS + 1)
    return made


def shapes(kind: TensorType, found: Mapping[str, Range]) -> Sequence[tuple[int, ...]]:
    """Least, usual and most shape of an input."""
    return [
        kind.bind({axis: getattr(one, which) for axis, one in found.items()})
        for which in ("low", "usual", "high")
    ]
