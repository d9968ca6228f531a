"""Quantization of activations where they are made.

    codes, scales = quantize_fp8(add_rms_norm(...)[0])    ->    add_rms_norm_fp8(...)
    codes, scales = quantize_fp8(rms_norm(...))           ->    rms_norm_fp8(...)
    codes, scales = quantize_fp8(silu_mul(...))           ->    silu_mul_fp8(...)

Why: the separate quantization reads what was just written and costs a launch; fused, the row is
still in registers. Where our own kernels are launched, what reads the codes makes them
(`fuse_linear`). A norm that is also read by a product with static scales is left to TensorRT, which
quantizes for that one in the norm.

Costs nothing in precision: the value is rounded to the activations' dtype first, as when apart.
"""

import operator
from collections.abc import Sequence
from typing import Any

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import (
    add_rms_norm,
    add_rms_norm_fp8,
    fp8_static_linear,
    quantize_fp8,
    rms_norm,
    rms_norm_fp8,
    silu_mul,
    silu_mul_fp8,
)
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite


def _quantized(x: Value) -> tuple[Value, Value]:
    both = quantize_fp8.OP.overload(x)
    return operator.getitem(both, 0), operator.getitem(both, 1)


def _check(match: Match, context: Context) -> str | None:
    static = (fp8_static_linear.OP.overload, fp8_static_linear.OP_F32.overload)
    readers = (user.target for output in match.outputs for user in output.users)
    return NOT_MINE if context.fuses_launches or any(r in static for r in readers) else None


def _is_quantized(context: Context) -> bool:
    """Whether ops of their own make codes."""
    return context.dynamic_fp8 and not context.fuses_launches


# --------------------------------------------------------------------------------- add and norm


def add_norm(x: Value, residual: Value, weight: Value, eps: Value) -> Value:
    call = add_rms_norm.OP.overload(x, residual, weight, eps)
    y = operator.getitem(call, 0)
    return operator.getitem(call, 1), y, *_quantized(y)


def last_add_norm(x: Value, residual: Value, weight: Value, eps: Value) -> Value:
    """Nobody reads the sum behind the last layer."""
    y = operator.getitem(add_rms_norm.OP.overload(x, residual, weight, eps), 0)
    return y, *_quantized(y)


def replace_add_norm(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = ("x", "residual", "weight", "eps")
    call = build.call(add_rms_norm_fp8.OP.overload, *(match[name] for name in names))
    y, h, codes, scales = build.items(call)
    return (h, y, codes, scales) if len(match.outputs) == 4 else (y, codes, scales)


def expected_add_norm(context: Context) -> int:
    """A layer's norms whose readers take FP8 blocks alone, but the first, which follows no add."""
    if not _is_quantized(context):
        return 0
    attention = sum(_reads_fp8(context, layer) for layer in context.layers[1:])
    feed = sum(_feeds_fp8(context, layer) for layer in context.layers)
    every_row = context.phase in ("decode", "verify")
    return attention + feed + (every_row and context.is_fp8("lm_head"))


def _reads_fp8(context: Context, layer: int) -> bool:
    """Whether a layer's attention quantizes its input, for FP8 blocks alone."""
    at, config = f"model.layers.{layer}.attention", context.config
    if not config.is_mla(layer):
        names = ["query_key_value", "g_proj"]
    else:
        names = ["kv_a_proj_with_mqa", "q_proj" if config.q_lora_rank is None else "q_a_proj"]
    return _is_coded(context, [f"{at}.{name}" for name in names])


def _feeds_fp8(context: Context, layer: int) -> bool:
    """Whether a layer's feed-forward half quantizes its input, for FP8 blocks alone."""
    mlp = f"model.layers.{layer}.mlp"
    halves = ("gate_proj", "up_proj")
    if context.config.is_dense(layer):
        return _is_coded(context, [f"{mlp}.{half}" for half in halves])
    shared = [f"{mlp}.shared_experts.{half}" for half in halves]
    routed = [f"{mlp}.experts.0.gate_proj"]
    return _is_coded(context, routed + shared if layer in context.shared_layers else routed)


def _is_coded(context: Context, readers: Sequence[str]) -> bool:
    """Whether one of the readers is in FP8 blocks, and none has a static scale."""
    static = any(context.is_static(module) for module in readers)
    return not static and any(context.is_fp8(module) for module in readers)


ADD_NORM_RULE = Rewrite(
    name="fuse_add_rms_norm_quantize",
    patterns=(add_norm, last_add_norm),
    check=_check,
    replacement=replace_add_norm,
    expected=expected_add_norm,
)


# ------------------------------------------------------------------------------------------ norm


def norm(x: Value, weight: Value, eps: Value) -> Value:
    y = rms_norm.OP.overload(x, weight, eps)
    return y, *_quantized(y)


def replace_norm(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = ("x", "weight", "eps")
    return build.items(build.call(rms_norm_fp8.OP.overload, *(match[name] for name in names)))


def expected_norm(context: Context) -> int:
    """The first layer's input norm."""
    return int(_is_quantized(context) and _reads_fp8(context, context.layers[0]))


NORM_RULE = Rewrite(
    name="fuse_rms_norm_quantize",
    patterns=(norm,),
    check=_check,
    replacement=replace_norm,
    expected=expected_norm,
)


# ---------------------------------------------------------------------------------------- SwiGLU


def swiglu(gate_up: Value) -> Value:
    return _quantized(silu_mul.OP.overload(gate_up))


def replace_swiglu(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return build.items(build.call(silu_mul_fp8.OP.overload, match["gate_up"]))


def expected_swiglu(context: Context) -> int:
    """SwiGLUs whose down projection takes FP8."""
    config = context.config
    at = "model.layers.{}.mlp.{}down_proj"
    modules = [
        at.format(layer, "" if config.is_dense(layer) else "shared_experts.")
        for layer in context.mlp_layers
    ]
    return sum(context.is_fp8(module) for module in modules) if _is_quantized(context) else 0


SWIGLU_RULE = Rewrite(
    name="fuse_silu_mul_quantize",
    patterns=(swiglu,),
    check=_check,
    replacement=replace_swiglu,
    expected=expected_swiglu,
)
