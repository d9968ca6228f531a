"""What the commands that measure share: lists of sizes, compiling elsewhere, records."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from lingc.cli.output import Output
from lingc.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")


def compiling(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command the options of compiling on one machine and measuring on another."""
    for option in reversed(
        (
            click.option(
                "--compile",
                "into",
                type=click.Path(path_type=Path),
                help="Only compile, into this directory; needs no GPU.",
            ),
            click.option(
                "--binaries",
                type=click.Path(path_type=Path),
                help="Take what `--compile` made elsewhere, and compile nothing.",
            ),
            click.option("--jobs", type=click.IntRange(min=1), help="Processes that compile."),
        )
    ):
        function = option(function)
    return function


def sizes(text: str, option: str, *, least: int = 1) -> tuple[int, ...]:
    """A list of sizes as words give it, `1,8,32`, each once.

    Raises:
        UsageError: something in it is no integer of `least` or more; `option` is named.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UsageError(f"{option} {text!r} is not a list of sizes", hint="for example: 1,8,32")
    return tuple(dict.fromkeys(map(int, parts)))


def shares(text: str, option: str) -> tuple[float, ...]:
    """A list of shares as words give it, `0.5,0.8`, each once.

    Raises:
        UsageError: something in it is no number from 0 to 1; `option` is named.
    """
    try:
        found = tuple(dict.fromkeys(map(float, text.split(","))))
    except ValueError:
        found = (math.nan,)
    if not all(0 <= one <= 1 for one in found):
        raise UsageError(
            f"{option} {text!r} is not a list of shares from 0 to 1", hint="for example: 0.5,0.8"
        )
    return found


def keep(out: Output, path: Path | None, record: object) -> None:
    """Write a record where it was asked for, whole or not at all, and say so."""
    if path is not None:
        _write(path, record)
        out.note(f"record: {path}")


def _write(path: Path, record: object) -> None:
    from lingc.staging import write_whole

    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


class Growing:
    """A record that is written as it grows, under another name than the whole one will have.

    Args:
        path: The whole record's, None where none was asked for.

    Raises:
        ResourceError: It could not be written there.
    """

    def __init__(self, out: Output, path: Path | None) -> None:
        from lingc.staging import refuse_unwritable

        refuse_unwritable(path)
        self._out, self._path = out, path
        self._partial = None if path is None else path.with_name(f"{path.name}.partial")
        self._has_some = False

    def add(self, record: Callable[[], dict[str, object]]) -> None:
        """Write what there is so far."""
        if self._partial is not None:
            _write(self._partial, {"partial": True, **record()})
            self._has_some = True

    @contextmanager
    def told(self) -> Iterator[None]:
        """Say where the parts are if the whole is not reached."""
        try:
            yield
        except BaseException:
            if self._has_some:
                self._out.note(f"not whole; what was measured before is in {self._partial}")
            raise

    def finish(self, record: object) -> None:
        """Write the whole, and take the parts away."""
        keep(self._out, self._path, record)
        if self._partial is not None and self._has_some:
            self._partial.unlink(missing_ok=True)
