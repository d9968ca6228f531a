"""A measurement of drift as tables of a terminal, and as a page."""

from collections.abc import Iterator

from lingc.parity import plots
from lingc.parity.drift import Drift
from lingc.parity.page import filled

COLUMNS = (
    "layer", "head", "remembers", "after tokens", "error", "largest", "error in f32",
)  # fmt: skip

SHOWN = 8
"""Heads with a curve of their own, the worst first."""


def rows(drift: Drift) -> Iterator[tuple[object, ...]]:
    """One line a head, at the end."""
    for head in drift.heads:
        last, exact = head.points[-1], head.exact[-1]
        yield (
            head.layer,
            head.head,
            f"{1 / head.rate:.4g}",
            last.position,
            f"{last.mean:.3g}",
            f"{last.max:.3g}",
            f"{exact.mean:.3g}",
        )


def verdict(drift: Drift, limit: float | None) -> str:
    """One line."""
    worst = drift.worst
    last = worst.points[-1]
    found = f"{last.max:.3g} after {last.position} tokens in layer {worst.layer}, head {worst.head}"
    if limit is None:
        return f"state in {drift.state_dtype}: the output is off by up to {found}"
    word = "within" if last.max <= limit else "over"
    return f"{word} the limit of {limit:g}: the output is off by up to {found}"


def render(drift: Drift, limit: float | None) -> str:
    """The page."""
    worst = sorted(drift.heads, key=lambda head: -head.points[-1].max)[:SHOWN]
    last = drift.worst.points[-1]
    if drift.state_dtype == "f32" or last.max < 0.01:
        advice = "This type holds the state well enough over so many tokens."
    else:
        advice = (
            "Keep the state in f32, which is what engines built by lingc do; a narrower one is "
            "safe only for contexts well below the length at which the slowest heads go astray."
        )
    figures = [
        (
            head,
            plots.growth(
                [p.position for p in head.points],
                [p.mean for p in head.points],
                [p.max for p in head.points],
            ),
        )
        for head in worst
    ]
    return filled(
        "drift.html", drift=drift, worst=drift.worst, figures=figures, columns=COLUMNS,
        rows=list(rows(drift)), verdict=verdict(drift, limit), limit=limit,
        ok=limit is None or last.max <= limit, advice=advice,
    )  # fmt: skip
