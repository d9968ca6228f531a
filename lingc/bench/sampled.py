"""Some rows of a large result: enough to hold a kernel to FP64 where the whole would not fit.

An op says by `Op.rows` which arguments have a row for each row of its results. Cut to some of them,
its reference makes those rows alone, from all of what else it reads: weights, caches, experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lingc.op import Op

FROM = 2048
"""Tokens from which on results are compared at some rows alone."""

EDGE = 8
"""Rows at both ends of the step and of every part of it that are looked at."""

PART = 4096
"""Tokens of a part: a multiple of every tile's rows, so that its ends are ends of tiles."""

DRAWN = 192
"""Rows that are drawn besides, by a seed: of 8,192 rows one in every 43."""


def rows_of(op: Op, arguments: Sequence[Any]) -> Tensor | None:
    """The rows to compare, rising; None where the whole result is."""
    if not op.rows:
        return None
    given = dict(zip(op.arguments, arguments, strict=True))
    first = given[op.rows[0]]
    tokens = len(first)
    if tokens < FROM:
        return None
    ends = torch.arange(0, tokens + PART, PART).clamp(max=tokens)
    edges = (ends[:, None] + torch.arange(-EDGE, EDGE)).flatten()
    drawn = torch.randint(tokens, (DRAWN,), generator=torch.Generator().manual_seed(tokens))
    wanted = torch.cat((edges[(edges >= 0) & (edges < tokens)], drawn)).unique()
    made: Tensor = wanted.to(first.device)
    return made


def arguments_at(op: Op, arguments: Sequence[Any], rows: Tensor) -> list[Any]:
    """Arguments of a call of the reference that makes these rows alone.

    Offsets of sequences count the rows that are left of each. Lists of experts' pairs, which say
    nothing that the ids do not, are left out.
    """
    made: list[Any] = []
    for name, value in zip(op.arguments, arguments, strict=True):
        if not isinstance(value, Tensor):
            made.append(value)
        elif name in op.rows:
            made.append(value[rows])
        elif name == "offsets":
            made.append(torch.searchsorted(rows, value.to(rows.dtype)).to(value.dtype))
        else:
            made.append(None if name in {"pairs", "starts"} else value)
    return made
