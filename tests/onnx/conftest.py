"""One op as a plan, a plan as models, models run by ONNX Runtime or the ONNX reference evaluator."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from lingc.op import DTYPE_NAME
from lingc.plan import Arg, Plan, Program, Ref, Step, TensorType, WeightSpec
from lingc.quantize.layouts import arrange
from lingc.runtime.onnx_weights import initializer_from_json, load
from lingc.targets.onnx import OnnxEngine, embedded, lower
from lingc.targets.onnx.functions import FUNCTIONS

OPEN = {
    **dict.fromkeys(("x", "residual", "q", "k", "v", "qkv", "qkvg", "o", "a", "base"), "T"),
    **dict.fromkeys(("token_ids", "positions", "rows", "ids", "weights", "cos", "sin"), "T"),
    **dict.fromkeys(("codes", "scales", "gate", "gate_up"), "T"),
    **dict.fromkeys(("slots", "accepted", "page_table"), "B"),
    **dict.fromkeys(("state", "pending_k", "pending_v"), "S"),
    "offsets": "B1",
    "cache": "R",
}
WEIGHTS = {
    "weight", "q_weight", "k_weight", "kv_weight", "norm_weight", "bias", "decay", "kv_b", "w_k",
    "w_v", "down", "packed", "weight_scale", "gate_up_scale", "down_scale",
}  # fmt: skip


def parameters(op: str) -> list[str]:
    return [name.lstrip("_") for name in inspect.signature(FUNCTIONS[op]).parameters][1:]


def is_weight(op: str, parameter: str) -> bool:
    if parameter == "gate_up":
        return op.endswith("experts")
    return parameter in WEIGHTS or (parameter == "scales" and op.startswith("int4"))


def stored(x: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as an engine holds it: what NumPy lacks as bits."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy()
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8).numpy()
    return x.numpy()


class OneOp:
    """A plan of one step, and what it is given."""

    def __init__(self, op: str, args: Sequence[Any], results: int, *, phase: str) -> None:
        self.phase = phase
        types: dict[str, TensorType] = {}
        specs: dict[str, WeightSpec] = {}
        self.weights: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        given: list[Arg] = []
        for name, arg in zip(parameters(op), args, strict=True):
            if not isinstance(arg, Tensor):
                given.append(tuple(arg) if isinstance(arg, list) else arg)
                continue
            given.append(Ref(name))
            shape: tuple[int | str, ...] = tuple(arg.shape)
            if is_weight(op, name):
                self.weights[name] = arg
                specs[name] = WeightSpec(
                    name=name, type=TensorType(DTYPE_NAME[arg.dtype], shape), sources=()
                )
            else:
                self.inputs[name] = arg
                shape = (OPEN[name], "P") if name == "page_table" else (OPEN[name], *shape[1:])
            types[name] = TensorType(DTYPE_NAME[arg.dtype], shape)
        self.results = [f"result.{i}" for i in range(results)]
        # The types of results are not read by the lowering but for the graph's outputs.
        types |= {name: TensorType("f32", ()) for name in self.results}
        program = Program(
            inputs=tuple(self.inputs),
            states=(),
            outputs={name: name for name in self.results},
            updates={},
            weights=tuple(specs),
            types=types,
            steps=(Step(op=f"lingc.{op}", args=tuple(given), outputs=tuple(self.results)),),
        )
        self.plan = Plan(
            config={},
            precision="bf16",
            target="cpu",
            activation="f32",
            page_size=1,
            max_draft=0,
            states={},
            weights=specs,
            programs={phase: program},
        )


def initializers(engine: OnnxEngine, weights: Mapping[str, Any]) -> dict[str, Any]:
    packed = {w.name: arrange(w.layout, weights[w.name]) for w in engine.weights}
    made = [initializer_from_json(item) for item in engine.info["initializers"]]
    return {item.name: load(item, packed) for item in made}


def untyped_outputs(model: bytes) -> bytes:
    """The model with outputs of any type, so that a test need not know them."""
    made = onnx.ModelProto.FromString(model)
    for value in made.graph.output:
        value.ClearField("type")
    return made.SerializeToString()


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


RunOp = Callable[..., list[Tensor]]


@pytest.fixture
def run_op() -> RunOp:
    """`run_op(name, args, results, library=, widen=, phase=, evaluator=)`."""

    def run(
        name: str,
        args: Sequence[Any],
        results: int,
        *,
        library: str = "ort",
        widen: str = "load",
        phase: str = "prefill",
        evaluator: str = "ort",
    ) -> list[Tensor]:
        one = OneOp(name, args, results, phase=phase)
        engine = lower(one.plan, library=library, widen=widen)
        weights = {key: stored(value) for key, value in one.weights.items()}
        model = untyped_outputs(
            embedded(engine.models[phase], initializers(engine, weights))
        )
        if evaluator == "reference":
            onnx.checker.check_model(onnx.ModelProto.FromString(embedded(engine.models[phase], initializers(engine, weights))))
            feeds = {key: value.numpy() for key, value in one.inputs.items()}
            made = ReferenceEvaluator(onnx.ModelProto.FromString(model)).run(None, feeds)
            return [torch.from_numpy(np.asarray(value)) for value in made]
        found = session(model)
        feeds = {}
        for key, value in one.inputs.items():
            if value.dtype == torch.float8_e4m3fn:
                feeds[key] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    stored(value), onnx.TensorProto.FLOAT8E4M3FN
                )
            else:
                feeds[key] = onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy())
        outputs = found.run_with_ort_values(None, feeds)
        return [_tensor(value) for value in outputs]

    return run


def _tensor(value: onnxruntime.OrtValue) -> Tensor:
    if value.element_type() == onnx.TensorProto.FLOAT8E4M3FN:
        return torch.from_dlpack(value._ortvalue) if False else torch.from_numpy(value.numpy().view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(value.numpy())
