"""The manifest: what is in a package, who made it from what, and where it runs.

`SCHEMA` is the one description of its fields; `docs/format.md` prints it and a test compares.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lingc.engine import canonical
from lingc.engine.layout import CONFIG, FORMAT, LIMITS, PLAN, VARIANT_INFO, role_of
from lingc.engine.schema import Absent, Maybe, Open, Problem, Shape, problems, shown

SCHEMA: Mapping[str, Shape] = {
    "format": "count",
    "format_min_reader": "count",
    "bundle_id": "sha256",
    "producer": "texts by name",
    "model": {
        "architecture": "text",
        "config_sha256": "sha256",
        "checkpoint": Maybe({"identity": "sha256", "layout": "text"}),
    },
    "request": Open(
        {
            "precision": "text",
            "target": "text",
            "engine": "engine",
            "page_size": "count",
            "max_draft": "count",
        }
    ),
    "graph": {
        "passes": [
            Open({"phase": "text", "name": "text", "expected": Maybe("count"), "found": "count"})
        ],
        "programs": [{"phase": "text", "steps": "count", "ops": "counts by name"}],
        "states": [{"name": "text", "type": "text", "count": "count"}],
    },
    "quant": "object",
    "weights": {
        "kind": "kind",
        "spec_sha256": "sha256",
        "bytes": "count",
        "formats": [{"format": "text", "dtype": "text", "tensors": "count", "bytes": "count"}],
    },
    "variants": [
        {
            "target": "path",
            "engine": "engine",
            "weights_in_use_bytes": Maybe("count"),
            "tuned_on": Absent("text"),
            "faults": Absent("count"),
            "runs_on": Open(
                {
                    "os": "texts",
                    "arch": "texts",
                    "libraries": "texts by name",
                    "gpu": Absent(
                        {"capability": "text", "driver": "text", "memory_bytes": "count"}
                    ),
                }
            ),
        }
    ],
    "files": [{"path": "path", "role": "role", "size": "count", "sha256": "sha256"}],
    "stability": {"may_ignore": "texts"},
}

MAY_IGNORE = ("graph", "producer", "quant", "stability")
"""Fields that inform people; a reader that ignores them loads the package all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of the package."""

    path: str
    role: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The code for one target.

    Attributes:
        runs_on: What the machine must have: `os`, `arch` (any of the listed), `libraries`
            (module name -> versions, `>=1.20,<2` or empty for any); perhaps `gpu` (`capability`,
            `driver`: versions of CUDA that it speaks, `memory_bytes`).
    """

    target: str
    engine: str
    runs_on: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest that has passed every check of its own.

    Attributes:
        value: The whole manifest, as parsed.
    """

    value: Mapping[str, Any]
    bundle_id: str
    files: Mapping[str, FileEntry]
    variants: Mapping[str, Variant]

    @property
    def format(self) -> int:
        return int(self.value["format"])

    @property
    def target(self) -> str:
        return str(self.value["request"]["target"])

    @property
    def precision(self) -> str:
        return str(self.value["request"]["precision"])

    @property
    def has_weights(self) -> bool:
        """Whether the weights are inside; else they are bound from a checkpoint."""
        return bool(self.value["weights"]["kind"] == "embedded")

    @property
    def weights_sha256(self) -> str:
        """The digest of what the weights are made like: specs and config, not bytes."""
        return str(self.value["weights"]["spec_sha256"])

    @property
    def checkpoint_identity(self) -> str | None:
        """The checkpoint it was built from, or None where it was built from a config alone."""
        checkpoint = self.value["model"]["checkpoint"]
        return None if checkpoint is None else str(checkpoint["identity"])


def from_value(value: Mapping[str, Any]) -> Manifest:
    """Build a manifest from a value without `faults`."""
    return Manifest(
        value=MappingProxyType(dict(value)),
        bundle_id=value["bundle_id"],
        files=MappingProxyType({f["path"]: _entry(f) for f in value["files"]}),
        variants=MappingProxyType({v["target"]: _variant(v) for v in value["variants"]}),
    )


def bundle_id(value: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest without its `bundle_id`."""
    return canonical.sha256({key: item for key, item in value.items() if key != "bundle_id"})


def faults(value: Mapping[str, Any]) -> list[Problem]:
    """Everything that is wrong with a manifest, judged by itself.

    A manifest of a later format that says this reader may read it can have more fields.
    """
    shape = list(problems(value, SCHEMA, strict=value.get("format") == FORMAT))
    return shape or list(_contradictions(value))


def _contradictions(value: Mapping[str, Any]) -> Iterator[Problem]:
    """What no field shows by itself. The value has the shape of the schema."""
    paths = [entry["path"] for entry in value["files"]]
    targets = [variant["target"] for variant in value["variants"]]
    if len(paths) > LIMITS["files"]:
        yield _fault("files", f"at most {LIMITS['files']} files", str(len(paths)))
    if (name := _disorder(paths)) is not None:
        yield _fault("files", "paths in order, each once", shown(name))
    if (name := _disorder(targets)) is not None:
        yield _fault("variants", "targets in order, each once", shown(name))
    for i, entry in enumerate(value["files"]):
        role = role_of(entry["path"])
        if role != entry["role"]:
            yield _fault(f"files[{i}].role", f"{role} for {entry['path']!r}", shown(entry["role"]))
    if value["request"]["target"] not in targets:
        yield _fault("variants", f"one for {value['request']['target']!r}", shown(targets))
    needed = [PLAN, CONFIG, *(f"variants/{target}/{VARIANT_INFO}" for target in targets)]
    for path in sorted(set(needed) - set(paths)):
        yield _fault("files", repr(path), "nothing")
    yield from _misplaced(value, targets)
    if value["format_min_reader"] > value["format"]:
        oldest = shown(value["format_min_reader"])
        yield _fault("format_min_reader", f"at most {value['format']}", oldest)


def _misplaced(value: Mapping[str, Any], targets: Sequence[str]) -> Iterator[Problem]:
    """Files that this package cannot have where they are."""
    for entry in value["files"]:
        path = entry["path"]
        if role_of(path) == "variant" and path.split("/")[1] not in targets:
            yield _fault("files", f"a file of one of {targets}", shown(path))
        if role_of(path) == "kernel" and entry["sha256"] not in path:
            yield _fault("files", "a kernel under its own digest", shown(path))
        if role_of(path) == "weights" and value["weights"]["kind"] == "external":
            yield _fault("files", "no weights, as they are external", shown(path))


def _fault(where: str, expected: str, found: str) -> Problem:
    return Problem(where=where, kind="layout", expected=expected, found=found)


def _disorder(names: Sequence[str]) -> str | None:
    """The first name that does not come after the one before it."""
    return next((b for a, b in itertools.pairwise(names) if a >= b), None)


def _entry(value: Mapping[str, Any]) -> FileEntry:
    return FileEntry(
        path=value["path"], role=value["role"], size=value["size"], sha256=value["sha256"]
    )


def _variant(value: Mapping[str, Any]) -> Variant:
    return Variant(
        target=value["target"],
        engine=value["engine"],
        runs_on=MappingProxyType(dict(value["runs_on"])),
    )
