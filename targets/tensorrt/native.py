"""Ops that TensorRT has layers for, and fuses better than a plugin would.

A function takes the body and the op's arguments in the order of its schema: tensors as values,
numbers as they are. It rounds where the op's own reference rounds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.plan import Program, Ref, Step, TensorType
from lingc.runtime.tensorrt_constants import SIGNED
from lingc.targets.tensorrt.body import Body, Value

Array = NDArray[Any]


def embedding(body: Body, token_ids: Value, weight: Value, dtype: str) -> Value:
    return body.cast(body.rows(weight, token_ids), dtype)


def linear(body: Body, x: Value, weight: Value) -> Value:
    return body.times(x, body.cast(weight, x.dtype))


def rms_norm(body: Body, x: Value, weight: Value, eps: float) -> Value:
    """As primitives, in f32: one kernel, which takes what quantizes its result with it."""
    wide = body.cast(x, "f32")
    least = body.constant(np.full((1,) * x.rank, eps, np.float32))
    root = body.sqrt(body.add(body.mean(body.mul(wide, wide)), least))
    row = (1,) * (x.rank - 1) + (int(weight.type.shape[0]),)
    scale = body.reshape(body.cast(weight, "f32"), row, TensorType("f32", row))
    return body.cast(body.mul(body.div(wide, root), scale), x.dtype)


def add_rms_norm(
    body: Body, x: Value, residual: Value, weight: Value, eps: float
) -> tuple[Value, Value]:
    total = body.add(x, residual)
    return rms_norm(body, total, weight, eps), total


def silu_mul(body: Body, gate_up: Value) -> Value:
    tokens, width = gate_up.type.shape
    kind = TensorType(gate_up.dtype, (tokens, int(width) // 2))
    gate, up = (
        body.cast(body.columns(gate_up, start, kind), "f32") for start in (0, int(width) // 2)
    )
    return body.cast(body.mul(body.mul(gate, body.sigmoid(gate)), up), gate_up.dtype)


def int4_weight_linear(body: Body, x: Value, packed: Array, scales: Array, group: int) -> Value:
    """Weights as constants: TensorRT then dequantizes inside of the product.

    Its INT4 is signed, the plan's nibbles are the number and 8: their highest bit is the other way.
    """
    rows, words = packed.shape
    signed = np.ascontiguousarray(packed).view(np.uint8) ^ np.uint8(SIGNED)
    codes = body.constant(signed, "int4", (rows, 8 * words))
    scale = body.constant(scales, "bf16", (rows, 8 * words // group))
    return body.times(x, body.dequantize(codes, scale, x.dtype))


def fp8_static_linear(
    body: Body, x: Value, x_scale: Array, weight: Value, weight_scale: Array
) -> Value:
    """The scales as constants, without which TensorRT multiplies in BF16; codes may be bound.

    It quantizes x in what makes x, and multiplies codes by codes.
    """
    return _static(body, x, x_scale, weight, weight_scale, x.dtype)


def fp8_static_linear_f32(
    body: Body, x: Value, x_scale: Array, weight: Value, weight_scale: Array
) -> Value:
    return _static(body, x, x_scale, weight, weight_scale, "f32")


def _static(
    body: Body, x: Value, x_scale: Array, weight: Value, weight_scale: Array, dtype: str
) -> Value:
    values = body.rounded(x, x_scale, dtype)
    # Of no rank: with one, a scale may be taken for that of an axis.
    scale = body.constant(weight_scale, shape=())
    return body.times(values, body.dequantize(weight, scale, dtype))


def int4_refusal(width: int, group: int) -> str | None:
    """Why a matrix of INT4 groups is no layer of TensorRT's, or None."""
    if width % group or width % 8:
        return f"{width} channels are not whole groups of {group}"
    if width == group:
        return "a matrix of one group is dequantized apart from its product"
    return None


Function = Callable[..., Any]
"""(body, *arguments) -> a value, or a tuple of them."""

NATIVE: Mapping[str, Function] = {
    function.__name__: function
    for function in (embedding, linear, rms_norm, add_rms_norm, silu_mul)
}
"""What reads weights as they are bound: in BF16."""

INT4, FP8 = "int4", "fp8"
"""What a product with a constant in it is to be, where a report shows what became of it."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A native op of which some weights become constants of the engine.

    Attributes:
        function: It gets those as arrays.
        constants: Numbers of the arguments that are such weights.
        role: What TensorRT is to make of it.
    """

    function: Function
    constants: tuple[int, ...]
    role: str


EMBEDDED: Mapping[str, Embedded] = {
    "int4_weight_linear": Embedded(int4_weight_linear, (1, 2), INT4),
    "fp8_static_linear": Embedded(fp8_static_linear, (1, 3), FP8),
    "fp8_static_linear_f32": Embedded(fp8_static_linear_f32, (1, 3), FP8),
}
"""What wants constants."""


def is_native(step: Step, program: Program, *, embeds: bool) -> bool:
    """Whether a step of ours becomes layers of TensorRT's own.

    Args:
        step: Of the program.
        program: The program.
        embeds: Whether the weights are there, to be constants.
    """
    op = step.op.removeprefix("lingc.")
    if op in NATIVE:
        return True
    if not embeds or op not in EMBEDDED:
        return False
    if EMBEDDED[op].role != INT4:
        return True
    x, group = step.args[0], step.args[-1]
    assert isinstance(x, Ref), "the first argument of a linear is its input"
    assert isinstance(group, int), "the last argument of an INT4 linear is its group"
    return int4_refusal(int(program.types[x.name].shape[-1]), group) is None
