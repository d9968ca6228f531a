"""Constants of TensorRT engines that a package stores once, among its weights.

TensorRT for RTX writes INT4 constants and their scales into an engine as they were given to it, in
each phase's engine again. A package holds engines without them, and of each what was cut out where:
a weight of the package, each byte of which may have bits the other way. Who loads an engine puts
them back and holds the whole to its SHA-256.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.errors import IntegrityError

Array = NDArray[Any]

LEAST_BYTES = 4096
"""Smaller constants stay where they are."""

PLAIN, SIGNED = 0x00, 0x88
"""What a weight's bytes are XORed with: TensorRT's INT4 is signed, the plan's has 8 added."""

_HINT = "its producer contradicts itself: build the engine again, and report it"
_PREFIX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """A constant that was cut out.

    Attributes:
        at: Where it begins in the whole engine.
        weight: Whose bytes it is.
        flip: What each of them is XORed with, `PLAIN` or `SIGNED`.
    """

    at: int
    weight: str
    flip: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """An engine without constants that stand elsewhere.

    Attributes:
        rest: What is left of it.
        holes: In order.
        sha256: Of the whole engine.
    """

    rest: bytes
    holes: tuple[Hole, ...]
    sha256: str


def flipped(values: Array, flip: int) -> bytes:
    """A weight's bytes, each XORed with `flip`."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return (raw ^ np.uint8(flip) if flip else raw).tobytes()


def cut(engine: bytes, constants: Mapping[str, tuple[Array, int]]) -> Cut:
    """Cut constants out of an engine, each where it is found first, none twice.

    Args:
        engine: As TensorRT wrote it.
        constants: Weight -> its values, and what its bytes are XORed with in the engine. One that
            is small, or is not there byte for byte, stays.
    """
    found: list[tuple[int, int, Hole]] = []
    at = 0
    for name, (values, flip) in constants.items():
        needle = flipped(values, flip)
        if len(needle) < LEAST_BYTES:
            continue
        taken = {begin for begin, _, _ in found}
        start = _find(engine, needle, at, taken)
        if start < 0:
            start = _find(engine, needle, 0, taken)  # TensorRT keeps their order, mostly
        if start >= 0:
            at = start + len(needle)
            found.append((start, at, Hole(at=start, weight=name, flip=flip)))
    rest, holes, end = [], [], 0
    for begin, after, hole in sorted(found, key=lambda one: one[0]):
        if begin >= end:
            rest.append(engine[end:begin])
            holes.append(hole)
            end = after
    rest.append(engine[end:])
    return Cut(rest=b"".join(rest), holes=tuple(holes), sha256=hashlib.sha256(engine).hexdigest())


def _find(engine: bytes, needle: bytes, at: int, taken: set[int]) -> int:
    while (at := engine.find(needle[:_PREFIX], at)) >= 0:
        if at not in taken and engine.startswith(needle, at):
            return at
        at += 1
    return -1


def joined(phase: str, made: Cut, weights: Mapping[str, Array]) -> bytes:
    """The whole engine.

    Args:
        phase: Of the engine, for messages.
        made: What the package holds of it.
        weights: Of the package.

    Raises:
        IntegrityError: The pieces are not those of the engine that was built.
    """
    parts: list[bytes] = []
    size = read = 0
    for hole in made.holes:
        gap = hole.at - size
        if gap < 0 or read + gap > len(made.rest) or hole.weight not in weights:
            raise _broken(phase, f"weight {hole.weight!r} has no place at byte {hole.at}")
        parts += made.rest[read : read + gap], flipped(weights[hole.weight], hole.flip)
        read += gap
        size = hole.at + len(parts[-1])
    parts.append(made.rest[read:])
    whole = b"".join(parts)
    if hashlib.sha256(whole).hexdigest() != made.sha256:
        raise _broken(phase, "it is not the engine that was built")
    return whole


def _broken(phase: str, why: str) -> IntegrityError:
    return IntegrityError(f"the {phase} engine cannot be put together: {why}", hint=_HINT)


def to_value(made: Cut) -> dict[str, Any]:
    """What `variant.json` says of an engine's constants."""
    return {
        "sha256": made.sha256,
        "holes": [[hole.at, hole.weight, hole.flip] for hole in made.holes],
    }


def holes_of(value: Mapping[str, Any]) -> tuple[Hole, ...]:
    """Read back the holes.

    Raises:
        ValueError: They are no holes.
        TypeError: Nor are their parts.
    """
    made: list[Hole] = []
    rows: Sequence[Any] = value["holes"]
    for at, weight, flip in rows:
        if type(at) is not int or at < 0 or flip not in (PLAIN, SIGNED):
            raise ValueError(f"{[at, weight, flip]} is no hole")
        made.append(Hole(at=at, weight=str(weight), flip=flip))
    return tuple(made)
