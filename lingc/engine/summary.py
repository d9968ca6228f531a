"""What the manifest says of a plan, so that a reader of the manifest alone knows it."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lingc.engine import canonical
from lingc.plan import DTYPE_BYTES, Plan, Program, to_json

WEIGHTS_FORMAT = 1
"""Version of the bytes that a weight is packed to; part of every weights digest."""

_ITEM_BYTES = {**DTYPE_BYTES, "f16": 2}
_LAYER = re.compile(r"\.\d+$")


def weights_sha256(plan: Plan) -> str:
    """The digest of how the weights are made: packing, specs, and the config that decays need."""
    value = to_json(replace(plan, programs={}, states={}))
    parts = {"format": WEIGHTS_FORMAT, "config": value["config"], "weights": value["weights"]}
    return canonical.sha256(parts)


def config_sha256(plan: Plan) -> str:
    """The digest of the model's config without its quantization entries."""
    return canonical.sha256(canonical.plain(plan.config, where="config"))


def weights(plan: Plan, *, kind: str) -> dict[str, Any]:
    """The manifest's `weights`."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for spec in plan.weights.values():
        sizes.setdefault((spec.format, spec.type.dtype), []).append(spec.type.bytes())
    return {
        "kind": kind,
        "spec_sha256": weights_sha256(plan),
        "bytes": sum(map(sum, sizes.values())),
        "formats": [
            {"format": form, "dtype": dtype, "tensors": len(each), "bytes": sum(each)}
            for (form, dtype), each in sorted(sizes.items())
        ],
    }


def programs(plan: Plan) -> list[dict[str, Any]]:
    """The manifest's `graph.programs`."""
    return [
        {"phase": phase, "steps": len(program.steps), "ops": _op_counts(program)}
        for phase, program in sorted(plan.programs.items())
    ]


def states(plan: Plan) -> list[dict[str, Any]]:
    """The manifest's `graph.states`: those of all layers that are alike, as one line."""
    alike = Counter((_LAYER.sub(".{l}", name), str(t)) for name, t in plan.states.items())
    return [
        {"name": name, "type": kind, "count": count}
        for (name, kind), count in sorted(alike.items())
    ]


def variant(info: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the manifest's `variants` that `variant.json` says.

    Where it lists initializers, the weights take their sizes while the engine runs; widened ones
    are larger than at rest.
    """
    made = info.get("initializers")
    in_use = None
    if isinstance(made, list):
        in_use = sum(math.prod(one["shape"]) * _ITEM_BYTES[one["dtype"]] for one in made)
    said = {
        "engine": info.get("engine"),
        "runs_on": info.get("runs_on"),
        "weights_in_use_bytes": in_use,
    }
    if "tuned_on" in info:
        said["tuned_on"] = info["tuned_on"]
    faults = info.get("faults")
    told = faults.values() if isinstance(faults, Mapping) else ()
    if count := sum(len(one) for one in told if isinstance(one, list)):
        said["faults"] = count
    return said


def _op_counts(program: Program) -> Mapping[str, int]:
    return dict(Counter(step.op for step in program.steps))
