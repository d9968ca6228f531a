"""What the published bindings of standard TensorRT offer, written down from themselves.

Their wheel is one extension module and asks for nine C functions, which a stub gives, so it imports
without a GPU and without the libraries; nothing of it can be run. As a program, with the wheel on
the path, this prints a surface as JSON:

    cc -shared -fPIC -Wl,-soname,libnvinfer.so.11 -o libnvinfer.so.11 stub.c     (two more names)
    LD_LIBRARY_PATH=. PYTHONPATH=wheel python -m tests.tensorrt.surface > 11.4.0.106.json

`docs/tensorrt.md` has the stub. A surface has for each class its members: `null` for a property or
a value, else the overloads of a method, each its arguments and what it returns.
"""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

CLASSES = (
    "ActivationType", "Builder", "DataType", "Dims", "DimsExprs", "DimensionOperation",
    "ElementWiseOperation", "GatherMode", "HardwareCompatibilityLevel", "IActivationLayer",
    "IBuilderConfig", "ICastLayer", "IConcatenationLayer", "IConstantLayer", "ICudaEngine",
    "IDequantizeLayer", "IElementWiseLayer", "IExecutionContext", "IExprBuilder", "IGatherLayer",
    "IHostMemory", "ILayer", "ILogger", "IMatrixMultiplyLayer", "INetworkDefinition",
    "IOptimizationProfile", "IPluginCreatorV3One", "IPluginRegistry", "IPluginV3",
    "IPluginV3Layer", "IPluginV3OneBuildV2", "IPluginV3OneCore", "IPluginV3OneRuntime",
    "IQuantizeLayer", "IReduceLayer", "IShapeLayer", "IShuffleLayer", "ISliceLayer", "ITensor",
    "ITimingCache", "IUnaryLayer", "Logger", "MatrixOperation", "NetworkDefinitionCreationFlag",
    "BuilderFlag", "PluginField", "PluginFieldCollection", "PluginFieldType", "PreviewFeature",
    "ProfilingVerbosity", "ReduceOperation", "Runtime", "TensorFormat", "UnaryOperation", "Weights",
)  # fmt: skip

_SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\)(?: -> (.+))?$")


def surface(trt: Any) -> dict[str, Any]:
    """The surface of a module of bindings."""
    return {
        "version": trt.__version__,
        "module": sorted(name for name in dir(trt) if not name.startswith("_")),
        "classes": {name: _members(getattr(trt, name)) for name in CLASSES if hasattr(trt, name)},
    }


def _members(kind: type) -> dict[str, Any]:
    return {
        name: _overloads(name, getattr(kind, name, None))
        for name in dir(kind)
        if not name.startswith("_")
    }


def _overloads(name: str, member: Any) -> list[dict[str, Any]] | None:
    if not callable(member) or isinstance(member, type):
        return None
    found = []
    for line in (getattr(member, "__doc__", "") or "").splitlines():
        match = _SIGNATURE.match(line.strip())
        if match is None or match[1] != name or "*args" in match[2]:
            continue
        given = [part for part in _split(match[2]) if not part.startswith("self")]
        found.append(
            {
                "arguments": [part.partition(":")[0].strip() for part in given],
                "optional": sum("=" in part for part in given),
                "returns": (match[3] or "").rpartition(".")[2],
            }
        )
    return found


def _split(text: str) -> list[str]:
    """Arguments, which may have commas in brackets."""
    parts, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    return [part for part in (*parts, text[begin:].strip()) if part]


def load(version: str) -> dict[str, Any]:
    """A surface that was written down."""
    path = Path(__file__).parent / "surfaces" / f"{version}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    made = surface(importlib.import_module("tensorrt_bindings"))
    json.dump(made, sys.stdout, sort_keys=True, separators=(",", ":"))
    sys.stdout.write("\n")
