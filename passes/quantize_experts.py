"""Routed experts in the storage format that the recipe gives their weights.

    experts(x, ...)    ->    fp8_experts(quantize_fp8(x), ...)    FP8 blocks, FP8 activations
                             fp8_weight_experts(x, ...)           FP8 blocks, weight-only
                             int4_weight_experts(x, ...)          INT4 groups

Costs what the recipe costs.
"""

from typing import Any

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import experts, fp8_experts, int4_experts, quantize_fp8
from lingc.quantize.stored import fp8_specs, int4_specs
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite


def pattern(
    x: Value, ids: Value, weights: Value, gate_up: Value, down: Value, base: Value
) -> Value:
    return experts.OP.overload(x, ids, weights, gate_up, down, base)


def check(match: Match, context: Context) -> str | None:
    plain = context.format_of(match.weight("gate_up")).kind == "plain"
    return NOT_MINE if plain else None


def replacement(build: Builder, match: Match, context: Context) -> tuple[Value, ...]:
    stored = context.format_of(match.weight("gate_up"))
    x, ids, weights, base = (match[name] for name in ("x", "ids", "weights", "base"))
    matrices: list[Any] = []
    for name in ("gate_up", "down"):
        spec = match.weight(name)
        fp8 = stored.kind == "fp8_block"
        parts = fp8_specs(spec) if fp8 else int4_specs(spec, stored.group)
        matrices.extend(build.weight(part) for part in parts)
    if stored.kind == "int4_group":
        overload = int4_experts.OP.overload
        return (build.call(overload, x, ids, weights, *matrices, base, stored.group),)
    if not context.dynamic_fp8:
        return (build.call(fp8_experts.OP_WEIGHT.overload, x, ids, weights, *matrices, base),)
    codes, scales = build.items(build.once(quantize_fp8.OP.overload, x))
    overload, dtype = fp8_experts.OP.overload, context.target.activations
    return (build.call(overload, codes, scales, ids, weights, *matrices, base, dtype),)


def expected(context: Context) -> int:
    modules = [f"model.layers.{layer}.mlp.experts.0.gate_proj" for layer in context.moe_layers]
    return sum(context.recipe.format_of(module).kind != "plain" for module in modules)


RULE = Rewrite(
    name="quantize_experts",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=expected,
)
