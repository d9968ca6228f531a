"""JSON in which no object says a thing twice."""

import json
from collections import Counter
from typing import Any


def loads(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: Not JSON, or a key that is given twice.
        RecursionError: Nested too deeply.
    """
    return json.loads(text, object_pairs_hook=unique)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values, for `json.loads`.

    Raises:
        ValueError: A key is given twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} is given twice")
    return value
