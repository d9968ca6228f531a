"""JSON with one spelling for each value, and a reader that hostile text cannot hurt."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from lingc.strict_json import unique


def encode(value: Any) -> bytes:
    r"""Sorted keys, no white space, ASCII, a final newline.

    >>> encode({"b": 1, "a": "é"})
    b'{"a":"\\u00e9","b":1}\n'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def sha256(value: Any) -> str:
    """The SHA-256 of a value's one spelling."""
    return hashlib.sha256(encode(value)).hexdigest()


def decode(data: bytes, *, max_nesting: int) -> Any:
    """Parse JSON whose size the caller has bounded.

    Raises:
        ValueError: Not JSON, not finite, a key given twice, or nested too deep.
    """
    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {max_nesting} levels") from None
    _bound_nesting(value, max_nesting)
    return value


def decode_object(data: bytes, *, max_nesting: int) -> dict[str, Any]:
    """`decode`, of an object.

    Raises:
        ValueError: As `decode`; no object.
    """
    value = decode(data, max_nesting=max_nesting)
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")  # noqa: TRY004 a value
    return value


def refuse_other_spelling(value: Any, data: bytes) -> None:
    """Compare what was decoded with what it was decoded from.

    Raises:
        ValueError: The value has another spelling than its one, or none.
    """
    if encode(value) != data:
        raise ValueError("it is not in canonical form")


def decode_canonical(data: bytes, *, max_nesting: int) -> dict[str, Any]:
    """`decode_object`, of an object in its one spelling.

    Raises:
        ValueError: As `decode_object`; spelled otherwise.
    """
    value = decode_object(data, max_nesting=max_nesting)
    refuse_other_spelling(value, data)
    return value


def plain(value: Any, *, where: str) -> Any:
    """A copy made of dict, list, str, int, float, bool and None alone.

    Raises:
        ValueError: A value of another type, a key that is no text, or a number not finite.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{where} is {value}, which JSON cannot say")
            return value
        case Mapping():
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise ValueError(f"{where} has the key {odd[0]!r}, which is no text")
            return {key: plain(item, where=f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [plain(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot say")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _bound_nesting(value: Any, limit: int) -> None:
    level = [value]
    for _ in range(limit):
        level = [
            item
            for parent in level
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    if any(isinstance(item, dict | list) for item in level):
        raise ValueError(f"it is nested deeper than {limit} levels")
