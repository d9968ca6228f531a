"""Plugin layers in an RTX network, which only its ONNX parser can make.

The parser takes an empty network alone, but what it made can be extended. So one ONNX model with
all plugins, on constants of one element, is parsed first; lowering gives each layer its inputs.
The constants become dead layers, which cost nothing.
"""

from collections.abc import Sequence
from typing import Any

from onnx import TensorProto, helper

from lingc.errors import StageError
from lingc.runtime.tensorrt_plugin import (
    CALL_FIELD,
    NAMESPACE,
    OPS_FIELD,
    TABLE_FIELD,
    VERSION,
    OpPlugin,
)

ONNX_DTYPE = {
    "f32": (TensorProto.FLOAT, 4),
    "bf16": (TensorProto.BFLOAT16, 2),
    "f8e4m3": (TensorProto.FLOAT8E4M3FN, 1),
    "i32": (TensorProto.INT32, 4),
    "i64": (TensorProto.INT64, 8),
}
"""Element types of plugin inputs, and their bytes."""

_OPSET, _IR_VERSION = 21, 10


def seed(trt: Any, log: Any, network: Any, plugins: Sequence[OpPlugin]) -> tuple[Any, list[Any]]:
    """Make the layers of plugins in an empty network.

    Returns:
        The parser, to be kept as long as the network, and the layers in the order of `plugins`.

    Raises:
        StageError: The parser refuses.
    """
    nodes, outputs = [], []
    # One constant for all inputs of a type and rank.
    values: dict[str, TensorProto] = {}
    for number, plugin in enumerate(plugins):
        call = plugin.call
        inputs = [f"seed.{dtype}.{rank}" for _, dtype, rank in call.inputs]
        for name, (_, dtype, rank) in zip(inputs, call.inputs, strict=True):
            kind, size = ONNX_DTYPE[dtype]
            values[name] = TensorProto(
                name=name, data_type=kind, dims=[1] * rank, raw_data=bytes(size)
            )
        made = [f"seeded.{number}.{one.name}" for one in call.outputs]
        for name, one in zip(made, call.outputs, strict=True):
            outputs.append(helper.make_tensor_value_info(name, ONNX_DTYPE[one.dtype][0], None))
        given: dict[str, Any] = {
            OPS_FIELD: call.op,
            TABLE_FIELD: plugin.launcher.digest,
            CALL_FIELD: plugin.number,
            "plugin_namespace": NAMESPACE,
            "plugin_version": VERSION,
        }
        nodes.append(
            helper.make_node(
                plugin.plugin_name, inputs, made, name=_name(number), domain=NAMESPACE, **given
            )
        )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(NAMESPACE, 1)]
    graph = helper.make_graph(nodes, "seed", [], outputs, list(values.values()))
    model = helper.make_model(graph, ir_version=_IR_VERSION, opset_imports=opsets)
    parser = trt.OnnxParser(network, log)
    if not nodes:
        return parser, []
    if not parser.parse(model.SerializeToString()):
        told = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise StageError(
            f"TensorRT's parser takes no plugin: {told[:600]}",
            hint="a fault of lingc, or of this TensorRT; please report it",
        )
    layers = {network.get_layer(i).name: network.get_layer(i) for i in range(network.num_layers)}
    for tensor in [network.get_output(i) for i in range(network.num_outputs)]:
        network.unmark_output(tensor)
    return parser, [layers[_name(number)] for number in range(len(plugins))]


def _name(number: int) -> str:
    return f"plugin.{number}"
