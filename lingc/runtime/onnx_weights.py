"""What becomes of an engine's weights when they are loaded for ONNX Runtime.

An `Initializer` is a weight as the models read it: the stored bytes as they are, or widened once
while loading, so that one copy serves all phases.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.errors import InputError
from lingc.quantize.formats import FP8_BLOCK, decode_e4m3, widen_bf16
from lingc.quantize.layouts import PLAIN, arrange

Array = NDArray[Any]

WEIGHTS_FILE = "weights.bin"
"""Location of every initializer's data, as the models name it."""

AS_STORED = "as_stored"
AS_BYTES = "as_bytes"
BF16_TO_F32 = "bf16_to_f32"
FP8_TO_F32 = "fp8_to_f32"
FP8_TO_F16 = "fp8_to_f16"
SCALES_TO_ROWS = "scales_to_rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Initializer:
    """One weight as the engine's code reads it.

    Attributes:
        name: Its name in the code.
        dtype: Element type there: a dtype of the plan, or `f16`.
        shape: Shape there.
        weights: The engine weights it is made from.
        load: What is done while loading: a key of `LOADERS`.
        layout: Order of the weight's rows, for block scales, which stay in the order of blocks.
        stacked: Matrices joined along the rows of each: 2 for gate and up, else 1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: tuple[str, ...]
    load: str = AS_STORED
    layout: str = PLAIN
    stacked: int = 1

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values | {"shape": list(self.shape), "weights": list(self.weights)}


def initializer_from_json(value: Mapping[str, Any]) -> Initializer:
    """Read an initializer back.

    Raises:
        InputError: A field is missing, unknown or of another kind.
    """
    try:
        given = dict(value)
        shape, weights = tuple(map(int, given.pop("shape"))), tuple(map(str, given.pop("weights")))
        made = Initializer(shape=shape, weights=weights, **given)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"an initializer of the engine cannot be read: {error}") from error
    if made.load not in LOADERS:
        raise InputError(
            f"initializer {made.name!r} asks for {made.load!r}, which this lingc does not know",
            hint="the engine was built by a newer version; update lingc",
        )
    return made


def load(made: Initializer, weights: Mapping[str, Array]) -> Array:
    """The values of an initializer from the engine's weights; a view of them where it can be.

    Raises:
        InputError: A weight is missing, or its size is another one.
    """
    missing = [name for name in made.weights if name not in weights]
    if missing:
        raise InputError(
            f"the engine's weights lack {', '.join(map(repr, missing))}",
            hint="they are another engine's; bind this engine to its checkpoint again",
        )
    given = [weights[name] for name in made.weights]
    try:
        return LOADERS[made.load](made, *given).reshape(made.shape)
    except ValueError as error:
        shapes = ", ".join(
            f"{n!r} {list(a.shape)}" for n, a in zip(made.weights, given, strict=True)
        )
        raise InputError(
            f"initializer {made.name!r} of shape {list(made.shape)} cannot be made of {shapes}",
            hint="the weights are another engine's; bind this engine to its checkpoint again",
        ) from error


def row_scales(made: Initializer, scales: Array, shape: tuple[int, ...]) -> Array:
    """Scales of 128x128 blocks as one scale a row and 128 columns, in the order of the rows."""
    rows = shape[-2] // made.stacked
    blocks = -(-rows // FP8_BLOCK)
    *outer, _, columns = scales.shape
    by_block = scales.reshape(*outer, made.stacked, blocks, columns)
    by_row = np.repeat(by_block, FP8_BLOCK, axis=-2)[..., :rows, :]
    joined = by_row.reshape(*outer, made.stacked * rows, columns)
    return arrange(made.layout, joined)


def _bf16_to_f32(_made: Initializer, bits: Array) -> Array:
    return widen_bf16(bits)


def _fp8_to_f32(made: Initializer, codes: Array, scales: Array) -> Array:
    values = decode_e4m3(codes)
    by_row = row_scales(made, scales, codes.shape)
    width = codes.shape[-1]
    for block in range(by_row.shape[-1]):
        columns = slice(block * FP8_BLOCK, min((block + 1) * FP8_BLOCK, width))
        values[..., columns] *= by_row[..., block, None]
    return values


def _fp8_to_f16(_made: Initializer, codes: Array) -> Array:
    # E4M3's 15 binades and 3 mantissa bits lie within FP16's: exact.
    return decode_e4m3(codes).astype(np.float16)


LOADERS: Mapping[str, Callable[..., Array]] = {
    AS_STORED: lambda _made, values: values,
    AS_BYTES: lambda _made, values: np.ascontiguousarray(values).view(np.uint8),
    BF16_TO_F32: _bf16_to_f32,
    FP8_TO_F32: _fp8_to_f32,
    FP8_TO_F16: _fp8_to_f16,
    SCALES_TO_ROWS: lambda made, scales: row_scales(made, scales, made.shape),
}
