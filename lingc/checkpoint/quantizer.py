"""Quantize a checkpoint by any recipe: tensor by tensor, resumable, and telling what it did.

Each tensor is read from the source, rounded in the format of the recipe, written, and compared with
what it was. At no time is more than a few matrices held in memory, whatever the size of the files.
What is stored in the format already is copied; what a calibration has rounded is taken from there.

    formats of the recipe      layout
    plain alone                BF16 release
    fp8_block alone            FP8 release: `weight_scale_inv`, quant_method fp8
    int4_group of one group    compressed-tensors, pack-quantized
    fp8_tensor alone           compressed-tensors, float-quantized, one scale a matrix
    several                    compressed-tensors, mixed-precision, a group of modules a format

Files that are whole are not written again: a killed run goes on at the file it was in.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.checkpoint import items
from lingc.checkpoint.compressed import compressed_config
from lingc.checkpoint.convert import is_stored_as
from lingc.checkpoint.directory import INDEX, MTP_FILE
from lingc.checkpoint.error import ErrorSums, error_sums
from lingc.checkpoint.expected import matrix_modules, mtp_prefix
from lingc.checkpoint.items import Item
from lingc.checkpoint.layout import INPUT_SCALE, SCALE, SCALE_INV
from lingc.checkpoint.quantization import quantization_config
from lingc.checkpoint.reader import GENERATION_CONFIG
from lingc.checkpoint.source import Source
from lingc.checkpoint.tensorfile import TensorWriter
from lingc.quantize.recipes import Recipe, load_recipe
from lingc.resuming import Resumable, appearing
from lingc.staging import write_whole, writing

REPORT = "quantization.json"
"""What was done to each tensor, beside the weights."""

WORKERS = 2
"""Tensors that are rounded at a time; more would outrun most disks."""

Array = NDArray[Any]
Progress = Callable[[int], None]
"""Called with bytes of input that are behind since the last call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was done to one matrix.

    Attributes:
        name: Of the module.
        format: How it is stored now: `int4_group(32)`.
        how: `plain`, `copied` as it was stored already, `rounded` to nearest, or `calibrated`.
        why: In `plain`, why it is not quantized.
        error: Norm of what rounding changed over the norm of the matrix; None where nothing was
            rounded, and where calibration moved a scale from one matrix to another.
        typical_error: Root mean square of the change over a typical value: where it is far above
            `error`, outliers cost the other values digits; likewise.
        worst: Largest change of one element over the root mean square of the matrix, likewise.
        input_bytes: What it took in an unquantized checkpoint.
        bytes: What it takes now.
    """

    name: str
    format: str
    how: str
    why: str | None
    error: float | None
    typical_error: float | None
    worst: float | None
    input_bytes: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A quantized checkpoint.

    Attributes:
        path: Its directory.
        is_resumed: Whether files of an earlier run were kept.
        lacks_input_scales: Whether the recipe wants scales of inputs, and neither a calibration
            nor the source has them.
        outcomes: Of every matrix, in the order of the layers.
    """

    path: Path
    is_resumed: bool
    lacks_input_scales: bool
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a calibration brings.

    Attributes:
        source: The checkpoint with calibrated tensors in place of its own.
        names: Logical names of the tensors that come from the calibration.
        moved: Those whose values, and not only whose rounding, are others.
        input_scales: Module -> what a code of its inputs stands for.
        digest: Tells calibrations apart.
    """

    source: Source
    names: frozenset[str]
    moved: frozenset[str]
    input_scales: Mapping[str, float]
    digest: str


def quantize_checkpoint(
    source: Source,
    recipe: Recipe,
    out_dir: str | Path,
    *,
    changes: Changes | None = None,
    keep_mtp: bool = True,
    shard_bytes: int = items.SHARD_BYTES,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Write a quantized checkpoint, whole or not at all; a killed run goes on by being asked again.

    Args:
        source: Where the weights come from.
        recipe: Which matrix is stored how.
        out_dir: Must not exist, or be empty.
        changes: What a calibration of this source by this recipe brings.
        keep_mtp: Whether MTP weights are written; the INT4 release has none.
        shard_bytes: How large the files of the main model get, unless one tensor is larger.
        fresh: Throw away what an earlier run began.
        progress: Told after each tensor.

    Raises:
        UsageError: `out_dir` is there already, or what was begun had other inputs.
        RecipeError: A pattern of the recipe matches nothing.
        CheckpointError: A weight is not finite.
        ResourceError: The disk is full, read-only or forbidden.
    """
    recipe.check_matches(matrix_modules(source.config))
    target = Path(out_dir)
    work = _Work(source, recipe, changes, keep_mtp=keep_mtp)
    shards = items.cut(work.main, shard_bytes)
    files = items.shard_names(len(shards))
    inputs = {
        "checkpoint": source.identity(),
        "recipe": recipe.digest(),
        "calibration": "none" if changes is None else changes.digest,
        "MTP layer": "kept" if keep_mtp else "left out",
        "files": f"of {shard_bytes} bytes",
    }
    with (
        Resumable(target, inputs, fresh=fresh, needed_bytes=work.total_bytes) as folder,
        writing(target),
    ):
        outcomes: list[Outcome] = []
        weight_map: dict[str, str] = {}
        for file, shard in zip([*files, MTP_FILE], [*shards, work.mtp], strict=True):
            if not shard:
                continue
            pieces = work.pieces(shard)
            told = folder.state / f"{file}.json"
            if not told.exists():
                with appearing(folder.content / file) as path:
                    done = work.write(path, shard, progress)
                write_whole(told, json.dumps([asdict(one) for one in done]))
            elif progress is not None:
                progress(sum(work.input_bytes(one.name) for one in shard))
            outcomes += [Outcome(**one) for one in json.loads(told.read_text(encoding="utf-8"))]
            weight_map |= dict.fromkeys(pieces, file)
        content = folder.content
        items.write_json(content / INDEX, items.index(weight_map, work.total_bytes))
        items.write_json(content / "config.json", work.config())
        items.write_json(content / REPORT, report(recipe, outcomes, changes))
        if generation := source.generation_config():
            items.write_json(content / GENERATION_CONFIG, generation)
        for path in source.tokenizer_files():
            (content / path.name).write_bytes(path.read_bytes())
        folder.publish()
    return Quantized(
        path=target,
        is_resumed=folder.is_resumed,
        lacks_input_scales=work.lacks_input_scales,
        outcomes=tuple(outcomes),
    )


def report(recipe: Recipe, outcomes: Sequence[Outcome], changes: Changes | None) -> dict[str, Any]:
    """What `quantization.json` holds."""
    return {
        "recipe": recipe.document(),
        "calibration": None if changes is None else changes.digest,
        "tensors": [asdict(one) for one in outcomes],
    }


class _Work:
    """What has to be written, and how."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        changes: Changes | None,
        *,
        keep_mtp: bool,
    ) -> None:
        self._source = source
        self._changes = changes
        self._from = source if changes is None else changes.source
        self._recipe = recipe
        shapes = {name: source.shape(name) for name in source.names}
        matrices = (
            name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2
        )
        self.kinds = {recipe.format_of(module).kind for module in matrices} - {"plain"}
        suffix = SCALE_INV if self.kinds == {"fp8_block"} else SCALE
        every = [items.item(source, name, recipe, scale_suffix=suffix) for name in source.names]
        prefix = mtp_prefix(source.config)
        self.main = [one for one in every if not one.name.startswith(prefix)]
        self.mtp = [one for one in every if one.name.startswith(prefix)] if keep_mtp else []
        self.total_bytes = sum(one.length_bytes for one in (*self.main, *self.mtp))
        scales = self._input_scales((*self.main, *self.mtp))
        self.total_bytes += 4 * len(scales)
        self.lacks_input_scales = recipe.activations == "fp8_static" and not scales

    def input_bytes(self, name: str) -> int:
        """Of a tensor in an unquantized checkpoint."""
        shape = self._source.shape(name)
        return int(np.prod(shape)) * (4 if name.endswith(".expert_bias") else 2)

    def pieces(self, shard: Sequence[Item]) -> dict[str, items.Piece]:
        """Everything that a file holds."""
        found = {name: piece for one in shard for name, piece in one.pieces.items()}
        return {**found, **dict.fromkeys(self._input_scales(shard), ("F32", (1,)))}

    def write(self, path: Path, shard: Sequence[Item], progress: Progress | None) -> list[Outcome]:
        """Write one file."""
        outcomes = []
        scales = self._input_scales(shard)
        with TensorWriter(path, self.pieces(shard), {"format": "pt"}) as writer:
            for name, value in scales.items():
                writer.write(name, np.array([value], np.float32))
            for one, values, outcome in self._made(shard):
                for name, piece in zip(one.pieces, values, strict=True):
                    writer.write(name, piece)
                if outcome is not None:
                    outcomes.append(outcome)
                if progress is not None:
                    progress(self.input_bytes(one.name))
            writer.finish()
        return outcomes

    def config(self) -> dict[str, Any]:
        """The written `config.json`."""
        formats = {one.name: one.format for one in (*self.main, *self.mtp)}
        model = self._source.config
        # What the releases have is said as the releases say it.
        is_release = self.kinds <= {"fp8_block"} or (
            formats == {name: load_recipe("int4").format_of(_module(name)) for name in formats}
        )
        if is_release:
            layout = "int4" if "int4_group" in self.kinds else "fp8"
            said = quantization_config(model, layout, formats)
        else:
            activations = self._recipe.activations
            if self.lacks_input_scales:
                activations = "plain"  # nobody knows the scales
            said = compressed_config(formats, activations)
        return {**model.raw, **({"quantization_config": said} if said else {})}

    def _input_scales(self, shard: Sequence[Item]) -> dict[str, float]:
        """Those of a calibration, or that the source has already."""
        if self._recipe.activations != "fp8_static":
            return {}
        found = (
            (_module(one.name), self._from.input_scale(one.name))
            for one in shard
            if one.format.kind.startswith("fp8")
        )
        return {module + INPUT_SCALE: scale for module, scale in found if scale is not None}

    def _made(
        self, shard: Sequence[Item]
    ) -> Iterator[tuple[Item, tuple[Array, ...], Outcome | None]]:
        """Values of every item in order, a few of them made ahead."""
        with ThreadPoolExecutor(WORKERS) as pool:
            waiting = iter(shard)
            ahead = [pool.submit(self._make, one) for one in islice(waiting, WORKERS + 1)]
            while ahead:
                made = ahead.pop(0).result()
                ahead += [pool.submit(self._make, one) for one in islice(waiting, 1)]
                yield made

    def _make(self, one: Item) -> tuple[Item, tuple[Array, ...], Outcome | None]:
        values = items.values(self._from, one)
        shape = self._source.shape(one.name)
        if len(shape) != 2:
            return one, values, None
        how = self._how(one)
        sums: ErrorSums | None = None
        if how == "rounded" or (how == "calibrated" and one.name not in self._moved):
            sums = error_sums(self._source, one, values)
        outcome = Outcome(
            name=_module(one.name),
            format=str(one.format),
            how=how,
            why=self._why(_module(one.name)) if how == "plain" else None,
            error=None if sums is None else sums.relative,
            typical_error=None if sums is None else sums.of_typical,
            worst=None if sums is None else sums.worst,
            input_bytes=self.input_bytes(one.name),
            bytes=one.length_bytes,
        )
        return one, values, outcome

    @property
    def _moved(self) -> frozenset[str]:
        return frozenset() if self._changes is None else self._changes.moved

    def _how(self, one: Item) -> str:
        if one.format.kind == "plain":
            return "plain"
        if self._changes is not None and one.name in self._changes.names:
            return "calibrated"
        stored = is_stored_as(self._source, one.name, one.format.kind, one.format.group)
        return "copied" if stored else "rounded"

    def _why(self, module: str) -> str:
        for number, rule in enumerate(self._recipe.rules, 1):
            if rule.matches(module):
                return f"rule {number} of the recipe keeps it plain"
        return "no rule of the recipe names it"


def _module(name: str) -> str:
    return name.removesuffix(".weight")
