"""Linears in the storage format that the recipe gives their weights.

    linear(x, W)    ->    linear(x, W)                                   plain
                          fp8_linear(quantize_fp8(x), W8, scale)         FP8 blocks, FP8 activations
                          fp8_weight_linear(x, W8, scale)                FP8 blocks, weight-only
                          fp8_static_linear(x, x_scale, W8, scale)       FP8, one scale each
                          int4_weight_linear(x, W4, scale, group)        INT4 groups

and likewise for the head, whose result is FP32. An input that several linears read is quantized
once; by a static scale TensorRT does it, in the norm in front.

Costs what the recipe costs: this is where values are rounded to its formats.
"""

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import fp8_linear, fp8_static_linear, int4_linear, linear, quantize_fp8
from lingc.quantize.stored import fp8_specs, fp8_tensor_specs, int4_specs
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(x: Value, weight: Value) -> Value:
    return aten.linear.default(x, weight)


def head_pattern(x: Value, weight: Value) -> Value:
    return linear.OP_F32.overload(x, weight)


def check(match: Match, context: Context) -> str | None:
    if not match.is_weight("weight"):
        return "the matrix is not a weight"
    spec = match.weight("weight")
    head = match.outputs[0].target is linear.OP_F32.overload
    plain = context.format_of(spec).kind == "plain"
    return NOT_MINE if head and plain else None


def replacement(build: Builder, match: Match, context: Context) -> tuple[Value, ...]:
    spec = match.weight("weight")
    head = match.outputs[0].target is linear.OP_F32.overload
    stored = context.format_of(spec)
    x = match["x"]
    if stored.kind == "plain":
        return (build.call(linear.OP.overload, x, match["weight"]),)
    if stored.kind == "int4_group":
        packed, scales = (build.weight(part) for part in int4_specs(spec, stored.group))
        op = int4_linear.OP_F32 if head else int4_linear.OP
        return (build.call(op.overload, x, packed, scales, stored.group),)
    if stored.kind == "fp8_tensor":
        codes, scale, x_scale = (build.weight(part) for part in fp8_tensor_specs(spec))
        op = fp8_static_linear.OP_F32 if head else fp8_static_linear.OP
        return (build.call(op.overload, x, x_scale, codes, scale),)
    codes, scales = (build.weight(part) for part in fp8_specs(spec))
    if not context.dynamic_fp8:
        op = fp8_linear.OP_WEIGHT_F32 if head else fp8_linear.OP_WEIGHT
        return (build.call(op.overload, x, codes, scales),)
    x_codes, x_scales = build.items(build.once(quantize_fp8.OP.overload, x))
    if head:
        return (build.call(fp8_linear.OP_F32.overload, x_codes, x_scales, codes, scales),)
    dtype = context.target.activations
    return (build.call(fp8_linear.OP.overload, x_codes, x_scales, codes, scales, dtype),)


def expected(context: Context) -> int:
    """Every linear, a merged pair as one; the head only where it is quantized."""
    return len(context.linears()) - (context.recipe.format_of("lm_head").kind == "plain")


RULE = Rewrite(
    name="quantize_linears",
    patterns=(pattern, head_pattern),
    check=check,
    replacement=replacement,
    expected=expected,
)
