"""Plots as SVG text, for a page that loads nothing.

Colours are the page's: classes `axis`, `grid`, `mean`, `most`, `bar`, `cell` and `none`. All errors
are on a logarithmic scale, where zero stands at the lower end.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

WIDTH, HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 10, 40
_LEAST = 1e-17
_MOST_POINTS = 160
_BINS = 32


def by_position(positions: NDArray[np.int64], values: F64, *, label: str) -> str:
    """Mean and largest value at each position, or range of positions where there are many."""
    length = int(positions.max(initial=0)) + 1
    width = -(-length // _MOST_POINTS)
    bins = positions // width
    count = int(bins.max(initial=0)) + 1
    shown = _shown(values)
    tokens = np.bincount(bins, minlength=count)
    mean = np.bincount(bins, weights=shown, minlength=count) / np.maximum(tokens, 1)
    most = np.zeros(count)
    np.maximum.at(most, bins, shown)
    there = tokens > 0
    x: F64 = (np.flatnonzero(there) + np.float64(0.5)) * width
    low, high = _decades(shown)
    parts = [
        *_y_axis(low, high, label),
        *_x_axis([(v, f"{v:g}") for v in _ticks(length)], length, "position"),
        _line("most", x, most[there], length, low, high),
        _line("mean", x, mean[there], length, low, high),
    ]
    return _svg(f"{label} by position: mean and largest", parts)


def histogram(values: F64, *, label: str) -> str:
    """How many tokens have a value of which size."""
    shown = _shown(values)
    low, high = _decades(shown)
    counts, edges = np.histogram(np.log10(shown), bins=_BINS, range=(low, high))
    tallest = max(int(counts.max(initial=0)), 1)
    span = _plot_width() / _BINS
    bars = []
    for i, count in enumerate(counts.tolist()):
        if count:
            height = max(_plot_height() * count / tallest, 2)  # one token is seen too
            bars.append(
                f'<rect class="bar" x="{_LEFT + i * span + 0.5:.1f}" '
                f'y="{_TOP + _plot_height() - height:.1f}" '
                f'width="{span - 1:.1f}" height="{height:.1f}">'
                f"<title>{10 ** edges[i]:.1e} to {10 ** edges[i + 1]:.1e}: {count}</title>"
                "</rect>"
            )
    step = max(1, math.ceil((high - low) / 6))
    ticks = [(float(d - low), f"1e{d}") for d in range(low, high + 1, step)]
    top = f'<text x="{_LEFT - 6}" y="{_TOP + 10}" text-anchor="end">{tallest}</text>'
    parts = [*_frame(), top, *bars, *_x_axis(ticks, high - low, label)]
    return _svg(f"tokens by {label}", parts)


def by_layer(layers: Sequence[int], mean: Sequence[float], most: Sequence[float]) -> str:
    """Mean and largest error behind each layer, from the first to the last."""
    shown, upper = _shown(np.array(mean)), _shown(np.array(most))
    low, high = _decades(np.concatenate((shown, upper)))
    x: F64 = np.arange(len(layers)) + np.float64(0.5)
    step = max(1, math.ceil(len(layers) / 16))
    ticks = [(float(i) + 0.5, str(layers[i])) for i in range(0, len(layers), step)]
    parts = [
        *_y_axis(low, high, "error"),
        *_x_axis(ticks, len(layers), "behind layer"),
        _line("most", x, upper, len(layers), low, high),
        _line("mean", x, shown, len(layers), low, high),
    ]
    return _svg("error behind each layer: mean and largest", parts)


def growth(positions: Sequence[int], mean: Sequence[float], most: Sequence[float]) -> str:
    """Mean and largest error after so many tokens, both on logarithmic scales."""
    shown, upper = _shown(np.array(mean)), _shown(np.array(most))
    low, high = _decades(np.concatenate((shown, upper)))
    places = np.log2(np.maximum(np.array(positions, np.float64), 1))
    start = math.floor(float(places.min()))
    end = max(math.ceil(float(places.max())) - start, 1)
    step = max(1, math.ceil(end / 8))
    ticks = [(float(i), f"{1 << (start + i)}") for i in range(0, end + 1, step)]
    x: F64 = places - start
    parts = [
        *_y_axis(low, high, "error"),
        *_x_axis(ticks, end, "tokens"),
        _line("most", x, upper, end, low, high),
        _line("mean", x, shown, end, low, high),
    ]
    return _svg("error after so many tokens: mean and largest", parts)


def counts(layers: Sequence[float]) -> str:
    """How many there are in each layer."""
    found = np.bincount(np.array(layers, np.int64))
    tallest, span = int(found.max(initial=1)), _plot_width() / len(found)
    bars = [
        f'<rect class="bar" x="{_LEFT + i * span + 0.5:.1f}" '
        f'y="{_TOP + _plot_height() * (1 - count / tallest):.1f}" width="{span - 1:.1f}" '
        f'height="{_plot_height() * count / tallest:.1f}"><title>layer {i}: {count}</title></rect>'
        for i, count in enumerate(found.tolist())
        if count
    ]
    step = max(1, math.ceil(len(found) / 16))
    ticks = [(i + 0.5, str(i)) for i in range(0, len(found), step)]
    top = f'<text x="{_LEFT - 6}" y="{_TOP + 10}" text-anchor="end">{tallest}</text>'
    parts = [*_frame(), top, *bars, *_x_axis(ticks, len(found), "layer")]
    return _svg("tokens with other experts, by layer", parts)


def heat(counts: Mapping[int, Sequence[int]], *, label: str) -> str:
    """A square a layer and expert, the darker the more; those without any are crossed out."""
    layers = list(counts)
    experts = max((len(each) for each in counts.values()), default=1)
    most = max((max(each, default=0) for each in counts.values()), default=0)
    left, top, width = 34, 18, 720
    size = (width - left) / experts
    tall = min(max(size, 8.0), 22.0)
    parts = []
    for row, layer in enumerate(layers):
        y = top + row * tall
        text = f"{y + tall / 2 + 4:.1f}"
        parts.append(f'<text x="{left - 6}" y="{text}" text-anchor="end">{layer}</text>')
        for expert, count in enumerate(counts[layer]):
            x = left + expert * size
            box = f'x="{x:.1f}" y="{y:.1f}" width="{size - 0.6:.1f}" height="{tall - 0.6:.1f}"'
            name = f"<title>layer {layer}, expert {expert}: {count}</title>"
            if count:
                depth = 0.12 + 0.88 * math.log1p(count) / math.log1p(most)
                parts.append(f'<rect class="cell" {box} opacity="{depth:.2f}">{name}</rect>')
            else:
                parts.append(f'<rect class="none" {box}>{name}</rect>')
    parts.append(f'<text x="{left}" y="12">{label}</text>')
    return _svg(label, parts, width, math.ceil(top + len(layers) * tall + 4))


def _shown(values: F64) -> F64:
    """Values that have a place on the scale; what is not finite stands at the upper end."""
    finite = values[np.isfinite(values)]
    upper = float(finite.max(initial=_LEAST))
    shown: F64 = np.clip(np.where(np.isfinite(values), values, upper * 10), _LEAST, None)
    return shown


def _decades(values: F64) -> tuple[int, int]:
    low = math.floor(math.log10(float(values.min(initial=1.0))))
    high = math.ceil(math.log10(float(values.max(initial=_LEAST))))
    return low, max(high, low + 1)


def _ticks(length: int) -> Iterator[int]:
    step = 10 ** max(0, math.floor(math.log10(max(length, 1))))
    if length / step < 3:
        step = max(1, step // 4)
    yield from range(0, length, step)


def _plot_width() -> int:
    return WIDTH - _LEFT - _RIGHT


def _plot_height() -> int:
    return HEIGHT - _TOP - _BOTTOM


def _frame() -> Iterator[str]:
    bottom = _TOP + _plot_height()
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>'


def _y_axis(low: int, high: int, label: str) -> Iterator[str]:
    yield from _frame()
    step = max(1, math.ceil((high - low) / 6))
    for decade in range(low, high + 1, step):
        y = _TOP + _plot_height() * (high - decade) / (high - low)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">1e{decade}</text>'
    yield f'<text x="{_LEFT + 6}" y="{_TOP + 12}">{label}</text>'


def _x_axis(ticks: list[tuple[float, str]], end: float, label: str) -> Iterator[str]:
    base = _TOP + _plot_height()
    for value, text in ticks:
        x = _LEFT + _plot_width() * value / end
        yield f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{text}</text>'
    yield f'<text x="{WIDTH - _RIGHT}" y="{base + 34}" text-anchor="end">{label}</text>'


def _line(name: str, x: F64, values: F64, end: float, low: int, high: int) -> str:
    across = _LEFT + _plot_width() * x / end
    down = _TOP + _plot_height() * (high - np.log10(values)) / (high - low)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
    if len(x) == 1:
        return f'<circle class="{name}" cx="{across[0]:.1f}" cy="{down[0]:.1f}" r="3"/>'
    return f'<polyline class="{name}" points="{points}"/>'


def _svg(title: str, parts: list[str], width: int = WIDTH, height: int = HEIGHT) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
        f"<title>{title}</title>{body}</svg>"
    )
