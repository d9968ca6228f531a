"""FP8 and INT4: codes, scales, packing, and the fused forms of quantization."""

import pytest
import torch
from torch import Tensor

from lingc.compare import assert_close
from lingc.math import dequantize_blocks, dequantize_int4, dequantize_rows
from lingc.plugins import (
    add_rms_norm,
    add_rms_norm_fp8,
    experts,
    fp8_experts,
    fp8_linear,
    int4_experts,
    int4_linear,
    linear,
    quantize_fp8,
    rms_norm,
    rms_norm_fp8,
    silu_mul,
    silu_mul_fp8,
)
from lingc.samples import Samples

F8 = torch.float8_e4m3fn


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Equal bit for bit."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_codes_are_the_casts_of_torch_block_by_block(dtype: str) -> None:
    x = Samples(dtype=dtype, device="cpu").normal(5, 300)

    codes, scales = quantize_fp8.reference(x)

    assert scales.shape == (5, 3)
    for t in range(5):
        for n, block in enumerate(x[t].float().split(128)):
            scale = block.abs().max() / 448
            assert scales[t, n] == scale
            made = codes[t, 128 * n : 128 * n + block.numel()]
            assert torch.equal(made.float(), (block / scale).to(F8).float())
            assert made.float().abs().max() == 448


def test_a_block_of_zeros_has_scale_1_and_codes_0() -> None:
    codes, scales = quantize_fp8.reference(torch.zeros(2, 130, dtype=torch.bfloat16))

    assert (scales == 1).all()
    assert (codes.float() == 0).all()


@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e38, 3e38])
def test_the_smallest_and_the_largest_numbers_quantize_to_finite_codes(size: float) -> None:
    codes, scales = quantize_fp8.reference(torch.tensor([[size, -size, size / 2]]))

    assert codes.float().isfinite().all()
    assert (scales > 0).all()
    assert scales.isfinite().all()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_norm_with_quantization_is_norm_then_quantization_bit_for_bit(dtype: str) -> None:
    x, residual, weight, eps = add_rms_norm_fp8.OP.inputs(5, 300, dtype=dtype, device="cpu")

    y = rms_norm.reference(x, weight, eps)
    equal(rms_norm_fp8.reference(x, weight, eps), (y, *quantize_fp8.reference(y)))
    y, h = add_rms_norm.reference(x, residual, weight, eps)
    equal(add_rms_norm_fp8.reference(x, residual, weight, eps), (y, h, *quantize_fp8.reference(y)))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_silu_mul_with_quantization_is_one_then_the_other_bit_for_bit(dtype: str) -> None:
    (gate_up,) = silu_mul_fp8.OP.inputs(5, 200, dtype=dtype, device="cpu")

    got = silu_mul_fp8.reference(gate_up)

    equal(got, quantize_fp8.reference(silu_mul.reference(gate_up)))


def test_block_scales_reach_the_last_partial_block() -> None:
    codes = torch.ones(130, 257).to(F8)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    w = dequantize_blocks(codes, scales, torch.float32)

    assert [w[0, 0], w[127, 127], w[0, 128], w[129, 255], w[129, 256]] == [1, 1, 2, 5, 6]


def test_nibbles_unpack_lowest_first_with_8_for_zero() -> None:
    # 0xFEDCBA98 as a signed int32: nibbles 8 … 15, the lowest first.
    packed = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32]], dtype=torch.int32)
    scales = torch.tensor([[1.0, 0.5, 2.0, 1.0]], dtype=torch.bfloat16)

    w = dequantize_int4(packed, scales, 15, 4, torch.float32)

    assert w.tolist() == [[-8, -7, -6, -5, -2, -1.5, -1, -0.5, 0, 2, 4, 6, 4, 5, 6]]


def test_fp8_products_are_products_of_the_values() -> None:
    codes, scales, weight, weight_scale, _ = fp8_linear.OP.inputs(
        7, 130, 300, dtype="f64", device="cpu"
    )
    x = dequantize_rows(codes, scales, torch.float64)
    w = dequantize_blocks(weight, weight_scale, torch.float64)

    both = fp8_linear.reference(codes, scales, weight, weight_scale, "f64")

    assert_close(both, x @ w.T, dtype="f64")
    assert torch.equal(fp8_linear.reference_weight(x, weight, weight_scale), both)
    narrow = fp8_linear.reference(codes, scales, weight, weight_scale, "bf16")
    kept = fp8_linear.reference_f32(codes, scales, weight, weight_scale)
    assert torch.equal(kept.bfloat16(), narrow)


def test_int4_products_are_products_of_the_values() -> None:
    x, packed, scales, group = int4_linear.OP.inputs(7, 33, 50, 32, dtype="bf16", device="cpu")
    w = dequantize_int4(packed, scales, 50, group, torch.float32)

    equal((int4_linear.reference(x, packed, scales, group),), (linear.reference(x, w),))
    equal((int4_linear.reference_f32(x, packed, scales, group),), (linear.reference_f32(x, w),))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_weight_only_experts_are_experts_of_the_values(dtype: str) -> None:
    # F = 130: gate and up blocks do not line up with those of the joined matrix.
    x, ids, weights, gate_up, gate_up_scale, down, down_scale, base = fp8_experts.OP_WEIGHT.inputs(
        7, 3, 5, 130, 140, 1, dtype=dtype, device="cpu"
    )
    halves = zip(gate_up.split(130, 1), gate_up_scale.split(2, 1), strict=True)
    joined = torch.cat(
        [torch.stack([dequantize_blocks(w, s, torch.float32) for w, s in zip(*half, strict=True)])
         for half in halves],
        1,
    )  # fmt: skip
    wide_down = torch.stack(
        [dequantize_blocks(w, s, torch.float32) for w, s in zip(down, down_scale, strict=True)]
    )

    got = fp8_experts.reference_weight(
        x, ids, weights, gate_up, gate_up_scale, down, down_scale, base
    )

    want = experts.reference(x, ids, weights, joined, wide_down, base)
    assert_close(got, want, dtype=dtype, mechanism="experts")


def test_int4_experts_are_experts_of_the_values() -> None:
    x, ids, weights, gate_up, gate_up_scale, down, down_scale, base, group = int4_experts.OP.inputs(
        7, 3, 5, 20, 36, 32, 1, dtype="f64", device="cpu"
    )
    wide_gate_up, wide_down = (
        torch.stack(
            [dequantize_int4(p, s, width, group, torch.float64) for p, s in zip(*w, strict=True)]
        )
        for w, width in (((gate_up, gate_up_scale), 36), ((down, down_scale), 20))
    )

    got = int4_experts.reference(
        x, ids, weights, gate_up, gate_up_scale, down, down_scale, base, group
    )

    assert_close(
        got, experts.reference(x, ids, weights, wide_gate_up, wide_down, base), dtype="f64"
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_fp8_experts_quantize_between_their_products_as_the_dense_layer_does(dtype: str) -> None:
    codes, scales, ids, weights, gate_up, gate_up_scale, down, down_scale, _, _ = (
        fp8_experts.OP.inputs(4, 1, 1, 128, 256, 0, dtype=dtype, device="cpu")
    )

    got = fp8_experts.reference(
        codes, scales, ids, weights, gate_up, gate_up_scale, down, down_scale, None, dtype
    )

    joined = fp8_linear.reference(codes, scales, gate_up[0], gate_up_scale[0], "f32")
    gate, up = joined.chunk(2, -1)
    inner = (torch.nn.functional.silu(gate) * up).to(got.dtype)
    made = fp8_linear.reference_f32(*quantize_fp8.reference(inner), down[0], down_scale[0])
    assert_close(got, (made * weights).to(got.dtype), dtype=dtype, mechanism="fp8_gemm")
