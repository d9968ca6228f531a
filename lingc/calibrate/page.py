"""A calibration as one HTML page that loads nothing, for a screen, a phone or paper."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lingc import __version__
from lingc.calibrate.coverage import Coverage
from lingc.staging import write_whole, writing

_TEMPLATE = Path(__file__).parent / "page.html"
_CELL = 12
_MOST_COLUMNS = 64
_SHOWN = 40


def render(document: Mapping[str, Any], covered: Coverage) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["at_dots"] = _at_dots
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    matrices = document["matrices"]
    made = [one for one in matrices if one["how"] == "calibrated"]
    return template.render(
        document=document,
        covered=covered,
        maps=[(layer, heat_map(counts)) for layer, counts in covered.layers.items()],
        worst=sorted(made, key=lambda one: -one["loss"])[:_SHOWN],
        left=[one for one in matrices if one["how"] != "calibrated"],
        made=len(made),
        gain=_median([m["loss"] / m["nearest_loss"] for m in made if m["nearest_loss"]]),
        shown=_SHOWN,
        version=__version__,
    )


def write(document: Mapping[str, Any], covered: Coverage, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        ResourceError: It cannot be written there.
    """
    with writing(path):
        write_whole(path, render(document, covered))


def heat_map(counts: Sequence[int]) -> str:
    """A cell an expert, darker with more tokens; one that has none is crossed."""
    columns = min(len(counts), _MOST_COLUMNS)
    rows = math.ceil(len(counts) / columns)
    most = max(*counts, 1)
    cells = []
    for expert, count in enumerate(counts):
        x, y = expert % columns * _CELL, expert // columns * _CELL
        name = f"<title>expert {expert}: {count} tokens</title>"
        box = f'x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}"'
        if count:
            cells.append(
                f'<rect class="cell" {box} fill-opacity="{0.08 + 0.92 * count / most:.3f}">'
                f"{name}</rect>"
            )
        else:
            end_x, end_y = x + _CELL - 1, y + _CELL - 1
            cells.append(
                f'<g class="silent"><rect {box}/><path d="M{x} {y}L{end_x} {end_y}M{end_x} {y}'
                f'L{x} {end_y}"/>{name}</g>'
            )
    width, height = columns * _CELL, rows * _CELL
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{2 * width}px" role="img" '
        f'aria-label="tokens of {len(counts)} experts">{"".join(cells)}</svg>'
    )


def _at_dots(name: str) -> Markup:
    """A name that may be broken behind its dots."""
    return Markup(".<wbr>").join(name.split("."))


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
