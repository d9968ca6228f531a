"""Starting up, and the memory that a running side takes: in a process of its own each time.

A start is measured from before the interpreter to after the first token of a short prompt, imports
and all, as a user waits for it. Memory is read after that token: anonymous pages, which belong to
the process, and pages of files, which the system can drop and other processes share.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingc.errors import StageError

PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)
"""Small enough for any vocabulary that is one."""

_TOLD = """
import json, re, sys, time
from pathlib import Path
given = json.loads(sys.argv[1])
def tell():
    at = time.monotonic()
    rollup = Path("/proc/self/smaps_rollup")
    text = rollup.read_text() if rollup.exists() else ""
    kb = {k: int(v) for k, v in re.findall(r"^(\\w+): +(\\d+) kB", text, re.MULTILINE)}
    print(json.dumps({"at": at, "rss": kb.get("Rss"), "anonymous": kb.get("Anonymous")}))
"""

_ENGINE = """
from lingc.runtime.load import load
from lingc.runtime.generate import Generator
from lingc.runtime.sequence import Request
given |= {k: given[k] and Path(given[k]) for k in ("checkpoint", "cache_dir")}
names = ("checkpoint", "cache_dir", "tokens", "threads")
with load(given["path"], slots=1, **{k: given[k] for k in names}) as engine:
    ask = Request(tokens=tuple(given["prompt"]), max_tokens=1, stop_ids=frozenset())
    Generator(engine.backend).generate([ask])
    tell()
"""

_EAGER = """
import torch
torch.set_num_threads(given["threads"])
from lingc.model import load
module = load(given["path"])
with torch.inference_mode():
    int(module(torch.tensor([given["prompt"]]))[0, -1].argmax())
tell()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """One start of a side.

    Attributes:
        seconds: Until its first token.
        anonymous_bytes: Memory of its own then; None where the system does not tell.
        file_bytes: Pages of files that it had mapped.
    """

    seconds: float
    anonymous_bytes: int | None
    file_bytes: int | None


def start_engine(
    path: Path, *, checkpoint: Path | None, cache_dir: Path, room: int, threads: int
) -> Started:
    """Start an engine by the runtime alone."""
    given = {
        "path": str(path),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "cache_dir": str(cache_dir),
        "tokens": room,
        "threads": threads,
    }
    return _start(_ENGINE, given)


def start_eager(path: Path, *, threads: int) -> Started:
    """Start a checkpoint in eager."""
    return _start(_EAGER, {"path": str(path), "threads": threads})


def _start(code: str, given: dict[str, Any]) -> Started:
    text = json.dumps({**given, "prompt": PROMPT})
    words = (sys.executable, "-c", _TOLD + code, text)
    begun = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 our own code
    if done.returncode != 0:
        said = re.findall(r"^[\w.]*(?:Error|Exit|Interrupt)\b.*", done.stderr, re.MULTILINE)
        raise StageError(
            f"{given['path']!r} does not start in a process of its own: "
            f"{said[-1] if said else f'it ended with {done.returncode}'}",
            hint="try `lingc verify` and `lingc run` with it",
        )
    told = json.loads(done.stdout)
    rss, anonymous = told["rss"], told["anonymous"]
    return Started(
        seconds=told["at"] - begun,
        anonymous_bytes=None if anonymous is None else anonymous * 1024,
        file_bytes=None if rss is None else (rss - anonymous) * 1024,
    )
