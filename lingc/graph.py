"""Programs as FX graphs, and how to read them.

A program is one phase of the model: a flat graph of calls whose placeholders carry a role and
whose every value carries a `TensorType` with named axes. Types stand in `node.meta["type"]`, the
absolute layer in `node.meta["layer"]` (-1 outside the layers), the line of the model in
`node.meta["source"]`.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NewType

import torch
from torch import fx

from lingc.errors import StageError
from lingc.plan import TensorType, WeightSpec

Value = Any  # a node, a literal, or a list of them


@dataclass(slots=True)
class Program:
    """One phase, as a graph that the rewrite engine may edit.

    Attributes:
        phase: One of `lingc.plan.PHASES`.
        graph: Placeholders first, by role: inputs, constants, states, weights. The output node
            holds the values of `outputs` and then those of `updates`.
        outputs: Roles of the first outputs, e.g. `("logits", "hidden")`.
        updates: State names that the remaining outputs replace, in order.
    """

    phase: str
    graph: fx.Graph
    outputs: tuple[str, ...]
    updates: tuple[str, ...]
    weights: dict[str, fx.Node] = field(default_factory=dict)

    def placeholders(self, role: str) -> list[fx.Node]:
        """Placeholders of one role: `input`, `constant`, `state` or `weight`."""
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.meta["role"] == role]

    def calls(self) -> list[fx.Node]:
        """Every call, in order."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    def results(self) -> tuple[fx.Node, ...]:
        """The nodes that the output node holds."""
        (node,) = (n for n in self.graph.nodes if n.op == "output")
        return tuple(node.args[0])

    def weight(self, spec: WeightSpec) -> fx.Node:
        """The placeholder of a weight, made where it does not exist yet.

        Raises:
            StageError: A weight of that name exists and is made differently.
        """
        known = self.weights.get(spec.name)
        if known is not None:
            if known.meta["weight"] != spec:
                raise StageError(f"two different weights are called {spec.name!r}")
            return known
        node = self.placeholder(spec.name, "weight", spec.type)
        node.meta["weight"] = spec
        self.weights[spec.name] = node
        return node

    def placeholder(self, name: str, role: str, kind: TensorType) -> fx.Node:
        """A new placeholder, behind the last one."""
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        at = self.graph.inserting_before(first) if first is not None else nullcontext()
        with at:
            node = self.graph.placeholder(_identifier(name))
        node.meta.update(role=role, name=name, type=kind, layer=-1, source="")
        return node


Captured = NewType("Captured", Program)
"""Functional ATen and the structural ops, as the model says it."""

Fused = NewType("Fused", Program)
"""Only what the chosen engine kind can lower."""


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def type_of(value: Value) -> Any:
    """The type of a node, or a literal as it is; lists become tuples of types."""
    if isinstance(value, fx.Node):
        return value.meta["type"]
    if isinstance(value, list | tuple):
        return [type_of(item) for item in value]
    return value


def tensor_type(node: Value) -> TensorType:
    """The type of a node that is one tensor."""
    found = type_of(node)
    assert isinstance(found, TensorType), f"{node} is {found}, not one tensor"
    return found


def where(node: fx.Node) -> str:
    """The node and the line of the model it came from, for messages."""
    target = target_name(node)
    source = node.meta.get("source") or "no source line"
    layer = node.meta.get("layer", -1)
    place = f"layer {layer}, " if layer >= 0 else ""
    return f"{node.name} = {target} ({place}{source})"


def target_name(node: fx.Node) -> str:
    """`aten.add.Tensor`, `lingc.router`, `getitem`, or the op kind of a non-call."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        return name.removesuffix(".default") if name.startswith("lingc.") else name
    return getattr(node.target, "__name__", str(node.target))


def is_weight(value: Value) -> bool:
    """Whether a value is a weight's placeholder."""
    return isinstance(value, fx.Node) and value.meta.get("role") == "weight"


def full_args(node: fx.Node) -> tuple[Value, ...]:
    """All arguments by position, keyword arguments and defaults filled in from the schema."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return tuple(node.args)
    arguments = target._schema.arguments
    values: list[Value] = []
    for i, argument in enumerate(arguments):
        if i < len(node.args):
            values.append(node.args[i])
        elif argument.name in node.kwargs:
            values.append(node.kwargs[argument.name])
        else:
            values.append(argument.default_value)
    return tuple(values)


def text(program: Program) -> Iterator[str]:
    """The program, a line a node, for dumps and for people."""
    for node in program.graph.nodes:
        if node.op == "placeholder":
            yield f"{node.meta['role']:8} {node.name}: {node.meta['type']}"
        elif node.op == "call_function":
            args = ", ".join(_show(a) for a in node.args)
            yield (
                f"{node.name}: {node.meta['type']} = {target_name(node)}({args})"
                f"  # {node.meta.get('layer', -1)} {node.meta.get('source', '')}"
            )
    names = (*program.outputs, *program.updates)
    for name, node in zip(names, program.results(), strict=True):
        yield f"output   {name}: {node.name}"


def _show(value: Value) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return value.name if isinstance(value, fx.Node) else repr(value)
