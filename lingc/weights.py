"""The weights of a plan: made from a checkpoint, written to files, mapped back.

A `WeightSpec` says which tensors of the checkpoint a weight is made of. What the checkpoint stores
in the same format and group is taken unchanged; else the dequantized values are rounded to nearest.
The codes and the scales of one matrix are weights of their own, made together. Rows are put in the
order of the weight's layout, whether it is written or read straight from the checkpoint.

The scale of a matrix's inputs is what the checkpoint says, or 1 where nothing was calibrated: E4M3
spans 2^-9 to 448, and activations of a model with norms lie inside of that.

FP8 blocks cover 128 rows of a matrix. Several matrices are joined block by block where each but the
last ends on a block, and always in stacked experts, whose scales are laid out by source; otherwise
the joined values are quantized anew.

BF16 is held as uint16 bits, E4M3 as uint8 codes.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.checkpoint.convert import to_plain, to_quantized
from lingc.checkpoint.source import Source
from lingc.checkpoint.tensorfile import (
    DTYPES,
    TAGS,
    Maps,
    Stored,
    TensorWriter,
    read_header,
    tensor_bytes,
)
from lingc.errors import CheckpointError, InputError, IntegrityError
from lingc.model.config import ModelConfig
from lingc.plan import WeightSpec
from lingc.quantize.formats import (
    FP8_BLOCK,
    quantize_fp8_block,
)
from lingc.quantize.layouts import arrange
from lingc.staging import Scratch, sync, writing

Array = NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""

SHARD_BYTES = 2 << 30

_RUN = 1 << 20  # values looked at together; what that makes stays in a core's cache


# ----------------------------------------------------------------------------------------- making


def materialize(spec: WeightSpec, checkpoint: Source, config: ModelConfig) -> Array:
    """Make one weight; `CheckpointWeights` is quicker for codes and scales of one matrix.

    Raises:
        CheckpointError: The checkpoint lacks a source, gives another shape, or a value is not
            finite.
    """
    return CheckpointWeights([spec], checkpoint, config)[spec.name]


class CheckpointWeights(Mapping[str, Array]):
    """The weights of a plan by name, each made from the checkpoint when it is asked for.

    The last matrix that was made is kept, so that its codes and scales cost one quantization. What
    the checkpoint holds as it is wanted is a read-only view of the file.
    """

    def __init__(
        self, specs: Iterable[WeightSpec], checkpoint: Source, config: ModelConfig
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._checkpoint = checkpoint
        self._config = config
        self._last: tuple[Hashable, dict[str, Array]] = (None, {})

    def __getitem__(self, name: str) -> Array:
        spec = self._specs[name]
        if self._last[0] != _matrix_of(spec):
            self._last = (None, {})  # before making more
            self._last = (_matrix_of(spec), self._make(spec))
        return _finished(spec, self._last[1][spec.part], spec.type.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _make(self, spec: WeightSpec) -> dict[str, Array]:
        made = _pieces(spec, self._checkpoint, self._config)
        if not spec.experts:
            return next(made)
        stacks: dict[str, Array] = {}
        for expert, parts in enumerate(made):
            for part, values in parts.items():
                if part not in stacks:
                    count = len(spec.members())
                    stacks[part] = np.empty((count, *values.shape), values.dtype)
                stacks[part][expert] = values
        return stacks


def _matrix_of(spec: WeightSpec) -> Hashable:
    """What the two parts of a quantized matrix have in common, and no other weight has."""
    dtype = spec.type.dtype if spec.part == "values" else ""
    made_of = spec.sources, spec.experts, spec.last, spec.format, spec.group, spec.take
    return *made_of, spec.split, spec.layer, dtype


def _pieces(
    spec: WeightSpec, checkpoint: Source, config: ModelConfig
) -> Iterator[dict[str, Array]]:
    """The parts of a matrix, by name; expert by expert where experts are stacked."""
    if spec.format == "decay":
        yield {"values": config.decay(spec.layer).astype(DTYPES[TAGS[spec.type.dtype]])}
        return
    for names in spec.members():
        try:
            parts = _parts(spec, names, checkpoint)
            _refuse_wild(parts)
        except InputError as error:
            raise CheckpointError(
                f"weight {spec.name!r} cannot be made of {', '.join(names)}: {error.problem}",
                hint=error.hint,
            ) from error
        yield parts


def _parts(spec: WeightSpec, names: Sequence[str], checkpoint: Source) -> dict[str, Array]:
    if spec.format == "plain":
        assert spec.type.dtype in ("f32", "bf16"), f"a plain weight is stored as {spec.type.dtype}"
        joined = _join([to_plain(checkpoint, name, spec.type.dtype) for name in names])
        return {"values": joined if spec.take is None else _take(spec, joined)}
    if spec.format == "fp8_block" and not (spec.experts or _end_on_blocks(checkpoint, names)):
        dense = _join([checkpoint.dense(name) for name in names])
        pairs = [quantize_fp8_block(dense)]
    else:
        pairs = [to_quantized(checkpoint, name, spec.format, spec.group) for name in names]
    made = {"codes": _join([a for a, _ in pairs]), "scales": _join([b for _, b in pairs])}
    if spec.format == "fp8_tensor":
        made["scales"] = made["scales"].reshape(1)  # stored as one number, with an axis or without
        found = [checkpoint.input_scale(name) for name in names]
        made["input_scales"] = np.array([1.0 if one is None else one for one in found], np.float32)
    return made


def _refuse_wild(parts: Mapping[str, Array]) -> None:
    """A NaN that is shipped shows as nonsense on whoever meets the expert it stands in."""
    for part, values in parts.items():
        flat = values.reshape(-1)
        starts = range(0, flat.size, _RUN)
        if not all(_are_finite(flat[start : start + _RUN]) for start in starts):
            raise InputError(
                f"there are {part} that are NaN or infinite",
                hint="the checkpoint is damaged or was exported wrongly; fetch it again",
            )


def _are_finite(values: Array) -> bool:
    """Of BF16 bits, E4M3 codes or f32; packed integers always are."""
    if values.dtype == np.uint16:
        return bool(((values & np.uint16(0x7FFF)) < 0x7F80).all())
    if values.dtype == np.uint8:
        return bool(((values & np.uint8(0x7F)) != 0x7F).all())
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _take(spec: WeightSpec, kv_b: Array) -> Array:
    heads, nope, values = spec.split
    by_head = kv_b.reshape(heads, nope + values, -1)
    rows = by_head[:, :nope] if spec.take == "absorb_k" else by_head[:, nope:]
    return np.ascontiguousarray(rows)


def _end_on_blocks(checkpoint: Source, names: Sequence[str]) -> bool:
    return all(checkpoint.shape(name)[0] % FP8_BLOCK == 0 for name in names[:-1])


def _join(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _finished(spec: WeightSpec, values: Array, shape: Sequence[Any]) -> Array:
    """Values in the weight's layout, if they have the shape that the plan says."""
    if values.shape != tuple(shape):
        raise CheckpointError(
            f"weight {spec.name!r} is {list(shape)} in the plan, the checkpoint's tensors "
            f"({', '.join(spec.sources)}) give {list(values.shape)}",
            hint="the plan was made for another config; build it from this checkpoint",
        )
    return arrange(spec.layout, values)


# ---------------------------------------------------------------------------------------- writing


def write_weights(
    specs: Iterable[WeightSpec],
    checkpoint: Source,
    config: ModelConfig,
    out_dir: Path,
    progress: Progress | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write weights to safetensors files named by their SHA-256.

    The same weights in the same layouts give the same files. A file appears under its name when
    all of them are whole; at no time is more than one matrix, or one expert's, held in memory.

    Args:
        specs: In any order.
        out_dir: Made if it is not there; what it holds already is left alone.
        progress: Told after each matrix.
        shard_bytes: How large a file gets, unless one weight is larger.

    Returns:
        The files, in the order of the weights' names.

    Raises:
        CheckpointError: As by `materialize`.
        ResourceError: The disk is full, read-only or forbidden.
    """
    ordered = sorted(specs, key=lambda spec: spec.name)
    shards = _cut(ordered, shard_bytes)
    total_bytes = sum(_spec_bytes(spec) for spec in ordered)
    with Scratch(out_dir, needed_bytes=total_bytes) as scratch, writing(out_dir):
        paths = [scratch.content / f"{number}.safetensors" for number in range(len(shards))]
        with ExitStack() as stack:
            writers: dict[str, TensorWriter] = {}
            for path, shard in zip(paths, shards, strict=True):
                stored = {spec.name: _stored_as(spec) for spec in shard}
                writer = stack.enter_context(TensorWriter(path, stored))
                writers |= dict.fromkeys(stored, writer)
            written_bytes = 0
            for matrix in _matrices(ordered):
                for expert, parts in enumerate(_pieces(matrix[0], checkpoint, config)):
                    for spec in matrix:
                        shape = spec.type.shape[1:] if spec.experts else spec.type.shape
                        values = _finished(spec, parts[spec.part], shape)
                        at_bytes = expert * values.nbytes
                        writers[spec.name].write(spec.name, values, at_bytes=at_bytes)
                written_bytes += sum(_spec_bytes(spec) for spec in matrix)
                if progress is not None:
                    progress(written_bytes, total_bytes)
            for writer in set(writers.values()):
                writer.finish()
        return _publish(paths, out_dir)


def _stored_as(spec: WeightSpec) -> tuple[str, tuple[int, ...]]:
    shape = spec.type.bind({})
    return TAGS[spec.type.dtype], shape


def _spec_bytes(spec: WeightSpec) -> int:
    return tensor_bytes(*_stored_as(spec))


def _cut(specs: Sequence[WeightSpec], shard_bytes: int) -> list[list[WeightSpec]]:
    shards: list[list[WeightSpec]] = []
    size_bytes = 0
    for spec in specs:
        length_bytes = _spec_bytes(spec)
        if not shards or size_bytes + length_bytes > shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(spec)
        size_bytes += length_bytes
    return shards


def _matrices(specs: Sequence[WeightSpec]) -> list[list[WeightSpec]]:
    """Weights that are parts of one matrix together."""
    matrices: dict[Hashable, list[WeightSpec]] = {}
    for spec in specs:
        matrices.setdefault(_matrix_of(spec), []).append(spec)
    return list(matrices.values())


def _publish(paths: Sequence[Path], out_dir: Path) -> list[Path]:
    """Move finished files to their names; one that is there already has the same content."""
    out_dir.mkdir(exist_ok=True)
    published = []
    for path in paths:
        with path.open("rb") as file:
            name = hashlib.file_digest(file, "sha256").hexdigest()
        published.append(path.replace(out_dir / f"{name}.safetensors"))
    sync(out_dir)
    return published


# ---------------------------------------------------------------------------------------- reading


class StoredWeights(Mapping[str, Array]):
    """Weights in files, each mapped read-only when it is asked for; made by `open_weights`."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        self._maps = Maps()

    def __getitem__(self, name: str) -> Array:
        return self._maps.read(self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def open_weights(paths: Iterable[Path]) -> StoredWeights:
    """Map files that `write_weights` wrote; digests are not compared here.

    Raises:
        IntegrityError: A file is missing or damaged, or two files hold the same weight.
    """
    tensors: dict[str, Stored] = {}
    for path in paths:
        try:
            found = read_header(path)
        except CheckpointError as error:
            raise IntegrityError(
                f"weight file {error.problem}", hint="write them again from the checkpoint"
            ) from error
        for name in found.keys() & tensors.keys():
            raise IntegrityError(
                f"weight {name!r} stands in {tensors[name].path.name!r} and in {path.name!r}",
                hint="give the files of one engine",
            )
        tensors |= found
    return StoredWeights(tensors)
