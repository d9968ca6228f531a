"""Fused programs to a plan: names, numbers, and nothing else."""

import logging
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from lingc.capture import Sizes, input_types
from lingc.context import Context
from lingc.errors import StageError
from lingc.graph import Fused, Value, is_weight, target_name, tensor_type, type_of, where
from lingc.op import OPS
from lingc.plan import (
    DTYPE_BYTES,
    Arg,
    Plan,
    Program,
    Ref,
    Size,
    Step,
    TensorType,
    WeightSpec,
)
from lingc.quantize.layouts import PLAIN, layout_refusal
from lingc.sizing.memory import state_types

log = logging.getLogger(__name__)


def lower(programs: Mapping[str, Fused], context: Context, sizes: Sizes) -> Plan:
    """Make the plan of all phases.

    Args:
        programs: phase -> fused program.
        context: Model, target and recipe; its phase is not read.
        sizes: What the programs were captured with.
    """
    activation = context.target.activations
    return Plan(
        config=dict(context.config.raw),
        precision=context.recipe.name,
        target=context.target.name,
        activation=activation,
        page_size=sizes.page_size,
        max_draft=sizes.max_draft,
        states=state_types(
            context.config, activation, max_draft=sizes.max_draft, has_mtp="draft" in programs
        ),
        weights=_weights(programs, context),
        programs={
            phase: _Lowering(program).program(tuple(input_types(context.config, phase)))
            for phase, program in programs.items()
        },
    )


def _weights(programs: Mapping[str, Fused], context: Context) -> dict[str, WeightSpec]:
    """Every weight by name, in the layout that the target's own kernels want it in."""
    specs: dict[str, WeightSpec] = {}
    refused: dict[str, str] = {}
    for program in programs.values():
        layouts = _layouts(program) if context.fuses_launches else {}
        for name, node in program.weights.items():
            spec, layout = node.meta["weight"], layouts.get(name, PLAIN)
            reason = _refusal(layout, spec.type)
            if reason is not None:
                refused[name], layout = reason, PLAIN
            made = replace(spec, layout=layout)
            if specs.setdefault(name, made) != made:
                raise StageError(f"two phases want weight {name!r} made differently")
    for name, reason in sorted(refused.items())[:1]:
        message = "%s has no kernels for %d of %d weights, such as %s: %s"
        log.warning(message, context.target.name, len(refused), len(specs), name, reason)
    return dict(sorted(specs.items()))


def _layouts(program: Fused) -> dict[str, str]:
    """The layout that the op which reads it wants each weight in."""
    found: dict[str, str] = {}
    for node in program.calls():
        op = OPS.get(target_name(node).removeprefix("lingc."))
        if op is None:
            continue
        given: tuple[Value, ...] = tuple(node.args)
        wanted = op.layouts(*map(type_of, given))
        for argument, value in zip(op.arguments, given, strict=True):
            if is_weight(value):
                layout = wanted.get(argument, PLAIN)
                if found.setdefault(value.meta["name"], layout) != layout:
                    raise StageError(f"{where(node)} wants {value.name} in another layout")
    return found


def _refusal(layout: str, kind: TensorType) -> str | None:
    if layout == PLAIN:
        return None
    *_, rows, width = kind.bind({})
    return layout_refusal(layout, rows, width * DTYPE_BYTES[kind.dtype])


class _Lowering:
    """Names the values of one program, and writes its steps."""

    def __init__(self, program: Fused) -> None:
        self.fused = program
        self.names: dict[fx.Node, str] = {}
        self.types: dict[str, TensorType] = {}
        self.taken: dict[str, int] = {}

    def program(self, inputs: tuple[str, ...]) -> Program:
        for role in ("input", "state"):
            for node in self.fused.placeholders(role):
                self._call(node, node.meta["name"])
        for name, node in self.fused.weights.items():
            self._call(node, name)
        steps = [step for node in self.fused.calls() if (step := self._step(node))]
        results = [self._name(node) for node in self.fused.results()]
        count = len(self.fused.outputs)
        return Program(
            inputs=inputs,
            states=tuple(node.meta["name"] for node in self.fused.placeholders("state")),
            outputs=dict(zip(self.fused.outputs, results[:count], strict=True)),
            updates=dict(zip(self.fused.updates, results[count:], strict=True)),
            weights=tuple(sorted(self.fused.weights)),
            types=self.types,
            steps=tuple(steps),
        )

    def _call(self, node: fx.Node, name: str) -> str:
        self.names[node] = name
        self.types[name] = tensor_type(node)
        return name

    def _name(self, node: Value) -> str:
        if node not in self.names:
            raise StageError(f"{where(node)} is read before it is made")
        return self.names[node]

    def _fresh(self, node: fx.Node) -> str:
        """`layers.3.router`, then `layers.3.router.1`."""
        layer = node.meta["layer"]
        op = target_name(node).removeprefix("lingc.").removeprefix("aten.").partition(".")[0]
        stem = f"layers.{layer}.{op}" if layer >= 0 else op
        seen = self.taken.get(stem, 0)
        self.taken[stem] = seen + 1
        return f"{stem}.{seen}" if seen else stem

    def _step(self, node: fx.Node) -> Step | None:
        if node.target is operator.getitem or isinstance(node.meta["type"], str):
            return None  # a part of a result, or the size of an axis
        if node.kwargs:
            raise StageError(f"{where(node)} has keyword arguments, a step has none")
        return Step(
            op=target_name(node),
            args=tuple(self._arg(value) for value in node.args),
            outputs=self._outputs(node),
            layer=node.meta["layer"],
            source=node.meta["source"],
        )

    def _outputs(self, node: fx.Node) -> tuple[str, ...]:
        kind = node.meta["type"]
        if isinstance(kind, TensorType):
            return (self._call(node, self._fresh(node)),)
        return self._several(node, kind)

    def _several(self, node: fx.Node, kinds: tuple[TensorType, ...]) -> tuple[str, ...]:
        """Name every result, those that nobody reads too."""
        stem = self._fresh(node)
        returns: Any = node.target._schema.returns  # type: ignore[union-attr]
        outputs = []
        for i, (kind, value) in enumerate(zip(kinds, returns, strict=True)):
            name = f"{stem}.{value.name or i}"
            self.types[name] = kind
            outputs.append(name)
        for user in node.users:
            self.names[user] = outputs[user.args[1]]  # type: ignore[index]
        return tuple(outputs)

    def _arg(self, value: Value) -> Arg:
        if isinstance(value, fx.Node):
            if isinstance(value.meta["type"], str):
                return Size(value.meta["type"])
            return Ref(self._name(value))
        if isinstance(value, list | tuple):
            return tuple(self._arg(item) for item in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise StageError(f"argument {value!r} has no form in a plan")
