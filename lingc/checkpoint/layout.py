"""From stored tensors to logical ones: the release layouts and their kin, mixed as they come.

    kind         stored for `<module>.weight`
    plain        `.weight` BF16 or F32
    fp8_block    `.weight` F8_E4M3, `.weight_scale_inv` F32 a block
    fp8_tensor   `.weight` F8_E4M3, `.weight_scale` F32 [1]; `.input_scale` F32 [1]
    int4_group   `.weight_packed` I32, `.weight_scale` BF16, `.weight_shape` I64 [2]

`<module>.input_scale` may stand beside any matrix: one scale for all of its inputs, F32 or BF16.
The scales of FP8 blocks may also be called `.weight_scale`, as compressed-tensors does.
The tensors themselves say which; of `quantization_config` only the group size is read, and may be
absent where it divides the width.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lingc.checkpoint.directory import Scan, is_ignored
from lingc.checkpoint.expected import Shape, expected_tensors, mtp_prefix
from lingc.checkpoint.listing import of_tensors
from lingc.checkpoint.tensorfile import Stored
from lingc.model.config import ModelConfig
from lingc.quantize.formats import FP8_BLOCK, NIBBLES, blocks

SCALE_INV = "_scale_inv"
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
INPUT_SCALE = ".input_scale"
"""Behind a module's name: what one FP8 code of its inputs stands for, times the code."""

PLAIN_DTYPES: Mapping[str, str] = {"BF16": "bf16", "F32": "f32"}
"""What a plain tensor may be stored as -> its name in plans."""

_FP8 = ("", SCALE_INV)
_FP8_SCALE = ("", SCALE)
_INT4 = (PACKED, SCALE, SHAPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A logical tensor.

    Attributes:
        kind: `plain`, `fp8_block`, `fp8_tensor` or `int4_group`.
        shape: As in an unquantized checkpoint.
        parts: Where its pieces are: the values, codes and scales, or packed, scales and shape.
        group: Columns that share a scale in `int4_group`, 128 in `fp8_block`, else 0.
        input_scale: Where the scale of a matrix's inputs is, if there is one.
    """

    name: str
    kind: str
    shape: Shape
    parts: tuple[Stored, ...]
    group: int = 0
    input_scale: Stored | None = None


def assemble(scan: Scan, config: ModelConfig) -> tuple[dict[str, Entry], list[str]]:
    """Every logical tensor that is sound, and what is wrong with the others."""
    expected = expected_tensors(config)
    stored: dict[str, dict[str, Stored]] = defaultdict(dict)
    scales: dict[str, Stored] = {}
    for full_name, tensor in scan.tensors.items():
        if is_input_scale(full_name, expected):
            scales[full_name.removesuffix(INPUT_SCALE) + ".weight"] = tensor
        elif not is_ignored(full_name):
            name, suffix = _split(full_name)
            stored[name][suffix] = tensor
    lost = {_split(name)[0] for name in scan.lost}
    problems = of_tensors(
        (name + suffix for name in stored if name not in expected for suffix in stored[name]),
        "is not one that this config has",
    )
    problems += _missing(config, expected, stored.keys() | lost, scan)
    sound = {name: parts for name, parts in stored.items() if name not in lost}
    entries, faults = _entries(expected, sound, _group_sizes(config.quantization))
    for name, scale in scales.items():
        unfit = [f"tensor {name!r} {fault}" for fault in _scale_faults(scale)]
        faults += unfit
        if name in entries and not unfit:
            entries[name] = replace(entries[name], input_scale=scale)
    return entries, problems + faults


def _scale_faults(scale: Stored) -> Iterator[str]:
    """What is wrong with the scale of a matrix's inputs."""
    if scale.dtype not in PLAIN_DTYPES or not _is_one(scale):
        yield (
            f"has an {INPUT_SCALE[1:]!r} that is {scale.dtype} {list(scale.shape)} in "
            f"{scale.path.name!r}, F32 [1] is due"
        )


def assemble_some(
    tensors: Mapping[str, Stored], config: ModelConfig, groups: tuple[int, ...]
) -> tuple[dict[str, Entry], list[str]]:
    """The logical tensors that stand in some files, of which none is due, and what is wrong.

    Args:
        tensors: Stored name -> where it is.
        config: Says what shape each must have.
        groups: Group sizes that may occur in `int4_group`.
    """
    expected = expected_tensors(config)
    stored: dict[str, dict[str, Stored]] = defaultdict(dict)
    for full_name, tensor in tensors.items():
        name, suffix = _split(full_name)
        stored[name][suffix] = tensor
    foreign = [name for name in stored if name not in expected]
    problems = of_tensors(foreign, "is not one that this config has")
    entries, faults = _entries(expected, stored, groups)
    return entries, problems + faults


def _entries(
    expected: Mapping[str, Shape],
    stored: Mapping[str, Mapping[str, Stored]],
    groups: tuple[int, ...],
) -> tuple[dict[str, Entry], list[str]]:
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for name, shape in expected.items():
        if name not in stored:
            continue
        faults = list(_faults(stored[name], shape, groups))
        problems += [f"tensor {name!r} {fault}" for fault in faults]
        if not faults:
            entries[name] = _entry(name, stored[name], shape, groups)
    return entries, problems


def is_input_scale(name: str, expected: Mapping[str, Shape]) -> bool:
    """Whether a stored name is the scale of the inputs of a module with a matrix."""
    weight = name.removesuffix(INPUT_SCALE) + ".weight"
    return name.endswith(INPUT_SCALE) and len(expected.get(weight, ())) == 2


def _split(full_name: str) -> tuple[str, str]:
    for suffix in (SCALE_INV, PACKED, SCALE, SHAPE):
        if full_name.endswith(f".weight{suffix}"):
            return full_name.removesuffix(suffix), suffix
    return full_name, ""


def _missing(
    config: ModelConfig, expected: Mapping[str, Shape], known: set[str], scan: Scan
) -> list[str]:
    if scan.is_partial:  # they may stand in the file that could not be read
        return []
    prefix = mtp_prefix(config)
    without_mtp = not any(name.startswith(prefix) for name in known)
    absent = [
        name
        for name in expected
        if name not in known and not (without_mtp and name.startswith(prefix))
    ]
    return of_tensors(absent, "is missing")


def _group_sizes(quantization: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Group sizes that a compressed-tensors config names."""
    groups = (quantization or {}).get("config_groups")
    values = groups.values() if isinstance(groups, dict) else ()
    weights = [value.get("weights") for value in values if isinstance(value, dict)]
    sizes = [weight.get("group_size") for weight in weights if isinstance(weight, dict)]
    return tuple(size for size in sizes if isinstance(size, int) and size > 0)


def _group(columns: int, scales: int, named: tuple[int, ...]) -> int | None:
    """The group size with which `columns` have that many scales."""
    fitting = [size for size in named if -(-columns // size) == scales]
    if fitting:
        return fitting[0]
    if scales and not columns % scales and not named:
        return columns // scales
    return None


def _faults(parts: Mapping[str, Stored], shape: Shape, groups: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with the pieces of one tensor, as ends of sentences."""
    have = set(parts)
    if have == {""} and parts[""].dtype == "F8_E4M3":
        yield f"is F8_E4M3 and has no {'weight' + SCALE_INV!r} beside it"
    elif have == {""}:
        yield from _unlike(parts[""], shape, tuple(PLAIN_DTYPES))
    elif have not in (set(_FP8), set(_FP8_SCALE), set(_INT4)):
        given = ", ".join(sorted("weight" + suffix for suffix in have))
        yield f"has {given} beside each other, which is no layout"
    elif len(shape) != 2:
        yield f"is quantized, but is no matrix: [{', '.join(map(str, shape))}] is due"
    elif have == set(_FP8):
        yield from _unlike(parts[""], shape, ("F8_E4M3",))
        scales = (blocks(shape[0]), blocks(shape[1]))
        yield from _unlike(parts[SCALE_INV], scales, ("F32",), SCALE_INV)
    elif have == set(_FP8_SCALE):
        yield from _unlike(parts[""], shape, ("F8_E4M3",))
        scales = (blocks(shape[0]), blocks(shape[1]))
        due = parts[SCALE].shape if _is_one(parts[SCALE]) else scales
        yield from _unlike(parts[SCALE], due, ("F32",), SCALE)
    else:
        packed = (shape[0], -(-shape[1] // NIBBLES))
        yield from _unlike(parts[PACKED], packed, ("I32",), PACKED)
        yield from _unlike(parts[SHAPE], (2,), ("I64",), SHAPE)
        scale = parts[SCALE]
        columns = scale.shape[1] if len(scale.shape) == 2 else 0
        fits = _group(shape[1], columns, groups) is not None
        wanted = -(-shape[1] // groups[0]) if groups else max(columns, 1)
        yield from _unlike(scale, (shape[0], columns if fits else wanted), ("BF16",), SCALE)
        if not fits and not groups:
            yield (
                f"has {columns} scales a row, which do not divide its {shape[1]} columns; "
                "quantization_config must then name the group_size"
            )


def _is_one(scale: Stored) -> bool:
    return scale.shape in ((), (1,))


def _unlike(
    tensor: Stored, shape: Shape, dtypes: tuple[str, ...], suffix: str = ""
) -> Iterator[str]:
    subject = f"has a {'weight' + suffix!r} that is" if suffix else "is"
    if tensor.dtype not in dtypes:
        yield f"{subject} {tensor.dtype} in {tensor.path.name!r}, {' or '.join(dtypes)} is due"
    if tensor.shape != shape:
        yield f"{subject} {list(tensor.shape)} in {tensor.path.name!r}, {list(shape)} is due"


def _entry(name: str, parts: Mapping[str, Stored], shape: Shape, groups: tuple[int, ...]) -> Entry:
    if PACKED in parts:
        group = _group(shape[1], parts[SCALE].shape[1], groups)
        assert group is not None, f"{name!r} was found to be sound"
        pieces = tuple(parts[suffix] for suffix in _INT4)
        return Entry(name=name, kind="int4_group", shape=shape, parts=pieces, group=group)
    if len(parts) == 2:
        (scale,) = (part for suffix, part in parts.items() if suffix)
        kind, group = ("fp8_tensor", 0) if _is_one(scale) else ("fp8_block", FP8_BLOCK)
        return Entry(name=name, kind=kind, shape=shape, parts=(parts[""], scale), group=group)
    return Entry(name=name, kind="plain", shape=shape, parts=(parts[""],))
