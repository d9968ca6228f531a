"""What the commands that measure share: lists of sizes, compiling elsewhere, records."""

import json
import math
from collections.abc import Callable
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
    from lingc.staging import write_whole

    if path is not None:
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(path, text + "\n")
        out.note(f"record: {path}")
