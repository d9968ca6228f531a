"""A comparison as one HTML page that loads nothing, for a screen, a phone or paper."""

import platform
import secrets
from pathlib import Path

import jinja2

from lingc import __version__
from lingc.parity import plots, report
from lingc.parity.run import ModeResult, Result
from lingc.staging import sync, writing

_TEMPLATE = Path(__file__).parent / "page.html"
_MOST_FLIPS = 500


def render(result: Result) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    flips = list(report.flip_rows(result))
    return template.render(
        result=result,
        verdict=report.verdict(result),
        modes=[(mode, *_plots(mode)) for mode in result.modes],
        summary=(report.SUMMARY_COLUMNS, list(report.summary_rows(result))),
        checks=(report.CHECK_COLUMNS, list(report.check_rows(result))),
        buckets=(report.BUCKET_COLUMNS, list(report.bucket_rows(result))),
        flips=(report.FLIP_COLUMNS, flips[:_MOST_FLIPS]),
        flip_count=len(flips),
        version=__version__,
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


def write(result: Result, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        ResourceError: It cannot be written there.
    """
    write_whole(path, render(result))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under its name when all of it is on the disk.

    Raises:
        ResourceError: It cannot be written there.
    """
    staged = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with writing(path):
            staged.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(staged)
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _plots(mode: ModeResult) -> tuple[str, str]:
    """Markup, of numbers and our own labels, with nothing from outside in it."""
    tokens = mode.tokens
    lines = plots.by_position(tokens.position, tokens.kl, label="KL")
    return lines, plots.histogram(tokens.max_abs, label="largest |Δ logit| of a token")
