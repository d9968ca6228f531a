"""A plan as text that a person can review: layers of one kind are written once."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lingc.plan import PHASES, Plan, Program, Ref, Size, Step

_OF_LAYER = re.compile(r"\b(layers|linear_state|pending_k|pending_v|latent_cache)\.(\d+)\b")


def lines(plan: Plan) -> Iterator[str]:
    """Every program, step by step.

    `{l}` stands for the number of the layer, `{l-1}` for that of the one before. Layers whose
    steps differ in nothing else share one block.
    """
    yield f"plan: {plan.precision} for {plan.target}, {plan.activation} activations"
    for phase in filter(plan.programs.__contains__, PHASES):
        program = plan.programs[phase]
        yield ""
        yield f"{phase}({', '.join(_typed(program, name) for name in program.inputs)})"
        yield from _steps(program)
        for role, name in program.outputs.items():
            yield f"  return {role} = {_typed(program, name)}"


def _steps(program: Program) -> Iterator[str]:
    blocks: list[tuple[list[int], list[str]]] = []
    for layer, steps in itertools.groupby(program.steps, key=lambda step: step.layer):
        text = [_step(program, step) for step in steps]
        same = next((block for block in blocks if block[1] == text and layer >= 0), None)
        if same is None:
            blocks.append(([layer], text))
        else:
            same[0].append(layer)
    for layers, text in blocks:
        if layers[0] >= 0:
            yield f"  layers {_ranges(layers)}:"
        indent = "    " if layers[0] >= 0 else "  "
        yield from (indent + line for line in text)


def _step(program: Program, step: Step) -> str:
    results = ", ".join(_typed(program, name) for name in step.outputs)
    arguments = ", ".join(_argument(value) for value in step.args)
    text = f"{results} = {step.op}({arguments})"
    return _OF_LAYER.sub(lambda found: _relative(found, step.layer), text)


def _relative(found: re.Match[str], layer: int) -> str:
    offset = int(found[2]) - layer
    if layer < 0 or offset not in (0, -1):
        return found[0]
    return f"{found[1]}.{{l{offset or ''}}}"


def _argument(value: Any) -> str:
    match value:
        case Ref() | Size():
            return value.name
        case tuple():
            # A vector of RoPE frequencies would hide the rest of the line.
            shown = [_argument(item) for item in value[:8]]
            more = [f"... {len(value)} in all"] if len(value) > len(shown) else []
            return f"[{', '.join([*shown, *more])}]"
        case float():
            return f"{value:.6g}"
    return repr(value)


def _typed(program: Program, name: str) -> str:
    kind = program.types.get(name)
    return name if kind is None else f"{name}: {kind}"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2, 4` for 0, 1, 2, 4."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ", ".join(parts)
