"""Experts as their two halves, each with what stands beside it, and the shared one among them.

    residual + experts(rms_norm(x, w), ids, ..., base)
        ->    expert_down(expert_up(x, w, ids, ...), ids, ..., residual + base)

    expert_down(expert_up(x, w, ...), ..., residual + D swiglu(GU rms_norm(x, w)))
        ->    the same with the shared expert's GU and D as the last of the stacks

and likewise for experts in FP8 and INT4. For targets whose engine launches our kernels.

Why: what an expert's first half makes is read by other blocks of the second, so there is a launch
between them, and nothing else needs one: the norm is computed again by the first half, the weighted
sum with the residual ends the second. A shared expert of the routed ones' width and format is one
more matrix of the same launches, instead of two launches.

Gains precision: as in `fuse_linear`.
"""

import operator
from dataclasses import replace
from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value, tensor_type
from lingc.plan import TensorType, WeightSpec
from lingc.plugins import (
    expert_down,
    expert_up,
    experts,
    fp8_experts,
    fused_linear,
    int4_experts,
    norm_router,
    quantize_fp8,
    rms_norm,
)
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------- split


def plain(
    x: Value, norm_weight: Value, eps: Value, routed: Value, gate_up: Value, down: Value,
    base: Value, residual: Value
) -> Value:  # fmt: skip
    normed = rms_norm.OP.overload(x, norm_weight, eps)
    ids, weights = operator.getitem(routed, 0), operator.getitem(routed, 1)
    return aten.add.Tensor(residual, experts.OP.overload(normed, ids, weights, gate_up, down, base))


def fp8(
    x: Value, norm_weight: Value, eps: Value, routed: Value, gate_up: Value, up_scale: Value,
    down: Value, down_scale: Value, base: Value, residual: Value, _dtype: Value
) -> Value:  # fmt: skip
    both = quantize_fp8.OP.overload(rms_norm.OP.overload(x, norm_weight, eps))
    codes, scales = operator.getitem(both, 0), operator.getitem(both, 1)
    ids, weights = operator.getitem(routed, 0), operator.getitem(routed, 1)
    made = fp8_experts.OP.overload(
        codes, scales, ids, weights, gate_up, up_scale, down, down_scale, base, _dtype
    )
    return aten.add.Tensor(residual, made)


def fp8_weight(
    x: Value, norm_weight: Value, eps: Value, routed: Value, gate_up: Value, up_scale: Value,
    down: Value, down_scale: Value, base: Value, residual: Value
) -> Value:  # fmt: skip
    normed = rms_norm.OP.overload(x, norm_weight, eps)
    ids, weights = operator.getitem(routed, 0), operator.getitem(routed, 1)
    made = fp8_experts.OP_WEIGHT.overload(
        normed, ids, weights, gate_up, up_scale, down, down_scale, base
    )
    return aten.add.Tensor(residual, made)


def int4(
    x: Value, norm_weight: Value, eps: Value, routed: Value, gate_up: Value, up_scale: Value,
    down: Value, down_scale: Value, base: Value, residual: Value, group: Value
) -> Value:  # fmt: skip
    normed = rms_norm.OP.overload(x, norm_weight, eps)
    ids, weights = operator.getitem(routed, 0), operator.getitem(routed, 1)
    made = int4_experts.OP.overload(
        normed, ids, weights, gate_up, up_scale, down, down_scale, base, group
    )
    return aten.add.Tensor(residual, made)


def check(match: Match, context: Context) -> str | None:
    if not context.fuses_launches:
        return NOT_MINE
    called = {node.target for node in match.nodes.values()}
    if fp8_experts.OP_WEIGHT.overload in called:
        return "no kernel multiplies FP8 weights with activations that are not FP8"
    if match["routed"].target is not norm_router.OP.overload:
        return "the tokens of every expert are not listed"
    made, residual = tensor_type(match.outputs[0]), match.type("residual")
    return None if made == residual else f"the sum with {residual} is {made}"


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    group = match.bound.get("group", 0)
    stored = "int4" if group else "fp8" if "up_scale" in match.bound else "bf16"
    ids, weights, *lists = build.items(match["routed"])
    stack = (match["gate_up"], match.bound.get("up_scale"), stored, group, match["eps"], 0)
    a = build.call(expert_up.OP.overload, match["x"], match["norm_weight"], ids, *lists, *stack)
    residual, base = match["residual"], match["base"]
    if base is not None:
        residual = build.call(aten.add.Tensor, residual, base, type=tensor_type(residual))
    rest = (match["down"], match.bound.get("down_scale"), residual, stored, group, 0)
    return (build.call(expert_down.OP.overload, a, ids, weights, *lists, *rest),)


RULE = Rewrite(
    name="split_experts",
    patterns=(plain, fp8, fp8_weight, int4),
    check=check,
    replacement=replacement,
    expected=lambda context: len(context.moe_layers) if context.fuses_launches else 0,
    again=(rms_norm.OP.overload, quantize_fp8.OP.overload, norm_router.OP.overload),
)


# -------------------------------------------------------------------------------------------- join


def shared(
    x: Value, norm_weight: Value, ids: Value, weights: Value, pairs: Value, starts: Value,
    gate_up: Value, up_scale: Value, down: Value, down_scale: Value, one_gate_up: Value,
    one_up_scale: Value, one_down: Value, one_down_scale: Value, residual: Value, stored: Value,
    group: Value, eps: Value, _eps: Value, _dtype: Value
) -> Value:  # fmt: skip
    a = expert_up.OP.overload(
        x, norm_weight, ids, pairs, starts, gate_up, up_scale, stored, group, eps, 0
    )
    inner = fused_linear.OP.overload(
        x, None, norm_weight, one_gate_up, one_up_scale, None, "rms_norm", "swiglu", stored, group,
        1, eps, _dtype,
    )  # fmt: skip
    base = fused_linear.OP.overload(
        inner, None, None, one_down, one_down_scale, residual, "none", "none", stored, group, 1,
        _eps, _dtype,
    )  # fmt: skip
    return expert_down.OP.overload(
        a, ids, weights, pairs, starts, down, down_scale, base, stored, group, 0
    )


def check_shared(match: Match, _context: Any) -> str | None:
    for stack, one in (("gate_up", "one_gate_up"), ("down", "one_down")):
        if match.type(stack).shape[1:] != match.type(one).shape:
            shapes = f"{match.type(one)}, a routed one's {match.type(stack)}"
            return f"the shared expert's matrix is {shapes}"
    return None


def replace_shared(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    up, up_scale, down, down_scale = (
        None
        if match[stack] is None
        else build.weight(joined(match.weight(stack), match.weight(f"one_{stack}")))
        for stack in ("gate_up", "up_scale", "down", "down_scale")
    )
    stored, group = match["stored"], match["group"]
    ids, lists = match["ids"], (match["pairs"], match["starts"])
    x = (match["x"], match["norm_weight"])
    a = build.call(
        expert_up.OP.overload, *x, ids, *lists, up, up_scale, stored, group, match["eps"], 1
    )
    rest = (down, down_scale, match["residual"], stored, group, 1)
    return (build.call(expert_down.OP.overload, a, ids, match["weights"], *lists, *rest),)


def joined(stack: WeightSpec, last: WeightSpec) -> WeightSpec:
    """The experts' matrices with one more behind them."""
    count, *shape = stack.type.bind({})
    return replace(
        stack,
        name=stack.name.replace(".experts.", ".all_experts."),
        type=TensorType(stack.type.dtype, (count + 1, *shape)),
        last=last.sources,
    )


def expected_shared(context: Context) -> int:
    found = sum(context.is_joined_expert(layer) for layer in context.shared_layers)
    return found if context.fuses_launches else 0


SHARED_RULE = Rewrite(
    name="join_shared_expert",
    patterns=(shared,),
    check=check_shared,
    replacement=replace_shared,
    expected=expected_shared,
)
