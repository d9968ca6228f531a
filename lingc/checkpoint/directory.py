"""Which files a checkpoint directory has, and which tensors they hold.

With `model.safetensors.index.json`: the files it names, and the MTP layer's file, which some
releases have without listing it. Without one: every `*.safetensors` file.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingc import strict_json
from lingc.checkpoint.listing import of_tensors
from lingc.checkpoint.tensorfile import Stored, read_header
from lingc.errors import CheckpointError

INDEX = "model.safetensors.index.json"
MTP_FILE = "model-mtp-layer.safetensors"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What was found in a directory.

    Attributes:
        tensors: Stored name -> where it is.
        problems: What is wrong with the files and the index.
        lost: Names that the index puts where they cannot be read; a problem says so already.
        is_partial: Whether a file of unknown content could not be read.
    """

    tensors: Mapping[str, Stored]
    problems: tuple[str, ...]
    lost: frozenset[str]
    is_partial: bool


def scan(directory: Path) -> Scan:
    """Read the index and every header of a checkpoint directory."""
    problems: list[str] = []
    index = _read_index(directory / INDEX, problems)
    files = _files(directory, index, problems)
    tensors: dict[str, Stored] = {}
    unread = set(index.values()) - set(files)
    for file in files:
        try:
            found = read_header(directory / file)
        except CheckpointError as error:
            problems.append(error.problem)
            unread.add(file)
            continue
        problems += [
            f"tensor {name!r} stands in {tensors[name].path.name!r} and in {file!r}"
            for name in sorted(found.keys() & tensors.keys())
        ]
        if file in index.values():
            unlisted = (name for name in found if name not in index and not is_ignored(name))
            problems += of_tensors(unlisted, f"of {file!r} is not in the index")
        tensors |= found
    lost = {name for name, file in index.items() if file in unread}
    for file in sorted(set(index.values()) - unread):
        held = {name for name, tensor in tensors.items() if tensor.path.name == file}
        absent = [name for name in index if index[name] == file and name not in held]
        problems += of_tensors(absent, f"is not in {file!r}, where the index puts it")
        lost.update(absent)
    return Scan(
        tensors=tensors,
        problems=tuple(problems),
        lost=frozenset(lost),
        is_partial=bool(unread - set(index.values())),
    )


def is_ignored(name: str) -> bool:
    """Whether a tensor is passed over wherever it stands, as by every loader of the release."""
    return "slope" in name or name.startswith("model.mtp")


def _read_index(path: Path, problems: list[str]) -> Mapping[str, str]:
    """Name -> file; empty where there is no index or no sound one."""
    if not path.exists():
        return {}
    try:
        value: Any = strict_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{INDEX!r} cannot be read: {error.strerror or error}")
        return {}
    except (ValueError, RecursionError) as error:
        problems.append(f"{INDEX!r} is not sound JSON: {error}")
        return {}
    listed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        problems.append(f"{INDEX!r} has no weight_map from names to file names")
        return {}
    return listed


def _files(directory: Path, index: Mapping[str, str], problems: list[str]) -> list[str]:
    """Names of the files to read, in order."""
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if not index:
        if not present:
            problems.append("there is no '*.safetensors' file")
        return present
    files = []
    for name in sorted(set(index.values())):
        if not _is_plain_name(name):
            problems.append(f"the index names the file {name!r}; one in its own folder is due")
        elif not (directory / name).is_file():
            count = sum(file == name for file in index.values())
            problems.append(f"{name!r} is missing; the index puts {count} tensors there")
        else:
            files.append(name)
    if MTP_FILE in present and MTP_FILE not in index.values():
        files.append(MTP_FILE)
    for name in sorted(set(present) - set(files)):
        _log.warning("%r is not in the index and is not read", name)
    return files


def _is_plain_name(name: str) -> bool:
    """Whether a file name from outside cannot lead out of the directory."""
    return (
        name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(c in name for c in "/\\\0")
    )
