"""How a side stores its weights: what is quantized, what is not, and how many bytes each takes."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lingc.checkpoint import Source
from lingc.plan import Plan, WeightSpec

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAs:
    """The matrices that are stored in one way.

    Attributes:
        format: `bf16`, `f32`, `fp8_block`, `int4_group(32)`.
        is_quantized: Whether a value has fewer bits than BF16.
        matrices: How many; each expert's is one.
        elements: Of all of them.
        modules: Their names, with `*` for layers and experts.
    """

    format: str
    is_quantized: bool
    matrices: int
    elements: int
    modules: tuple[str, ...]


def of_plan(plan: Plan) -> tuple[StoredAs, ...]:
    """Of an engine's or a plan's weights."""
    found: dict[str, dict[str, int]] = {}
    for spec in plan.weights.values():
        if spec.part == "scales" or not spec.sources or len(spec.type.shape) < 2:
            continue
        held = found.setdefault(_format(spec), {})
        names = [name for names in spec.members() for name in names]
        if all(name in held for name in names):  # a part of what another program has whole
            continue
        held |= dict.fromkeys(names, 0)
        held[names[0]] = _elements(spec)
    return _listed(found)


def of_source(source: Source) -> tuple[StoredAs, ...]:
    """Of a checkpoint's."""
    found: dict[str, dict[str, int]] = {}
    for name in source.names:
        shape = source.shape(name)
        if len(shape) < 2:
            continue
        kind = source.kind(name)
        if kind == "plain":
            kind = source.plain(name)[1]
        elif kind == "int4_group":
            kind = f"int4_group({source.quantized(name)[2]})"
        found.setdefault(kind, {})[name] = math.prod(shape)
    return _listed(found)


def _listed(found: dict[str, dict[str, int]]) -> tuple[StoredAs, ...]:
    return tuple(
        StoredAs(
            format=kind,
            is_quantized=kind not in ("bf16", "f32"),
            matrices=len(tensors),
            elements=sum(tensors.values()),
            modules=tuple(folded(tensors)),
        )
        for kind, tensors in sorted(found.items(), key=lambda item: -sum(item[1].values()))
    )


def folded(names: Iterable[str]) -> Sequence[str]:
    """Names without what they have in common: layers and experts as `*`, in order."""
    short = (_INDEX.sub("*", name).removesuffix(".weight") for name in names)
    return list(dict.fromkeys(name.removeprefix("model.") for name in short))


def _elements(spec: WeightSpec) -> int:
    elements = math.prod(spec.type.bind({}))
    return elements * 8 if spec.format == "int4_group" else elements


def _format(spec: WeightSpec) -> str:
    if spec.format == "int4_group":
        return f"int4_group({spec.group})"
    return spec.format if spec.format != "plain" else spec.type.dtype
