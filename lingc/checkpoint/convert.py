"""Tensors in the format that is wanted.

What is stored in that format is taken as it is. Any other is rounded to nearest from its
(dequantized) values.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.checkpoint.source import Source
from lingc.errors import CheckpointError, InputError
from lingc.quantize.formats import (
    F32,
    Weight,
    blocks,
    dequantize_fp8_block,
    dequantize_fp8_tensor,
    dequantize_int4_group,
    quantize_fp8_block,
    quantize_fp8_tensor,
    quantize_int4_group,
    round_bf16,
    widen_bf16,
)

Array = NDArray[Any]


def to_dense(source: Source, name: str) -> F32:
    """The values, dequantized, in memory of their own."""
    kind = source.kind(name)
    if kind == "plain":
        values, dtype = source.plain(name)
        return widen_bf16(values) if dtype == "bf16" else np.array(values)
    codes, scales, group = source.quantized(name)
    if kind == "fp8_block":
        return dequantize_fp8_block(codes, scales)
    if kind == "fp8_tensor":
        return dequantize_fp8_tensor(codes, scales)
    return dequantize_int4_group(codes, scales, group, source.shape(name)[1])


def to_plain(source: Source, name: str, dtype: str) -> Array:
    """The values as `f32`, or as the bits of `bf16`."""
    if dtype == "f32":
        return source.dense(name)
    weight = _weight(source, name)
    return weight if weight.dtype == np.uint16 else round_bf16(weight.view(np.float32))


def to_quantized(source: Source, name: str, kind: str, group: int) -> tuple[Array, Array]:
    """Codes and scales of a matrix in the format `kind`; `group` is that of `int4_group`.

    Raises:
        CheckpointError: A value is not finite.
    """
    if is_stored_as(source, name, kind, group):
        codes, scales, _ = source.quantized(name)
        if source.kind(name) == kind:
            return codes, scales
        grid = tuple(blocks(size) for size in codes.shape)
        return codes, np.broadcast_to(scales.reshape(()), grid)
    weight = _weight(source, name)
    try:
        if kind == "fp8_block":
            return quantize_fp8_block(weight)
        if kind == "fp8_tensor":
            return quantize_fp8_tensor(weight)
        return quantize_int4_group(weight, group)
    except InputError as error:
        raise CheckpointError(f"tensor {name!r}: {error.problem}", hint=error.hint) from error


def to_rounded(source: Source, name: str, kind: str, group: int) -> F32:
    """The values of a matrix after the way to the format `kind` and back, in memory of their own.

    What is stored in that format has not far to go; `plain` is BF16.
    """
    if kind == "plain" or is_stored_as(source, name, kind, group):
        values = source.dense(name)
        return widen_bf16(round_bf16(values)) if kind == "plain" else values
    codes, scales = to_quantized(source, name, kind, group)
    if kind == "fp8_block":
        return dequantize_fp8_block(codes, scales)
    if kind == "fp8_tensor":
        return dequantize_fp8_tensor(codes, scales)
    return dequantize_int4_group(codes, scales, group, source.shape(name)[1])


def is_stored_as(source: Source, name: str, kind: str, group: int) -> bool:
    """Whether a tensor's stored codes are what `to_quantized` gives; nothing is rounded then.

    One scale for a whole matrix is also one for each of its blocks.
    """
    stored = source.kind(name)
    if stored == "fp8_tensor":
        return kind in (stored, "fp8_block")
    if stored != kind or kind == "plain":
        return False
    if kind == "fp8_block":
        return True
    stored_group = source.quantized(name)[2]
    # Any two groups that span the whole width are the same group.
    return stored_group == group or min(stored_group, group) >= source.shape(name)[1]


def _weight(source: Source, name: str) -> Weight:
    """BF16 bits where a tensor is stored so, else its values."""
    return source.plain(name)[0] if source.kind(name) == "plain" else source.dense(name)
