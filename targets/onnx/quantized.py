"""Functions on FP8 and INT4 weights, and FP8 activations."""

import numpy as np

from lingc.quantize.formats import E4M3_MAX, FP8_BLOCK
from lingc.targets.onnx.body import Value
from lingc.targets.onnx.library_standard import Standard
from lingc.targets.onnx.rows import add_rms_norm, rms_norm, silu_mul


def quantize_fp8(library: Standard, x: Value) -> tuple[Value, Value]:
    return _quantized(library, x, width=x.size(1))


def rms_norm_fp8(
    library: Standard, x: Value, weight: Value, eps: float
) -> tuple[Value, Value, Value]:
    y = rms_norm(library, x, weight, eps)
    return (y, *_quantized(library, y, width=x.size(1)))


def add_rms_norm_fp8(
    library: Standard, x: Value, residual: Value, weight: Value, eps: float
) -> tuple[Value, Value, Value, Value]:
    y, h = add_rms_norm(library, x, residual, weight, eps)
    return (y, h, *_quantized(library, y, width=x.size(1)))


def silu_mul_fp8(library: Standard, gate_up: Value) -> tuple[Value, Value]:
    return _quantized(library, silu_mul(library, gate_up), width=gate_up.size(1) // 2)


def fp8_linear(
    library: Standard,
    codes: Value,
    scales: Value,
    weight: Value,
    weight_scale: Value | None,
    _dtype: str,
) -> Value:
    x = dequantized_rows(library, codes, scales)
    return library.linear(x, library.wide(weight, x, weight_scale))


def fp8_linear_f32(
    library: Standard, codes: Value, scales: Value, weight: Value, weight_scale: Value | None
) -> Value:
    x = dequantized_rows(library, codes, scales)
    return library.linear(x, library.wide(weight, x, weight_scale))


def fp8_weight_linear(
    library: Standard, x: Value, weight: Value, weight_scale: Value | None
) -> Value:
    return library.linear(x, library.wide(weight, x, weight_scale))


def fp8_weight_linear_f32(
    library: Standard, x: Value, weight: Value, weight_scale: Value | None
) -> Value:
    return library.linear(x, library.wide(weight, x, weight_scale))


def int4_weight_linear(
    library: Standard, x: Value, packed: Value, scales: Value, group: int
) -> Value:
    return library.int4_linear(x, packed, scales, group)


def int4_weight_linear_f32(
    library: Standard, x: Value, packed: Value, scales: Value, group: int
) -> Value:
    return library.int4_linear(x, packed, scales, group)


def dequantized_rows(library: Standard, codes: Value, scales: Value) -> Value:
    """FP8 activations [T, D] in f32."""
    wide = codes.cast("f32")
    made = library.by_blocks(wide, scales, width=codes.size(1), rank=2)
    return Value(made.name, made.body, "f32", codes.shape)


def requantized(library: Standard, rows: Value, width: int) -> Value:
    """Rows [n, width] after a round trip through FP8."""
    codes, scales = _quantized(library, rows, width=width)
    return library.by_blocks(codes.cast("f32"), scales, width=width, rank=2)


def _quantized(library: Standard, x: Value, *, width: int) -> tuple[Value, Value]:
    """E4M3 codes [T, width] and one scale a row and 128 columns."""
    body, short = library.body, -width % FP8_BLOCK
    padded = x
    if short:
        padded = body.op("Pad", x, body.ints([0, 0, 0, short]))
    blocks = padded.reshape(0, (width + short) // FP8_BLOCK, FP8_BLOCK)
    largest = body.op("Abs", blocks).max(2, keep=True) / float(E4M3_MAX)
    scales = body.where(body.op("Equal", largest, 0.0), 1.0, largest)
    top = np.float32(E4M3_MAX)
    ratio = body.op("Clip", blocks / scales, np.asarray(-top), np.asarray(top))
    codes = ratio.reshape(0, width + short)
    if short:
        codes = codes.slice(1, 0, width)
    return codes.cast("f8e4m3"), scales.squeeze(2)
