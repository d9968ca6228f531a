"""In what form each weight of a plan reaches its function."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from lingc.errors import StageError, UsageError
from lingc.plan import Plan, TensorType
from lingc.quantize.formats import FP8_BLOCK
from lingc.quantize.layouts import INTERLEAVED, PLAIN
from lingc.runtime.onnx_weights import (
    AS_BYTES,
    AS_STORED,
    BF16_TO_F32,
    FP8_TO_F16,
    FP8_TO_F32,
    SCALES_TO_ROWS,
    Initializer,
)

WIDEN = ("auto", "load", "step")
LARGEST_WIDENED_BYTES = 1 << 30

_STACKED = "gate_up"
_SCALE = "_scale"


def widening(plan: Plan, widen: str) -> str:
    """`load` or `step`, decided by size where `widen` is `auto`."""
    if widen not in WIDEN:
        raise UsageError(f"widen is {widen!r}, not one of {', '.join(WIDEN)}")
    if widen != "auto":
        return widen
    # INT4 is never widened, and its i32 have four bytes as they are.
    used = {name for program in plan.programs.values() for name in program.weights}
    size = sum(4 * prod(plan.weights[name].type.bind({})) for name in used)
    return "load" if size <= LARGEST_WIDENED_BYTES else "step"


def layout(argument: str, stored: TensorType, *, interleaved: bool) -> str:
    """How the engine's weights hold what an argument stands for.

    Block scales stay in the order of blocks; they are spread over rows while loading.
    """
    rows = argument == _STACKED or (argument == _STACKED + _SCALE and stored.dtype != "f32")
    return INTERLEAVED if rows and interleaved else PLAIN


def forms(
    op: str,
    given: Mapping[str, str],
    types: Mapping[str, TensorType],
    *,
    widen: bool,
    interleaved: bool,
) -> dict[str, Initializer | None]:
    """The initializer for each weight among a step's arguments; None for one that is not needed.

    Args:
        op: The op, without its namespace.
        given: argument -> the plan's weight.
        types: Type of every weight.
        widen: Whether matrices are widened to f32 while loading.
        interleaved: Whether the weights lie as ONNX Runtime's own ops want them.
    """
    made: dict[str, Initializer | None] = {}
    for argument, name in given.items():
        stored = types[name]
        codes = given.get(argument.removesuffix(_SCALE), name)
        scales = given.get(argument + _SCALE)
        stacked = 2 if argument.startswith(_STACKED) else 1
        shape = stored.bind({})
        load, dtype, sources = AS_STORED, stored.dtype, [name]
        if stored.dtype == "f8e4m3" and widen and scales is not None:
            load, dtype, sources = FP8_TO_F32, "f32", [name, scales]
        elif stored.dtype == "f8e4m3":
            load, dtype = FP8_TO_F16, "f16"
        elif types[codes].dtype == "f8e4m3":
            if widen:
                made[argument] = None
                continue
            *rows, width = types[codes].bind({})
            load, shape = SCALES_TO_ROWS, (*rows, -(-width // FP8_BLOCK))
        elif stored.dtype == "i32":
            load, dtype, shape = AS_BYTES, "u8", (*shape[:-1], 4 * shape[-1])
            if argument == "packed" and interleaved:
                shape = _by_group(shape, types[given["scales"]])
        elif stored.dtype == "bf16" and _is_widened(op, argument, stored, widen=widen):
            load, dtype = BF16_TO_F32, "f32"
        made[argument] = Initializer(
            name=name,
            dtype=dtype,
            shape=shape,
            weights=tuple(sources),
            load=load,
            layout=INTERLEAVED if interleaved and stacked > 1 else PLAIN,
            stacked=stacked,
        )
    return made


def _by_group(shape: tuple[int, ...], scales: TensorType) -> tuple[int, ...]:
    """Bytes [N, P] as ONNX Runtime's op wants them, [N, groups, P / groups], where they divide."""
    rows, row_bytes = shape
    groups = scales.bind({})[1]
    return shape if row_bytes % groups else (rows, groups, row_bytes // groups)


def _is_widened(op: str, argument: str, stored: TensorType, *, widen: bool) -> bool:
    if op == "embedding":
        return False  # rows are fetched first, then cast
    small = len(stored.shape) == 1 or argument.endswith(("scale", "scales"))
    return small or widen


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWeight:
    """A weight of the plan as an engine keeps it: its type, its rows in the order of `layout`."""

    name: str
    type: TensorType
    layout: str = PLAIN


class Weights:
    """The initializers that the phases share, and the engine weights they are made from.

    Args:
        types: Type of every weight of the plan.
        widen: Whether matrices are widened to f32 while loading.
        interleaved: Whether the weights lie as ONNX Runtime's own ops want them.
    """

    def __init__(self, types: Mapping[str, TensorType], *, widen: bool, interleaved: bool) -> None:
        self.initializers: dict[str, Initializer] = {}
        self.packed: dict[str, EngineWeight] = {}
        self._types = types
        self._widen = widen
        self._interleaved = interleaved

    def __contains__(self, name: str) -> bool:
        return name in self._types

    def bound(self, op: str, given: Mapping[str, str]) -> dict[str, Initializer | None]:
        """The initializers of a step: argument -> the plan's weight, in; None: not needed, out."""
        made = forms(op, given, self._types, widen=self._widen, interleaved=self._interleaved)
        for argument, initializer in made.items():
            self._pack(argument, given[argument])
            if initializer is not None:
                made[argument] = self._shared(initializer)
        return made

    def _shared(self, initializer: Initializer) -> Initializer:
        known = self.initializers.setdefault(initializer.name, initializer)
        if known == initializer:
            return known
        # Another form of the same weight, as of an embedding that is the head too.
        other = replace(initializer, name=f"{initializer.name}.{initializer.dtype}")
        return self.initializers.setdefault(other.name, other)

    def _pack(self, argument: str, name: str) -> None:
        stored = self._types[name]
        order = layout(argument, stored, interleaved=self._interleaved)
        weight = EngineWeight(name=name, type=stored, layout=order)
        if self.packed.setdefault(name, weight) != weight:
            raise StageError(f"weight {name!r} is wanted in two layouts")
