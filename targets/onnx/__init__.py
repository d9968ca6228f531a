"""Plans as ONNX models: own-domain nodes, and two libraries of functions that say what they do."""

from lingc.errors import MissingExtraError

try:
    import onnx as _onnx  # noqa: F401  (asked here, so that the answer names the extra)
except ImportError as error:
    raise MissingExtraError(
        "writing an ONNX engine needs the package 'onnx', which is not installed",
        hint="pip install 'lingc[onnx]'",
    ) from error

from lingc.targets.onnx.lower import LIBRARIES, OnnxEngine, embedded, lower
from lingc.targets.onnx.weights import WIDEN, EngineWeight

__all__ = ["LIBRARIES", "WIDEN", "EngineWeight", "OnnxEngine", "embedded", "lower"]
