"""Open a checkpoint directory and read its tensors, one at a time, as they are asked for."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lingc.checkpoint.convert import to_dense
from lingc.checkpoint.directory import scan
from lingc.checkpoint.expected import mtp_prefix
from lingc.checkpoint.layout import PLAIN_DTYPES, Entry, assemble
from lingc.checkpoint.tensorfile import Maps, Stored
from lingc.checkpoint.values import input_scale, value_faults
from lingc.errors import CheckpointError
from lingc.model.config import ModelConfig
from lingc.quantize.formats import (
    F32,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
GENERATION_CONFIG = "generation_config.json"

_SAMPLES, _SAMPLE_BYTES = 4, 256


class Checkpoint:
    """An open checkpoint directory; made by `open_checkpoint`.

    Files are memory-mapped: a tensor is read from the disk when its values are touched, and nothing
    is kept. Reading is described by `lingc.checkpoint.source.Source`.
    """

    def __init__(self, path: Path, config: ModelConfig, entries: Mapping[str, Entry]) -> None:
        self.path = path
        self._config = config
        self._entries = entries
        self._maps = Maps()

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self._config

    @property
    def names(self) -> tuple[str, ...]:
        """Logical names, in the order of the layers."""
        return tuple(self._entries)

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP layer's weights are there."""
        prefix = mtp_prefix(self._config)
        return any(name.startswith(prefix) for name in self._entries)

    def kind(self, name: str) -> str:
        """How a tensor is stored: `plain`, `fp8_block`, `fp8_tensor` or `int4_group`."""
        return self._entry(name).kind

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as in an unquantized checkpoint."""
        return self._entry(name).shape

    def dense(self, name: str) -> F32:
        """The values as f32, dequantized, in memory of their own."""
        return to_dense(self, name)

    def plain(self, name: str) -> tuple[NDArray[Any], str]:
        """A plain tensor as stored, read-only, and `bf16` (uint16 bits) or `f32`."""
        entry = self._entry(name)
        assert entry.kind == "plain", f"{name!r} is stored as {entry.kind}"
        return self._maps.read(entry.parts[0]), PLAIN_DTYPES[entry.parts[0].dtype]

    def quantized(self, name: str) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Codes, scales and group of a quantized tensor as stored, read-only."""
        entry = self._entry(name)
        assert entry.kind != "plain", f"{name!r} is stored plain"
        codes, scales = (self._maps.read(part) for part in entry.parts[:2])
        return codes, scales, entry.group

    def input_scale(self, name: str) -> float | None:
        """What an E4M3 code of a matrix's inputs stands for, where that was calibrated."""
        stored = self._entry(name).input_scale
        return None if stored is None else input_scale(stored, self._maps)

    def identity(self) -> str:
        """A SHA-256 that tells weights apart.

        Taken over the logical names in order and, for each stored piece, dtype, shape and bytes:
        all of them up to 1 KiB, else 4 runs of 256, from the first to the last, evenly apart. So it
        costs little on any size, does not depend on files or their order, differs between trained
        models, and does not find a flipped byte.
        """
        digest = hashlib.sha256(b"lingc checkpoint 1\n")
        for name in sorted(self._entries):
            entry = self._entries[name]
            digest.update(f"{name} {entry.kind} {entry.group}\n".encode())
            scale = [] if entry.input_scale is None else [entry.input_scale]
            for part in (*entry.parts[:2], *scale):
                digest.update(f"{part.dtype} {part.shape}\n".encode())
                digest.update(_sample(part))
        return digest.hexdigest()

    def tokenizer_files(self) -> tuple[Path, ...]:
        """Files of the tokenizer that the directory has."""
        return tuple(self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file())

    def generation_config(self) -> Mapping[str, Any]:
        """What `generation_config.json` holds; empty without one.

        Raises:
            CheckpointError: It cannot be read, or is not an object.
        """
        return read_generation_config(self.path / GENERATION_CONFIG)

    def faults(self) -> list[str]:
        """What only the values show; reads every scale and vector, no matrix."""
        return value_faults(self._entries.values(), self._maps)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} has no tensor {name!r}",
                hint="the plan or the config was made for another checkpoint",
            )
        return self._entries[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory in any of the release layouts.

    Headers are read and compared with what the config demands; `validate` also looks at values.

    Raises:
        ConfigError: `config.json` is missing, contradictory or of another architecture.
        CheckpointError: Files or tensors are missing, damaged, wrong or too many; all are listed,
            with the faults that `validate` would find in what can be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no directory {str(path)!r}",
            hint="give the directory that holds config.json and the safetensors files",
        )
    config = ModelConfig.from_file(directory)
    found = scan(directory)
    entries, problems = assemble(found, config)
    problems = [*found.problems, *problems]
    if problems:
        raise _failure(directory, [*problems, *value_faults(entries.values(), Maps())])
    return Checkpoint(directory, config, entries)


def validate(checkpoint: Checkpoint) -> None:
    """Check what only the values show: scales positive and finite, vectors finite.

    Raises:
        CheckpointError: Every fault found.
    """
    problems = checkpoint.faults()
    if problems:
        raise _failure(checkpoint.path, problems)


def _failure(path: Path, problems: Sequence[str]) -> CheckpointError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return CheckpointError(
        f"checkpoint {str(path)!r} has {count}:",
        problems=tuple(problems),
        hint="fetch the files named here again, or correct config.json if it is of another model",
    )


def read_generation_config(path: Path) -> Mapping[str, Any]:
    """What a `generation_config.json` holds; empty where there is none.

    Raises:
        CheckpointError: It cannot be read, or is not an object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not JSON: {error}", hint="correct the file, or remove it"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(value).__name__}, not an object",
            hint="correct the file, or remove it",
        )
    return value


def _sample(part: Stored) -> bytes:
    """Bytes of a tensor for `identity`, by plain reads: a map would fetch far more around them."""
    last = part.length_bytes - _SAMPLE_BYTES
    with part.path.open("rb", buffering=0) as file:
        if part.length_bytes <= _SAMPLES * _SAMPLE_BYTES:
            return os.pread(file.fileno(), part.length_bytes, part.offset_bytes)
        starts = (part.offset_bytes + last * i // (_SAMPLES - 1) for i in range(_SAMPLES))
        return b"".join(os.pread(file.fileno(), _SAMPLE_BYTES, start) for start in starts)
