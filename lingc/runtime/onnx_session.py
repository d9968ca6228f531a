"""ONNX Runtime set up for an engine: options, weights that it does not own, extra outputs.

LINGC_ONNX_PROVIDER=cuda runs ONNX engines on the GPU, by the package `onnxruntime-gpu`: somebody
else's kernels for the same plan, to hold ours to. Nothing there is made for speed.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from lingc.errors import IncompatibleError, MissingExtraError, ResourceError, UsageError
from lingc.plan import TensorType
from lingc.runtime.onnx_weights import WEIGHTS_FILE, Array

try:
    import onnxruntime
    from onnxruntime import InferenceSession, OrtValue
    from onnxruntime.capi import onnxruntime_pybind11_state as _native
except ImportError as error:
    raise MissingExtraError(
        "running an ONNX engine needs the package 'onnxruntime', which is not installed",
        hint="pip install 'lingc[onnx]'",
    ) from error

__all__ = [
    "InferenceSession",
    "OrtValue",
    "guarded",
    "is_elsewhere",
    "make_session",
    "value_of",
    "with_outputs",
]

Made = TypeVar("Made")


ONNX_DTYPE: Mapping[str, int] = {
    "f32": 1, "u8": 2, "i32": 6, "i64": 7, "bool": 9, "f16": 10, "f64": 11, "bf16": 16,
    "f8e4m3": 17,
}  # fmt: skip
"""Numbers of `onnx.TensorProto.DataType`."""

_FAILURES = (
    _native.EPFail,
    _native.Fail,
    _native.InvalidArgument,
    _native.InvalidGraph,
    _native.InvalidProtobuf,
    _native.NotImplemented,
    _native.RuntimeException,
    RuntimeError,  # from a run with bound inputs, whatever went wrong
)
_ERRORS_ONLY = 3

SMALL_BYTES = 64 << 10

PROVIDER = "LINGC_ONNX_PROVIDER"
"""The variable that says what runs ONNX engines: `cpu`, which is the default, or `cuda`."""

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"

_SETTINGS: Mapping[str, str] = {
    # What depends on weights alone is computed once, but no copy of a large weight is made.
    "optimization.constant_folding_max_output_size_in_bytes": str(SMALL_BYTES),
    # An FP16 weight and its scales are not a quantized model to be fused.
    "session.disable_quant_qdq": "1",
    # Within a step a thread that waits is soon needed again, and waking it outlasts a node.
    # Phases take turns: threads of one must not spin while another computes.
    "session.intra_op.spin_duration_us": "1000",
    "session.force_spinning_stop": "1",
}


def make_session(
    model: bytes, weights: Mapping[str, OrtValue], *, threads: int | None, prepack: bool
) -> InferenceSession:
    """A session on the CPU, or where LINGC_ONNX_PROVIDER says.

    Args:
        model: The model; its initializers have no data.
        weights: Every initializer. They must live as long as the session.
        threads: Threads of a step; as many as this process may use where None.
        prepack: Whether the session may copy weights into the order its kernels like best.

    Raises:
        IncompatibleError: ONNX Runtime refuses the model, or has no such provider here.
        UsageError: There is no provider of that name.
    """
    on_gpu = _is_on_gpu()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    for key, value in _SETTINGS.items():
        options.add_session_config_entry(key, value)
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    # Small ones are copied, and may be folded. Large ones stay where they are: all sessions share
    # them, and no optimizer can read them.
    # A GPU copies all of them.
    most = None if on_gpu else SMALL_BYTES
    small = {
        name: value
        for name, value in weights.items()
        if most is None or value.tensor_size_in_bytes() <= most
    }
    options.add_external_initializers(list(small), list(small.values()))
    for name in weights.keys() - small.keys():
        options.add_initializer(name, weights[name])
    with _external_data(options):
        session = guarded(
            "the engine's code cannot be loaded",
            lambda: InferenceSession(
                model,
                options,
                providers=[(_CUDA, {"use_tf32": "0"}), _CPU] if on_gpu else [_CPU],
                disabled_optimizers=["FuseFp16InitializerToFp32NodeTransformer"],
            ),
        )
    if on_gpu and session.get_providers()[0] != _CUDA:
        raise _no_gpu("it cannot be loaded")
    return session


def _is_on_gpu() -> bool:
    name = os.environ.get(PROVIDER, "cpu")
    if name not in {"cpu", "cuda"}:
        raise UsageError(f"{PROVIDER} is {name!r}, it may be cpu or cuda")
    if name == "cuda" and _CUDA not in onnxruntime.get_available_providers():
        raise _no_gpu("this ONNX Runtime was built without it")
    return name == "cuda"


def _no_gpu(why: str) -> IncompatibleError:
    return IncompatibleError(
        f"ONNX engines shall run by ONNX Runtime's CUDA provider ({PROVIDER}=cuda), but {why}",
        hint="pip install onnxruntime-gpu in place of onnxruntime, with CUDA's libraries and cuDNN",
    )


@contextmanager
def _external_data(options: onnxruntime.SessionOptions) -> Iterator[None]:
    """An empty file where the model says that its initializers lie.

    `add_initializer` lets all sessions share one, where `add_external_initializers` gives each its
    own copy; but the location must exist. Reading it fails, so nothing can be computed from it.
    """
    key = "session.model_external_initializers_file_folder_path"
    try:
        with TemporaryDirectory(prefix="lingc-") as directory:
            (Path(directory) / WEIGHTS_FILE).touch()
            options.add_session_config_entry(key, directory)
            yield
    except OSError as error:
        raise ResourceError(
            f"no temporary file can be made: {error}", hint="TMPDIR may name another directory"
        ) from error


def is_elsewhere(session: InferenceSession) -> bool:
    """Whether a session computes in other memory than the CPU's."""
    return bool(session.get_providers()[0] != _CPU)


def value_of(array: Array, dtype: str) -> OrtValue:
    """An array as ONNX Runtime's, at the same address; `dtype` is what its bits mean."""
    return OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_DTYPE[dtype])


def guarded(what: str, work: Callable[[], Made]) -> Made:
    """Do something with ONNX Runtime, and say what it was where that fails."""
    try:
        return work()
    except _FAILURES as error:
        reason = str(error).strip().splitlines()[0]
        raise IncompatibleError(
            f"{what}: ONNX Runtime {onnxruntime.__version__} says: {reason}",
            hint="engines of this version run on onnxruntime 1.31 and newer",
        ) from error


def with_outputs(model: bytes, outputs: Mapping[str, TensorType]) -> bytes:
    """The model with more values as outputs.

    A message that follows another in protobuf's encoding is merged into it, and repeated fields are
    joined: the outputs are written behind the model, and the package `onnx` is not needed.
    """
    values = b"".join(_field(12, _value_info(name, kind)) for name, kind in outputs.items())
    return model + _field(7, values)  # ModelProto.graph, GraphProto.output


def _value_info(name: str, kind: TensorType) -> bytes:
    tensor = _varint(1 << 3) + _varint(ONNX_DTYPE[kind.dtype])  # TypeProto.Tensor.elem_type
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    made.append(value)
    return bytes(made)
