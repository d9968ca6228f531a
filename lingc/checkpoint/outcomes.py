"""What a quantized checkpoint's lines add up to: families of modules, and what to leave out."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lingc.checkpoint.quantizer import Outcome

OUTLIER = 2.0
"""Of the median error of its format: from here a matrix is suggested to stay plain.

Errors over a typical value are much alike where weights are: those of the shipped checkpoint lie
within 1.6 of the median of their format. What lies farther out has outliers that cost every other
value digits.
"""

_NUMBERS = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Matrices of one kind in all layers and experts that were treated alike.

    Attributes:
        pattern: Their names with `*` for numbers.
        error: Mean of their errors; None where nothing was rounded.
        worst: Largest of their largest changes.
        bytes: What they take.
    """

    pattern: str
    format: str
    how: str
    why: str | None
    matrices: int
    error: float | None
    worst: float | None
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A matrix that a recipe had better leave plain.

    Attributes:
        module: A pattern for a rule of a recipe.
        reason: In words.
        bytes: What that costs.
    """

    module: str
    reason: str
    bytes: int


def family_name(module: str) -> str:
    """A module's name with `*` for layer and expert.

    >>> family_name("model.layers.3.mlp.experts.7.up_proj")
    'model.layers.*.mlp.experts.*.up_proj'
    """
    return _NUMBERS.sub(".*", module)


def families(outcomes: Sequence[Outcome]) -> tuple[Family, ...]:
    """Outcomes folded over layers and experts, in the order of the first of each."""
    groups: dict[tuple[str, str, str, str | None], list[Outcome]] = defaultdict(list)
    for one in outcomes:
        groups[family_name(one.name), one.format, one.how, one.why].append(one)
    found = []
    for (pattern, kind, how, why), members in groups.items():
        errors = [one.error for one in members if one.error is not None]
        worst = [one.worst for one in members if one.worst is not None]
        found.append(
            Family(
                pattern=pattern,
                format=kind,
                how=how,
                why=why,
                matrices=len(members),
                error=sum(errors) / len(errors) if errors else None,
                worst=max(worst, default=None),
                bytes=sum(one.bytes for one in members),
            )
        )
    return tuple(found)


def suggestions(outcomes: Sequence[Outcome]) -> tuple[Suggestion, ...]:
    """Matrices whose error stands out among those of their format, the worst first."""
    errors: dict[str, list[float]] = defaultdict(list)
    for one in outcomes:
        if one.typical_error is not None:
            errors[one.format].append(one.typical_error)
    usual = {kind: median(found) for kind, found in errors.items()}
    found = [
        (one.typical_error / usual[one.format], one)
        for one in outcomes
        if one.typical_error is not None and one.typical_error > OUTLIER * usual[one.format] > 0
    ]
    found.sort(key=lambda pair: -pair[0])
    return tuple(
        Suggestion(
            module=one.name,
            reason=f"beside a typical value its error is {ratio:.1f} times the median of "
            f"{one.format}, so outliers cost the others digits",
            bytes=one.input_bytes - one.bytes,
        )
        for ratio, one in found
    )
