"""What holds after each stage, checked by code.

    captured    functional ATen and the structural ops; every value typed; no mutation
    canonical   one spelling per idea
    fused       only fused ops, views, and what every engine kind lowers
"""

import operator
from collections.abc import Iterator

import torch
from torch import fx

from lingc.errors import StageError
from lingc.graph import Program, target_name, tensor_type, type_of, where
from lingc.op import OPS
from lingc.plan import TensorType

aten = torch.ops.aten

STRUCTURAL = frozenset(
    {"expert_dispatch", "lightning_prefill", "lightning_decode", "lightning_verify"}
)
"""Ops that a captured program may hold."""

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
    }
)

STAGES = ("captured", "canonical", "fused")


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
        if node.op != "call_function":
            continue
        if node.meta.get("type") is None:
            yield f"{where(node)} has no type"
        reason = _illegal(node, stage)
        if reason is not None:
            yield f"{where(node)} {reason}"


def _illegal(node: fx.Node, stage: str) -> str | None:
    target = node.target
    if target is operator.getitem:
        return None
    name = target_name(node)
    ours = name.removeprefix("lingc.") if name.startswith("lingc.") else None
    if stage == "fused":
        if (ours in OPS and ours != "expert_dispatch") or target in LOWERED_ATEN:
            return None
        return "is left over: no engine kind lowers it"
    if stage == "captured" and ours is not None and ours not in STRUCTURAL:
        return "is a fused op in a captured program"
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        return "changes its input"
    if stage == "canonical" and target in NOT_CANONICAL:
        return "has a canonical spelling"
    return None


def retype(program: Program, dtype: str) -> None:
    """Give the activations their element type, and follow it through the program.

    Args:
        program: After fusion into ops that say what they round, in any stage of storage formats.
        dtype: `f32` or `bf16`; state tensors other than the linear state have it too.

    Raises:
        StageError: A call whose result type is not known.
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
    if target in LOWERED_ATEN or target is aten.linear.default:
        first = node.args[0]
        source = first[0] if isinstance(first, list | tuple) else first
        return TensorType(tensor_type(source).dtype, tensor_type(node).shape)
    raise StageError(f"{where(node)} has no rule for its element type")
