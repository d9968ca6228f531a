"""A comparison as a JSON document, and as the tables of a terminal."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lingc.parity.compare import Summary
from lingc.parity.experts import Flip
from lingc.parity.run import ModeResult, Result

SHOWN_FLIPS = 20

Cells = Sequence[object]


def document(result: Result) -> dict[str, Any]:
    """The whole result but for its single tokens, in JSON's types; what is not finite is null."""
    value: dict[str, Any] = {
        "kind": "parity",
        "ok": result.ok,
        "reference": asdict(result.reference),
        "other": asdict(result.other),
        "data": {"file": result.data, "rows": len(result.lines)},
        "weights": result.weights,
        "budget": asdict(result.budget),
        "modes": [_mode(mode, result.lines) for mode in result.modes],
    }
    return value


def verdict(result: Result) -> str:
    """The last line: whether the budget is kept, and if not, where not."""
    name = result.budget.name
    if not result.ok:
        broken = [
            f"{mode.summary.mode}: {check.name} is {check.found}, {check.limit} is due"
            for mode in result.modes
            for check in mode.checks
            if not check.ok
        ]
        return f"over budget {name!r}; " + "; ".join(broken)
    if all(len(mode.checks) == 1 for mode in result.modes):
        return f"budget {name!r} judges nothing: this is a report"
    limits = ", ".join(f"{check.name} {check.limit}" for check in result.modes[0].checks[1:])
    return f"within budget {name!r}: {limits}"


SUMMARY_COLUMNS = (
    "mode", "tokens", "mean KL", "max KL", "mean |Δ|", "max |Δ|", "top-1 agrees", "in top 5",
    "differs, clear", "differs, near tie", "other experts", "perplexity", "of the reference",
)  # fmt: skip


def summary_rows(result: Result) -> Iterator[Cells]:
    """One line a mode."""
    for mode in result.modes:
        found = mode.summary
        yield (
            found.mode,
            found.tokens,
            f"{found.mean_kl:.3g}",
            f"{found.max_kl:.3g}",
            f"{found.mean_abs:.3g}",
            f"{found.max_abs:.3g}",
            f"{found.top1_agreement:.5f}",
            f"{found.top5_agreement:.5f}",
            found.top1_above_margin,
            found.top1_within_margin,
            flip_count(found),
            *(
                None if value is None else f"{value:.6g}"
                for value in (found.other_perplexity, found.perplexity)
            ),
        )


BUCKET_COLUMNS = (
    "mode", "positions", "tokens", "mean KL", "max KL", "max |Δ|", "differs, clear", "near tie",
)  # fmt: skip


def bucket_rows(result: Result) -> Iterator[Cells]:
    """One line a mode and range of positions."""
    for mode in result.modes:
        for bucket in mode.summary.buckets:
            yield (
                mode.summary.mode,
                f"{bucket.first}-{bucket.last}",
                bucket.tokens,
                f"{bucket.mean_kl:.3g}",
                f"{bucket.max_kl:.3g}",
                f"{bucket.max_abs:.3g}",
                bucket.top1_above_margin,
                bucket.top1_within_margin,
            )


LAYER_COLUMNS = ("mode", "behind layer", "mean error", "max error")


def layer_rows(result: Result) -> Iterator[Cells]:
    """One line a mode and layer."""
    for mode in result.modes:
        for error in mode.summary.layers:
            yield mode.summary.mode, error.layer, f"{error.mean:.3g}", f"{error.max:.3g}"


STATE_COLUMNS = ("mode", "layer", "after tokens", "rows", "mean error", "max error")


def state_rows(result: Result) -> Iterator[Cells]:
    """One line a mode, linear layer and position."""
    for mode in result.modes:
        for error in mode.summary.states:
            yield (
                mode.summary.mode,
                error.layer,
                error.position,
                error.rows,
                f"{error.mean:.3g}",
                f"{error.max:.3g}",
            )


CHECK_COLUMNS = ("mode", "budget", "limit", "found", "")


def check_rows(result: Result) -> Iterator[Cells]:
    """One line a mode and limit."""
    for mode in result.modes:
        for check in mode.checks:
            kept = "kept" if check.ok else "OVER"
            yield mode.summary.mode, check.name, check.limit, check.found, kept


FLIP_COLUMNS = ("mode", "line", "position", "layer", "gap", "only reference", "only other", "")


def flip_rows(result: Result) -> Iterator[Cells]:
    """One line a token whose experts differ."""
    for mode in result.modes:
        for flip in mode.summary.flips:
            yield (
                mode.summary.mode,
                result.lines[flip.row],
                flip.position,
                flip.layer,
                "unknown" if flip.gap is None else f"{flip.gap:.3g}",
                " ".join(map(str, flip.reference)),
                " ".join(map(str, flip.other)),
                "" if flip.is_root else "follows from an earlier one",
            )


WORST_COLUMNS = (
    "mode", "line", "position", "KL", "max |Δ|", "margin", "reference", "other", "after",
)  # fmt: skip


def worst_rows(result: Result, *, limit: int) -> Iterator[Cells]:
    """The tokens with the largest divergence, with the end of what stood before."""
    for mode in result.modes:
        for token in mode.worst[:limit]:
            yield (
                mode.summary.mode,
                token.line,
                token.position,
                f"{token.kl:.3g}",
                f"{token.max_abs:.3g}",
                f"{token.margin:.3g}",
                repr(token.reference),
                repr(token.other),
                repr(token.context[-24:]),
            )


def flip_count(summary: Summary) -> str:
    """How many tokens went elsewhere, and how many of those say something about the router."""
    if not summary.expert_layers:
        return "not told"
    roots = sum(flip.is_root for flip in summary.flips)
    return f"{len(summary.flips)} ({roots} first)" if summary.flips else "0"


def _mode(mode: ModeResult, lines: Sequence[int]) -> dict[str, Any]:
    value = asdict(mode.summary)
    value["top1_agreement"] = mode.summary.top1_agreement
    value["flips"] = [_flip(flip, lines) for flip in mode.summary.flips]
    value["checks"] = [asdict(check) for check in mode.checks]
    value["worst"] = [asdict(token) for token in mode.worst]
    value["ok"] = mode.ok
    told: dict[str, Any] = _finite(value)
    return told


def _flip(flip: Flip, lines: Sequence[int]) -> dict[str, Any]:
    value = asdict(flip)
    del value["row"]
    # None is a gap that nobody knows; one that no scores could explain has no number in JSON.
    if flip.gap is not None and not math.isfinite(flip.gap):
        value["gap"] = "infinite"
    return {"line": lines[flip.row], **value}


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value
