"""What the commands that measure share: lists of sizes, compiling elsewhere, records."""

import json
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


def sizes(text: str, option: str) -> tuple[int, ...]:
    """A list of sizes as words give it, `1,8,32`, each once.

    Raises:
        UsageError: something in it is no positive integer; `option` is named.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text!r} is not a list of sizes", hint="for example: 1,8,32")
    return tuple(dict.fromkeys(map(int, parts)))


def keep(out: Output, path: Path | None, record: object) -> None:
    """Write a record where it was asked for, whole or not at all, and say so."""
    from lingc.parity.page import write_whole

    if path is not None:
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(path, text + "\n")
        out.note(f"record: {path}")
