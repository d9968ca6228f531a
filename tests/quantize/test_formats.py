"""Storage formats: exact where they promise to be, and the same as torch's own rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import InputError
from lingc.quantize import formats
from lingc.quantize.formats import F32, I8, U8, U16, Weight

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**32 - 1)
EVERY_BF16 = np.arange(1 << 16, dtype=np.uint16)


def _torch_e4m3(values: F32) -> U8:
    clamped = torch.from_numpy(values).clamp(-448, 448)
    codes: U8 = clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return codes


def _weight(rows: int, columns: int, seed: int) -> U16:
    rng = np.random.default_rng(seed)
    spread = rng.choice([1e-6, 0.02, 30.0], size=(rows, 1))
    return formats.round_bf16((rng.standard_normal((rows, columns)) * spread).astype(np.float32))


def _any_f32(seed: int) -> F32:
    """Every exponent alike, subnormals, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)


# ------------------------------------------------------------------------------------------ BF16


def test_every_bf16_value_survives_the_way_to_f32_and_back() -> None:
    finite = EVERY_BF16[~np.isnan(formats.widen_bf16(EVERY_BF16))]

    assert np.array_equal(formats.round_bf16(formats.widen_bf16(finite)), finite)


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_bf16_rounds_as_torch_does(seed: int) -> None:
    values = _any_f32(seed)
    values = values[~np.isnan(values)]

    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()

    assert np.array_equal(formats.round_bf16(values), want.view(np.uint16))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFF800001])
def test_a_nan_stays_nan_in_bf16(bits: int) -> None:
    values = np.array([bits], np.uint32).view(np.float32)

    assert np.isnan(formats.widen_bf16(formats.round_bf16(values))).all()


# ------------------------------------------------------------------------------------------ E4M3


def test_e4m3_decodes_as_torch_does() -> None:
    codes = np.arange(256, dtype=np.uint8)

    want = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()

    assert np.array_equal(formats.decode_e4m3(codes), want, equal_nan=True)


def test_every_e4m3_code_survives_the_way_to_f32_and_back() -> None:
    codes = np.arange(256, dtype=np.uint8)

    again = formats.encode_e4m3(formats.decode_e4m3(codes))

    assert np.array_equal(again[codes & 127 != 127], codes[codes & 127 != 127])


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_e4m3_rounds_as_torch_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    near = (rng.standard_normal(20_000) * rng.choice([1e-3, 1, 200], 20_000)).astype(np.float32)
    values = np.concatenate((near, _any_f32(seed)))
    values = values[~np.isnan(values)]

    assert np.array_equal(formats.encode_e4m3(values), _torch_e4m3(values))


def test_e4m3_breaks_ties_to_even_and_leaves_them_one_bit_away() -> None:
    values = formats.decode_e4m3(np.arange(127, dtype=np.uint8))
    middles = (values[1:] + values[:-1]) / 2
    around = np.concatenate((middles, np.nextafter(middles, 0), np.nextafter(middles, 999)))

    assert np.array_equal(formats.encode_e4m3(around), _torch_e4m3(around))


def test_e4m3_saturates_and_keeps_nan() -> None:
    values = np.array([449, 1e30, np.inf, -np.inf, np.nan, -0.0], np.float32)

    codes = formats.encode_e4m3(values)

    assert codes.tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x80]


# ------------------------------------------------------------------------------------- fp8_block


@given(rows=SIZES, columns=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_fp8_block_is_the_formula_of_its_docstring(rows: int, columns: int, seed: int) -> None:
    weight = _weight(rows, columns, seed)
    values = formats.widen_bf16(weight)

    codes, scales = formats.quantize_fp8_block(weight)

    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            assert scales[i, j] == np.abs(values[at]).max() / np.float32(448)
            assert np.array_equal(codes[at], _torch_e4m3(values[at] / scales[i, j]))
            back = formats.dequantize_fp8_block(codes, scales)[at]
            assert np.array_equal(back, formats.decode_e4m3(codes[at]) * scales[i, j])


@given(rows=SIZES, columns=SIZES, group=st.sampled_from([0, 5, 32]), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_bf16_bits_and_f32_quantize_alike(rows: int, columns: int, group: int, seed: int) -> None:
    weight = _weight(rows, columns, seed)
    values = formats.widen_bf16(weight)

    def quantize(matrix: Weight) -> tuple[bytes, ...]:
        if group:
            return tuple(part.tobytes() for part in formats.quantize_int4_group(matrix, group))
        return tuple(part.tobytes() for part in formats.quantize_fp8_block(matrix))

    assert quantize(weight) == quantize(values)


def test_a_wide_matrix_is_cut_into_tiles_that_do_not_show() -> None:
    weight = _weight(130, 1024 + 128 + 7, 3)

    codes, scales = formats.quantize_fp8_block(weight)
    right = formats.quantize_fp8_block(weight[:, 1024:])

    assert np.array_equal(codes[:, 1024:], right[0])
    assert np.array_equal(scales[:, 8:], right[1])


def test_an_fp8_matrix_quantizes_to_itself() -> None:
    codes, scales = formats.quantize_fp8_block(_weight(256, 384, 5))

    again, same = formats.quantize_fp8_block(formats.dequantize_fp8_block(codes, scales))

    assert np.array_equal(again, codes)
    assert np.allclose(same, scales, rtol=1e-6)


def test_a_zero_block_has_scale_one() -> None:
    codes, scales = formats.quantize_fp8_block(np.zeros((128, 128), np.uint16))

    assert scales.tolist() == [[1.0]]
    assert not codes.any()


def test_a_block_too_small_for_a_scale_becomes_zero() -> None:
    codes, scales = formats.quantize_fp8_block(np.full((1, 1), 1e-44, np.float32))

    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[0]]


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0])
def test_a_weight_that_is_not_finite_is_refused(bad: int) -> None:
    weight = _weight(300, 300, 0)
    weight[290, 7] = bad

    with pytest.raises(InputError, match="NaN or infinite, near row 256"):
        formats.quantize_fp8_block(weight)
    with pytest.raises(InputError, match="NaN or infinite"):
        formats.quantize_int4_group(weight, 32)


# ------------------------------------------------------------------------------------ int4_group


@given(rows=st.integers(1, 40), columns=SIZES, group=st.integers(1, 140), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_int4_group_is_the_formula_of_its_docstring(
    rows: int, columns: int, group: int, seed: int
) -> None:
    weight = _weight(rows, columns, seed)
    values = formats.widen_bf16(weight)

    packed, scales = formats.quantize_int4_group(weight, group)

    assert packed.shape == (rows, -(-columns // 8))
    assert scales.shape == (rows, -(-columns // group))
    wide = formats.widen_bf16(scales)
    for j in range(scales.shape[1]):
        part = values[:, j * group : (j + 1) * group]
        amax = np.abs(part).max(axis=1, keepdims=True)
        want = torch.from_numpy(amax / np.float32(7.5)).to(torch.bfloat16).float().numpy()
        assert np.array_equal(wide[:, j : j + 1], want)
        q = np.clip(np.rint(part / want), -8, 7)
        back = formats.dequantize_int4_group(packed, scales, group, columns)
        assert np.array_equal(back[:, j * group : (j + 1) * group], q * want)


def test_a_zero_group_has_scale_one() -> None:
    packed, scales = formats.quantize_int4_group(np.zeros((1, 8), np.uint16), 4)

    assert formats.widen_bf16(scales).tolist() == [[1.0, 1.0]]
    assert formats.unpack_int4(packed, 8).tolist() == [[0] * 8]


@given(rows=st.integers(1, 9), columns=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_packing_is_undone_by_unpacking(rows: int, columns: int, seed: int) -> None:
    values: I8 = np.random.default_rng(seed).integers(-8, 8, (rows, columns), dtype=np.int8)

    assert np.array_equal(formats.unpack_int4(formats.pack_int4(values), columns), values)


def test_the_lowest_nibble_is_the_first_value_and_padding_is_zero() -> None:
    packed = formats.pack_int4(np.array([[-8, -7, 7]], np.int8))

    assert packed.view(np.uint32).tolist() == [[0x88888F10]]


def test_values_read_from_the_middle_of_a_buffer_are_taken_as_they_are() -> None:
    """A memory-mapped tensor may start at any byte."""
    weight = _weight(64, 64, 9)
    shifted = np.frombuffer(b"\0" + weight.tobytes(), np.uint16, 64 * 64, 1).reshape(64, 64)

    assert np.array_equal(
        formats.quantize_fp8_block(shifted)[0], formats.quantize_fp8_block(weight)[0]
    )
