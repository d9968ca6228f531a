"""Progress on stderr: a bar where someone watches, lines or events where nobody does.

Counts are real or absent. A stage without a total shows elapsed time and nothing that pretends to
know the end. Plain lines and events also come every half minute from a stage that says nothing, so
that a long one is seen to live.

`--progress events` prints one JSON object a line:

    {"ts": 1790000000.1, "stage": "pack weights", "state": "run", "done": 3, "total": 8,
     "unit": "shards", "rss": 123456789}

with state one of start, run, done, failed; rss is resident memory in bytes.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

MODES = ("auto", "bar", "plain", "events", "none")

HEARTBEAT_S = 30.0
EVENT_S = 0.5


class Advance(Protocol):
    """Tell a stage that `done` more units are behind it."""

    def __call__(self, done: int = 1) -> None: ...


@contextmanager
def stage(
    name: str, *, total: int | None, unit: str, mode: str, is_colored: bool
) -> Iterator[Advance]:
    """Show one stage from its start to its end, whichever way it ends."""
    if mode == "none":
        yield _ignore
    elif mode == "bar":
        with _bar(name, total=total, unit=unit, is_colored=is_colored) as advance:
            yield advance
    else:
        show = _event if mode == "events" else _line
        with _told(_Count(name=name, total=total, unit=unit), show, mode=mode) as advance:
            yield advance


def rss_bytes() -> int:
    """Resident memory of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True, kw_only=True)
class _Count:
    name: str
    total: int | None
    unit: str
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    shown: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started


Show = Callable[[_Count, str], None]


def _ignore(done: int = 1) -> None:
    """Advance nothing."""


@contextmanager
def _told(count: _Count, show: Show, *, mode: str) -> Iterator[Advance]:
    lock = threading.Lock()
    ended = threading.Event()
    gap_s = EVENT_S if mode == "events" else HEARTBEAT_S

    def tell(state: str) -> None:
        with lock:
            count.shown = time.monotonic()
            show(count, state)

    def advance(done: int = 1) -> None:
        count.done += done
        if time.monotonic() - count.shown >= gap_s:
            tell("run")

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            if time.monotonic() - count.shown >= HEARTBEAT_S:
                tell("run")

    tell("start")
    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    state = "failed"
    try:
        yield advance
        state = "done"
    finally:
        ended.set()
        heart.join()
        tell(state)


def _line(count: _Count, state: str) -> None:
    if state == "start":
        return
    amount = ""
    if count.total is not None or count.done:
        of = "" if count.total is None else f" of {_amount(count.total, count.unit)}"
        amount = f" {_amount(count.done, count.unit)}{of}"
    said = {"run": "so far", "done": "done", "failed": "stopped"}[state]
    left = ""
    if state == "run" and count.total is not None and 0 < count.done < count.total:
        left = f", about {count.elapsed_s * (count.total / count.done - 1):.0f} s left"
    click.echo(f"{count.name}:{amount} {said}, {count.elapsed_s:.1f} s{left}", err=True)


def _event(count: _Count, state: str) -> None:
    event = {
        "ts": round(time.time(), 3),
        "stage": count.name,
        "state": state,
        "done": count.done,
        "total": count.total,
        "unit": count.unit,
        "rss": rss_bytes(),
    }
    click.echo(json.dumps(event), err=True)


def _amount(count: int, unit: str) -> str:
    if unit == "B":
        return f"{count / 1e6:.1f} MB"
    return f"{count} {unit}".rstrip()


@contextmanager
def _bar(name: str, *, total: int | None, unit: str, is_colored: bool) -> Iterator[Advance]:
    counted = DownloadColumn() if unit == "B" else MofNCompleteColumn()
    named = TextColumn(unit if unit != "B" else "")
    columns = [BarColumn(), counted, named, TimeRemainingColumn()]
    console = Console(stderr=True, no_color=None if is_colored else True, highlight=False)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *([] if total is None else columns),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with progress:
        task = progress.add_task(name, total=total)

        def advance(done: int = 1) -> None:
            progress.advance(task, done)

        yield advance
