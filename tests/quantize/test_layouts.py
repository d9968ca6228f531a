"""Orders of bytes: every byte where the table says, and back again."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lingc.errors import InputError
from lingc.quantize.layouts import arrange, layout_refusal, restore

Array = NDArray[Any]

LAYOUTS = ("interleaved", "tiled", "tiled_gated", "tiled_scales", "tiled_gated_scales")
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def numbered(rows: int, row_bytes: int, *outer: int) -> Array:
    """Bytes that tell their places apart, modulo 2^16."""
    shape = (*outer, rows, row_bytes // 2)
    return np.arange(np.prod(shape), dtype=np.uint64).astype(np.uint16).reshape(shape)


@given(
    layout=st.sampled_from(LAYOUTS),
    tiles=st.integers(1, 4),
    pieces=st.integers(1, 3),
    experts=st.integers(0, 2),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32, np.int32]),
)
def test_restoring_undoes_arranging(
    layout: str, tiles: int, pieces: int, experts: int, dtype: Any
) -> None:
    outer = (experts,) if experts else ()
    raw = numbered(16 * tiles, 64 * pieces, *outer)
    values = np.ascontiguousarray(raw).view(np.uint8).view(dtype)

    made = arrange(layout, values)

    assert (made.shape, made.dtype) == (values.shape, values.dtype)
    assert np.array_equal(restore(layout, made).view(np.uint8), values.view(np.uint8))


def test_a_piece_holds_eight_rows_of_swizzled_quarters_and_eight_more() -> None:
    rows, row_bytes = 48, 192
    values = numbered(rows, row_bytes)
    raw = values.view(np.uint8)

    made = arrange("tiled", values).view(np.uint8).reshape(-1)

    for row in range(rows):
        for byte in range(0, row_bytes, 16):
            piece = (row // 16) * (row_bytes // 64) + byte // 64
            quarter = (byte // 16 % 4) ^ (row % 8 // 2 % 4)
            at = piece * 1024 + row % 16 // 8 * 512 + row % 8 * 64 + quarter * 16
            assert np.array_equal(made[at : at + 16], raw[row, byte : byte + 16])


def test_a_gated_tile_has_eight_channels_of_gate_and_of_up() -> None:
    values = numbered(64, 64)
    gate, up = values[:32], values[32:]
    zipped = np.concatenate([half[8 * i : 8 * i + 8] for i in range(4) for half in (gate, up)])

    assert np.array_equal(arrange("tiled_gated", values), arrange("tiled", zipped))


def test_nibbles_stand_so_that_one_mask_takes_two_neighbours() -> None:
    words = np.tile(np.array([0x76543210], np.uint32).view(np.int32), (16, 16))

    (word,) = np.unique(arrange("tiled", words).view(np.uint32))

    assert [int(word) >> 4 * place & 15 for place in range(8)] == [*NIBBLES]


def test_scales_of_a_tile_stand_group_after_group() -> None:
    values = numbered(32, 10)

    made = arrange("tiled_scales", values).reshape(2, 5, 16)

    assert np.array_equal(made[1, 3], values[16:, 3])


@pytest.mark.parametrize(
    ("layout", "rows", "row_bytes", "said"),
    [
        ("plain", 3, 5, None),
        ("interleaved", 6, 5, None),
        ("interleaved", 5, 4, "5 rows are not a multiple of 2"),
        ("tiled", 40, 64, "40 rows are not a multiple of 16"),
        ("tiled_gated", 48, 96, "rows of 96 bytes are not a multiple of 64"),
        ("tiled_scales", 48, 6, None),
        ("tiled_gated_scales", 24, 6, "24 rows are not a multiple of 16"),
    ],
)
def test_says_why_a_matrix_cannot_have_a_layout(
    layout: str, rows: int, row_bytes: int, said: str | None
) -> None:
    reason = layout_refusal(layout, rows, row_bytes)

    assert (reason or "").startswith(said or "")
    assert (reason is None) == (said is None)


def test_a_layout_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InputError, match="weight layout 'diagonal' is not known"):
        arrange("diagonal", numbered(16, 64))
