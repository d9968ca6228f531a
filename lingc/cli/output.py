"""What every command has in common: its options, and where its words go.

Results go to stdout: text and tables, or with `--json` one document and nothing else. Notes,
warnings, logs and progress go to stderr. A command takes an `Output` first:

    @click.command()
    @click.argument("name", required=False)
    @output.options
    def command(out: Output, name: str | None) -> None:
        found = ...
        if out.as_json:
            out.emit(found)
        else:
            out.table(("name", "bytes"), rows)
"""

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import PurePath
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lingc.cli import failure, progress

P = ParamSpec("P")
R = TypeVar("R")

_NUMBER = re.compile(r"[-+~<>≤≥]*[\d.,]+([eE][-+]?\d+)?( ?[A-Za-zµ%/]{1,7})?|-|")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How one command was asked to talk.

    Attributes:
        as_json: Print one JSON document on stdout, and nothing else there.
        verbosity: -1 errors only, 0 as usual, 1 a line for each stage, 2 everything.
        is_colored: Whether colour may be used where the stream is a terminal.
        mode: How progress is shown: `bar`, `plain`, `events` or `none`.
    """

    as_json: bool = False
    verbosity: int = 0
    is_colored: bool = True
    mode: str = "none"

    def emit(self, document: Any) -> None:
        """Print `document`, of JSON types, dataclasses and paths, on stdout; once a run."""
        click.echo(json.dumps(document, indent=2, ensure_ascii=False, default=_plain))
        context = click.get_current_context(silent=True)
        if context is not None:
            context.meta[failure.EMITTED] = True

    def line(self, text: str = "") -> None:
        """Print one line of the result on stdout."""
        click.echo(text)

    def write(self, text: str) -> None:
        """Print a piece of the result on stdout at once, without ending the line."""
        click.echo(text, nl=False)

    def note(self, text: str) -> None:
        """Tell the user something beside the result, on stderr; `-q` drops it."""
        if self.verbosity >= 0:
            click.echo(text, err=True)

    def detail(self, text: str) -> None:
        """Say on stderr what only `-v` asks for."""
        if self.verbosity > 0:
            click.echo(text, err=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        title: str | None = None,
    ) -> None:
        """Print a table on stdout.

        Columns of numbers are set to the right, None is shown as a dash, and nothing is cut where
        stdout is not a terminal.
        """
        cells = [[_cell(value) for value in row] for row in rows]
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
        for index, name in enumerate(columns):
            numbers = all(_NUMBER.fullmatch(row[index]) for row in cells)
            table.add_column(name, justify="right" if numbers and cells else "left")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        console = self.console(stderr=False)
        if not console.is_terminal:
            console.width = 10_000
        console.print(table)

    def console(self, *, stderr: bool = True) -> Console:
        """A rich console on stderr, or on stdout for results."""
        return _console(stderr=stderr, is_colored=self.is_colored)

    def stage(
        self, name: str, *, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[progress.Advance]:
        """Show that a stage is under way; yields `advance(done=1)`.

        Args:
            name: A few words, as a person would say them: `pack weights`.
            total: How many units there are, or None where no honest count exists.
            unit: What is counted; `B` is shown as kilobytes, megabytes and so on.
        """
        return progress.stage(
            name, total=total, unit=unit, mode=self.mode, is_colored=self.is_colored
        )


def options(function: Callable[Concatenate[Output, P], R]) -> Callable[P, R]:
    """Give a command the options that all commands share, and its `Output` as first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("-v", "--verbose", count=True, help="Say more on stderr; -vv says everything.")
    @click.option("-q", "--quiet", is_flag=True, help="Only results and errors.")
    @click.option("--no-color", is_flag=True, help="No colour; NO_COLOR means the same.")
    @click.option(
        "--progress",
        "mode",
        type=click.Choice(progress.MODES),
        default="auto",
        show_default=True,
        help="Progress on stderr: a bar, plain lines, or events as JSON lines.",
    )
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        flags: dict[str, Any] = kwargs
        out = from_flags(
            as_json=flags.pop("as_json"),
            verbose=flags.pop("verbose"),
            quiet=flags.pop("quiet"),
            no_color=flags.pop("no_color"),
            mode=flags.pop("mode"),
        )
        return function(out, *args, **kwargs)

    return wrapper


def from_flags(*, as_json: bool, verbose: int, quiet: bool, no_color: bool, mode: str) -> Output:
    """The `Output` that the common options ask for; sends logs to stderr at its level.

    Raises:
        click.UsageError: `-v` and `-q` together.
    """
    if quiet and verbose:
        raise click.UsageError("-v and -q contradict each other; give one of them")
    if mode == "auto":
        mode = "none" if quiet else "bar" if sys.stderr.isatty() else "plain"
    verbosity = -1 if quiet else min(verbose, 2)
    _send_logs_to_stderr(verbosity)
    return Output(as_json=as_json, verbosity=verbosity, is_colored=not no_color, mode=mode)


class _Threads(click.IntRange):
    """A number of threads; many more than there are processors stop a machine with waiting."""

    _A_PROCESSOR = 4

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        count = int(super().convert(value, param, ctx))
        processors = os.cpu_count() or 1
        if count > self._A_PROCESSOR * processors:
            self.fail(
                f"{count} threads are more than {self._A_PROCESSOR} for each of the {processors} "
                "processors here",
                param,
                ctx,
            )
        return count


THREADS = _Threads(min=1)
"""The type of an option for threads on a CPU."""


def refuse_idle(action: str, idle: Collection[str]) -> None:
    """Refuse what was given and would not be looked at.

    Args:
        action: What is asked for, in words.
        idle: Parameters of the running command that say nothing to it.

    Raises:
        click.UsageError: One of them was given on the command line.
    """
    context = click.get_current_context()
    for one in context.command.params:
        was_given = context.get_parameter_source(str(one.name)) is ParameterSource.COMMANDLINE
        if was_given and one.name in idle:
            given = " ".join([one.opts[0], *_words(context.params[str(one.name)])])
            raise click.UsageError(f"{given} says nothing to {action}; leave it out")


def _words(value: object) -> list[str]:
    """The value of an option as it was given; a flag has none."""
    if isinstance(value, bool):
        return []
    return [", ".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def bytes_text(count: float) -> str:
    """`count` bytes in decimal units, as datasheets use them: `1.29 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale * 0.9995:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """A duration in the unit that suits it: `3.1 ms`, `12.4 s`, `2 min 05 s`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: object) -> object:
    """What `json` cannot say by itself."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r} has no JSON form")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `main`, where rich would exit with the code of an internal error."""
        raise BrokenPipeError


def _console(*, stderr: bool, is_colored: bool) -> Console:
    # None leaves it to NO_COLOR and to whether the stream is a terminal.
    return _Console(stderr=stderr, no_color=None if is_colored else True, highlight=False)


def _send_logs_to_stderr(verbosity: int) -> None:
    level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}[verbosity]
    handler = _EchoHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("lingc")
    logger.handlers = [handler]
    logger.setLevel(level)


class _EchoHandler(logging.Handler):
    """Logs to what stderr is when a record comes, not to what it was at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)
