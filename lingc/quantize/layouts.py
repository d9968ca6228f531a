"""Orders in which an engine's kernels want the bytes of a weight.

A layout keeps element type, shape and size: it moves rows and bytes. Packed weights are loaded as
they are, so what a kernel needs is done once, when they are written.

    plain            as in the checkpoint, sources one below the other
    interleaved      of two halves of rows, gate and up: gate 0, up 0, gate 1, up 1, ...
    tiled            pieces of 16 rows by 64 bytes, one after the other along a row of pieces
    tiled_gated      `tiled` of rows in the order gate 0-7, up 0-7, gate 8-15, up 8-15, ...
    tiled_scales     INT4 scales, [rows / 16, groups, 16]: of 16 rows, group after group
    tiled_gated_scales   the same of gated rows

A piece of `tiled` is 1 KiB that one bulk copy moves: 8 rows of 64 bytes, then 8 more. Within a
row the four 16-byte quarters stand at quarter `c ^ (row // 2 % 4)`, the 64-byte swizzle of the
tensor cores' shared-memory operands, so that `mma.sync` reads a piece without bank conflicts and
`wgmma` reads the same bytes through a descriptor. The eight nibbles of an INT4 word stand in the
order 0 2 4 6 1 3 5 7, so that one mask takes two neighbours out of a word, 16 bits apart.

A gated tile holds gate and up of eight channels, which one thread of an `mma` finds in its own
registers.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.errors import InputError

Array = NDArray[Any]

PLAIN = "plain"
INTERLEAVED = "interleaved"
TILED = "tiled"
TILED_GATED = "tiled_gated"
TILED_SCALES = "tiled_scales"
TILED_GATED_SCALES = "tiled_gated_scales"

TILE_ROWS = 16
PIECE_BYTES = 64
"""Bytes of a row in one piece."""

_QUARTER = 16
_GATED = {TILED_GATED: TILED, TILED_GATED_SCALES: TILED_SCALES}
_NIBBLE_OF = (0, 2, 4, 6, 1, 3, 5, 7)
"""Element at each nibble of a tiled word."""


def arrange(layout: str, values: Array) -> Array:
    """The bytes in a layout's order; element type and shape stay.

    Args:
        layout: A name of the table above.
        values: [..., rows, X] as the plan has it; for interleaved and gated an even number of rows.

    Raises:
        InputError: No such layout, or sizes that it cannot have (`layout_refusal`).
    """
    if layout == PLAIN:
        return values
    _check(layout, values)
    if layout == INTERLEAVED:
        return _zip_halves(values, 1)
    if layout in _GATED:
        return arrange(_GATED[layout], _zip_halves(values, TILE_ROWS // 2))
    *outer, rows, width = values.shape
    if layout == TILED_SCALES:
        tiles = values.reshape(*outer, rows // TILE_ROWS, TILE_ROWS, width)
        return np.ascontiguousarray(tiles.swapaxes(-1, -2)).reshape(values.shape)
    raw = _nibbles(values, _NIBBLE_OF) if values.dtype == np.int32 else values
    raw = np.ascontiguousarray(raw).view(np.uint8).reshape(*outer, rows // 16, 2, 8, -1, 4, 16)
    return _bytes_as(np.moveaxis(_swizzle(raw), -3, -5), values)


def restore(layout: str, values: Array) -> Array:
    """Values in the plan's order again: the inverse of `arrange`."""
    if layout == PLAIN:
        return values
    _check(layout, values)
    if layout == INTERLEAVED:
        return _split_halves(values, 1)
    if layout in _GATED:
        return _split_halves(restore(_GATED[layout], values), TILE_ROWS // 2)
    *outer, rows, width = values.shape
    if layout == TILED_SCALES:
        tiles = values.reshape(*outer, rows // TILE_ROWS, width, TILE_ROWS)
        return np.ascontiguousarray(tiles.swapaxes(-1, -2)).reshape(values.shape)
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(*outer, rows // 16, -1, 2, 8, 4, 16)
    plain = _bytes_as(_swizzle(np.moveaxis(raw, -5, -3)), values)
    return _nibbles(plain, _inverse(_NIBBLE_OF)) if values.dtype == np.int32 else plain


def layout_refusal(layout: str, rows: int, row_bytes: int) -> str | None:
    """Why a matrix of this size cannot have a layout, or None."""
    unit = {PLAIN: 1, INTERLEAVED: 2}.get(layout, TILE_ROWS)
    if rows % unit:
        return f"{rows} rows are not a multiple of {unit}, which the layout {layout!r} needs"
    if layout in {TILED, TILED_GATED} and row_bytes % PIECE_BYTES:
        return f"rows of {row_bytes} bytes are not a multiple of {PIECE_BYTES}"
    return None


def _zip_halves(values: Array, run: int) -> Array:
    """`run` rows of the first half, `run` of the second, and so on."""
    *outer, rows, width = values.shape
    halves = values.reshape(*outer, 2, rows // 2 // run, run, width)
    return np.ascontiguousarray(halves.swapaxes(-4, -3)).reshape(values.shape)


def _split_halves(values: Array, run: int) -> Array:
    *outer, rows, width = values.shape
    runs = values.reshape(*outer, rows // 2 // run, 2, run, width)
    return np.ascontiguousarray(runs.swapaxes(-4, -3)).reshape(values.shape)


def _swizzle(raw: Array) -> Array:
    """Quarters [..., 8 rows, pieces, 4, 16] at `c ^ (row // 2 % 4)`; its own inverse."""
    swapped = np.empty_like(raw)
    for row in range(8):
        order = [c ^ (row // 2 % 4) for c in range(4)]
        swapped[..., row, :, :, :] = raw[..., row, :, order, :].transpose(
            *range(1, raw.ndim - 2), 0, raw.ndim - 2
        )
    return swapped


def _nibbles(words: Array, order: tuple[int, ...]) -> Array:
    bits = words.view(np.uint32)
    made = np.zeros_like(bits)
    for place, source in enumerate(order):
        made |= (bits >> np.uint32(4 * source) & np.uint32(15)) << np.uint32(4 * place)
    return made.view(np.int32)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def _bytes_as(raw: Array, like: Array) -> Array:
    return np.ascontiguousarray(raw).reshape(-1).view(like.dtype).reshape(like.shape)


def _check(layout: str, values: Array) -> None:
    known = {INTERLEAVED, TILED, TILED_GATED, TILED_SCALES, TILED_GATED_SCALES}
    if layout not in known:
        raise InputError(
            f"weight layout {layout!r} is not known",
            hint="the engine was built by a newer version; update lingc",
        )
    rows, width = values.shape[-2:]
    reason = layout_refusal(layout, rows, width * values.itemsize)
    if reason is not None:
        raise InputError(reason, hint="the plan was written by hand, or by another version")
