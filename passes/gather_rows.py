"""The rows whose logits somebody reads, as the GPU's own kernel picks them.

    index_select(x, 0, rows)    ->    gather_rows(x, rows)

For targets whose engine launches our kernels, and where only some rows go to the head: in prefill
and draft.

Costs nothing in precision.
"""

from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import gather_rows
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten


def pattern(x: Value, rows: Value) -> Value:
    return aten.index_select.default(x, 0, rows)


def check(_match: Match, context: Context) -> str | None:
    return None if context.fuses_launches else NOT_MINE


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return (build.call(gather_rows.OP.overload, match["x"], match["rows"]),)


def expected(context: Context) -> int:
    return int(context.fuses_launches and context.phase in ("prefill", "draft"))


RULE = Rewrite(
    name="gather_rows",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=expected,
)
