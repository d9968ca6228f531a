"""Write a checkpoint in one of the release layouts, tensor by tensor.

A tensor that is already stored as the layout wants it is copied unchanged. Any other is rounded to
nearest from its (dequantized) values. Which module is quantized is what the recipe of the layout's
name says; `expert_bias` is F32, all else BF16.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lingc.checkpoint.directory import INDEX, MTP_FILE
from lingc.checkpoint.expected import mtp_prefix
from lingc.checkpoint.items import (
    SHARD_BYTES,
    Item,
    cut,
    index,
    item,
    shard_names,
    values,
    write_json,
)
from lingc.checkpoint.quantization import quantization_config
from lingc.checkpoint.reader import GENERATION_CONFIG, Checkpoint, open_checkpoint
from lingc.checkpoint.source import Source
from lingc.checkpoint.tensorfile import TensorWriter
from lingc.errors import UsageError
from lingc.quantize.recipes import load_recipe
from lingc.staging import Staging, is_empty, writing

LAYOUTS = ("bf16", "fp8", "int4")

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


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
    items = [item(source, name, recipe) for name in source.names]
    main = [one for one in items if not one.name.startswith(prefix)]
    mtp = [one for one in items if one.name.startswith(prefix)] if keep_mtp else []
    shards = cut(main, shard_bytes)
    files = shard_names(len(shards))
    total_bytes = sum(one.length_bytes for one in [*main, *mtp])
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
            for one in _write_shard(folder / file, source, shard):
                written_bytes += one.length_bytes
                if progress is not None:
                    progress(written_bytes, total_bytes)
                if file != MTP_FILE or index_mtp:
                    weight_map |= dict.fromkeys(one.pieces, file)
        write_json(folder / INDEX, index(weight_map, total_bytes))
        write_json(folder / "config.json", _config(source, layout, [*main, *mtp]))
        if generation := source.generation_config():
            write_json(folder / GENERATION_CONFIG, generation)
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


# ----------------------------------------------------------------------------------------- files


def _write_shard(path: Path, source: Source, items: Sequence[Item]) -> Iterator[Item]:
    """Write a file, giving each tensor when it is written; no file where there is none."""
    if not items:
        return
    pieces = {name: piece for one in items for name, piece in one.pieces.items()}
    with TensorWriter(path, pieces, {"format": "pt"}) as writer:
        for one in items:
            for name, piece in zip(one.pieces, values(source, one), strict=True):
                writer.write(name, piece)
            yield one
        writer.finish()


def _config(source: Source, layout: str, items: Sequence[Item]) -> dict[str, Any]:
    quantization = quantization_config(
        source.config, layout, {one.name: one.format for one in items}
    )
    return {**source.config.raw, **({"quantization_config": quantization} if quantization else {})}
