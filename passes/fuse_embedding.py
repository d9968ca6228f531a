"""The embedding look-up, with the element type of the activations as its result.

    embedding(weight, ids)    ->    embedding(ids, weight, dtype)

Why: the table stays in its storage format; rows are widened as they are read.

Costs nothing in precision.
"""

from typing import Any

import torch

from lingc.graph import Value
from lingc.plugins import embedding
from lingc.rewrite import Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(weight: Value, ids: Value) -> Value:
    return aten.embedding.default(weight, ids)


def check(match: Match, _context: Any) -> str | None:
    return None if match.is_weight("weight") else "the table is not a weight"


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return (build.call(embedding.OP.overload, match["ids"], match["weight"], "f32"),)


RULE = Rewrite(
    name="fuse_embedding",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=lambda _context: 1,
)
