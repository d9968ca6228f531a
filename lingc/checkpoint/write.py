"""Write a checkpoint in one of the release layouts, tensor by tensor.

A tensor that is already stored as the layout wants it is copied unchanged. Any other is rounded to
nearest from its (dequantized) values. Which module is quantized is what the recipe of the layout's
name says; `expert_bias` is F32, all else BF16.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.checkpoint.convert import to_plain, to_quantized
from lingc.checkpoint.directory import INDEX, MTP_FILE
from lingc.checkpoint.expected import Shape, mtp_prefix
from lingc.checkpoint.layout import PACKED, SCALE, SCALE_INV, SHAPE
from lingc.checkpoint.quantization import quantization_config
from lingc.checkpoint.reader import GENERATION_CONFIG, Checkpoint, open_checkpoint
from lingc.checkpoint.source import Source
from lingc.checkpoint.tensorfile import TensorWriter, tensor_bytes
from lingc.errors import CheckpointError, InputError, UsageError
from lingc.quantize.formats import (
    NIBBLES,
    blocks,
)
from lingc.quantize.recipes import PLAIN, Format, Recipe, load_recipe
from lingc.staging import Staging, is_empty, writing

LAYOUTS = ("bf16", "fp8", "int4")
SHARD_BYTES = 8 << 30

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""

Piece = tuple[str, Shape]  # dtype tag and shape


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One logical tensor to write: its format, and the pieces it is stored as, by name."""

    name: str
    format: Format
    pieces: dict[str, Piece]

    @property
    def length_bytes(self) -> int:
        return sum(tensor_bytes(*piece) for piece in self.pieces.values())


def write_checkpoint(
    source: Source,
    out_dir: str | Path,
    *,
    layout: str = "bf16",
    shard_bytes: int = SHARD_BYTES,
    index_mtp: bool = True,
    keep_mtp: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint directory, whole or not at all.

    Args:
        source: Where the weights come from.
        out_dir: Must not exist, or be empty.
        layout: One of `LAYOUTS`.
        shard_bytes: How large the files of the main model get, unless one tensor is larger.
        index_mtp: Whether the index lists the MTP layer's file; both forms occur in releases.
        keep_mtp: Whether MTP weights are written; the INT4 release has none.
        progress: Told after each tensor.

    Raises:
        UsageError: `out_dir` is there already, or no layout has that name.
        CheckpointError: A weight is not finite.
        ResourceError: The disk is full, read-only or forbidden.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"no layout is called {layout!r}", hint=f"there are {', '.join(LAYOUTS)}")
    recipe = load_recipe(layout)
    prefix = mtp_prefix(source.config)
    items = [_item(source, name, recipe) for name in source.names]
    main = [item for item in items if not item.name.startswith(prefix)]
    mtp = [item for item in items if item.name.startswith(prefix)] if keep_mtp else []
    shards = _cut(main, shard_bytes)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    total_bytes = sum(item.length_bytes for item in [*main, *mtp])
    texts = {path.name: path.read_bytes() for path in source.tokenizer_files()}
    target = Path(out_dir)
    with (
        Staging(target, replaceable=is_empty, needed_bytes=total_bytes) as staging,
        writing(target),
    ):
        folder = staging.content
        written_bytes = 0
        weight_map: dict[str, str] = {}
        for file, shard in zip([*files, MTP_FILE], [*shards, mtp], strict=True):
            for item in _write_shard(folder / file, source, shard):
                written_bytes += item.length_bytes
                if progress is not None:
                    progress(written_bytes, total_bytes)
                if file != MTP_FILE or index_mtp:
                    weight_map |= dict.fromkeys(item.pieces, file)
        _write_json(folder / INDEX, _index(weight_map, total_bytes))
        _write_json(folder / "config.json", _config(source, layout, [*main, *mtp]))
        if generation := source.generation_config():
            _write_json(folder / GENERATION_CONFIG, generation)
        for name, text in texts.items():
            (folder / name).write_bytes(text)
        staging.publish()
    return target


def make_twin(checkpoint: Checkpoint, layout: str, cache_dir: str | Path) -> Checkpoint:
    """Open the same model in another layout, written to `cache_dir` once.

    Like the releases, the INT4 twin has no MTP weights.

    Raises:
        UsageError: No layout has that name.
        CheckpointError: A weight is not finite, or the cached twin was damaged.
        ResourceError: The disk is full, read-only or forbidden.
    """
    path = Path(cache_dir) / f"{layout}-{checkpoint.identity()[:16]}"
    if not path.is_dir():
        try:
            write_checkpoint(checkpoint, path, layout=layout, keep_mtp=layout != "int4")
        except UsageError:
            if not path.is_dir():  # else another process was faster
                raise
    return open_checkpoint(path)


# ---------------------------------------------------------------------------------------- pieces


def _item(source: Source, name: str, recipe: Recipe) -> _Item:
    shape = source.shape(name)
    chosen = recipe.format_of(name.removesuffix(".weight")) if len(shape) == 2 else PLAIN
    return _Item(name=name, format=chosen, pieces=_pieces(name, shape, chosen))


def _pieces(name: str, shape: Shape, chosen: Format) -> dict[str, Piece]:
    if chosen.kind == "plain":
        return {name: (_plain_dtype(name), shape)}
    rows, columns = shape
    if chosen.kind == "fp8_block":
        return {
            name: ("F8_E4M3", shape),
            name + SCALE_INV: ("F32", (blocks(rows), blocks(columns))),
        }
    return {
        name + PACKED: ("I32", (rows, -(-columns // NIBBLES))),
        name + SCALE: ("BF16", (rows, -(-columns // chosen.group))),
        name + SHAPE: ("I64", (2,)),
    }


def _plain_dtype(name: str) -> str:
    return "F32" if name.endswith(".expert_bias") else "BF16"


def _values(source: Source, item: _Item) -> tuple[NDArray[Any], ...]:
    """Values of the pieces, in their order."""
    name, chosen = item.name, item.format
    if chosen.kind == "plain":
        return (to_plain(source, name, "f32" if _plain_dtype(name) == "F32" else "bf16"),)
    pair = to_quantized(source, name, chosen.kind, chosen.group)
    if chosen.kind == "fp8_block":
        return pair
    return *pair, np.array(source.shape(name), np.int64)


# ----------------------------------------------------------------------------------------- files


def _cut(items: Sequence[_Item], shard_bytes: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    size_bytes = 0
    for item in items:
        if shards[-1] and size_bytes + item.length_bytes > shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(item)
        size_bytes += item.length_bytes
    return shards


def _write_shard(path: Path, source: Source, items: Sequence[_Item]) -> Iterator[_Item]:
    """Write a file, giving each tensor when it is written; no file where there is none."""
    if not items:
        return
    pieces = {name: piece for item in items for name, piece in item.pieces.items()}
    with TensorWriter(path, pieces, {"format": "pt"}) as writer:
        for item in items:
            try:
                values = _values(source, item)
            except InputError as error:
                raise CheckpointError(
                    f"tensor {item.name!r}: {error.problem}", hint=error.hint
                ) from error
            for name, piece in zip(item.pieces, values, strict=True):
                writer.write(name, piece)
            yield item
        writer.finish()


def _index(weight_map: dict[str, str], total_bytes: int) -> dict[str, Any]:
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _config(source: Source, layout: str, items: Sequence[_Item]) -> dict[str, Any]:
    quantization = quantization_config(
        source.config, layout, {item.name: item.format for item in items}
    )
    return {**source.config.raw, **({"quantization_config": quantization} if quantization else {})}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
