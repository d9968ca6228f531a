"""A Torch-TensorRT that only registers converters and calls them, with its 2.13 signatures.

Read from pytorch/TensorRT at v2.13.0, `py/torch_tensorrt/dynamo/conversion`: what a converter is
registered with, the context that it is given, how the interpreter walks a graph.
"""

import enum
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import fx


class ConverterPriority(enum.Enum):
    STANDARD = enum.auto()
    HIGH = enum.auto()


@dataclass
class ConversionContext:
    net: Any
    compilation_settings: Any = None
    requires_output_allocator: bool = False
    requires_native_multidevice: bool = False
    weight_refit_map: dict[str, torch.Tensor] = field(default_factory=dict)
    cpu_weights_reference_holder: list[torch.Tensor] = field(default_factory=list)
    current_node: fx.Node | None = None


Converter = Callable[[ConversionContext, Any, Sequence[Any], Mapping[str, Any], str], Any]
Validator = Callable[[fx.Node, Any], bool]


class Registry:
    """Converters by target, those of high priority first."""

    def __init__(self) -> None:
        self.found: dict[Any, list[tuple[Converter, Validator]]] = {}

    def dynamo_tensorrt_converter(
        self, key: Any, *, enabled: bool = True, capability_validator: Validator | None = None,
        priority: ConverterPriority = ConverterPriority.STANDARD,
        supports_dynamic_shapes: bool = False, requires_output_allocator: bool = False,
        requires_native_multidevice: bool = False,
    ) -> Callable[[Converter], Converter]:  # fmt: skip
        assert enabled
        assert supports_dynamic_shapes
        assert not requires_output_allocator
        assert not requires_native_multidevice
        assert capability_validator is not None

        def register(converter: Converter) -> Converter:
            held = self.found.setdefault(key, [])
            place = 0 if priority is ConverterPriority.HIGH else len(held)
            held.insert(place, (converter, capability_validator))
            return converter

        return register

    def get(self, node: fx.Node) -> Converter | None:
        """The converter of a node, if one says that it can."""
        for converter, validator in self.found.get(node.target, ()):
            if validator(node, None):
                return converter
        return None

    def module(self) -> ModuleType:
        """`torch_tensorrt.dynamo.conversion`."""
        made = ModuleType("torch_tensorrt.dynamo.conversion")
        vars(made)["dynamo_tensorrt_converter"] = self.dynamo_tensorrt_converter
        vars(made)["ConverterPriority"] = ConverterPriority
        return made


def interpret(registry: Registry, graph: fx.GraphModule, network: Any) -> ConversionContext:
    """Convert a graph into a network, node by node; every op of it must be ours."""
    ctx = ConversionContext(net=network)
    values: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = network.add_input(node.name, node.meta["val"].dtype, ())
        elif node.op == "get_attr":
            values[node] = getattr(graph, node.target)
        elif node.op == "call_function" and node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            converter = registry.get(node)
            assert converter is not None, node
            ctx.current_node = node
            # The interpreter gives the node a keyword of its own, and takes it back.
            own, node.kwargs = node.kwargs, {**node.kwargs, "_itensor_to_tensor_meta": {}}
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = converter(ctx, node.target, args, kwargs, node.name)
            node.kwargs = own
        elif node.op == "output":
            for value in node.args[0]:
                network.mark_output(values[value])
    return ctx
