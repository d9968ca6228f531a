"""The records of a quantized weight: codes and scales in place of values."""

from dataclasses import replace

from lingc.plan import Dim, TensorType, WeightSpec
from lingc.quantize.formats import FP8_BLOCK, NIBBLES


def _up(size: Dim, unit: int) -> int:
    assert isinstance(size, int), "the shape of a weight is known"
    return -(-size // unit)


def fp8_specs(spec: WeightSpec) -> tuple[WeightSpec, WeightSpec]:
    """Codes and scales of a weight in 128x128 FP8 blocks.

    Blocks of a stacked expert's matrices start anew with each source.
    """
    *stack, rows, columns = spec.type.shape
    parts = len(spec.sources) if spec.experts else 1
    assert isinstance(rows, int)
    grid = (*stack, parts * _up(rows // parts, FP8_BLOCK), _up(columns, FP8_BLOCK))
    codes = replace(
        spec, name=f"{spec.name}_codes", type=TensorType("f8e4m3", spec.type.shape),
        format="fp8_block", part="codes",
    )  # fmt: skip
    scales = replace(
        spec, name=f"{spec.name}_scale", type=TensorType("f32", grid), format="fp8_block",
        part="scales",
    )  # fmt: skip
    return codes, scales


def fp8_tensor_specs(spec: WeightSpec) -> tuple[WeightSpec, WeightSpec, WeightSpec]:
    """Codes and scale of a weight in FP8 with one scale, and the one of what it is multiplied with.

    One matrix of the checkpoint alone: another has another scale.
    """
    assert len(spec.members()) == len(spec.sources) == 1, f"{spec.name!r} is several matrices"
    codes = replace(
        spec, name=f"{spec.name}_codes", type=TensorType("f8e4m3", spec.type.shape),
        format="fp8_tensor", part="codes",
    )  # fmt: skip
    scale, input_scale = (
        replace(
            spec, name=f"{spec.name}_{name}", type=TensorType("f32", (1,)), format="fp8_tensor",
            part=part, shard_axis=None,
        )
        for name, part in (("scale", "scales"), ("input_scale", "input_scales"))
    )  # fmt: skip
    return codes, scale, input_scale


def int4_specs(spec: WeightSpec, group: int) -> tuple[WeightSpec, WeightSpec]:
    """Packed codes and scales of a weight in INT4 groups along its input axis."""
    *stack, rows, columns = spec.type.shape
    words = TensorType("i32", (*stack, rows, _up(columns, NIBBLES)))
    groups = TensorType("bf16", (*stack, rows, _up(columns, group)))
    packed = replace(
        spec, name=f"{spec.name}_packed", type=words, format="int4_group", part="codes",
        group=group,
    )  # fmt: skip
    scales = replace(
        spec, name=f"{spec.name}_scale", type=groups, format="int4_group", part="scales",
        group=group,
    )  # fmt: skip
    return packed, scales
