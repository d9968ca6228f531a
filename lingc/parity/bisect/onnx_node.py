"""One node of an ONNX engine as a model of its own."""

from collections.abc import Mapping

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from lingc.runtime.backend import Array
from lingc.runtime.onnx_backend import OnnxModels
from lingc.runtime.onnx_weights import initializer_from_json, load
from lingc.targets.onnx.body import LINGC, ONNX_DTYPE
from lingc.targets.onnx.lower import embedded

_SLOT_STATES = ("linear_state.", "pending_")


def alone(models: OnnxModels, name: str, output: str, weights: Mapping[str, Array]) -> bytes | None:
    """The node that makes a value, with its function, and its weights inside.

    Args:
        models: Of the engine.
        name: Which of its models.
        output: The value.
        weights: The engine's, by name, as they are stored.

    Returns:
        A model whose inputs and outputs have the plan's names; None where the value is a view, or
        the model holds fewer slots than the plan says.
    """
    whole = ModelProto.FromString(models.models[name])
    node = next((n for n in whole.graph.node if output in n.output), None)
    if node is None or node.domain != LINGC:
        return None
    phase = next(p for p in models.plan.programs if name == p or name.startswith(f"{p}_"))
    types = models.plan.programs[phase].types
    if "settled" in name or name.endswith("_one"):
        fewer = any(given.startswith(_SLOT_STATES) for given in node.input)
        if fewer and phase == "decode":
            return None
    stored = {tensor.name: tensor for tensor in whole.graph.initializer}
    inputs = [n for n in dict.fromkeys(node.input) if n and n not in stored]
    if any(n not in types for n in (*inputs, *node.output)):
        return None

    def declared(value: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(value, ONNX_DTYPE[types[value].dtype], None)

    graph = helper.make_graph(
        [node], name, [declared(n) for n in inputs], [declared(n) for n in node.output if n]
    )
    read = [stored[n] for n in dict.fromkeys(node.input) if n in stored]
    graph.initializer.extend(TensorProto.FromString(t.SerializeToString()) for t in read)
    function = [f for f in whole.functions if (f.name, f.overload) == (node.op_type, node.overload)]
    made = helper.make_model(
        graph,
        functions=function,
        opset_imports=list(whole.opset_import),
        ir_version=whole.ir_version,
    )
    wanted = {tensor.name for tensor in read}
    arrays = {
        one.name: load(one, weights)
        for item in models.info["initializers"]
        if (one := initializer_from_json(item)).name in wanted
    }
    return embedded(made.SerializeToString(), arrays)
