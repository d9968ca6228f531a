"""A plan as text for people: what is the same in several layers is written once.

`{l}` stands for the number of the layer, `{l-1}` for that of the layer before, `{e}` for that of an
expert; among the steps of a layer, a name that begins with a dot is the layer's own. Beside the
layer's number stands how many steps it takes in all, views left out. A full-size plan takes a few
hundred lines; golden files hold some.
"""

import itertools
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lingc.plan import PHASES, Plan, Program, Ref, Size, Step, TensorType, WeightSpec

FACTS: Mapping[str, str] = {
    "num_hidden_layers": "layers",
    "first_k_dense_replace": "of them dense",
    "layer_group_size": "in a group",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_experts": "experts",
    "num_experts_per_tok": "a token",
    "num_shared_experts": "shared",
    "vocab_size": "tokens",
    "num_nextn_predict_layers": "draft layers",
}
"""What the header says of the model: key of the config -> word behind its value."""

SHOWN = 4
"""Numbers of a vector, such as rotary frequencies, before the rest is counted."""

VIEWS = frozenset({"aten.slice.Tensor", "aten.reshape.default"})
"""Steps that are no work."""

_LAYER = re.compile(r"\b(layers|linear_state|pending_k|pending_v|latent_cache)\.(\d+)\b")


def text(plan: Plan) -> str:
    """The plan in folded lines."""
    return "\n".join(lines(plan)) + "\n"


def lines(plan: Plan) -> Iterator[str]:
    """The plan in folded lines: model, states, weights, then each phase step by step."""
    facts = [f"{plan.config[key]} {word}" for key, word in FACTS.items() if key in plan.config]
    yield f"model      {', '.join(facts)}"
    yield f"precision  {plan.precision}"
    yield f"target     {plan.target}, {plan.activation} activations"
    yield f"sizes      {plan.page_size} tokens a page, {plan.max_draft} drafts"
    yield ""
    yield f"states ({len(plan.states)})"
    yield from _folded((name, str(kind)) for name, kind in plan.states.items())
    total = sum(spec.type.bytes() for spec in plan.weights.values())
    yield ""
    yield f"weights ({len(plan.weights)}, {total:,} bytes)"
    yield from _folded((name, _made(spec)) for name, spec in plan.weights.items())
    for phase in filter(plan.programs.__contains__, PHASES):
        yield ""
        yield from _program(phase, plan.programs[phase])


# ------------------------------------------------------------------------------ states and weights


def _folded(records: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A line for each kind of record, with the layers that have it."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, value in records:
        found = _LAYER.search(name)
        layer = int(found[2]) if found else -1
        kind = (_relative(name, layer), _relative(value, layer))
        kinds.setdefault(kind, []).append(layer)
    for (name, value), layers in kinds.items():
        numbers = ranges(sorted(layers))
        which = numbers if len(layers) == 1 else f"{{{numbers}}}"
        yield f"  {name.replace('{l}', which, 1)}: {value}"


def _made(spec: WeightSpec) -> str:
    """Type, storage and origin of a weight."""
    parts = [str(spec.type)]
    if spec.format != "plain":
        group = f"({spec.group})" if spec.group else ""
        part = f" {spec.part}" if spec.part != "values" else ""
        parts.append(f"{spec.format}{group}{part}")
    if spec.sources:
        taken = f"{spec.take} of " if spec.take else ""
        last = f", {_joined(spec.last)}" if spec.last else ""
        parts.append(f"= {taken}{_joined(spec.sources)}{last}")
    if spec.shard_axis is not None:
        parts.append(f"/ axis {spec.shard_axis}")
    if spec.layout != "plain":
        parts.append(f"as {spec.layout}")
    return " ".join(parts)


def _joined(sources: Sequence[str]) -> str:
    """`model.x.(gate_proj + up_proj).weight` for two names that have the rest in common."""
    if len(sources) == 1:
        return sources[0]
    names = [source.split(".") for source in sources]
    head = _shared(names)
    tail = _shared([name[::-1] for name in names])[::-1]
    apart = [".".join(name[len(head) : len(name) - len(tail)]) for name in names]
    return ".".join([*head, f"({' + '.join(apart)})", *tail])


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """The parts that all names begin with."""
    together = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*names, strict=False))
    return [part for part, *_ in together]


# ---------------------------------------------------------------------------------------- programs


def _program(phase: str, program: Program) -> Iterator[str]:
    """Every step; runs of steps that differ in nothing but the layer's number as one."""
    yield f"{phase}({', '.join(_typed(program.types, name) for name in program.inputs)})"
    blocks: dict[Hashable, tuple[list[int], list[str]]] = {}
    counts = step_counts(program)
    for layer, steps in itertools.groupby(program.steps, key=lambda step: step.layer):
        written = [_step(program, step) for step in steps]
        # Steps outside the layers stay where they are.
        key = (counts[layer], *written) if layer >= 0 else len(blocks)
        blocks.setdefault(key, ([], written))[0].append(layer)
    for layers, written in blocks.values():
        if layers[0] >= 0:
            yield f"  layer {ranges(layers)} ({counts[layers[0]]} steps)"
        indent = "    " if layers[0] >= 0 else "  "
        yield from (indent + line for line in written)
    for role, name in program.outputs.items():
        yield f"  return {role} = {name}"
    yield from _folded((f"update {name}", value) for name, value in program.updates.items())


def step_counts(program: Program) -> dict[int, int]:
    """Layer -> how many of its steps are work; -1 for those outside the layers."""
    return dict(Counter(step.layer for step in program.steps if step.op not in VIEWS))


def _step(program: Program, step: Step) -> str:
    results = ", ".join(_typed(program.types, name) for name in step.outputs)
    arguments = ", ".join(_argument(value) for value in step.args)
    written = _relative(f"{results} = {step.op}({arguments})", step.layer)
    # What belongs to the layer itself begins with a dot.
    return written.replace("layers.{l}", "")


def _typed(types: Mapping[str, TensorType], name: str) -> str:
    return f"{name} {types[name]}"


def _argument(value: Any) -> str:
    match value:
        case Ref() | Size():
            return value.name
        case tuple():
            shown = [_argument(item) for item in value[:SHOWN]]
            rest = [f"... {len(value)} in all"] if len(value) > SHOWN else []
            return f"[{', '.join([*shown, *rest])}]"
        case float():
            return f"{value:.6g}"
    return repr(value)


def _relative(written: str, layer: int) -> str:
    """The text with numbers of this layer and the one before by name."""

    def name(found: re.Match[str]) -> str:
        offset = int(found[2]) - layer
        if layer < 0 or offset not in (0, -1):
            return found[0]
        return f"{found[1]}.{{l{offset or ''}}}"

    return _LAYER.sub(name, written)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short.

    >>> ranges([0, 1, 2, 4])
    '0-2, 4'
    """
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ", ".join(parts)
