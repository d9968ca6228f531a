"""Checks of what the files of a package say, once their digests are known to hold."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingc import plan as plans
from lingc.engine import canonical, summary, tree
from lingc.engine.checks import Check, failed, passed
from lingc.engine.layout import LIMITS, PLAN, VARIANT_INFO
from lingc.engine.manifest import FileEntry, Manifest
from lingc.engine.schema import shown
from lingc.engine.shards import disagreements
from lingc.errors import InputError
from lingc.plan import Plan

_REBUILD = "its producer contradicts itself: build the package again, and report it"
_UPDATE = "update lingc (pip install -U lingc), or build the package again with this version"
_BAD_PLAN = (ValueError, KeyError, TypeError, AttributeError, OSError, InputError)
_MAX_ROWS = 50


def read_listed(root: Path, entry: FileEntry, *, limit: int | None = None) -> bytes:
    """The bytes of a file, which are those that its digest was taken of.

    Raises:
        OSError: It is not there, or not a plain file.
        ValueError: It holds other bytes, or more than `limit`.
    """
    if limit is not None and entry.size > limit:
        raise ValueError(f"{entry.path!r} has {entry.size} bytes, at most {limit} are read")
    data = tree.read(root / entry.path, limit=entry.size)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ValueError(f"{entry.path!r} was changed while the package was checked")
    return data


def judge_plan(root: Path, manifest: Manifest) -> tuple[Plan | None, list[Check]]:
    """Read the plan."""
    try:
        data = read_listed(root, manifest.files[PLAN], limit=LIMITS["plan bytes"])
        value = canonical.decode(data, max_nesting=LIMITS["manifest nesting"])
        version = value["format"]
        if isinstance(version, int) and version > plans.FORMAT:
            expected = f"format {plans.FORMAT} or older"
            newer = failed("plan-format", PLAN, expected, f"format {version}", _UPDATE)
            return None, [newer]
        plan = plans.from_json(value)
        summary.weights(plan, kind="external")
    except _BAD_PLAN as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:200]
        return None, [failed("plan", PLAN, "a plan", said, _REBUILD)]
    steps = sum(len(program.steps) for program in plan.programs.values())
    known = passed("plan-format", f"format {plan.format}")
    return plan, [known, passed("plan", f"{len(plan.programs)} programs, {steps} steps")]


def judge_agreement(manifest: Manifest, plan: Plan) -> list[Check]:
    """Whether the manifest tells of this plan."""
    value = manifest.value
    request, graph, kind = value["request"], value["graph"], value["weights"]["kind"]
    pairs: Mapping[str, tuple[Any, Any]] = {
        "request.target": (request["target"], plan.target),
        "request.precision": (request["precision"], plan.precision),
        "request.page_size": (request["page_size"], plan.page_size),
        "request.max_draft": (request["max_draft"], plan.max_draft),
        "model.config_sha256": (value["model"]["config_sha256"], summary.config_sha256(plan)),
        "weights": (value["weights"], summary.weights(plan, kind=kind)),
        "graph.programs": (graph["programs"], summary.programs(plan)),
        "graph.states": (graph["states"], summary.states(plan)),
    }
    rows = [
        failed("agreement", f"{where} and {PLAN}", shown(said), shown(found), _REBUILD)
        for where, (said, found) in pairs.items()
        if said != found
    ]
    return rows or [passed("agreement", f"{len(pairs)} facts, {PLAN}")]


def judge_variant(root: Path, manifest: Manifest, target: str) -> list[Check]:
    """Whether `variant.json` says what the manifest says of it."""
    path = f"variants/{target}/{VARIANT_INFO}"
    said = next(v for v in manifest.value["variants"] if v["target"] == target)
    try:
        found = {"target": target, **summary.variant(variant_info(root, manifest, target))}
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [failed("agreement", path, "canonical JSON", str(error)[:200], _REBUILD)]
    if said != found:
        return [failed("agreement", path, shown(said), shown(found), _REBUILD)]
    return [passed("agreement", path)]


def variant_info(root: Path, manifest: Manifest, target: str) -> dict[str, Any]:
    """The facts of a variant, for its backend."""
    entry = manifest.files[f"variants/{target}/{VARIANT_INFO}"]
    data = read_listed(root, entry, limit=LIMITS["variant.json bytes"])
    return canonical.decode_canonical(data, max_nesting=LIMITS["manifest nesting"])


def judge_weights(check_id: str, plan: Plan, shards: list[Path]) -> list[Check]:
    """Whether the shards hold the plan's weights."""
    rows = [
        failed(check_id, line.subject, line.expected, line.found, _REBUILD)
        for line in disagreements(plan.weights, shards)
    ]
    return rows[:_MAX_ROWS] or [
        passed(check_id, f"{len(plan.weights)} weights in {len(shards)} shards")
    ]
