"""What a calibration holds, and the checkpoint that it makes of another.

    <calibration>/
      calibration.json       what it was made from, by digests; bounds of inputs; coverage
      layers/*.safetensors   tensors in place of the checkpoint's own, stored as in a checkpoint

A calibration is of one checkpoint and one recipe, and says so.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lingc import strict_json
from lingc.checkpoint.convert import to_dense
from lingc.checkpoint.layout import Entry, assemble_some
from lingc.checkpoint.quantizer import Changes
from lingc.checkpoint.source import Source
from lingc.checkpoint.tensorfile import Maps, Stored, read_header
from lingc.errors import CheckpointError, InputError, IntegrityError
from lingc.model.config import ModelConfig
from lingc.quantize.formats import E4M3_MAX, F32
from lingc.quantize.recipes import Recipe

DOCUMENT = "calibration.json"
LAYERS = "layers"
FORMAT = 1
"""Version of `calibration.json`; another is refused."""


def open_calibration(path: Path, source: Source, recipe: Recipe) -> Changes:
    """Open what `lingc calibrate` wrote.

    Args:
        path: Its directory.
        source: The checkpoint that it must be of.
        recipe: The recipe that it must be for.

    Raises:
        InputError: It is no calibration, or is damaged.
        IntegrityError: It is of another checkpoint, or for another recipe.
    """
    document = read_document(path)
    for what, mine in (("checkpoint", source.identity()), ("recipe", recipe.digest())):
        theirs = document["inputs"].get(what)
        if theirs != mine:
            raise IntegrityError(
                f"calibration {str(path)!r} is of {what} {str(theirs)[:16]}, "
                f"given is {what} {mine[:16]}",
                hint="calibrate again, or give the checkpoint and recipe that it was made with",
            )
    tensors: dict[str, Stored] = {}
    for file in sorted((path / LAYERS).glob("*.safetensors")):
        tensors |= read_header(file)
    groups = tuple(sorted({rule.format.group for rule in recipe.rules if rule.format.group}))
    entries, problems = assemble_some(tensors, source.config, groups)
    made = {one["module"] for one in document["matrices"] if one["how"] == "calibrated"}
    lost = made - {name.removesuffix(".weight") for name in entries}
    problems += [f"{module!r} is not there" for module in sorted(lost)]
    if problems:
        raise CheckpointError(
            f"calibration {str(path)!r} is not whole:",
            problems=tuple(problems),
            hint="calibrate again",
        )
    bounds = document["input_bounds"]
    scales = {module: bound / float(E4M3_MAX) or 1.0 for module, bound in bounds.items()}
    return Changes(
        source=_Calibrated(source, entries),
        names=frozenset(entries),
        moved=frozenset(),
        input_scales=scales,
        digest=_digest(path, tensors),
    )


def read_document(path: Path) -> Mapping[str, Any]:
    """`calibration.json` of a directory.

    Raises:
        InputError: There is none, or it is of another version or damaged.
    """
    file = path / DOCUMENT
    try:
        value: Any = strict_json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{str(path)!r} is no calibration: {DOCUMENT!r} cannot be read: "
            f"{error.strerror or error}",
            hint="give a directory that `lingc calibrate` wrote; what is called .partial is not "
            "finished",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(file)!r} is not sound JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else None
        raise InputError(
            f"{str(file)!r} has format {found!r}, this version reads {FORMAT}",
            hint="calibrate again",
        )
    kinds = {"inputs": dict, "matrices": list, "input_bounds": dict, "coverage": dict}
    for key, kind in kinds.items():
        if not isinstance(value.get(key), kind):
            raise InputError(f"{str(file)!r} has no sound {key!r}", hint="calibrate again")
    return value


def _digest(path: Path, tensors: Mapping[str, Stored]) -> str:
    """Of the document, which says what the rest follows from, and of what stands in the files."""
    digest = hashlib.sha256(b"lingc calibration 1\n")
    digest.update((path / DOCUMENT).read_bytes())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
    return digest.hexdigest()


class _Calibrated:
    """A source with some tensors in place of its own."""

    def __init__(self, source: Source, entries: Mapping[str, Entry]) -> None:
        self._source = source
        self._entries = entries
        self._maps = Maps()

    @property
    def config(self) -> ModelConfig:
        return self._source.config

    @property
    def names(self) -> tuple[str, ...]:
        return self._source.names

    @property
    def has_mtp(self) -> bool:
        return self._source.has_mtp

    def kind(self, name: str) -> str:
        entry = self._entries.get(name)
        return self._source.kind(name) if entry is None else entry.kind

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dense(self, name: str) -> F32:
        return to_dense(self, name)

    def plain(self, name: str) -> tuple[NDArray[Any], str]:
        return self._source.plain(name)

    def quantized(self, name: str) -> tuple[NDArray[Any], NDArray[Any], int]:
        entry = self._entries.get(name)
        if entry is None:
            return self._source.quantized(name)
        codes, scales = (self._maps.read(part) for part in entry.parts[:2])
        return codes, scales, entry.group

    def identity(self) -> str:
        return self._source.identity()

    def tokenizer_files(self) -> tuple[Path, ...]:
        return self._source.tokenizer_files()

    def generation_config(self) -> Mapping[str, Any]:
        return self._source.generation_config()
