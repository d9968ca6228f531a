"""Weights that lie outside of a package: where, and whether they are the right ones.

They are found by what they are made like and of what: `<weights digest>-<checkpoint identity>` in
the cache. `weights.json` beside the shards lists their digests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingc.engine import canonical, tree
from lingc.engine.checks import Check, failed, not_run, passed
from lingc.engine.contents import judge_weights
from lingc.engine.layout import LIMITS
from lingc.engine.manifest import Manifest
from lingc.engine.schema import Shape, problems
from lingc.errors import IntegrityError, UsageError
from lingc.plan import Plan

INDEX = "weights.json"
FORMAT = 1

SCHEMA: Mapping[str, Shape] = {
    "format": "count",
    "id": "sha256",
    "spec_sha256": "sha256",
    "checkpoint": "sha256",
    "files": [{"path": "path", "size": "count", "sha256": "sha256"}],
}

_AGAIN = "remove that directory and bind again: lingc bind PACKAGE --checkpoint DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundWeights:
    """Packed weights whose every byte was checked.

    Attributes:
        checkpoint_identity: The checkpoint that they were made of.
    """

    path: Path
    checkpoint_identity: str
    shards: tuple[Path, ...]


def bind_dir(manifest: Manifest, cache_dir: Path, identity: str) -> Path:
    """Where the weights of a package lie, once bound to that checkpoint."""
    return cache_dir / "weights" / f"{manifest.weights_sha256}-{identity}"


def candidates(manifest: Manifest, cache_dir: Path) -> dict[str, Path]:
    """Checkpoint identity -> directory, of what this package's weights were bound to so far."""
    if manifest.checkpoint_identity is not None:
        found = [bind_dir(manifest, cache_dir, manifest.checkpoint_identity)]
    else:
        found = sorted((cache_dir / "weights").glob(f"{manifest.weights_sha256}-*"))
    return {path.name.partition("-")[2]: path for path in found if path.is_dir()}


def choose(manifest: Manifest, cache_dir: Path, identity: str | None) -> Path | None:
    """The directory to load from: that of the checkpoint, or the only one there is.

    Raises:
        UsageError: There are several, and no checkpoint says which.
    """
    found = candidates(manifest, cache_dir)
    if identity is not None:
        return found.get(identity)
    if len(found) > 1:
        raise UsageError(
            f"the package was bound to {len(found)} checkpoints: {', '.join(sorted(found))}",
            hint="say which with --checkpoint DIR",
        )
    return next(iter(found.values()), None)


def open_bound(directory: Path, manifest: Manifest, plan: Plan) -> BoundWeights:
    """Check every byte of bound weights.

    Raises:
        IntegrityError: They are not what was written, or not this package's.
    """
    weights, rows = examine_bound(directory, manifest, plan)
    if weights is None:
        listed = "".join(f"\n  - {row.sentence()}" for row in rows if row.verdict == "failed")
        raise IntegrityError(
            f"the weights in {str(directory)!r} cannot be used:{listed}", hint=_AGAIN
        )
    return weights


def judge_bound(manifest: Manifest, plan: Plan, cache_dir: Path | None) -> list[Check]:
    """The same as checks, of whatever the package is bound to."""
    found = {} if cache_dir is None else candidates(manifest, cache_dir)
    if not found:
        return not_run(["bound-weights"], "it is not bound here to a checkpoint")
    return [row for path in found.values() for row in examine_bound(path, manifest, plan)[1]]


def examine_bound(
    directory: Path, manifest: Manifest, plan: Plan
) -> tuple[BoundWeights | None, list[Check]]:
    """Judge bound weights: the index, then every byte, then what the headers say."""
    try:
        index = _read_index(directory)
    except (OSError, ValueError) as error:
        return None, [_bad(INDEX, "a whole index", str(error)[:200])]
    rows = list(_misfits(index, directory, manifest)) or list(_changed(index, directory))
    shards = tuple(directory / entry["path"] for entry in index["files"])
    if not rows:
        made = judge_weights("bound-weights", plan, list(shards))
        rows = [row for row in made if row.verdict == "failed"]
    if rows:
        return None, rows
    weights = BoundWeights(path=directory, checkpoint_identity=index["checkpoint"], shards=shards)
    return weights, [passed("bound-weights", f"{len(shards)} shards of {index['checkpoint']}")]


def index_value(
    manifest: Manifest, identity: str, digests: Mapping[str, tree.Digest]
) -> dict[str, Any]:
    """What `weights.json` says."""
    value = {
        "format": FORMAT,
        "spec_sha256": manifest.weights_sha256,
        "checkpoint": identity,
        "files": [
            {"path": path, "size": taken.stamp.size, "sha256": taken.sha256}
            for path, taken in sorted(digests.items())
        ],
    }
    return {**value, "id": canonical.sha256(value)}


def _read_index(directory: Path) -> dict[str, Any]:
    data = tree.read(directory / INDEX, limit=LIMITS["manifest bytes"])
    value = canonical.decode_canonical(data, max_nesting=LIMITS["manifest nesting"])
    if isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise ValueError(f"format {value['format']}, this version reads {FORMAT}")
    for problem in problems(value, SCHEMA, strict=True):
        raise ValueError(f"{problem.where}: expected {problem.expected}, found {problem.found}")
    if value["id"] != canonical.sha256({k: v for k, v in value.items() if k != "id"}):
        raise ValueError("it is not what its id was taken of")
    return value


def _misfits(index: Mapping[str, Any], directory: Path, manifest: Manifest) -> list[Check]:
    """What shows that these weights, though whole, belong to something else."""
    rows = []
    if index["spec_sha256"] != manifest.weights_sha256:
        expected = f"weights made like {manifest.weights_sha256}"
        rows.append(_bad("spec_sha256", expected, index["spec_sha256"]))
    recorded = manifest.checkpoint_identity
    if recorded is not None and index["checkpoint"] != recorded:
        rows.append(_bad("checkpoint", f"checkpoint {recorded}", index["checkpoint"]))
    listed = {INDEX, *(entry["path"] for entry in index["files"])}
    there = {node.path: node for node in tree.walk(directory)}
    rows += [_bad(path, "a file", "nothing") for path in sorted(listed - there.keys())]
    rows += [_bad(repr(path), "nothing", "a file") for path in sorted(there.keys() - listed)]
    return rows


def _changed(index: Mapping[str, Any], directory: Path) -> list[Check]:
    def take(entry: Mapping[str, Any]) -> Check | None:
        try:
            digest = tree.digest(directory / entry["path"])
        except OSError as error:
            return _bad(entry["path"], "a plain file", error.strerror or str(error))
        same = (digest.sha256, digest.stamp.size) == (entry["sha256"], entry["size"])
        return None if same else _bad(entry["path"], entry["sha256"], digest.sha256)

    return [row for row in tree.in_threads(take, index["files"]) if row is not None]


def _bad(subject: str, expected: str, found: str) -> Check:
    return failed("bound-weights", subject, expected, found, _AGAIN)
