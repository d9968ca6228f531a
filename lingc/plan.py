"""The plan: what an engine does, in names and numbers.

A plan is made by `lingc.lower` from a fused program and read by every target, by the interpreter
and by the runtime. It holds no torch object, no weight bytes and no path, and its JSON form reads
back to an equal plan.

Axis letters: T tokens, B sequences, Q tokens a sequence in a step, S state slots and one scratch
row, P pages a sequence, R cache rows and one scratch row, N rows of logits, H heads, K head dim of
q and k, V head dim of v, D hidden, E experts, F feed-forward width.

Slots and cache rows index from the front; -1 names the last row of a state tensor, which is
scratch: what is written there is never read. An engine may skip such writes.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from lingc.errors import InputError

FORMAT = 1
"""Version of the plan's JSON form; a reader refuses a newer one."""

PHASES = ("prefill", "decode", "verify", "draft")

Dim = int | str
"""A size: a number, the name of a symbolic axis (`"T"`), or a multiple of one (`"8*T"`)."""

DTYPE_BYTES: Mapping[str, int] = {
    "f64": 8, "f32": 4, "bf16": 2, "f8e4m3": 1, "i64": 8, "i32": 4, "u8": 1, "bool": 1,
}  # fmt: skip


def _size(name: str, dims: Mapping[str, int]) -> int:
    times, _, axis = name.rpartition("*")
    return dims[axis] * int(times or 1)


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape of a value; symbolic sizes are names."""

    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise InputError(
                f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}",
                hint="the plan was written by another version of lingc, or by hand",
            )

    def bind(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbolic size replaced by its value in `dims`."""
        return tuple(_size(d, dims) if isinstance(d, str) else d for d in self.shape)

    def bytes(self, dims: Mapping[str, int] | None = None) -> int:
        """Bytes of a value, with symbolic sizes from `dims`."""
        return math.prod(self.bind(dims or {})) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is a tensor of the program, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Size:
    """An argument that is the value of a symbolic axis."""

    name: str


Arg = Ref | Size | int | float | bool | str | None | tuple[Any, ...]
"""One argument of a step, positional, in the order of the op's schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """How one weight of the plan is made from a checkpoint.

    For every expert e in range(experts), or once where `experts` is 0: read each source
    (`{e}` replaced), in the storage format; join them along the output axis; take the part.
    Experts are stacked along a new first axis, the matrix of `last` behind them. Last of all, rows
    and bytes are put in the order of the layout.

    A shard of it is made the same way from shards of its sources: each is cut along its own axis
    into as many runs as there are ranks, at the borders of scale blocks and groups, then joined,
    stacked and put in the layout. Neither a joined matrix nor a layout can be cut.

    Attributes:
        name: Name in the plan, e.g. `layers.3.attention.qkv_a.weight`.
        type: Element type and shape as stored in the engine's weights.
        sources: Checkpoint names without any quantization suffix, `{e}` for the expert's number.
            Empty for a weight computed from the config (`format="decay"`).
        experts: How many experts are stacked; 0 for a plain matrix.
        last: Sources of one more matrix of the same size behind the experts, as many as `sources`:
            a shared expert. Empty where there is none.
        format: `plain` (rounded to `type.dtype`), `fp8_block` (E4M3, one FP32 scale a 128x128
            block), `fp8_tensor` (E4M3, one FP32 scale a matrix, one for its inputs), `int4_group`
            (symmetric, 8 nibbles an int32 along the input axis, lowest nibble first, value + 8;
            bf16 scales), or `decay` (per-head decay rate of a layer, from the config).
        part: `values` for plain and decay; `codes` or `scales` for a quantized format;
            `input_scales` of `fp8_tensor`, what an E4M3 code of its inputs stands for.
        group: Group size along the input axis for `int4_group`, else 0.
        take: `None`, or the slice of a kv_b matrix viewed as [H, nope + V, c]: `absorb_k`
            ([H, nope, c]) or `absorb_v` ([H, V, c]). `plain` format only.
        split: For `take`: (H, nope, V).
        layer: Absolute layer index, for `decay`; -1 otherwise.
        shard_axis: Axis that tensor parallelism splits, or None where every rank holds all of it.
        layout: Order of rows and bytes in the engine's weights, as its kernels want them: a name of
            `lingc.quantize.layouts`. Type and shape stay those of the plan.
    """

    name: str
    type: TensorType
    sources: tuple[str, ...]
    experts: int = 0
    format: str = "plain"
    part: str = "values"
    group: int = 0
    take: str | None = None
    split: tuple[int, ...] = ()
    layer: int = -1
    shard_axis: int | None = None
    layout: str = "plain"
    last: tuple[str, ...] = ()

    def members(self) -> tuple[tuple[str, ...], ...]:
        """Names in the checkpoint of what each stacked matrix is made of, or of the one matrix."""
        each = (
            tuple(source.replace("{e}", str(expert)) for source in self.sources)
            for expert in range(max(self.experts, 1))
        )
        return (*each, self.last) if self.last else tuple(each)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One op: its arguments and the names of its results.

    Attributes:
        op: `lingc.<name>` (a file of `plugins/`) or `aten.<name>.<overload>`.
        args: Positional, in the order of the op's schema.
        outputs: Names of the results.
        layer: Absolute layer index, or -1 outside the layers.
        source: Where the model says it: `mla.py:87`.
    """

    op: str
    args: tuple[Arg, ...]
    outputs: tuple[str, ...]
    layer: int = -1
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One phase.

    Attributes:
        inputs: Names of what the caller gives each step, in order (state excluded).
        states: Names of the state tensors that the phase reads or writes, as values at entry.
        outputs: Names of what the caller gets, in order, by role: `logits`, `hidden`.
        updates: state name -> name of the value that replaces it when the phase ends. The two
            may share memory.
        weights: Names of the weights it reads.
        types: Type of every value in the program, weights included.
        steps: In dependency order.
    """

    inputs: tuple[str, ...]
    states: tuple[str, ...]
    outputs: Mapping[str, str]
    updates: Mapping[str, str]
    weights: tuple[str, ...]
    types: Mapping[str, TensorType]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All phases of one model for one target and recipe.

    Attributes:
        config: The model's `config.json`, as read, quantization entries removed.
        precision: Name of the recipe.
        target: Canonical name of the target.
        activation: Element type of the activations, `f32` or `bf16`.
        page_size: Tokens a page of the latent cache.
        max_draft: Most tokens a verify step takes beside the pending one.
        states: Every state tensor: name -> type, with S and R symbolic.
        weights: Every weight, by name.
        programs: phase -> program, of those in `PHASES` that the model has.
    """

    config: Mapping[str, Any]
    precision: str
    target: str
    activation: str
    page_size: int
    max_draft: int
    states: Mapping[str, TensorType]
    weights: Mapping[str, WeightSpec]
    programs: Mapping[str, Program]
    format: int = field(default=FORMAT)


# ------------------------------------------------------------------------------------------ JSON


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    encoded: dict[str, Any] = _encode(plan)
    return encoded


def dumps(plan: Plan) -> str:
    """Canonical JSON text: sorted keys, no white space, a final newline."""
    return json.dumps(to_json(plan), sort_keys=True, separators=(",", ":")) + "\n"


def loads(text: str) -> Plan:
    """Read a plan back.

    Raises:
        InputError: The text is not a plan of a known format.
    """
    try:
        return from_json(json.loads(text, parse_constant=_no_number))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the plan cannot be read: {error}") from error


def from_json(value: Mapping[str, Any]) -> Plan:
    """Build a plan from `to_json`'s form."""
    if value["format"] > FORMAT:
        raise InputError(
            f"the plan has format {value['format']}, this lingc reads up to {FORMAT}",
            hint="update lingc, or rebuild the engine with this version",
        )
    programs = _table(value["programs"], _program)
    # The text sorts names; what is made of a plan goes through its phases in their own order.
    phases = [*(phase for phase in PHASES if phase in programs), *sorted({*programs} - {*PHASES})]
    return Plan(
        format=_whole(value["format"]),
        config=_table(value["config"], lambda item: item),
        precision=_text(value["precision"]),
        target=_text(value["target"]),
        activation=_text(value["activation"]),
        page_size=_whole(value["page_size"], least=1),
        max_draft=_whole(value["max_draft"], least=0),
        states=_table(value["states"], _type),
        weights=_table(value["weights"], _weight),
        programs={phase: programs[phase] for phase in phases},
    )


def _encode(value: Any) -> Any:
    match value:
        case TensorType():
            return str(value)
        case Ref():
            return {"ref": value.name}
        case Size():
            return {"size": value.name}
        case Mapping():
            return {key: _encode(item) for key, item in value.items()}
        case tuple() | list():
            return [_encode(item) for item in value]
        case Plan() | Program() | Step() | WeightSpec():
            return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
        case _:
            return value


T = TypeVar("T")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r:.80} is not a list of texts")
    return tuple(map(_text, values))


def _whole(value: Any, *, least: int = -(1 << 63)) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 63:
        raise ValueError(f"{value!r:.80} is not a whole number that can stand there")
    return value


def _table(value: Any, read: Callable[[Any], T]) -> dict[str, T]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.80} is not an object")
    return {name: read(item) for name, item in value.items()}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number that a plan can hold")


_TYPE = re.compile(r"(\w+)\[(.*)\]")


def _type(value: Any) -> TensorType:
    text = _text(value)
    found = _TYPE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a tensor type")
    dims = [d.strip() for d in found[2].split(",") if d.strip()]
    return TensorType(found[1], tuple(int(d) if d.lstrip("-").isdigit() else d for d in dims))


def _arg(value: Any) -> Arg:
    match value:
        case {"ref": str(name)}:
            return Ref(name)
        case {"size": str(name)}:
            return Size(name)
        case list():
            return tuple(_arg(item) for item in value)
        case None | bool() | int() | float() | str():
            return value
    raise ValueError(f"{value!r} is not an argument")


def _weight(item: Mapping[str, Any]) -> WeightSpec:
    take, axis = item["take"], item["shard_axis"]
    return WeightSpec(
        name=_text(item["name"]),
        type=_type(item["type"]),
        sources=_texts(item["sources"]),
        experts=_whole(item["experts"], least=0),
        format=_text(item["format"]),
        part=_text(item["part"]),
        group=_whole(item["group"], least=0),
        take=None if take is None else _text(take),
        split=tuple(map(_whole, item["split"])),
        layer=_whole(item["layer"]),
        shard_axis=None if axis is None else _whole(axis),
        layout=_text(item["layout"]),
        last=_texts(item["last"]),
    )


def _program(item: Mapping[str, Any]) -> Program:
    return Program(
        inputs=_texts(item["inputs"]),
        states=_texts(item["states"]),
        outputs=_table(item["outputs"], _text),
        updates=_table(item["updates"], _text),
        weights=_texts(item["weights"]),
        types=_table(item["types"], _type),
        steps=tuple(
            Step(
                op=_text(step["op"]),
                args=tuple(_arg(value) for value in step["args"]),
                outputs=_texts(step["outputs"]),
                layer=_whole(step["layer"]),
                source=_text(step["source"]),
            )
            for step in item["steps"]
        ),
    )


def refs(args: tuple[Arg, ...]) -> Iterator[str]:
    """Names of the tensors among `args`, in order, nested tuples included."""
    for value in args:
        if isinstance(value, Ref):
            yield value.name
        elif isinstance(value, tuple):
            yield from refs(value)
