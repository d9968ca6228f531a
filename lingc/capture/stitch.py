"""Exported blocks, copied one after the other into one flat program."""

from collections.abc import Callable

import torch
from torch import fx

from lingc.capture.export import Piece
from lingc.capture.inputs import Sizes, input_types, phase_states
from lingc.errors import StageError
from lingc.graph import Program
from lingc.model.config import ModelConfig
from lingc.plan import TensorType, WeightSpec

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


SHARD_AXIS = {
    "query_key_value": 0, "g_proj": 0, "g_norm": 0, "decay": 0, "dense": 1,
    "q_b_proj": 0, "q_proj": 0, "kv_b_proj": 0, "lm_head": 0, "word_embeddings": 0,
    "gate_proj": 0, "up_proj": 0, "down_proj": 1,
}  # fmt: skip
"""Axis that tensor parallelism splits, by module; a matrix not named is whole on every rank."""


def weight_spec(config: ModelConfig, name: str, layer: int, kind: TensorType) -> WeightSpec:
    """The plan's record of one parameter.

    Args:
        name: Full name in the checkpoint, `.weight` included; experts as one stacked parameter.
        kind: Type of the parameter as captured.
    """
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    short = name.removeprefix("model.")
    if module == "decay":
        stored = TensorType("f32", kind.shape)
        return WeightSpec(
            name=short, type=stored, sources=(), format="decay", layer=layer, shard_axis=0
        )
    stored = TensorType("f32" if module == "expert_bias" else "bf16", kind.shape)
    axis = SHARD_AXIS.get(module)
    if ".experts." in name:
        parent, _, leaf = name.rpartition(".experts.")
        source = f"{parent}.experts.{{e}}.{leaf}.weight"
        whole = None if axis is None else axis + 1
        return WeightSpec(
            name=short, type=stored, sources=(source,), experts=config.num_experts, shard_axis=whole
        )
    return WeightSpec(name=short, type=stored, sources=(name,), shard_axis=axis)
