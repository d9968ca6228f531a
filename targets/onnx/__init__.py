"""Plans as ONNX models: own-domain nodes, and two libraries of functions that say what they do."""

from lingc.targets.onnx.lower import LIBRARIES, OnnxEngine, embedded, lower
from lingc.targets.onnx.weights import WIDEN, EngineWeight

__all__ = ["LIBRARIES", "WIDEN", "EngineWeight", "OnnxEngine", "embedded", "lower"]
