"""Linears with what stands before and behind them, as the GPU's own kernels compute them.

    linear(x, W), fp8_linear(quantize_fp8(x), W8, s), int4_weight_linear(x, W4, s)
                                               ->    fused_linear(x, W, s)
    fused_linear(rms_norm(x, w))               ->    fused_linear(x, norm w)
    fused_linear(group_norm_gate(o, qkvg, w))  ->    fused_linear(o, gate qkvg, norm w)
    silu_mul(fused_linear(...))                ->    fused_linear(..., swiglu)
    residual + fused_linear(...)               ->    fused_linear(..., residual)

and the heads likewise, with FP32 results. For targets whose engine launches our kernels.

Why: at a few tokens a launch costs as much as two megabytes. A norm is computed again by every
linear that reads it: a row is a few kilobytes beside the weights. The norm behind the last layer
stays, because its result is an output.

Gains precision: what a norm makes is not rounded before it is quantized to FP8, and a sum with the
residual is rounded once.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch

from lingc.context import Context, Linear
from lingc.graph import Value, tensor_type
from lingc.plugins import (
    fp8_linear,
    fused_linear,
    group_norm_gate,
    int4_linear,
    linear,
    quantize_fp8,
    rms_norm,
    silu_mul,
)
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten

OVERLOAD = fused_linear.OP.overload

_FP8 = (fp8_linear.OP_WEIGHT.overload, fp8_linear.OP_WEIGHT_F32.overload)


def _expected(belongs: Callable[[Linear], bool]) -> Callable[[Context], int]:
    """How many linears of a phase a rule is for."""

    def expected(context: Context) -> int:
        return sum(map(belongs, context.linears())) if context.fuses_launches else 0

    return expected


# ------------------------------------------------------------------------------------------- bare


def plain(x: Value, weight: Value) -> Value:
    return linear.OP.overload(x, weight)


def plain_head(x: Value, weight: Value) -> Value:
    return linear.OP_F32.overload(x, weight)


def fp8(x: Value, weight: Value, scale: Value, dtype: Value) -> Value:
    both = quantize_fp8.OP.overload(x)
    codes, scales = operator.getitem(both, 0), operator.getitem(both, 1)
    return fp8_linear.OP.overload(codes, scales, weight, scale, dtype)


def fp8_head(x: Value, weight: Value, scale: Value) -> Value:
    both = quantize_fp8.OP.overload(x)
    codes, scales = operator.getitem(both, 0), operator.getitem(both, 1)
    return fp8_linear.OP_F32.overload(codes, scales, weight, scale)


def fp8_weight(x: Value, weight: Value, scale: Value) -> Value:
    return fp8_linear.OP_WEIGHT.overload(x, weight, scale)


def fp8_weight_head(x: Value, weight: Value, scale: Value) -> Value:
    return fp8_linear.OP_WEIGHT_F32.overload(x, weight, scale)


def int4(x: Value, weight: Value, scale: Value, group: Value) -> Value:
    return int4_linear.OP.overload(x, weight, scale, group)


def int4_head(x: Value, weight: Value, scale: Value, group: Value) -> Value:
    return int4_linear.OP_F32.overload(x, weight, scale, group)


def check_bare(match: Match, context: Context) -> str | None:
    if not context.fuses_launches:
        return NOT_MINE
    if match.outputs[0].target in _FP8:
        return "no kernel multiplies FP8 weights with activations that are not FP8"
    return None if match.is_weight("weight") else "the matrix is not a weight"


def replace_bare(build: Builder, match: Match, _context: Context) -> tuple[Value, ...]:
    scale, group = match.bound.get("scale"), match.bound.get("group", 0)
    stored = "bf16" if scale is None else "int4" if group else "fp8"
    dtype = tensor_type(match.outputs[0]).dtype
    given = (match["x"], None, None, match["weight"], scale, None, "none", "none")
    return (build.call(OVERLOAD, *given, stored, group, 1, 0.0, dtype),)


RULE = Rewrite(
    name="fuse_linear",
    patterns=(plain, plain_head, fp8, fp8_head, fp8_weight, fp8_weight_head, int4, int4_head),
    check=check_bare,
    replacement=replace_bare,
    expected=_expected(lambda _every: True),
    again=(quantize_fp8.OP.overload,),
)


# ------------------------------------------------------------------------------- before and behind


def _normed(
    x: Value, norm_weight: Value, norm_eps: Value, weight: Value, scale: Value, residual: Value,
    after: Value, stored: Value, group: Value, _eps: Value, dtype: Value
) -> Value:  # fmt: skip
    normed = rms_norm.OP.overload(x, norm_weight, norm_eps)
    return OVERLOAD(
        normed, None, None, weight, scale, residual, "none", after, stored, group, 1, _eps, dtype
    )


def check_norm(match: Match, _context: Any) -> str | None:
    (normed,) = (n for n in match.nodes.values() if n.target is rms_norm.OP.overload)
    is_output = any(user.op == "output" for user in normed.users)
    return NOT_MINE if is_output else None


def replace_norm(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    before = (match["x"], None, match["norm_weight"])
    return (_call(build, match, before, "rms_norm", 1, match["norm_eps"]),)


def _call(
    build: Builder, match: Match, before: tuple[Value, ...], how: str, groups: int, eps: float
) -> Value:
    """The fused linear again, with something before it."""
    middle = (match["weight"], match["scale"], match["residual"])
    last = (match["after"], match["stored"], match["group"], groups, eps, match["dtype"])
    return build.call(OVERLOAD, *before, *middle, how, *last)


NORM_RULE = Rewrite(
    name="fuse_linear_norm",
    patterns=(_normed,),
    check=check_norm,
    replacement=replace_norm,
    expected=_expected(lambda one: one.before == "norm"),
    again=(rms_norm.OP.overload,),
)


def _gated(
    o: Value, qkvg: Value, start: Value, end: Value, norm_weight: Value, groups: Value,
    norm_eps: Value, weight: Value, scale: Value, residual: Value, after: Value, stored: Value,
    group: Value, _eps: Value, dtype: Value
) -> Value:  # fmt: skip
    gate = aten.slice.Tensor(qkvg, 1, start, end)
    normed = group_norm_gate.OP.overload(o, gate, norm_weight, groups, norm_eps)
    return OVERLOAD(
        normed, None, None, weight, scale, residual, "none", after, stored, group, 1, _eps, dtype
    )


def check_gate(match: Match, _context: Any) -> str | None:
    width, columns = match.type("norm_weight").shape[0], match.type("qkvg").shape[1]
    if match["end"] != columns or match["end"] - match["start"] != width:
        return f"the gate is not the last {width} of {columns} columns"
    shape = match.type("o").shape
    return None if shape[1:] == (width,) else f"the heads of {list(shape)} are not side by side"


def replace_gate(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    before = (match["o"], match["qkvg"], match["norm_weight"])
    groups, eps = match["groups"], match["norm_eps"]
    return (_call(build, match, before, "group_norm_gate", groups, eps),)


GATE_RULE = Rewrite(
    name="fuse_linear_gate",
    patterns=(_gated,),
    check=check_gate,
    replacement=replace_gate,
    expected=_expected(lambda one: one.before == "gate"),
    again=(aten.slice.Tensor,),
)


def _swiglu(
    x: Value, gate: Value, norm_weight: Value, weight: Value, scale: Value, before: Value,
    stored: Value, group: Value, groups: Value, eps: Value, dtype: Value
) -> Value:  # fmt: skip
    both = OVERLOAD(
        x, gate, norm_weight, weight, scale, None, before, "none", stored, group, groups, eps,
        dtype,
    )  # fmt: skip
    return silu_mul.OP.overload(both)


def _fires(_match: Match, _context: Any) -> None:
    return None


_INPUTS = ("x", "gate", "norm_weight", "weight", "scale")
_REST = ("stored", "group", "groups", "eps", "dtype")


def replace_swiglu(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    given, rest = ((match[name] for name in names) for names in (_INPUTS, _REST))
    return (build.call(OVERLOAD, *given, None, match["before"], "swiglu", *rest),)


SWIGLU_RULE = Rewrite(
    name="fuse_linear_swiglu",
    patterns=(_swiglu,),
    check=_fires,
    replacement=replace_swiglu,
    expected=_expected(lambda one: one.is_gated),
)


def _added(
    x: Value, gate: Value, norm_weight: Value, weight: Value, scale: Value, residual: Value,
    before: Value, after: Value, stored: Value, group: Value, groups: Value, eps: Value,
    dtype: Value
) -> Value:  # fmt: skip
    made = OVERLOAD(
        x, gate, norm_weight, weight, scale, None, before, after, stored, group, groups, eps,
        dtype,
    )  # fmt: skip
    return aten.add.Tensor(residual, made)


def check_residual(match: Match, _context: Any) -> str | None:
    made, residual = tensor_type(match.outputs[0]), match.type("residual")
    return None if made == residual else f"the sum with {residual} is {made}"


def replace_residual(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    given, rest = ((match[name] for name in names) for names in (_INPUTS, _REST))
    how = (match["before"], match["after"])
    return (build.call(OVERLOAD, *given, match["residual"], *how, *rest),)


RESIDUAL_RULE = Rewrite(
    name="fuse_linear_residual",
    patterns=(_added,),
    check=check_residual,
    replacement=replace_residual,
    expected=_expected(lambda one: one.is_added),
)
