"""What a calibration holds, and the checkpoint that it makes of another.

    <calibration>/
      calibration.json       what it was made from, by digests; bounds of inputs; coverage; the
                             SHA-256 of the other files
      layers/*.safetensors   tensors in place of the checkpoint's own, stored as in a checkpoint

A calibration is of one checkpoint and one recipe, and says so.
"""

import hashlib
from collections.abc import Iterator, Mapping
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
FORMAT = 2
"""Version of `calibration.json`; another is refused."""
_F32_MAX = 3.4e38


def open_calibration(path: Path, source: Source, recipe: Recipe) -> Changes:
    """Open what `lingc calibrate` wrote.

    Args:
        path: Its directory.
        source: The checkpoint that it must be of.
        recipe: The recipe that it must be for.

    Raises:
        InputError: It is no calibration, or is damaged.
        CheckpointError: A file or tensor of it is lost.
        IntegrityError: It is of another checkpoint or for another recipe, or a file of it is not
            the one that was written.
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
    lost_files = _check_files(path, document["files"])
    tensors: dict[str, Stored] = {}
    for file in sorted((path / LAYERS).glob("*.safetensors")):
        tensors |= read_header(file)
    groups = tuple(sorted({rule.format.group for rule in recipe.rules if rule.format.group}))
    entries, problems = assemble_some(tensors, source.config, groups)
    made = {one["module"] for one in document["matrices"] if one["how"] == "calibrated"}
    lost = made - {name.removesuffix(".weight") for name in entries}
    problems += [f"{module!r} is not there" for module in sorted(lost)]
    problems += [f"{name!r} is not there" for name in lost_files]
    if problems:
        raise CheckpointError(
            f"calibration {str(path)!r} is not whole:",
            problems=tuple(problems),
            hint="calibrate again",
        )
    bounds = document["input_bounds"]
    scales = {module: bound / float(E4M3_MAX) or 1.0 for module, bound in bounds.items()}
    return Changes(
        source=_Calibrated(source, entries, scales),
        names=frozenset(entries),
        moved=frozenset(),
        input_scales=scales,
        digest=_digest(path),
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
    kinds = {
        "inputs": dict,
        "files": dict,
        "matrices": list,
        "input_bounds": dict,
        "coverage": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(value.get(key), kind):
            raise InputError(f"{str(file)!r} has no sound {key!r}", hint="calibrate again")
    for key, found in _unsound(value):
        raise InputError(f"{str(file)!r} has no sound {key}: it is {found}", hint="calibrate again")
    return value


def file_digests(path: Path) -> dict[str, str]:
    """SHA-256 of the files with tensors that a calibration's directory holds, by their names."""
    digests = {}
    for file in sorted((path / LAYERS).glob("*.safetensors")):
        with file.open("rb") as opened:
            digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _check_files(path: Path, written: Mapping[str, str]) -> list[str]:
    """Refuse files other than those that were written; names of those that are not there."""
    try:
        there = file_digests(path)
    except OSError as error:
        raise InputError(
            f"calibration {str(path)!r} cannot be read: {error.strerror or error}"
        ) from error
    for name, digest in there.items():
        if digest != written.get(name):
            raise IntegrityError(
                f"{str(path / LAYERS / name)!r} has SHA-256 {digest[:16]}, {DOCUMENT!r} has "
                f"{written.get(name, 'none')[:16]}",
                hint="copy the calibration again, or calibrate again",
            )
    return [name for name in written if name not in there]


def _unsound(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What in the document is not what it must be: its key, and the value."""
    for index, one in enumerate(document["matrices"]):
        if not isinstance(one, dict):
            yield f"'matrices[{index}]'", repr(one)
            continue
        for key in ("module", "how"):
            if not isinstance(one.get(key), str):
                yield f"'matrices[{index}].{key}'", repr(one[key]) if key in one else "missing"
    for table in ("files", "inputs"):
        for key, value in document[table].items():
            if not isinstance(value, str):
                yield f"'{table}' of {key!r}", repr(value)
    for module, bound in document["input_bounds"].items():
        # NaN is in no range.
        is_number = isinstance(bound, int | float) and not isinstance(bound, bool)
        if not (is_number and 0 <= bound <= _F32_MAX):
            yield f"'input_bounds' of {module!r}", repr(bound)


def _digest(path: Path) -> str:
    """Of the document, which has digests of the rest."""
    return hashlib.sha256(b"lingc calibration 2\n" + (path / DOCUMENT).read_bytes()).hexdigest()


class _Calibrated:
    """A source with some tensors in place of its own."""

    def __init__(
        self, source: Source, entries: Mapping[str, Entry], input_scales: Mapping[str, float]
    ) -> None:
        self._source = source
        self._entries = entries
        self._input_scales = input_scales
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

    def input_scale(self, name: str) -> float | None:
        return self._input_scales.get(name.removesuffix(".weight"))

    def identity(self) -> str:
        return self._source.identity()

    def tokenizer_files(self) -> tuple[Path, ...]:
        return self._source.tokenizer_files()

    def generation_config(self) -> Mapping[str, Any]:
        return self._source.generation_config()
