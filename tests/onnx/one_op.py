"""One op as a plan, lowered and run: by ONNX Runtime, or by the ONNX reference evaluator."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from lingc.op import DTYPE_NAME, Op
from lingc.plan import Arg, Plan, Program, Ref, Step, TensorType, WeightSpec
from lingc.quantize.layouts import arrange
from lingc.runtime.onnx_weights import initializer_from_json, load
from lingc.targets.onnx import OnnxEngine, embedded, lower
from lingc.targets.onnx.functions import FUNCTIONS

Array = NDArray[Any]

OPEN = {
    **dict.fromkeys(("x", "residual", "q", "k", "v", "qkv", "qkvg", "o", "a", "base"), "T"),
    **dict.fromkeys(("token_ids", "positions", "rows", "ids", "weights", "cos", "sin"), "T"),
    **dict.fromkeys(("codes", "scales", "gate", "gate_up"), "T"),
    **dict.fromkeys(("slots", "accepted", "page_table"), "B"),
    **dict.fromkeys(("state", "pending_k", "pending_v"), "S"),
    "offsets": "B+1",
    "cache": "R",
}
"""Argument -> what its first axis counts."""

WEIGHTS = frozenset(
    {
        "weight", "q_weight", "k_weight", "kv_weight", "norm_weight", "bias", "decay", "kv_b",
        "w_k", "w_v", "down", "packed", "weight_scale", "gate_up_scale", "down_scale",
    }
)  # fmt: skip

OUTPUT = "result"


def is_weight(op: str, argument: str) -> bool:
    if argument == "gate_up":
        return op.endswith("experts")
    return argument in WEIGHTS or (argument == "scales" and op.startswith("int4"))


def stored(x: Tensor) -> Array:
    """A tensor as an engine holds it: what NumPy lacks, as bits."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy()
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8).numpy()
    return x.numpy()


class OneOp:
    """A plan of one step, its weights and its inputs."""

    def __init__(self, op: Op, args: Sequence[Any], phase: str) -> None:
        self.weights: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        types, given = dict[str, TensorType](), list[Arg]()
        names = [name.lstrip("_") for name in inspect.signature(FUNCTIONS[op.name]).parameters]
        for name, arg in zip(names[1:], args, strict=True):
            if not isinstance(arg, Tensor):
                given.append(tuple(arg) if isinstance(arg, list) else arg)
                continue
            given.append(Ref(name))
            shape: tuple[int | str, ...] = tuple(arg.shape)
            if is_weight(op.name, name):
                self.weights[name] = arg
            else:
                self.inputs[name] = arg
                shape = (OPEN[name], *("P" if name == "page_table" else s for s in shape[1:]))
            types[name] = TensorType(DTYPE_NAME[arg.dtype], shape)
        made = op.types(*(types[g.name] if isinstance(g, Ref) else g for g in given))
        results = made if isinstance(made, tuple) else (made,)
        outputs = {f"{OUTPUT}{i}": result for i, result in enumerate(results)}
        specs = {n: WeightSpec(name=n, type=types[n], sources=()) for n in self.weights}
        program = Program(
            inputs=tuple(self.inputs),
            states=(),
            outputs={name: name for name in outputs},
            updates={},
            weights=tuple(specs),
            types=types | outputs,
            steps=(Step(op=f"lingc.{op.name}", args=tuple(given), outputs=tuple(outputs)),),
        )
        self.plan = plan_of({phase: program}, specs)


def plan_of(
    programs: Mapping[str, Program], weights: Mapping[str, WeightSpec], activation: str = "f32"
) -> Plan:
    return Plan(
        config={},
        precision="bf16",
        target="cpu",
        activation=activation,
        page_size=1,
        max_draft=0,
        states={},
        weights=weights,
        programs=programs,
    )


def initializers(engine: OnnxEngine, weights: Mapping[str, Array]) -> dict[str, Array]:
    packed = {w.name: arrange(w.layout, weights[w.name]) for w in engine.weights}
    made = [initializer_from_json(item) for item in engine.info["initializers"]]
    return {item.name: load(item, packed) for item in made}


def run_op(
    op: Op,
    args: Sequence[Any],
    *,
    library: str = "ort",
    widen: str = "load",
    phase: str = "prefill",
    evaluate: bool = False,
) -> list[Tensor]:
    """Results of an op's function.

    Args:
        op: The op.
        args: In the order of its schema.
        library: The library of functions.
        widen: When weights are widened.
        phase: The phase that the op stands in.
        evaluate: Run by the ONNX reference evaluator, after the checker, not by ONNX Runtime.
    """
    one = OneOp(op, args, phase)
    engine = lower(one.plan, library=library, widen=widen)
    held = initializers(engine, {name: stored(value) for name, value in one.weights.items()})
    model = onnx.ModelProto.FromString(embedded(engine.models[phase], held))
    if evaluate:
        onnx.checker.check_model(model)
        made = ReferenceEvaluator(model).run(None, {n: v.numpy() for n, v in one.inputs.items()})
        return [torch.from_numpy(np.asarray(value)) for value in made]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    numbers = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    feeds = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(stored(v), numbers[name])
        for name, v in one.inputs.items()
    }
    return [_tensor(value) for value in session.run_with_ort_values(None, feeds)]


def _tensor(value: Any) -> Tensor:
    array = value.numpy()
    if value.element_type() == onnx.TensorProto.FLOAT8E4M3FN:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)
