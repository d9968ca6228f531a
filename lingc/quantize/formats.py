"""How a weight is stored, and the way there and back.

BF16 is held as uint16 bits, E4M3 as uint8 codes. Every conversion rounds to nearest, ties to even.

    fp8_block   w = e4m3(code) * scale, one f32 scale for each 128 x 128 block; edge blocks are
                partial. scale = amax / 448, or 1 where a block is all zero.
    fp8_tensor  the same with one f32 scale for the whole matrix.
    int4_group  w = (nibble - 8) * scale, one bf16 scale for each row and `group` columns; the last
                group may be short. scale = bf16(amax / 7.5), or 1 where a group is all zero.
                Eight nibbles stand in an int32 along the input axis, the lowest first; a row whose
                width is not a multiple of 8 ends in nibbles of value 0.

Work goes by tiles that stay in a core's cache, so memory beyond arguments and results is bounded.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lingc.errors import InputError

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
I8 = NDArray[np.int8]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
Weight = U16 | F32
"""A matrix to be quantized, BF16 bits or f32."""

FP8_BLOCK = 128
"""Side of an `fp8_block` block."""

E4M3_MAX = np.float32(448)
INT4_SPAN = np.float32(7.5)  # half of the 15 steps between -8 and 7
NIBBLES = 8
"""INT4 values in one int32."""

_TILE = 1 << 17  # elements worked on at a time: half a MiB of f32


# ------------------------------------------------------------------------------------------ BF16


def widen_bf16(bits: U16) -> F32:
    """BF16 bits as f32, exactly."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def round_bf16(values: F32) -> U16:
    """f32 as BF16 bits; NaN stays NaN, and what exceeds the range becomes infinite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    # A NaN whose payload is all ones would carry into the sign.
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


# ------------------------------------------------------------------------------------------ E4M3


@cache
def _e4m3_values() -> F32:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(mantissa + 8.0, exponent - 10)
    )
    magnitude[codes & 127 == 127] = np.nan
    values: F32 = np.where(codes < 128, magnitude, -magnitude).astype(np.float32)
    return values


@cache
def _e4m3_codes() -> U8:
    """Code of every f32 whose low half is zero, by its high half.

    Bit 0 of the index may also say that the low half is not zero: E4M3 keeps 3 of the 7 mantissa
    bits of the high half, so that bit is never kept and only decides ties.
    """
    with np.errstate(invalid="ignore"):  # widening a signalling NaN
        magnitude = widen_bf16(np.arange(0x8000, dtype=np.uint16)).astype(np.float64)
    values = _e4m3_values()[:127].astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    below, above = (np.searchsorted(middles, magnitude, side) for side in ("left", "right"))
    # Between two codes exactly: `below` and `above` name them, and one of the two is even.
    codes = np.where(below % 2 == 0, below, above).astype(np.uint8)
    codes[np.isnan(magnitude)] = 127
    return np.concatenate((codes, codes | 0x80))


def decode_e4m3(codes: U8) -> F32:
    """E4M3 codes as f32, exactly; both NaN codes give NaN."""
    values: F32 = _e4m3_values().take(codes)
    return values


def encode_e4m3(values: F32) -> U8:
    """f32 as E4M3 codes: saturates at 448 (infinities too), NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    high = np.bitwise_and(bits, 0xFFFF)
    high += np.uint32(0xFFFF)  # reaches bit 16 unless the low half is zero
    high |= bits
    high >>= 16
    return _e4m3_codes().take(high)


# ------------------------------------------------------------------------------------- fp8_block


def blocks(length: int) -> int:
    """How many blocks of 128 cover an axis."""
    return -(-length // FP8_BLOCK)


def quantize_fp8_block(weight: Weight) -> tuple[U8, F32]:
    """Quantize a matrix by 128 x 128 blocks.

    Args:
        weight: [N, D], BF16 bits or f32.

    Returns:
        Codes [N, D] and scales [ceil(N / 128), ceil(D / 128)].

    Raises:
        InputError: A value is NaN or infinite.
    """
    rows, columns = weight.shape
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((blocks(rows), blocks(columns)), np.float32)
    for i, top in enumerate(range(0, rows, FP8_BLOCK)):
        for left, right in _spans(columns, _TILE // FP8_BLOCK):
            tile = weight[top : top + FP8_BLOCK, left:right]
            tops = _magnitude(tile).max(axis=0)
            largest = np.maximum.reduceat(tops, range(0, right - left, FP8_BLOCK))
            scale = _scale(_from_magnitude(largest), E4M3_MAX, top, left)
            scales[i, left // FP8_BLOCK : blocks(right)] = scale
            ratio = _f32(tile) / np.repeat(scale, FP8_BLOCK)[: right - left]
            codes[top : top + FP8_BLOCK, left:right] = encode_e4m3(ratio)
    return codes, scales


def dequantize_fp8_block(codes: U8, scales: F32) -> F32:
    """The values of `fp8_block` codes [N, D] and scales, f32 [N, D]."""
    rows, columns = codes.shape
    values = np.empty((rows, columns), np.float32)
    for i, top in enumerate(range(0, rows, FP8_BLOCK)):
        across = np.repeat(scales[i], FP8_BLOCK)
        for left, right in _spans(columns, _TILE // FP8_BLOCK):
            tile = decode_e4m3(codes[top : top + FP8_BLOCK, left:right])
            np.multiply(tile, across[left:right], out=values[top : top + FP8_BLOCK, left:right])
    return values


# ------------------------------------------------------------------------------------ fp8_tensor


def quantize_fp8_tensor(weight: Weight) -> tuple[U8, F32]:
    """Quantize a matrix by one scale.

    Args:
        weight: [N, D], BF16 bits or f32.

    Returns:
        Codes [N, D] and the scale [1].

    Raises:
        InputError: A value is NaN or infinite.
    """
    step = max(1, _TILE // max(weight.shape[1], 1))
    spans = tuple(_spans(weight.shape[0], step))
    tops = [
        _from_magnitude(_magnitude(weight[a:b]).reshape(-1).max(keepdims=True)) for a, b in spans
    ]
    scale = _scale(np.max(tops, axis=0), E4M3_MAX, 0, 0)
    codes = np.empty(weight.shape, np.uint8)
    for top, bottom in spans:
        codes[top:bottom] = encode_e4m3(_f32(weight[top:bottom]) / scale)
    return codes, scale


def dequantize_fp8_tensor(codes: U8, scale: F32) -> F32:
    """The values of `fp8_tensor` codes [N, D] and their scale [1], f32 [N, D]."""
    return np.multiply(decode_e4m3(codes), scale, dtype=np.float32)


# ------------------------------------------------------------------------------------ int4_group


def quantize_int4_group(weight: Weight, group: int) -> tuple[I32, U16]:
    """Quantize a matrix by `group` columns of each row.

    Args:
        weight: [N, D], BF16 bits or f32.
        group: Columns that share a scale.

    Returns:
        Packed values [N, ceil(D / 8)] and BF16 scales [N, ceil(D / group)].

    Raises:
        InputError: A value is NaN or infinite.
    """
    rows, columns = weight.shape
    groups = -(-columns // group)
    packed = np.empty((rows, -(-columns // NIBBLES)), np.int32)
    scales = np.empty((rows, groups), np.uint16)
    for top, bottom in _spans(rows, max(1, _TILE // max(columns, 1))):
        tile = np.zeros((bottom - top, groups * group), weight.dtype)
        tile[:, :columns] = weight[top:bottom]
        grouped = _magnitude(tile).reshape(-1, group)
        # Along the contiguous axis of so short a group the maximum would be three times slower.
        largest = np.ascontiguousarray(grouped.T).max(axis=0).reshape(-1, groups)
        bits = round_bf16(_scale(_from_magnitude(largest), INT4_SPAN, top, 0))
        bits[bits == 0] = 0x3F80  # an amax too small for a BF16 scale
        scales[top:bottom] = bits
        ratio = _f32(tile)
        ratio /= np.repeat(widen_bf16(bits), group, axis=1)
        np.clip(np.rint(ratio, out=ratio), -8, 7, out=ratio)
        packed[top:bottom] = pack_int4(ratio[:, :columns].astype(np.int8))
    return packed, scales


def dequantize_int4_group(packed: I32, scales: U16, group: int, columns: int) -> F32:
    """The values of `int4_group` packed values and scales, f32 [N, columns]."""
    values = np.empty((packed.shape[0], columns), np.float32)
    for top, bottom in _spans(packed.shape[0], max(1, _TILE // max(columns, 1))):
        across = np.repeat(widen_bf16(scales[top:bottom]), group, axis=1)[:, :columns]
        np.multiply(unpack_int4(packed[top:bottom], columns), across, out=values[top:bottom])
    return values


def pack_int4(values: I8) -> I32:
    """Values -8..7 [N, D] as int32 [N, ceil(D / 8)], the lowest nibble first."""
    short = -values.shape[1] % NIBBLES
    nibbles = (np.pad(values, ((0, 0), (0, short))) + np.int8(8)).view(np.uint8)
    pairs = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return np.ascontiguousarray(pairs).view("<i4")


def unpack_int4(packed: I32, columns: int) -> I8:
    """Values -8..7 [N, columns] of int32 [N, ceil(columns / 8)]."""
    pairs = np.ascontiguousarray(packed, dtype="<i4").view(np.uint8)
    nibbles = np.empty((packed.shape[0], pairs.shape[1] * 2), np.uint8)
    np.bitwise_and(pairs, 15, out=nibbles[:, 0::2])
    np.right_shift(pairs, 4, out=nibbles[:, 1::2])
    return (nibbles[:, :columns].view(np.int8)) - np.int8(8)


# ----------------------------------------------------------------------------------------- tiles


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, length)) for start in range(0, length, step))


def _f32(tile: Weight) -> F32:
    if tile.dtype == np.uint16:
        return widen_bf16(tile.view(np.uint16))
    return np.array(tile, np.float32)


def _magnitude(tile: Weight) -> U16 | U32:
    """Bits without the sign: they sort as the values do, NaN above infinity."""
    if tile.dtype == np.uint16:
        return tile.view(np.uint16) & np.uint16(0x7FFF)
    return np.ascontiguousarray(tile, dtype=np.float32).view(np.uint32) & np.uint32(0x7FFF_FFFF)


def _from_magnitude(bits: U16 | U32) -> F32:
    if bits.dtype == np.uint16:
        return widen_bf16(bits.view(np.uint16))
    return bits.view(np.float32)


def _scale(largest: F32, span: np.float32, top: int, left: int) -> F32:
    if not np.isfinite(largest).all():
        raise InputError(
            f"a weight is NaN or infinite, near row {top}, column {left}",
            hint="the checkpoint is damaged or was exported wrongly; fetch it again",
        )
    scale: F32 = largest / span
    scale[scale == 0] = 1
    return scale
