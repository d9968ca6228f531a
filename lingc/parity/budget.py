"""How much two sides may differ: budgets are data, read from `budgets/*.json` or a user's file.

    {
      "name": "engine-vs-eager",
      "summary": "one line",
      "margin": 0.001,                        what counts as a clear winner, in logits
      "mean_kl": 1e-6,                        over all tokens
      "max_kl": null,                         of any token
      "mean_abs": null, "max_abs": null,      of logits
      "top1_disagreements_above_margin": 0,   tokens
      "top1_agreement": null,                 least share of tokens, near ties included
      "top5_agreement": null,                 least share whose winner is among the other's five
      "perplexity_ratio": null,               of the other's to the reference's
      "layer_error": null,                    behind any layer, mean over tokens
      "state_error": null,                    of any linear state, at any position
      "expert_gap": 1e-5                      of any token that goes to other experts
    }

A limit that is null or left out is not judged. A logit that is NaN or infinite fails any budget.
"""

import difflib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingc.errors import InputError
from lingc.parity.compare import Summary

_FOLDER = Path(__file__).parent / "budgets"
_WAY_OUT = f"start from {str(_FOLDER / 'engine-vs-eager.json')!r}"
_COUNTS = {"top1_disagreements_above_margin"}
_NUMBERS = (
    "mean_kl", "max_kl", "mean_abs", "max_abs", "top1_agreement", "top5_agreement",
    "perplexity_ratio", "layer_error", "state_error", "expert_gap",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits; None is no limit. The module says what each means."""

    name: str
    summary: str = ""
    margin: float = 1e-3
    mean_kl: float | None = None
    max_kl: float | None = None
    mean_abs: float | None = None
    max_abs: float | None = None
    top1_disagreements_above_margin: int | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    perplexity_ratio: float | None = None
    layer_error: float | None = None
    state_error: float | None = None
    expert_gap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One limit held against what was found.

    Attributes:
        name: The key of the budget file, or `finite`.
        limit: In words: `below 1e-06`.
        found: In words.
        ok: Whether it holds.
    """

    name: str
    limit: str
    found: str
    ok: bool


def built_in() -> tuple[str, ...]:
    """Names of the budgets that come with lingc."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_budget(name_or_path: str | Path) -> Budget:
    """Read a built-in budget by name, or a budget file by path.

    Raises:
        InputError: No such budget, or its file has problems; all are listed.
    """
    text = str(name_or_path)
    if text in built_in():
        return _read(_FOLDER / f"{text}.json")
    path = Path(name_or_path)
    if not os.path.lexists(path) and "/" not in text and not text.endswith(".json"):
        near = difflib.get_close_matches(text, built_in(), n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"no budget is called {text!r}",
            hint=f"{meant}there are {', '.join(built_in())}; a file is given by its path",
        )
    return _read(path)


def judge(summary: Summary, budget: Budget) -> tuple[Check, ...]:
    """Hold a comparison against a budget; it is kept where every check is ok."""
    return tuple(_checks(summary, budget))


def _checks(summary: Summary, budget: Budget) -> Iterator[Check]:
    yield Check(
        name="finite",
        limit="every logit",
        found=f"{summary.not_finite} tokens have a logit that is NaN or infinite",
        ok=summary.not_finite == 0,
    )
    for name in ("mean_kl", "max_kl", "mean_abs", "max_abs"):
        limit = getattr(budget, name)
        if limit is not None:
            found = getattr(summary, name)
            # A comparison with NaN is false, so a NaN is over any limit.
            yield Check(name=name, limit=_below(limit), found=f"{found:.3g}", ok=found <= limit)
    most = budget.top1_disagreements_above_margin
    if most is not None:
        count = summary.top1_above_margin
        yield Check(
            name="top1_disagreements_above_margin",
            limit=f"at most {most}" if most else "none",
            found=f"{count} of {summary.tokens} tokens, margin {budget.margin:g}",
            ok=count <= most,
        )
    for name in ("top1_agreement", "top5_agreement"):
        least = getattr(budget, name)
        if least is not None:
            share = getattr(summary, name)
            yield Check(
                name=name, limit=f"at least {least:g}", found=f"{share:.5f}", ok=share >= least
            )
    if budget.perplexity_ratio is not None:
        pair = (summary.other_perplexity, summary.perplexity)
        ratio = float("nan") if pair[0] is None or pair[1] is None else pair[0] / pair[1]
        yield Check(
            name="perplexity_ratio",
            limit=_below(budget.perplexity_ratio),
            found=f"{ratio:.5f}",
            ok=ratio <= budget.perplexity_ratio,
        )
    yield from _inside_checks(summary, budget)
    if budget.expert_gap is not None:
        yield _expert_check(summary, budget.expert_gap)


def _inside_checks(summary: Summary, budget: Budget) -> Iterator[Check]:
    found = {
        "layer_error": [(error.mean, f"behind layer {error.layer}") for error in summary.layers],
        "state_error": [
            (error.max, f"of layer {error.layer} after {error.position} tokens")
            for error in summary.states
        ],
    }
    for name, errors in found.items():
        limit = getattr(budget, name)
        if limit is None:
            continue
        worst, where = max(errors, default=(float("nan"), "not compared: a side does not tell it"))
        # What was not compared is not within a limit.
        text = f"{worst:.3g} {where}" if errors else where
        yield Check(name=name, limit=_below(limit), found=text, ok=worst <= limit)


def _expert_check(summary: Summary, limit: float) -> Check:
    roots = [flip for flip in summary.flips if flip.is_root]
    unknown = sum(flip.gap is None for flip in roots)
    widest = max((flip.gap for flip in roots if flip.gap is not None), default=0.0)
    if not summary.expert_layers:
        found = "not compared: a side does not tell its experts"
    elif not roots:
        found = f"no difference in {len(summary.expert_layers)} layers"
    else:
        found = f"{len(roots)} differences, the widest {widest:.3g}"
        found += f", {unknown} without scores" if unknown else ""
    ok = widest <= limit and not unknown
    return Check(name="expert_gap", limit=_below(limit), found=found, ok=ok)


def _below(limit: float) -> str:
    return f"at most {limit:.3g}"


def _read(path: Path) -> Budget:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"budget {str(path)!r} cannot be read: {error.strerror or error}",
            hint=f"give a file, or one of {', '.join(built_in())}",
        ) from error
    except ValueError as error:
        raise InputError(f"budget {str(path)!r} is not JSON: {error}", hint=_WAY_OUT) from error
    if not isinstance(value, dict):
        raise InputError(
            f"budget {str(path)!r} holds a {type(value).__name__}, not an object", hint=_WAY_OUT
        )
    problems = list(_problems(value))
    if problems:
        listed = "".join(f"\n  - {line}" for line in problems)
        raise InputError(
            f"budget {str(path)!r} has problems:{listed}",
            hint=f"its keys are {', '.join(Budget.__dataclass_fields__)}",
        )
    return Budget(**{"name": path.stem, **value})


def _problems(value: dict[str, Any]) -> Iterator[str]:
    known = Budget.__dataclass_fields__
    for key, item in value.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f", did you mean {near[0]!r}?" if near else ""
            yield f"{key!r} is not a key of a budget{meant}"
        elif key in ("name", "summary"):
            if not isinstance(item, str):
                yield f"{key!r} is {item!r}, it must be text"
        elif key in _COUNTS:
            if item is not None and (not _is_number(item) or int(item) != item):
                yield f"{key!r} is {item!r}, it must be a whole number, 0 or more"
        elif not (_is_number(item) or (item is None and key in _NUMBERS)):
            yield f"{key!r} is {item!r}, it must be a number, 0 or more"


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(float(value)) and float(value) >= 0  # type: ignore[arg-type]
