"""How far a rounded matrix is from what it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.checkpoint.items import Item
from lingc.checkpoint.source import Source
from lingc.quantize.formats import (
    F32,
    FP8_BLOCK,
    dequantize_fp8_block,
    dequantize_fp8_tensor,
    dequantize_int4_group,
    widen_bf16,
)

Array = NDArray[Any]

_SAMPLE = 4096
_NORMAL_MEDIAN = 0.6745  # of |x|, x normal
_TILE = 1 << 18  # elements looked at together: what that makes stays in a core's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSums:
    """Sums over a matrix.

    Attributes:
        lost: Of squared changes.
        whole: Of squared values.
        most: Largest change.
        typical: Size of a typical value: the median magnitude over that of a normal distribution of
            variance 1, of a sample.
        count: Elements.
    """

    lost: float
    whole: float
    most: float
    typical: float
    count: int

    @property
    def relative(self) -> float:
        """Norm of the change over the norm of the matrix; 0 for a matrix of zeros."""
        return float(np.sqrt(self.lost / self.whole)) if self.whole else 0.0

    @property
    def of_typical(self) -> float:
        """Root mean square of the change over a typical value.

        As `relative` where values are spread normally; outliers, which cost the others digits and
        hide that in a norm that they dominate, do not hide it here.
        """
        return float(np.sqrt(self.lost / self.count) / self.typical) if self.typical else 0.0

    @property
    def worst(self) -> float:
        """Largest change over the root mean square of the matrix."""
        return float(self.most / np.sqrt(self.whole / self.count)) if self.whole else 0.0


def error_sums(source: Source, item: Item, values: Sequence[Array]) -> ErrorSums:
    """Compare what is written with what the source holds, tile by tile.

    Args:
        source: Holds the matrix as it was.
        item: How it is stored now.
        values: Its pieces, codes and scales first.
    """
    codes, scales = values[:2]
    rows, columns = source.shape(item.name)
    plain = source.kind(item.name) == "plain"
    before, dtype = source.plain(item.name) if plain else (source.dense(item.name), "f32")
    step = max(1, _TILE // max(columns, 1) // FP8_BLOCK) * FP8_BLOCK
    lost = whole = most = 0.0
    for top in range(0, rows, step):
        tile: F32 = before[top : top + step]
        if dtype == "bf16":
            tile = widen_bf16(tile.view(np.uint16))
        flat = tile.reshape(-1)
        whole += float(np.dot(flat, flat))
        after = _dequantized(item, codes, scales, slice(top, top + step), columns)
        np.subtract(after, tile, out=after)
        flat = after.reshape(-1)
        lost += float(np.dot(flat, flat))
        most = max(most, float(flat.max(initial=0)), -float(flat.min(initial=0)))
    sample = before.reshape(-1)[:: max(1, before.size // _SAMPLE)]
    if dtype == "bf16":
        sample = widen_bf16(sample.view(np.uint16))
    return ErrorSums(
        lost=lost,
        whole=whole,
        most=most,
        typical=float(np.median(np.abs(sample)) / _NORMAL_MEDIAN),
        count=rows * columns,
    )


def _dequantized(item: Item, codes: Array, scales: Array, rows: slice, columns: int) -> F32:
    kind = item.format.kind
    if kind == "fp8_block":
        blocks = slice(rows.start // FP8_BLOCK, -(-rows.stop // FP8_BLOCK))
        return dequantize_fp8_block(codes[rows], scales[blocks])
    if kind == "fp8_tensor":
        return dequantize_fp8_tensor(codes[rows], scales)
    return dequantize_int4_group(codes[rows], scales[rows], item.format.group, columns)
