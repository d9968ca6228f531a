"""A launch table for people: what a bucket runs, how long that should take, and where values lie.

Steps that differ in nothing but the number of their layer are told once. Times are the sum over
launches of what the tactics' origins say; bytes and flops are what the ops must move and do, so
that the two make a share of the roofline.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lingc.errors import UsageError
from lingc.kernel import align
from lingc.launch_table import Bucket, LaunchTable, TablePhase
from lingc.plan import Plan
from lingc.plan_text import ranges

_LAYER = re.compile(r"^layers\.(\d+)\.?")
_ANY_LAYER = re.compile(r"\blayers\.(\d+)\.")

SAMPLED: Mapping[str, int] = {"temperature": 4, "top_k": 4, "top_p": 4, "draws": 24, "tokens": 4}
"""Bytes a row of logits of what the step behind a program takes and makes; no plan has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a step shall have room for.

    Attributes:
        sequences: In the step.
        context: Tokens of the longest of them, those of the step included.
        tokens: Of the step, of all sequences.
    """

    phase: str = "decode"
    sequences: int = 1
    context: int = 4096
    tokens: int = 1


def find(table: LaunchTable, plan: Plan, wanted: Wanted) -> Bucket:
    """The quickest bucket that has the room.

    Raises:
        UsageError: There is none.
    """
    mine = [one for one in table.buckets if one.phase == wanted.phase]
    if not mine:
        raise UsageError(
            f"the engine has no phase {wanted.phase!r}",
            hint=f"it has: {', '.join(dict.fromkeys(one.phase for one in table.buckets))}",
        )
    fitting = [one for one in mine if _has_room(one, plan, wanted)]
    if not fitting:
        most = {
            axis: max(one.sizes[axis] for one in mine) for axis in ("T", "B", "P")
            if axis in mine[0].sizes
        }  # fmt: skip
        listed = ", ".join(f"{axis} up to {size}" for axis, size in most.items())
        raise UsageError(
            f"no bucket of {wanted.phase} has room for {wanted.sequences} sequences, "
            f"{wanted.tokens} tokens in the step and a context of {wanted.context}",
            hint=f"its buckets have {listed} ({plan.page_size} tokens a page)",
        )
    return min(fitting, key=lambda one: totals(table, one)["microseconds"])


def _has_room(bucket: Bucket, plan: Plan, wanted: Wanted) -> bool:
    sizes = bucket.sizes
    if sizes["B"] < wanted.sequences or sizes["P"] * plan.page_size < wanted.context:
        return False
    if wanted.phase == "verify":
        return sizes["T"] * wanted.sequences == sizes["B"] * wanted.tokens
    if wanted.phase == "decode" or sizes["T"] == wanted.tokens:
        return True
    # A sequence of padding takes the tokens that are left over.
    return sizes["T"] > wanted.tokens and sizes["B"] > wanted.sequences


def totals(table: LaunchTable, bucket: Bucket) -> dict[str, Any]:
    """One bucket in one line."""
    tactics = [table.tactics[index] for index in bucket.tactics]
    return {
        "phase": bucket.phase,
        "sizes": dict(bucket.sizes),
        "launches": table.launches(bucket),
        "microseconds": sum(one.microseconds for one in tactics),
        "measured": sum(one.microseconds for one in tactics if one.origin != "model"),
        "moved_bytes": sum(one.moved_bytes for one in tactics),
        "flops": sum(one.flops for one in tactics),
        "arena_bytes": bucket.arena_bytes,
    }


def overview(table: LaunchTable, plan: Plan) -> dict[str, Any]:
    """The table as a whole: what it holds, and each bucket in one line."""
    weights = sum(spec.type.bytes() for spec in plan.weights.values())
    return {
        "target": table.target,
        "arch": table.arch,
        "kernels": len(table.kernels),
        "tactics": len(table.tactics),
        "memory": {
            "weights": weights,
            "a slot": _state_bytes(plan, "S", 1),
            "a page": _state_bytes(plan, "R", plan.page_size),
            "counters": table.counter_bytes,
            "largest arena": max((one.arena_bytes for one in table.buckets), default=0),
        },
        "buckets": [totals(table, one) for one in table.buckets],
    }


def _state_bytes(plan: Plan, axis: str, size: int) -> int:
    mine = [kind for kind in plan.states.values() if kind.shape[0] == axis]
    return sum(kind.bytes({axis: size}) for kind in mine)


# --------------------------------------------------------------------------------------- a bucket


def steps(table: LaunchTable, bucket: Bucket) -> list[dict[str, Any]]:
    """Every step of a bucket in order, each by itself."""
    phase = table.phases[bucket.phase]
    found = []
    for step, index in zip(phase.steps, bucket.tactics, strict=True):
        tactic = table.tactics[index]
        layer = _LAYER.match(step.name)
        found.append(
            {
                "step": step.name,
                "layer": int(layer[1]) if layer else -1,
                "op": step.op,
                "tactic": tactic.tactic,
                "origin": tactic.origin,
                "launches": len(tactic.launches),
                "microseconds": tactic.microseconds,
                "moved_bytes": tactic.moved_bytes,
                "flops": tactic.flops,
                "workspace_bytes": sum(size for _, size in tactic.workspaces),
            }
        )
    return found


def folded(table: LaunchTable, bucket: Bucket) -> list[dict[str, Any]]:
    """Steps that are alike in several layers as one, in the order of the first of each."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for number, one in enumerate(steps(table, bucket)):
        name = _LAYER.sub("", one["step"]) if one["layer"] >= 0 else one["step"]
        alone = number if one["layer"] < 0 else -1
        kinds.setdefault((name, one["op"], one["tactic"], alone), []).append(one)
    return [
        {
            **alike[0],
            "step": key[0],
            "layers": ranges([one["layer"] for one in alike if one["layer"] >= 0]),
            "count": len(alike),
        }
        for key, alike in kinds.items()
    ]


def memory(table: LaunchTable, plan: Plan, bucket: Bucket) -> list[dict[str, Any]]:
    """What lies in the arena: where, how large, and from which step to which; by place.

    Nothing of the ops between the programs of a speculative round, which have memory of their own.
    """
    phase = table.phases[bucket.phase]
    if bucket.phase not in plan.programs:
        return []
    sizes = _sizes(phase, plan, bucket)
    uses: dict[str, list[int]] = {}
    for number, step in enumerate(phase.steps):
        for buffer in step.buffers.values():
            uses.setdefault(buffer or "", []).append(number)
    end = len(phase.steps) - 1
    program = plan.programs[bucket.phase]
    kept = {phase.values[name] for name in program.outputs.values()} | {"tokens"}
    given = {*program.inputs, *SAMPLED} - {"tokens"}
    rows = []
    for name, offset in zip(phase.arena, bucket.offsets, strict=True):
        first, last = min(uses.get(name, [0])), max(uses.get(name, [0]))
        rows.append(
            {
                "holds": name,
                "offset": offset,
                "bytes": sizes[name],
                "first": 0 if name in given else first,
                "last": end if name in given or name in kept else last,
            }
        )
    for number, (index, begin) in enumerate(zip(bucket.tactics, bucket.scratch, strict=True)):
        offset = begin
        for name, size in table.tactics[index].workspaces:
            holds = f"{name} of {phase.steps[number].name}"
            rows.append(
                {"holds": holds, "offset": offset, "bytes": size, "first": number, "last": number}
            )
            offset += align(size)
    return sorted(rows, key=lambda row: (row["offset"], row["first"]))


def folded_memory(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is alike in several layers as one; the largest first."""
    kinds: dict[tuple[str, int, int], list[int]] = {}
    for row in rows:
        layer = _ANY_LAYER.search(row["holds"])
        name = _ANY_LAYER.sub("", row["holds"])
        key = (name, row["bytes"], row["last"] - row["first"] + 1)
        kinds.setdefault(key, []).append(int(layer[1]) if layer else -1)
    found = [
        {
            "holds": name,
            "layers": ranges(sorted(number for number in layers if number >= 0)),
            "bytes": size,
            "steps": count,
        }
        for (name, size, count), layers in kinds.items()
    ]
    return sorted(found, key=lambda row: -row["bytes"])


def _sizes(phase: TablePhase, plan: Plan, bucket: Bucket) -> dict[str, int]:
    """Bytes of every buffer of the arena."""
    types = plan.programs[bucket.phase].types
    logits = types[plan.programs[bucket.phase].outputs["logits"]]
    rows = logits.bind(bucket.sizes)[0]
    return {
        name: types[name].bytes(bucket.sizes) if name in types else SAMPLED[name] * rows
        for name in phase.arena
    }
