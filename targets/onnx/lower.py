"""Lowers a plan for a CPU to ONNX models, one a phase.

Every fused op becomes a node `lingc::<op>`, with a function of that name and overload that says
what it computes, in standard ops or with ONNX Runtime's own. Weights are initializers without data:
`Initializer` says what each is made of. Their external locations name one file, for consumers that
want a file; `embedded` gives a model that holds its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from onnx import GraphProto, ModelProto, TensorProto, helper

from lingc.errors import UnsupportedError, UsageError
from lingc.plan import PHASES, Plan
from lingc.runtime.onnx_weights import WEIGHTS_FILE, Array, Initializer
from lingc.targets.onnx.body import LINGC, ONNX_DTYPE, OPSET
from lingc.targets.onnx.library_ort import Ort
from lingc.targets.onnx.library_standard import Standard
from lingc.targets.onnx.phase import MORE_MODELS, Model, Phase
from lingc.targets.onnx.weights import EngineWeight, Weights, widening

LIBRARIES: Mapping[str, type[Standard]] = {"ort": Ort, "standard": Standard}
IR_VERSION = 11
ALIGNMENT = 64

_ITEM_BYTES: Mapping[str, int] = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8e4m3": 1, "i64": 8, "i32": 4, "u8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxEngine:
    """What a plan was lowered to.

    Attributes:
        models: name -> serialized model, without weights: one for each phase, under its name, and
            more for steps that are simpler.
        weights: The weights that an engine of these models is packed with.
        info: What a backend must know beside the models and the plan, as plain JSON values:
            `library`, `widen`, `opset`, `initializers` and, under `phases`, the names of those that
            each model reads.
    """

    models: Mapping[str, bytes]
    weights: tuple[EngineWeight, ...]
    info: Mapping[str, Any]


def lower(plan: Plan, *, library: str = "ort", widen: str = "auto") -> OnnxEngine:
    """Lower every phase of a plan.

    Args:
        plan: A plan whose activations are f32.
        library: `ort` or `standard`.
        widen: When BF16 and FP8 weights become f32: `load`, once while loading; `step`, in every
            step; `auto`, `load` where all weights take no more than 1 GiB in f32.

    Raises:
        UsageError: An unknown library or widening.
        UnsupportedError: The plan has an op or activations that this engine kind has not.
    """
    if library not in LIBRARIES:
        raise UsageError(f"library is {library!r}, not one of {', '.join(sorted(LIBRARIES))}")
    if plan.activation != "f32":
        raise UnsupportedError(
            f"the plan has {plan.activation} activations, and an ONNX engine computes in f32",
            hint="build for the target 'cpu'",
        )
    policy = widening(plan, widen)
    kind = LIBRARIES[library]
    types = {name: spec.type for name, spec in plan.weights.items()}
    weights = Weights(types, widen=policy == "load", interleaved=kind.interleaved)
    wanted = [*(Model(name=phase, phase=phase) for phase in PHASES), *MORE_MODELS]
    phases = {
        model.name: Phase(model, plan.programs[model.phase], kind, weights)
        for model in wanted
        if model.phase in plan.programs
    }
    graphs = {name: phase.graph() for name, phase in phases.items()}
    offsets = _offsets(weights.initializers)
    for name, phase in phases.items():
        external = (_external(made, offsets[key]) for key, made in phase.initializers.items())
        graphs[name].initializer.extend(external)
    models = {name: _bytes(_model(graphs[name], phase, kind)) for name, phase in phases.items()}
    info = {
        "library": library,
        "widen": policy,
        "opset": OPSET,
        "initializers": [made.to_json() for made in weights.initializers.values()],
        "phases": {name: list(phase.initializers) for name, phase in phases.items()},
    }
    return OnnxEngine(models=models, weights=tuple(weights.packed.values()), info=info)


def embedded(model: bytes, initializers: Mapping[str, Array]) -> bytes:
    """A model of `lower` with its weights inside, for any consumer. At most 2 GB.

    Args:
        model: One of the models.
        initializers: By name, as `lingc.runtime.onnx_weights.load` makes them.
    """
    made = ModelProto.FromString(model)
    for tensor in made.graph.initializer:
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
        tensor.raw_data = initializers[tensor.name].tobytes()
    return _bytes(made)


def _model(graph: GraphProto, phase: Phase, library: type[Standard]) -> ModelProto:
    domains = dict(library.domains) | {LINGC: 1}
    return helper.make_model(
        graph,
        functions=list(phase.functions.values()),
        opset_imports=[helper.make_opsetid(*domain) for domain in domains.items()],
        ir_version=IR_VERSION,
        producer_name=LINGC,
    )


def _bytes(model: ModelProto) -> bytes:
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _offsets(initializers: Mapping[str, Initializer]) -> dict[str, int]:
    """Where each initializer begins in one file of all."""
    begins, end = {}, 0
    for name, made in initializers.items():
        begins[name] = end
        size = _byte_size(made)
        end += size + -size % ALIGNMENT
    return begins


def _byte_size(made: Initializer) -> int:
    return _ITEM_BYTES[made.dtype] * prod(made.shape)


def _external(made: Initializer, offset: int) -> TensorProto:
    tensor = TensorProto(
        name=made.name,
        data_type=ONNX_DTYPE[made.dtype],
        dims=made.shape,
        data_location=TensorProto.EXTERNAL,
    )
    size = _byte_size(made)
    for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", size)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor
