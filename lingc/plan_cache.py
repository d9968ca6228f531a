"""Plans that were compiled before, by all that they are made of.

A plan depends on the config, the recipe, the target, the request and this package's own code, and
on the version of torch that captures it. All of it is in the key, so that nothing else is asked.
What is kept is checked before it is used; where it is damaged, the plan is made again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lingc
from lingc import plan as plans
from lingc.compile import Request
from lingc.model.config import ModelConfig
from lingc.pipeline import Line, Report
from lingc.plan import Plan
from lingc.quantize.recipes import Recipe
from lingc.rewrite import Refusal
from lingc.staging import writing
from lingc.targets.spec import Target

log = logging.getLogger("lingc")

_FORMAT = 1


def key(
    config: ModelConfig, recipe: Recipe, target: Target, request: Request, *, has_mtp: bool
) -> str:
    """What a plan is kept under: a SHA-256 over everything that it is made of."""
    sizes, waived = asdict(request.sizes), sorted(request.waive)
    parts = {
        "format": _FORMAT,
        "config": [dict(config.raw), config.quantization],
        "recipe": asdict(recipe),
        "target": asdict(target),
        "engine": request.engine,
        "weights": request.weights if recipe.activations == "fp8_static" else "",
        "sizes": sizes,
        "waived": waived,
        "has_mtp": has_mtp,
        "code": code_digest(),
        "torch": version("torch"),
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=dict)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_digest() -> str:
    """Of every Python file of this package: names and bytes."""
    digest = hashlib.sha256()
    for root, folders, names in os.walk(Path(lingc.__file__).parent, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(root, name)
                data = path.read_bytes()
                digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def kept(folder: Path, name: str, make: Callable[[], tuple[Plan, Report]]) -> tuple[Plan, Report]:
    """A plan from the folder, or made and put there.

    Warnings are kept with it, and said again.

    Args:
        folder: Where plans are kept.
        name: Its key.
        make: How it is compiled.
    """
    place = folder / "plans" / f"{name}.json"
    found = _read(place)
    if found is not None:
        for level, message in found["said"]:
            log.log(level, message)
        return plans.loads(found["plan"]), Report([_line(entry) for entry in found["lines"]])
    with _heard() as said:
        plan, report = make()
    value = {
        "plan": plans.dumps(plan),
        "lines": [asdict(line) for line in report.lines],
        "said": said,
    }
    _write(place, value)
    return plan, report


def _read(place: Path) -> dict[str, Any] | None:
    """What was kept, or None where it is not there or not whole."""
    try:
        digest, _, text = place.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        return None
    value: dict[str, Any] = json.loads(text)
    return value


def _write(place: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{os.getpid()}.part")
        part.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")
        part.replace(place)


def _line(entry: Mapping[str, Any]) -> Line:
    return Line(**{**entry, "refused": tuple(Refusal(**one) for one in entry["refused"])})


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))


@contextmanager
def _heard() -> Iterator[list[tuple[int, str]]]:
    """What is said meanwhile that a user should know."""
    listener = _Listener()
    log.addHandler(listener)
    try:
        yield listener.said
    finally:
        log.removeHandler(listener)
