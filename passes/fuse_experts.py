"""Routed experts with gate and up as one matrix an expert, and the shared expert's sum.

    expert_dispatch(n, ids, weights, W_gate, W_up, W_down)    ->    experts(n, ..., [W_gate; W_up])
    experts(...) + shared                                     ->    experts(..., base=shared)

Why: an expert's first two matrices are read by one kernel; the shared expert's result enters the
weighted sum where it is made, without a pass of its own.

Costs nothing in precision in f32; in bf16 the sum is rounded once instead of twice.
"""

from dataclasses import replace
from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plan import TensorType
from lingc.plugins import expert_dispatch, experts
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(x: Value, ids: Value, weights: Value, gate: Value, up: Value, down: Value) -> Value:
    return expert_dispatch.OP.overload(x, ids, weights, gate, up, down)


def check(match: Match, context: Context) -> str | None:
    if not all(match.is_weight(name) for name in ("gate", "up", "down")):
        return "an expert's matrix is not a weight"
    return context.storage_refusal(*(match.weight(name) for name in ("gate", "up", "down")))


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    gate, up = match.weight("gate"), match.weight("up")
    count, rows, hidden = gate.type.shape
    assert isinstance(rows, int)
    merged = replace(
        gate,
        name=gate.name.removesuffix("gate_proj") + "gate_up",
        type=TensorType(gate.type.dtype, (count, 2 * rows, hidden)),
        sources=gate.sources + up.sources,
    )
    overload = experts.OP.overload
    x, ids, weights = match["x"], match["ids"], match["weights"]
    return (build.call(overload, x, ids, weights, build.weight(merged), match["down"], None),)


RULE = Rewrite(
    name="fuse_experts",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=lambda context: len(context.moe_layers),
)


def add_pattern(
    x: Value, ids: Value, weights: Value, gate_up: Value, down: Value, shared: Value
) -> Value:
    routed = experts.OP.overload(x, ids, weights, gate_up, down, None)
    return aten.add.Tensor(routed, shared)


def add_check(match: Match, context: Context) -> str | None:
    # Where there is no shared expert, the add behind the routed ones is the residual's.
    if match.outputs[0].meta["layer"] not in context.shared_layers:
        return NOT_MINE
    x, shared = match.type("x"), match.type("shared")
    return None if x.shape == shared.shape else f"the add broadcasts {shared} to {x}"


def add_replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    names = ("x", "ids", "weights", "gate_up", "down", "shared")
    return (build.call(experts.OP.overload, *(match[name] for name in names)),)


SHARED_RULE = Rewrite(
    name="fuse_shared_expert_add",
    patterns=(add_pattern,),
    check=add_check,
    replacement=add_replacement,
    expected=lambda context: len(context.shared_layers),
)
