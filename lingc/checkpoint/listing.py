"""How a fault of many tensors is told: names in full while few, counted when many."""

from collections.abc import Iterable

_SHOWN = 8


def of_tensors(names: Iterable[str], fault: str) -> list[str]:
    """One line for each tensor that has a fault, or a single line where there are many.

    >>> of_tensors(["a", "b"], "is missing")
    ["tensor 'a' is missing", "tensor 'b' is missing"]
    >>> of_tensors([f"layers.{i}" for i in range(99)], "is missing")
    ["tensor 'layers.0' is missing, as are 98 more, up to 'layers.98'"]
    """
    listed = list(names)
    if len(listed) <= _SHOWN:
        return [f"tensor {name!r} {fault}" for name in listed]
    first, last = listed[0], listed[-1]
    return [f"tensor {first!r} {fault}, as are {len(listed) - 1} more, up to {last!r}"]
