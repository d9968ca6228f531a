"""What the manifest says of a plan, so that a reader of the manifest alone knows it."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lingc.engine import canonical
from lingc.errors import StageError
from lingc.plan import DTYPE_BYTES, Plan, Program, WeightSpec, to_json

WEIGHTS_FORMAT = 1
"""Version of the bytes that a weight is packed to; part of every weights digest."""

_LAYER = re.compile(r"\.\d+$")


def weights_sha256(plan: Plan) -> str:
    """The digest of how the weights are made: packing, specs, and the config that decays need."""
    value = to_json(plan)
    parts = {"format": WEIGHTS_FORMAT, "config": value["config"], "weights": value["weights"]}
    return canonical.sha256(parts)


def config_sha256(plan: Plan) -> str:
    """The digest of the model's config without its quantization entries."""
    return canonical.sha256(to_json(plan)["config"])


def weight_bytes(spec: WeightSpec) -> int:
    """Bytes of one weight as stored."""
    sizes = [size for size in spec.type.shape if isinstance(size, int)]
    if len(sizes) < len(spec.type.shape):
        raise StageError(f"weight {spec.name!r} has the open shape {spec.type}")
    return int(math.prod(sizes) * DTYPE_BYTES[spec.type.dtype])


def weights(plan: Plan, *, kind: str) -> dict[str, Any]:
    """The manifest's `weights`."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for spec in plan.weights.values():
        sizes.setdefault((spec.format, spec.type.dtype), []).append(weight_bytes(spec))
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


def _op_counts(program: Program) -> Mapping[str, int]:
    return dict(Counter(step.op for step in program.steps))
