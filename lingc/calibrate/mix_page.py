"""A mixed recipe as one HTML page that loads nothing: the curve, and what each unit costs."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from lingc import __version__
from lingc.calibrate.mix import Mixed, Point
from lingc.staging import write_whole, writing

_TEMPLATE = Path(__file__).parent / "mix.html"
_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 16, 44
_LEAST = 1e-9


def render(mixed: Mixed) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    prices = {(one.unit, one.format): one for one in mixed.prices}
    formats = [one.format for one in mixed.prices[: len(mixed.prices) // len(mixed.units)]]
    return template.render(
        mixed=mixed,
        curve=curve(mixed),
        formats=formats,
        rows=[
            (unit.name, str(chosen), [prices[unit.name, kind] for kind in formats])
            for unit, chosen in zip(mixed.units, mixed.chosen.formats, strict=True)
        ],
        measured=[point for point in mixed.curve if point.measured is not None],
        version=__version__,
    )


def write(mixed: Mixed, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        ResourceError: It cannot be written there.
    """
    with writing(path):
        write_whole(path, render(mixed))


def curve(mixed: Mixed) -> str:
    """Predicted and measured divergence over bytes a token, with the budget."""
    points = [point for point in mixed.curve if point.predicted > _LEAST]
    seen = [point.measured for point in mixed.curve if point.measured]
    values = [point.predicted for point in points] + seen
    low = math.floor(math.log10(min(values, default=_LEAST)))
    high = max(math.ceil(math.log10(max(values, default=1.0))), low + 1)
    start, end = mixed.curve[0].bytes, mixed.curve[-1].bytes

    def x(count: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (count - start) / (end - start)

    def y(value: float) -> float:
        share = (high - math.log10(max(value, 10.0**low))) / (high - low)
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * share

    line = " ".join(f"{x(one.bytes):.1f},{y(one.predicted):.1f}" for one in points)
    parts = [
        *_axes(low, high, y),
        *(
            f'<text x="{x(count):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">'
            f"{_bytes(count)}</text>"
            for count in _ticks(start, end)
        ),
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">bytes a token</text>',
        f'<text x="{_LEFT + 6}" y="{_TOP + 10}">KL from the unrounded model</text>',
        f'<path class="budget" d="M{x(mixed.budget):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        if start <= mixed.budget <= end
        else "",
        f'<polyline class="mean" points="{line}"/>',
        *(_dot(point, mixed.chosen, x(point.bytes), y(point.measured)) for point in mixed.curve
          if point.measured),
    ]  # fmt: skip
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="loss over bytes a token">{"".join(parts)}</svg>'
    )


def _axes(low: int, high: int, y: "object") -> Iterator[str]:
    assert callable(y), "a scale"
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
    for decade in range(low, high + 1, max(1, math.ceil((high - low) / 6))):
        at = y(10.0**decade)
        yield f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">1e{decade}</text>'


def _dot(point: Point, chosen: Point, x: float, y: float) -> str:
    name = "chosen" if point is chosen else "most"
    title = f"{_bytes(point.bytes)}: predicted {point.predicted:.3g}, measured {point.measured:.3g}"
    return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>'


def _ticks(start: float, end: float) -> Sequence[float]:
    return [start + (end - start) * i / 4 for i in range(5)]


def _bytes(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
