"""What holds after each stage, checked by code.

captured: functional ATen and the structural ops; every value typed
canonical: one spelling per idea
fused: only fused ops, views, and linears whose storage is not chosen yet
legal: only what an engine kind lowers; every type as its op says
launched: legal, and nothing left that our own GPU kernels take in
"""

import operator
from collections.abc import Iterator

import torch
from torch import fx

from lingc.errors import StageError
from lingc.graph import Program, Value, target_name, tensor_type, type_of, where
from lingc.op import OPS
from lingc.plan import TensorType

aten = torch.ops.aten

STRUCTURAL = frozenset(
    {"expert_dispatch", "lightning_prefill", "lightning_decode", "lightning_verify"}
)
"""Ops that a captured program may hold."""

NOT_LOWERED = frozenset({"expert_dispatch"})
"""Ops that a fused program may not hold."""

TAKEN_IN = frozenset(
    {
        *("linear", "fp8_linear", "int4_weight_linear", "quantize_fp8", "router", "mla_latent"),
        *("linear_f32", "fp8_linear_f32", "int4_weight_linear_f32", "add_rms_norm"),
        *("lightning_prefill", "lightning_decode", "lightning_verify", "qk_norm_rope"),
        *("experts", "fp8_experts", "int4_weight_experts", "mla_absorbed_attention"),
    }
)
"""Ops that are part of a larger one where our own GPU kernels are launched."""

LAUNCHED_OPS = frozenset(
    {
        *("fused_linear", "norm_router", "expert_up", "expert_down", "mla_latent_attention"),
        *("lightning_prefill_qkv", "lightning_decode_qkv", "lightning_verify_qkv"),
        *("gather_rows", "rms_norm_pair"),
    }
)
"""Ops that stand in the plans of our own GPU kernels alone."""

LOWERED_ATEN = frozenset(
    {
        aten.slice.Tensor,
        aten.cat.default,
        aten.index_select.default,
        aten.add.Tensor,
        aten.reshape.default,
    }
)
"""ATen that every engine kind lowers; slices and reshapes are views."""

NOT_CANONICAL = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.alias.default,
        aten.clone.default,
    }
)

SIZE_ARITHMETIC = frozenset({operator.add, operator.sub, operator.mul, operator.floordiv})
"""What may be done to the sizes of symbolic axes."""


def check(program: Program, stage: str) -> None:
    """Check what must hold after a stage.

    Raises:
        StageError: Every violation, each with its node and the line of the model.
    """
    problems = list(_problems(program, stage))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:20])
        more = f"\n  - and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise StageError(
            f"the {program.phase} program is not {stage}:{listed}{more}",
            hint="run `lingc passes` to see which rewrite did not fire, and why",
        )


def _problems(program: Program, stage: str) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            yield f"{where(node)} is a {node.op}"
        if node.op == "call_function":
            yield from (f"{where(node)} {reason}" for reason in _faults(node, stage))


def _faults(node: fx.Node, stage: str) -> Iterator[str]:
    kind = node.meta.get("type")
    if kind is None:
        yield "has no type"
    illegal = _illegal(node, stage)
    if illegal is not None:
        yield illegal
    elif stage in ("legal", "launched") and kind is not None and kind != (said := _infer(node)):
        yield f"is {_show(kind)}, its op says {_show(said)}"


def _show(kind: Value) -> str:
    return ", ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)


def _illegal(node: fx.Node, stage: str) -> str | None:
    target = node.target
    if target is operator.getitem:
        return None
    name = target_name(node)
    ours = name.removeprefix("lingc.") if name.startswith("lingc.") else None
    if stage == "launched" and (ours in TAKEN_IN or target is aten.index_select.default):
        return "is left over: no GPU kernel of its own computes it"
    if stage == "fused" and ours in LAUNCHED_OPS:
        return "is there before formats are chosen"
    if stage in ("fused", "legal", "launched"):
        lowers = (ours in OPS and ours not in NOT_LOWERED) or target in LOWERED_ATEN
        later = stage == "fused" and target is aten.linear.default
        return None if lowers or later else "is left over: no engine kind lowers it"
    return _not_captured(node, ours, stage)


def _not_captured(node: fx.Node, ours: str | None, stage: str) -> str | None:
    target = node.target
    if stage == "captured" and ours is not None and ours not in STRUCTURAL:
        return "is a fused op in a captured program"
    if target in SIZE_ARITHMETIC:
        return None
    if not isinstance(target, torch._ops.OpOverload):
        return "is neither ATen nor an op of ours"
    if target._schema.is_mutable:
        return "changes its input"
    if stage == "canonical" and target in NOT_CANONICAL:
        return "has a canonical spelling"
    return None


def retype(program: Program, dtype: str) -> None:
    """Give the activations their element type, and follow it through the program.

    Args:
        program: Fused.
        dtype: `f32` or `bf16`; state tensors other than the linear state have it too.
    """
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind = tensor_type(node)
            name: str = node.meta["name"]
            if name == "hidden" or name.startswith(("pending_", "latent_cache")):
                node.meta["type"] = TensorType(dtype, kind.shape)
        elif node.op == "call_function":
            node.meta["type"] = _infer(node)


def _infer(node: fx.Node) -> TensorType | tuple[TensorType, ...]:
    target = node.target
    if target is operator.getitem:
        values, index = node.args
        item: TensorType = type_of(values)[index]
        return item
    name = target_name(node)
    if name.startswith("lingc."):
        inferred: TensorType | tuple[TensorType, ...] = OPS[name.removeprefix("lingc.")].types(
            *(type_of(a) for a in node.args)
        )
        return inferred
    assert target in LOWERED_ATEN or target is aten.linear.default, f"{where(node)} is not fused"
    first = node.args[0]
    source = first[0] if isinstance(first, list | tuple) else first
    return TensorType(tensor_type(source).dtype, tensor_type(node).shape)
