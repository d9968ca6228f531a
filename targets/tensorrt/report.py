"""What TensorRT says of an engine: the layers that it fused, read from the log of its build.

No GPU is needed: at full verbosity the builder lists every layer of the engine with its inputs,
constants, types and the metadata of what was fused, and the memory that it takes. The format of the
log is observed, not promised; `parse` refuses what it cannot read rather than report less.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lingc.errors import StageError
from lingc.targets.tensorrt.lower import PLUGIN, Network
from lingc.targets.tensorrt.native import FP8, INT4

FORMAT = 1
"""Version of the report's JSON form."""

CUSTOM = "custom_layer"
"""A call of a plugin, as TensorRT for RTX names it."""

_LAYERS, _ROW = "Layers:", "Name: "
_OPERAND = "{ Name: "
_DIM = r"-?\d{1,18}"
_TENSOR = re.compile(
    rf"{re.escape(_OPERAND)}.*?, Dimensions: \[((?:{_DIM}(?:,{_DIM})*)?)\].*?Datatype: (\w+)"
)
_OPERANDS = ("Inputs", "Constants", "Outputs")
_FIELD = re.compile(r"(?:^|, )(LayerType|Inputs|Constants|Outputs|TacticName|Metadata): ")
_BETWEEN = "\x1f"
"""Between the metadata of two layers that were fused."""

_TOTALS = {
    "Total Activation Memory": "activation_bytes",
    "Total Weights Memory": "weight_bytes",
    "Max Scratch Memory": "scratch_bytes",
}
_TOTAL = re.compile(rf"({'|'.join(_TOTALS)}): (\d+) bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A tensor of a layer: its dtype as TensorRT calls it, and its shape, open sizes as -1."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One kernel, or one call of a plugin.

    Attributes:
        name: As TensorRT calls it; a fused one has parts of several names.
        kind: `gemm`, `kgen` (generated code), `runtime_fusion`, `custom_layer` (a plugin), …
        origins: Values of the plan that it is for, from the layers' metadata.
        op: Of a plugin, the op; else empty.
    """

    name: str
    kind: str
    origins: tuple[str, ...]
    op: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """An engine's layers and its memory."""

    phase: str
    layers: tuple[Layer, ...]
    activation_bytes: int
    weight_bytes: int
    scratch_bytes: int


def parse(messages: Sequence[str], network: Network) -> Report:
    """Read the log of one build.

    Args:
        messages: Of the logger, from before the build to after it.
        network: That was built.

    Raises:
        StageError: The log does not list the engine's layers.
    """
    listed = [text for text in messages if text.startswith(_LAYERS)]
    if len(listed) != 1:
        raise StageError(
            f"the build of {network.phase!r} listed its layers {len(listed)} times, not once",
            hint="another version of TensorRT logs otherwise; docs/tensorrt.md names those known",
        )
    rows = [row for row in listed[0].splitlines() if row.startswith(_ROW)]
    totals = dict.fromkeys(_TOTALS.values(), 0)
    for text in messages:
        if (match := _TOTAL.match(text)) is not None:
            totals[_TOTALS[match[1]]] = int(match[2])
    layers = tuple(_layer(row, network.roles) for row in rows)
    return Report(phase=network.phase, layers=layers, **totals)


def faults(report: Report, network: Network) -> list[str]:
    """What an engine does otherwise than its lowering meant, in sentences.

    Each plugin is one layer and no other; each matrix that the recipe stores in INT4 is a constant
    of the product that dequantizes it; each that it stores in FP8 with one scale is multiplied as
    it is, by codes that something in front makes, and nothing is scaled behind the product. No
    other product is of FP8.
    """
    by_origin: dict[str, list[Layer]] = {}
    for layer in report.layers:
        for origin in layer.origins:
            by_origin.setdefault(origin, []).append(layer)
    problems = (
        _problem(origin, role, by_origin.get(origin, [])) for origin, role in network.roles.items()
    )
    told = [problem for problem in problems if problem is not None]
    told += [
        f"{', '.join(layer.origins)}: a product of FP8 by FP8 that nobody asked for"
        for layer in report.layers
        if _multiplies_fp8(layer) and FP8 not in map(network.roles.get, layer.origins)
    ]
    expected = sum(role.startswith(PLUGIN) for role in network.roles.values())
    found = sum(layer.kind == CUSTOM for layer in report.layers)
    if found != expected:
        told.append(f"the engine calls {found} plugins, the network has {expected}")
    return told


def _problem(origin: str, role: str, layers: Sequence[Layer]) -> str | None:
    """What became of a step instead of its role."""
    among = f"{len(layers)} layers ({', '.join(layer.kind for layer in layers) or 'none'})"
    if role.startswith(PLUGIN):
        calls = sum(layer.kind == CUSTOM for layer in layers)
        if calls != 1 or len(layers) != 1:
            op = role.removeprefix(PLUGIN)
            return f"{origin}: plugin {op} is {calls} calls among {among}, not one call alone"
    elif role == INT4:
        fused = sum(any(c.dtype == "Int4" for c in one.constants) for one in layers)
        if fused != 1 or len(layers) != 1:
            return f"{origin}: the INT4 matrix is dequantized apart from its product, in {among}"
    elif role == FP8 and not (len(layers) == 1 and _multiplies_fp8(layers[0])):
        return f"{origin}: not one product of FP8 by FP8 alone, but {among}"
    return None


def _multiplies_fp8(layer: Layer) -> bool:
    """Whether codes are multiplied by codes; their scales stand behind them."""
    operands = (*layer.inputs, *layer.constants)
    return layer.kind == "gemm" and sum(one.dtype.startswith("FP8") for one in operands) >= 2


def to_value(report: Report) -> dict[str, Any]:
    """In JSON's types."""
    return {key: value for key, value in asdict(report).items() if key != "phase"}


def _layer(row: str, roles: Mapping[str, str]) -> Layer:
    """A row of the log: `Name: …, LayerType: …, Inputs: [ … ], …, Metadata: …`."""
    parts = _FIELD.split(row.removeprefix(_ROW))
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    if {"LayerType", *_OPERANDS, "Metadata"} - found.keys():
        raise _unreadable(row)
    origins = _origins(found["Metadata"])
    kind = found["LayerType"]
    role = roles.get(origins[0], "") if kind == CUSTOM and origins else ""
    return Layer(
        name=parts[0],
        kind=kind,
        origins=origins,
        op=role.removeprefix(PLUGIN),
        **{name.lower(): _operands(found[name], row) for name in _OPERANDS},
    )


def _operands(text: str, row: str) -> tuple[Operand, ...]:
    """The tensors of a list, each of them or none.

    Raises:
        StageError: One cannot be read, with its row.
    """
    listed = _TENSOR.findall(text)
    # A tensor of another form is passed over, or read together with the one behind it.
    if len(listed) != text.count(_OPERAND) or (not listed and text.strip() != "[]"):
        raise _unreadable(row)
    return tuple(
        Operand(dtype=dtype, shape=tuple(map(int, dims.split(","))) if dims else ())
        for dims, dtype in listed
    )


def _unreadable(row: str) -> StageError:
    return StageError(
        f"a layer of the build log cannot be read: {row[:200]!r}",
        hint="another version of TensorRT logs otherwise; docs/tensorrt.md names those known",
    )


def _origins(metadata: str) -> tuple[str, ...]:
    """Values of the plan among a layer's metadata, each once, in order."""
    parts = (part.partition(" ")[0] for part in metadata.strip().split(_BETWEEN))
    return tuple(dict.fromkeys(part for part in parts if part))
