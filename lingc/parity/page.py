"""A comparison as one HTML page that loads nothing, for a screen, a phone or paper."""

import platform
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from lingc import __version__
from lingc.parity import plots, report
from lingc.parity.answers import answers, passes
from lingc.parity.layers import StateError
from lingc.parity.run import ModeResult, Result
from lingc.staging import write_whole

_FOLDER = Path(__file__).parent
_MOST_FLIPS = 500


def render(result: Result) -> str:
    """The page's text."""
    flips = list(report.flip_rows(result))
    counts = result.modes[0].summary.usage if result.modes else {}
    return filled(
        "page.html",
        result=result,
        verdict=report.verdict(result),
        answers=answers(result),
        passes=passes(result),
        modes=[(mode, _plots(mode)) for mode in result.modes],
        summary=(report.SUMMARY_COLUMNS, list(report.summary_rows(result))),
        checks=(report.CHECK_COLUMNS, list(report.check_rows(result))),
        buckets=(report.BUCKET_COLUMNS, list(report.bucket_rows(result))),
        flips=(report.FLIP_COLUMNS, flips[:_MOST_FLIPS]),
        flip_count=len(flips),
        usage=plots.heat(counts, label="layer by expert") if counts else "",
        layers=(report.LAYER_COLUMNS, list(report.layer_rows(result))),
        states=(report.STATE_COLUMNS, list(report.state_rows(result))),
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


def filled(template: str, **values: Any) -> str:
    """A page of this room: its template with the style that all have."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = (_FOLDER / template).read_text(encoding="utf-8")
    style = markupsafe.Markup((_FOLDER / "page.css").read_text(encoding="utf-8"))  # noqa: S704
    return environment.from_string(text).render(style=style, version=__version__, **values)


def write(result: Result, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        ResourceError: It cannot be written there.
    """
    write_whole(path, render(result))


def _plots(mode: ModeResult) -> list[tuple[str, str, bool]]:
    """Markup, caption, and whether there is a mean and a largest; numbers and our own labels."""
    tokens, found = mode.tokens, mode.summary
    made = [
        (plots.by_position(tokens.position, tokens.kl, label="KL"), "KL at each position", True),
        (plots.histogram(tokens.kl, label="KL of a token"), "Tokens by their KL", False),
        (
            plots.histogram(tokens.max_abs, label="largest |Δ logit| of a token"),
            "Tokens by their largest difference of a logit",
            False,
        ),
    ]
    if found.layers:
        columns = zip(*((e.layer, e.mean, e.max) for e in found.layers), strict=True)
        made.append((plots.by_layer(*columns), "Error of the residual stream, by layer", True))
    if found.states:
        at: dict[int, list[StateError]] = {}
        for one in found.states:
            at.setdefault(one.position, []).append(one)
        positions = sorted(at)
        mean = [sum(e.mean for e in at[p]) / len(at[p]) for p in positions]
        most = [max(e.max for e in at[p]) for p in positions]
        made.append((plots.growth(positions, mean, most), "Error of the linear states", True))
    if found.flips:
        layers = [float(flip.layer) for flip in found.flips]
        made.append((plots.counts(layers), "Tokens with other experts, by layer", False))
    return made
