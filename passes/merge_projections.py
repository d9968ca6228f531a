"""Projections of one input, as one matrix.

    a = n W_a^T, b = n W_b^T    ->    ab = n [W_a; W_b]^T, a = ab[:, :A], b = ab[:, A:]

for query_key_value + g_proj, q_a_proj + kv_a_proj_with_mqa, and gate_proj + up_proj.

Why: the input is read once and one launch moves both matrices; at a few tokens a launch costs as
much as two megabytes. The decode mixer and the latent step take the merged result whole.

Costs nothing in precision. Two matrices are merged only where the recipe stores them alike, and in
128x128 blocks only where the first ends on a block, so that an FP8 release is read unchanged.
Where that is refused, `join_projections` puts the two results side by side instead: one copy more,
and later passes find the same form.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lingc.context import Context, module_of
from lingc.graph import Value, tensor_type
from lingc.plan import TensorType
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten

FAMILIES: Mapping[tuple[str, str], str] = {
    ("query_key_value", "g_proj"): "qkvg",
    ("q_a_proj", "kv_a_proj_with_mqa"): "qkv_a",
    ("gate_proj", "up_proj"): "gate_up",
}


def pattern(x: Value, first: Value, second: Value) -> Value:
    return aten.linear.default(x, first), aten.linear.default(x, second)


def _modules(match: Match) -> tuple[str, str]:
    return (
        module_of(match.weight("first").sources[0]),
        module_of(match.weight("second").sources[0]),
    )


def check(match: Match, context: Context) -> str | None:
    if not _is_pair(match):
        return NOT_MINE
    first, second = _modules(match)
    rows = match.weight("first").type.shape[0]
    assert isinstance(rows, int), "the shape of a weight is known"
    return context.join_refusal(first, second, rows)


def _is_pair(match: Match) -> bool:
    """Whether the two weights are unmerged and of one family."""
    if not (match.is_weight("first") and match.is_weight("second")):
        return False
    if len(match.weight("first").sources) != 1 or len(match.weight("second").sources) != 1:
        return False
    first, second = _modules(match)
    parent, _, leaf = first.rpartition(".")
    return (leaf, second.removeprefix(f"{parent}.")) in FAMILIES


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    first, second = match.weight("first"), match.weight("second")
    rows, more = first.type.shape[0], second.type.shape[0]
    assert isinstance(rows, int), "the shape of a weight is known"
    assert isinstance(more, int), "the shape of a weight is known"
    parent, _, leaf = first.name.removesuffix(".weight").rpartition(".")
    other = second.name.removesuffix(".weight").rpartition(".")[2]
    merged = build.weight(
        replace(
            first,
            name=f"{parent}.{FAMILIES[leaf, other]}.weight",
            type=TensorType(first.type.dtype, (rows + more, *first.type.shape[1:])),
            sources=first.sources + second.sources,
        )
    )
    x = match["x"]
    kind = tensor_type(x)
    whole = TensorType(kind.dtype, (*kind.shape[:-1], rows + more))
    both = build.call(aten.linear.default, x, merged, type=whole)
    return build.slice(both, 1, 0, rows), build.slice(both, 1, rows, rows + more)


def join_check(match: Match, _context: Any) -> str | None:
    if not _is_pair(match):
        return NOT_MINE
    readers = {user.target for output in match.outputs for user in output.users}
    return NOT_MINE if readers == {aten.cat.default} else None


def join_replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    x = match["x"]
    first, second = (
        build.call(aten.linear.default, x, match[name], type=tensor_type(output))
        for name, output in zip(("first", "second"), match.outputs, strict=True)
    )
    both = build.cat(first, second)
    rows, width = tensor_type(first).shape[1], tensor_type(both).shape[1]
    assert isinstance(rows, int), "the shape of a weight is known"
    assert isinstance(width, int), "the shape of a weight is known"
    return build.slice(both, 1, 0, rows), build.slice(both, 1, rows, width)


RULE = Rewrite(
    name="merge_projections",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=lambda context: context.merged_pairs,
)

JOIN_RULE = Rewrite(
    name="join_projections",
    patterns=(pattern,),
    check=join_check,
    replacement=join_replacement,
    expected=lambda context: len(context.pairs()) - context.merged_pairs,
)
