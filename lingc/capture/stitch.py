"""Exported blocks, copied one after the other into one flat program."""

from collections.abc import Callable

import torch
from torch import fx

from lingc.capture.export import Piece
from lingc.capture.inputs import Sizes, input_types, phase_states
from lingc.errors import StageError
from lingc.graph import Program
from lingc.model.config import ModelConfig
from lingc.plan import TensorType

aten = torch.ops.aten

PLACEMENT = ("device", "pin_memory", "layout")


class Stitcher:
    """Copies pieces into one flat program, layer by layer."""

    def __init__(self, config: ModelConfig, phase: str, sizes: Sizes) -> None:
        self.config = config
        self.program = Program(phase=phase, graph=fx.Graph(), outputs=(), updates=())
        self.inputs: dict[str, fx.Node] = {}
        self.states: dict[str, fx.Node] = {}
        for name, kind in input_types(config, phase).items():
            self.inputs[name] = self.program.placeholder(name, "input", kind)
        for name, kind in phase_states(config, phase, sizes).items():
            self.states[name] = self.program.placeholder(name, "state", kind)

    def constant(self, name: str, values: tuple[float, ...]) -> fx.Node:
        """A vector known from the config, such as rotary frequencies."""
        for node in self.program.placeholders("constant"):
            if node.meta["name"] == name:
                return node
        node = self.program.placeholder(name, "constant", TensorType("f32", (len(values),)))
        node.meta["values"] = values
        return node

    def add(
        self,
        piece: Piece,
        arguments: tuple[fx.Node, ...],
        weight: Callable[[str, fx.Node], fx.Node],
        layer: int,
    ) -> tuple[fx.Node, ...]:
        """Copy a piece; return the nodes of its results."""
        here: dict[fx.Node, fx.Node] = {}
        for node in piece.graph.nodes:
            if node.op == "placeholder":
                kind, name = piece.sources[node]
                here[node] = arguments[name] if kind == "argument" else weight(name, node)
            elif node.op == "call_function":
                if node.target is aten._assert_tensor_metadata.default:
                    continue
                copy = self.program.graph.node_copy(node, lambda n: here[n])
                # A program belongs to no device.
                copy.kwargs = {k: v for k, v in copy.kwargs.items() if k not in PLACEMENT}
                copy.meta = {
                    "type": node.meta.get("type"),
                    "layer": layer,
                    "source": node.meta["source"],
                }
                here[node] = copy
            else:
                return tuple(here[n] for n in node.args[0])
        raise StageError("a captured block has no output")
