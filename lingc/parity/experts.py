"""Where two sides send a token to different experts, and how near the two choices are.

The router's scores b = sigmoid(logits) + bias decide in two steps: which groups are kept, by the
sum of their two largest b, then which experts of those, by b. The gap of two choices is how much
the scores of one side would have to move for it to choose as the other did.

A different choice changes the token's hidden state for good, and through attention that of later
tokens of the row. So a difference in a deeper layer at the same or a later position follows from
the first ones: it is listed, but only `root` differences say something about the router.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lingc.parity.side import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the model chooses: groups, groups kept, experts a token, and experts in all."""

    groups: int
    kept_groups: int
    top_k: int
    experts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A token whose set of experts differs in one layer.

    Attributes:
        row: Index of the row.
        gap: Least change of a score that explains it; None where no side tells its scores.
        is_root: Whether no earlier layer of this or an earlier token of the row differs.
        reference: Experts that only the reference chose.
        other: Experts that only the other side chose.
    """

    row: int
    position: int
    layer: int
    gap: float | None
    is_root: bool
    reference: tuple[int, ...]
    other: tuple[int, ...]


def flips(
    row: int,
    reference: Mapping[int, Choice],
    other: Mapping[int, Choice],
    routing: Routing,
) -> list[Flip]:
    """Every difference of a row in the layers that both sides tell of."""
    layers = sorted(reference.keys() & other.keys())
    length = max((len(reference[layer].ids) for layer in layers), default=0)
    # Earliest position at which an already seen, shallower layer differs.
    earliest = length
    found: list[Flip] = []
    for layer in layers:
        a, b = reference[layer], other[layer]
        differ = np.flatnonzero((np.sort(a.ids, axis=1) != np.sort(b.ids, axis=1)).any(axis=1))
        for t in differ.tolist():
            mine, theirs = set(a.ids[t].tolist()), set(b.ids[t].tolist())
            found.append(
                Flip(
                    row=row,
                    position=t,
                    layer=layer,
                    gap=_gap_of(a, b, t, routing),
                    is_root=t < earliest,
                    reference=tuple(sorted(mine - theirs)),
                    other=tuple(sorted(theirs - mine)),
                )
            )
        earliest = min(earliest, int(differ[0])) if len(differ) else earliest
    return sorted(found, key=lambda flip: (flip.position, flip.layer))


def _gap_of(a: Choice, b: Choice, t: int, routing: Routing) -> float | None:
    if a.biased is not None:
        return gap(a.biased[t], b.ids[t].tolist(), routing)
    if b.biased is not None:
        return gap(b.biased[t], a.ids[t].tolist(), routing)
    return None


def gap(biased: NDArray[np.float32], chosen: Sequence[int], routing: Routing) -> float:
    """How far scores are from choosing `chosen`; 0 where they do, infinite where none could.

    Args:
        biased: [E], what the experts are chosen by.
        chosen: The experts to explain.
    """
    scores = biased.astype(np.float64).reshape(routing.groups, -1)
    size = scores.shape[1]
    sums = np.sort(scores, axis=1)[:, -2:].sum(axis=1)
    kept = set(np.argsort(-sums, kind="stable")[: routing.kept_groups].tolist())
    needed = {expert // size for expert in chosen}
    outside = needed - kept
    # Groups leave for those that must be in: the weakest of those that nobody needs.
    spare = sorted(kept - needed, key=lambda group: (sums[group], -group))
    if len(set(chosen)) != routing.top_k or len(spare) < len(outside):
        return float("inf")
    dropped = spare[: len(outside)]
    group_gap = max(sums[g] for g in dropped) - min(sums[g] for g in outside) if outside else 0.0
    final = (kept - set(dropped)) | outside
    open_experts = [g * size + i for g in final for i in range(size)]
    flat = scores.reshape(-1)
    rest = [flat[expert] for expert in open_experts if expert not in set(chosen)]
    expert_gap = max(rest) - min(flat[expert] for expert in chosen) if rest else 0.0
    return float(max(group_gap, expert_gap, 0.0))
