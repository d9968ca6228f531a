"""Checks a parsed JSON value against a description, and lists everything that is wrong."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lingc.engine.layout import LIMITS, ROLES, is_path
from lingc.targets.spec import ENGINE_KINDS

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value, or null."""

    inner: "Shape"


@dataclass(frozen=True, slots=True)
class Absent:
    """A value under a key that may be left out."""

    inner: "Shape"


@dataclass(frozen=True, slots=True)
class Open:
    """An object with these keys, and any others."""

    known: Mapping[str, "Shape"]


Shape = str | Mapping[str, "Shape"] | list["Shape"] | Maybe | Absent | Open
"""A kind by name, an object with exactly these keys, a list of one shape, or one of the above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One place where a value is not what its description says."""

    where: str
    kind: str
    expected: str
    found: str


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LIMITS["text characters"]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _all_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(k) and _is_text(v) for k, v in value.items())


KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "count": (_is_count, "an integer from 0 on"),
    "text": (_is_text, f"a text of 1 to {LIMITS['text characters']} characters"),
    "sha256": (
        lambda v: isinstance(v, str) and _SHA256.fullmatch(v) is not None,
        "64 lower-case hexadecimal digits",
    ),
    "path": (
        lambda v: isinstance(v, str) and is_path(v),
        f"a relative path of portable names, at most {LIMITS['path characters']} characters",
    ),
    "role": (lambda v: isinstance(v, str) and v in ROLES, f"one of {', '.join(ROLES)}"),
    "engine": (
        lambda v: isinstance(v, str) and v in ENGINE_KINDS,
        f"one of {', '.join(ENGINE_KINDS)}",
    ),
    "kind": (lambda v: v in ("embedded", "external"), "embedded or external"),
    "flag": (lambda v: isinstance(v, bool), "true or false"),
    "texts": (_all_texts, "a list of texts"),
    "texts by name": (_texts_by_name, "an object of texts"),
    "counts by name": (
        lambda v: isinstance(v, dict) and all(map(_is_count, v.values())),
        "an object of integers",
    ),
    "object": (lambda v: isinstance(v, dict), "an object"),
}


def problems(value: Any, shape: Shape, *, strict: bool, where: str = "") -> Iterator[Problem]:
    """Everything in `value`, named `where`, that is not as `shape` says.

    With `strict`, a key that the shape does not know is a problem too.
    """
    match shape:
        case Maybe():
            if value is not None:
                yield from problems(value, shape.inner, strict=strict, where=where)
        case Absent():
            yield from problems(value, shape.inner, strict=strict, where=where)
        case str():
            holds, expected = KINDS[shape]
            if not holds(value):
                yield Problem(where=where, kind=shape, expected=expected, found=shown(value))
        case Open():
            yield from _object(value, shape.known, strict=strict, where=where, closed=False)
        case list():
            if not isinstance(value, list):
                yield Problem(where=where, kind="list", expected="a list", found=shown(value))
                return
            for i, item in enumerate(value):
                yield from problems(item, shape[0], strict=strict, where=f"{where}[{i}]")
        case _:
            yield from _object(value, shape, strict=strict, where=where, closed=strict)


def _object(
    value: Any, known: Mapping[str, Shape], *, strict: bool, where: str, closed: bool
) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield Problem(where=where, kind="object", expected="an object", found=shown(value))
        return
    for key, inner in known.items():
        name = f"{where}.{key}" if where else key
        if key in value:
            yield from problems(value[key], inner, strict=strict, where=name)
        elif not isinstance(inner, Absent):
            yield Problem(where=name, kind="key", expected="a value", found="nothing")
    for key in sorted(value.keys() - known.keys()) if closed else ():
        # The key comes from outside: its repr keeps control characters off the terminal.
        expected = "no such field in this format"
        yield Problem(where=where, kind="key", expected=expected, found=shown(key))


def fields(shape: Shape, where: str = "") -> Iterator[tuple[str, str]]:
    """Every field that a shape names, as `files[].path`, with its kind.

    >>> list(fields({"a": "count", "b": [{"c": Maybe("text")}]}))
    [('a', 'count'), ('b[].c', 'text or null')]
    """
    match shape:
        case str():
            yield where, shape
        case Maybe() | Absent():
            inner = list(fields(shape.inner, where))
            other = "null" if isinstance(shape, Maybe) else "absent"
            if inner[0][0] == where:
                yield where, f"{inner[0][1]} or {other}"
            else:
                yield where, f"object or {other}"
                yield from inner
        case list():
            yield from fields(shape[0], f"{where}[]")
        case Open():
            yield where, "object"
            yield from fields(shape.known, where)
        case _:
            for key, inner_shape in shape.items():
                yield from fields(inner_shape, f"{where}.{key}" if where else key)


def shown(value: Any) -> str:
    """A value from outside, short and safe to print."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
