"""Orders of rows in which an engine's kernels want a weight.

A layout keeps element type and shape: it moves rows. Packed weights are loaded as they are, so what
a kernel needs is done once, when they are written.

    plain          as in the checkpoint, sources one below the other
    interleaved    of two halves of rows, gate and up: gate 0, up 0, gate 1, up 1, ...
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.errors import InputError

Array = NDArray[Any]

PLAIN = "plain"
INTERLEAVED = "interleaved"


def arrange(layout: str, values: Array) -> Array:
    """Rows in a layout's order.

    Args:
        layout: `plain` or `interleaved`.
        values: [..., rows, X]; for `interleaved` an even number of rows.

    Raises:
        InputError: No such layout.
    """
    if layout == PLAIN:
        return values
    _check(layout)
    *outer, rows, width = values.shape
    halves = values.reshape(*outer, 2, rows // 2, width)
    return np.ascontiguousarray(halves.swapaxes(-3, -2)).reshape(values.shape)


def restore(layout: str, values: Array) -> Array:
    """Rows in the plan's order again: the inverse of `arrange`."""
    if layout == PLAIN:
        return values
    _check(layout)
    *outer, rows, width = values.shape
    pairs = values.reshape(*outer, rows // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(-3, -2)).reshape(values.shape)


def _check(layout: str) -> None:
    if layout != INTERLEAVED:
        raise InputError(
            f"weight layout {layout!r} is not known",
            hint="the engine was built by a newer version; update lingc",
        )
