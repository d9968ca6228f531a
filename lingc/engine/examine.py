"""Checks a package: everything that can be checked is, and everything that fails is told.

The order is that of trust. The manifest is judged by itself; then the directory by its names and
kinds; then every byte by its digest; only then is any file parsed; the machine comes last. A check
that a failure before it makes meaningless is reported as not run.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lingc.engine import tree
from lingc.engine.bound import judge_bound
from lingc.engine.checks import CHECKS, Check, Report, failed, not_run, passed
from lingc.engine.choosing import choose
from lingc.engine.contents import judge_agreement, judge_plan, judge_variant, judge_weights
from lingc.engine.layout import LIMITS, MANIFEST, PLAN, VARIANT_INFO
from lingc.engine.machine import Machine, judge_machine, this_machine
from lingc.engine.manifest import Manifest
from lingc.engine.reading import AGAIN, judge_manifest, package_root
from lingc.engine.schema import shown
from lingc.errors import ResourceError
from lingc.plan import Plan

Level = Literal["structure", "integrity", "full"]
"""`structure` reads the manifest and the names; `integrity` every byte; `full` also asks whether
this machine can run it."""

LEVELS: tuple[Level, ...] = get_args(Level)

_TREE = ("node", "collision", "missing", "extra", "size")
_CONTENT = ("plan-format", "plan", "agreement", "weights", "bound-weights")
_GPU = ("gpu", "gpu-driver", "gpu-memory")
_MACHINE = ("requirement", "os", "arch", "library", "library-version", *_GPU)
_MAX_ROWS = 50
_LARGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A report, and what was read to make it.

    Attributes:
        stamps: Path -> what the file looked like when its digest was taken.
        target: Of the variant that was asked about; None where there is no manifest.
    """

    root: Path
    report: Report
    manifest: Manifest | None
    plan: Plan | None
    stamps: Mapping[str, tree.Stamp]
    target: str | None = None


def verify(
    path: str | Path,
    *,
    level: Level = "full",
    cache_dir: Path | None = None,
    machine: Machine | None = None,
    target: str | None = None,
) -> Report:
    """Check a package.

    Args:
        path: Its directory.
        level: How far to look.
        cache_dir: Where weights are bound; those of this package are checked too, if there.
        machine: The one that shall run it; this one where None.
        target: Of the variant that shall run; the one for the machine's GPU where None.

    Raises:
        InputError: There is no package at `path`.
        ResourceError: It cannot be read.
        UsageError: It has no code for that target.
    """
    return examine(path, level=level, cache_dir=cache_dir, machine=machine, target=target).report


def examine(
    path: str | Path,
    *,
    level: Level = "full",
    cache_dir: Path | None = None,
    machine: Machine | None = None,
    target: str | None = None,
) -> Examined:
    """`verify`, with what it read."""
    root = package_root(path)
    manifest, checks = judge_manifest(root)
    stamps: dict[str, tree.Stamp] = {}
    plan: Plan | None = None
    if manifest is None:
        later = (*_TREE, "digest", *_CONTENT, *_MACHINE)
        checks += not_run(later, "there is no manifest to hold it against")
    else:
        checks += _judge_tree(root, manifest)
        if level == "structure":
            checks += not_run(("digest", *_CONTENT), f"the level is {level}")
        else:
            checks += _judge_digests(root, manifest, stamps)
            plan, rows = _judge_content(root, manifest, stamps, cache_dir)
            checks += rows
        machine = (machine or this_machine()) if level == "full" else None
        target = choose(manifest, machine, target)
        if machine is not None:
            checks += judge_machine(manifest.variants[target], machine)
        else:
            checks += not_run(_MACHINE, f"the level is {level}")
    report = Report(
        path=str(path),
        level=level,
        bundle_id=None if manifest is None else manifest.bundle_id,
        checks=tuple(checks),
    )
    return Examined(
        root=root, report=report, manifest=manifest, plan=plan, stamps=stamps,
        target=None if manifest is None else target,
    )  # fmt: skip


def _judge_tree(root: Path, manifest: Manifest) -> list[Check]:
    """Names, kinds and sizes; no content."""
    try:
        nodes = _nodes(root)
    except OSError as error:
        raise ResourceError(
            f"{error.filename!r} cannot be read: {error.strerror}", hint="check who may read it"
        ) from error
    if nodes is None:
        most = f"at most {LIMITS['files']} files"
        return [
            failed("extra", "", most, "more", AGAIN),
            *not_run((c for c in _TREE if c != "extra"), "there are too many files"),
        ]
    rows = {
        "node": list(_odd_nodes(nodes.values())),
        "collision": list(_collisions({*nodes, *manifest.files})),
        "missing": [
            failed("missing", path, f"{entry.size} bytes", "nothing", AGAIN)
            for path, entry in manifest.files.items()
            if path not in nodes
        ],
        "extra": list(_extras(nodes, manifest)),
        "size": [
            failed("size", path, f"{entry.size} bytes", f"{nodes[path].size} bytes", AGAIN)
            for path, entry in manifest.files.items()
            if path in nodes and nodes[path].kind == "file" and nodes[path].size != entry.size
        ],
    }
    whole = f"{len(manifest.files)} files"
    return [check for i in _TREE for check in _capped(i, rows[i]) or [passed(i, whole)]]


def _nodes(root: Path) -> dict[str, tree.Node] | None:
    """Everything that lies there, or None where it is more than a package may have."""
    # A file needs at most as many directories as its path has components.
    most = 2 * LIMITS["files"]
    nodes: dict[str, tree.Node] = {}
    for node in tree.walk(root):
        nodes[node.path] = node
        if len(nodes) > most:
            return None
    return nodes


def _odd_nodes(nodes: Iterable[tree.Node]) -> Iterable[Check]:
    for node in nodes:
        if node.kind not in ("file", "directory"):
            fix = "replace it by what it stands for: `cp -rL` copies a package without links"
            yield failed("node", shown(node.path), "a file", f"a {node.kind}", fix)
        elif node.kind == "file" and node.links > 1:
            fix = "copy the package with `cp -r`: through its other name the file can be changed"
            yield failed("node", shown(node.path), "one name", f"{node.links} names", fix)


def _collisions(paths: Iterable[str]) -> Iterable[Check]:
    alike: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        alike[tree.collision_key(path)].append(path)
    for same in alike.values():
        if len(same) > 1:
            first, *others = sorted(same)
            found = ", ".join(map(shown, others))
            yield failed("collision", shown(first), "no name like it", found, AGAIN)


def _extras(nodes: Mapping[str, tree.Node], manifest: Manifest) -> Iterable[Check]:
    directories = {
        "/".join(parts[:depth])
        for parts in (path.split("/") for path in manifest.files)
        for depth in range(1, len(parts))
    }
    for path, node in nodes.items():
        listed = directories if node.kind == "directory" else manifest.files
        if path not in listed and path != MANIFEST:
            fix = "remove it, if it is yours; a package holds what its manifest lists"
            yield failed("extra", shown(path), "nothing", f"a {node.kind}", fix)


def _judge_digests(root: Path, manifest: Manifest, stamps: dict[str, tree.Stamp]) -> list[Check]:
    """Hash every listed file; fills `stamps` with those that hold."""

    def take(path: str) -> tree.Digest | OSError:
        try:
            return tree.digest(root / path)
        except OSError as error:
            return error

    # The largest first, or the last thread ends long after the others; a thread for a small file
    # costs more than its hash.
    paths = sorted(manifest.files, key=lambda path: -manifest.files[path].size)
    large = [path for path in paths if manifest.files[path].size >= _LARGE_BYTES]
    taken_of = [*tree.in_threads(take, large), *map(take, paths[len(large) :])]
    rows = []
    for path, taken in zip(paths, taken_of, strict=True):
        wanted = manifest.files[path].sha256
        if isinstance(taken, PermissionError):
            raise ResourceError(
                f"{str(root / path)!r} cannot be read: {taken.strerror}",
                hint="check who may read it",
            )
        if isinstance(taken, OSError):
            found = taken.strerror or str(taken)
        elif taken.sha256 != wanted:
            found = taken.sha256
        else:
            stamps[path] = taken.stamp
            continue
        rows.append(failed("digest", path, wanted, found, AGAIN))
    rows.sort(key=lambda check: check.subject)
    total = sum(entry.size for entry in manifest.files.values())
    return _capped("digest", rows) or [passed("digest", f"{len(paths)} files, {total} bytes")]


def _judge_content(
    root: Path, manifest: Manifest, stamps: Mapping[str, tree.Stamp], cache_dir: Path | None
) -> tuple[Plan | None, list[Check]]:
    """Parse what the digests vouch for, and nothing else."""
    if PLAN not in stamps:
        return None, not_run(_CONTENT, f"{PLAN} is not what was written")
    plan, rows = judge_plan(root, manifest)
    if plan is None:
        return None, [*rows, *not_run(_CONTENT[2:], "the plan does not read")]
    rows += judge_agreement(manifest, plan)
    for target in manifest.variants:
        if f"variants/{target}/{VARIANT_INFO}" in stamps:
            rows += judge_variant(root, manifest, target)
    shards = [path for path, entry in manifest.files.items() if entry.role == "weights"]
    if not manifest.has_weights:
        rows += not_run(["weights"], "they are bound from a checkpoint")
        rows += judge_bound(manifest, plan, cache_dir)
    elif not stamps.keys() >= set(shards):
        rows += not_run(["weights"], "a shard is not what was written")
    else:
        rows += judge_weights("weights", plan, [root / path for path in shards])
    return plan, rows


def _capped(check_id: str, rows: list[Check]) -> list[Check]:
    if len(rows) <= _MAX_ROWS:
        return rows
    more = f"{len(rows) - _MAX_ROWS} more"
    return [*rows[:_MAX_ROWS], failed(check_id, "", "no more of them", more, AGAIN)]


assert {*_TREE, *_CONTENT, *_MACHINE} <= CHECKS.keys()
