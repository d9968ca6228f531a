"""The embedding look-up, with the element type of the activations as its result.

    embedding(weight, ids)    ->    embedding(ids, weight, dtype)

Why: the table stays in its storage format; rows are widened as they are read.

Costs nothing in precision. Runs last of the fusions: from here on the activations have the element
type of the target, which `lingc.stages.retype` follows through the program.
"""

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import embedding
from lingc.rewrite import Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(weight: Value, ids: Value) -> Value:
    return aten.embedding.default(weight, ids)


def check(match: Match, context: Context) -> str | None:
    if not match.is_weight("weight"):
        return "the table is not a weight"
    return context.plain_refusal(match.weight("weight"))


def replacement(build: Builder, match: Match, context: Context) -> tuple[Value, ...]:
    dtype = context.target.activations
    return (build.call(embedding.OP.overload, match["ids"], match["weight"], dtype),)


RULE = Rewrite(
    name="fuse_embedding",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=lambda _context: 1,
)
