"""What a written checkpoint is made of: logical tensors, the pieces they are stored as, files.

Shared by the two writers, `lingc.checkpoint.write` for the release layouts at once and
`lingc.checkpoint.quantizer` for any recipe.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.checkpoint.convert import to_plain, to_quantized
from lingc.checkpoint.expected import Shape
from lingc.checkpoint.layout import PACKED, SCALE, SCALE_INV, SHAPE
from lingc.checkpoint.source import Source
from lingc.checkpoint.tensorfile import tensor_bytes
from lingc.quantize.formats import NIBBLES, blocks
from lingc.quantize.recipes import PLAIN, Format, Recipe

SHARD_BYTES = 8 << 30

Piece = tuple[str, Shape]  # dtype tag and shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One logical tensor to write: its format, and the pieces it is stored as, by name."""

    name: str
    format: Format
    pieces: dict[str, Piece]

    @property
    def length_bytes(self) -> int:
        """Of all pieces together."""
        return sum(tensor_bytes(*piece) for piece in self.pieces.values())


def item(source: Source, name: str, recipe: Recipe, *, scale_suffix: str = SCALE_INV) -> Item:
    """How a recipe stores a tensor.

    Args:
        source: Says the tensor's shape.
        name: Logical name.
        recipe: Chooses the format of a matrix; vectors stay plain.
        scale_suffix: What the scales of FP8 blocks are called behind `weight`: `_scale_inv` in the
            FP8 release, `_scale` in compressed-tensors.
    """
    shape = source.shape(name)
    chosen = recipe.format_of(name.removesuffix(".weight")) if len(shape) == 2 else PLAIN
    return Item(name=name, format=chosen, pieces=_pieces(name, shape, chosen, scale_suffix))


def stored_bytes(name: str, shape: Shape, chosen: Format) -> int:
    """What a tensor takes in a format."""
    return sum(tensor_bytes(*piece) for piece in _pieces(name, shape, chosen, SCALE).values())


def _pieces(name: str, shape: Shape, chosen: Format, scale_suffix: str) -> dict[str, Piece]:
    if chosen.kind == "plain":
        return {name: (_plain_dtype(name), shape)}
    rows, columns = shape
    if chosen.kind == "fp8_tensor":
        return {name: ("F8_E4M3", shape), name + SCALE: ("F32", (1,))}
    if chosen.kind == "fp8_block":
        return {
            name: ("F8_E4M3", shape),
            name + scale_suffix: ("F32", (blocks(rows), blocks(columns))),
        }
    return {
        name + PACKED: ("I32", (rows, -(-columns // NIBBLES))),
        name + SCALE: ("BF16", (rows, -(-columns // chosen.group))),
        name + SHAPE: ("I64", (2,)),
    }


def _plain_dtype(name: str) -> str:
    return "F32" if name.endswith(".expert_bias") else "BF16"


def values(source: Source, chosen: Item) -> tuple[NDArray[Any], ...]:
    """Values of the pieces, in their order.

    Raises:
        CheckpointError: One is not finite.
    """
    name, stored = chosen.name, chosen.format
    if stored.kind == "plain":
        return (to_plain(source, name, "f32" if _plain_dtype(name) == "F32" else "bf16"),)
    codes, scales = to_quantized(source, name, stored.kind, stored.group)
    if stored.kind == "int4_group":
        return codes, scales, np.array(source.shape(name), np.int64)
    return codes, scales


def cut(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    """Items by file, in order; a file holds at most so many bytes, unless one item has more."""
    shards: list[list[Item]] = [[]]
    size_bytes = 0
    for one in items:
        if shards[-1] and size_bytes + one.length_bytes > shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(one)
        size_bytes += one.length_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """What the files of the main model are called."""
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def index(weight_map: Mapping[str, str], total_bytes: int) -> dict[str, Any]:
    """Content of the index: which file holds which piece."""
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
