"""Writes a package: the same contents give the same bytes, and all of them or none appear."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import lingc
from lingc import plan as plans
from lingc.engine import canonical, summary, tree
from lingc.engine.layout import FORMAT, MANIFEST, PLAN, TOP_NAMES, VARIANT_INFO, role_of
from lingc.engine.manifest import MAY_IGNORE, Manifest, bundle_id, faults, from_value
from lingc.engine.shards import disagreements
from lingc.errors import StageError
from lingc.staging import Staging, is_empty, writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What goes into a package.

    Attributes:
        plan: Canonical text, as `lingc.plan.dumps` writes it.
        model_files: Name -> bytes of `model/`; `config.json` at least.
        variants: Target -> file name -> bytes; a name may have folders in it.
        variant_info: Target -> what its backend must know, written as `variant.json`. `engine`
            (the kind) and `runs_on` (`os`, `arch`: lists; `libraries`: module name -> versions)
            stand in the manifest too, as do `tuned_on` where it is and the number of `faults`;
            the rest is the backend's.
        weights: Shards that are already written, moved in and named by their digest; None where
            the weights stay outside and are bound from a checkpoint.
        kernels: Digest -> bytes of `kernels/`: device code that variants of several targets share.
        tests: Name -> bytes of `tests/`.
        architecture: As `config.json` names it.
        checkpoint: Layout (`bf16`, `fp8`, `int4`) and identity of the checkpoint that it was made
            for; None where it was made for a config, and takes any weights of it.
        request: What was asked for, resolved: precision, target, engine, page_size, max_draft and
            whatever else decided about the bytes. No path and no command line.
        passes: One entry a pass and phase: phase, name, expected (None where any count will do),
            found.
        quant: What the precision did, for people.
        producer: Name -> version of what made it; lingc itself is added.
    """

    plan: str
    model_files: Mapping[str, bytes]
    variants: Mapping[str, Mapping[str, bytes]]
    variant_info: Mapping[str, Mapping[str, Any]]
    weights: Sequence[Path] | None
    architecture: str
    checkpoint: tuple[str, str] | None
    request: Mapping[str, Any]
    passes: Sequence[Mapping[str, Any]] = ()
    quant: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    producer: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    kernels: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    tests: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))


def write_package(path: str | Path, contents: Contents, *, overwrite: bool = False) -> Manifest:
    """Write a package whose weights, if it has any, lie in files already.

    Raises:
        UsageError: Something is at `path` already.
        ResourceError: Disk, quota or permission is lacking; nothing is left.
        StageError: The contents contradict each other.
    """
    with PackageWriter(path, overwrite=overwrite) as writer:
        return writer.commit(contents)


class PackageWriter:
    """A package under way, for weights that are too large to be anywhere else first.

        with PackageWriter(path) as writer:
            shards = write_weights(..., writer.weights_dir)
            writer.commit(Contents(weights=shards, ...))

    Leaving the block without `commit` leaves nothing.

    Args:
        path: Where the package shall be; must not exist.
        overwrite: Replace a package, or an empty directory, that is there. It stays whole and in
            place until the new one is; where the file system can swap names there is no moment
            without either.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self._staging = Staging(Path(path), replaceable=_is_package if overwrite else None)

    @property
    def weights_dir(self) -> Path:
        """Where shards may be written, on the package's own file system."""
        directory = self._staging.content / "weights"
        with writing(self._staging.final):
            directory.mkdir(exist_ok=True)
        return directory

    def __enter__(self) -> Self:
        self._staging.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._staging.__exit__()

    def commit(self, contents: Contents) -> Manifest:
        """Write everything else, and let the package appear."""
        root = self._staging.content
        plan = _read_plan(contents)
        files = _small_files(contents)
        with writing(self._staging.final):
            for path, data in files.items():
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            digests = self._move_in(contents.weights or ())
            if contents.weights is not None:
                _refuse_wrong_weights(plan, [root / path for path in digests])
            self._drop_unused_weights_dir()
            digests |= {path: tree.digest(root / path) for path in files}
            value = _manifest(contents, plan, digests)
            (root / MANIFEST).write_bytes(canonical.encode(value))
        self._staging.publish()
        return from_value(value)

    def _move_in(self, shards: Sequence[Path]) -> dict[str, tree.Digest]:
        """Give each shard the name of its digest; returns the paths in the package."""
        taken = {}
        for shard, digest in zip(shards, tree.in_threads(_digest, shards), strict=True):
            target = self.weights_dir / f"{digest.sha256}.safetensors"
            status = shard.stat()
            if status.st_nlink == 1 and status.st_dev == target.parent.stat().st_dev:
                shard.rename(target)
            else:
                # A file with a second name could be written to through that: take a copy.
                shutil.copyfile(shard, target)
                shard.unlink()
            taken[f"weights/{target.name}"] = digest
        return taken

    def _drop_unused_weights_dir(self) -> None:
        directory = self._staging.content / "weights"
        if directory.is_dir() and is_empty(directory):
            directory.rmdir()


def _digest(shard: Path) -> tree.Digest:
    with shard.open("rb", buffering=0) as file:
        return tree.digest_open(file)


def _is_package(path: Path) -> bool:
    """Whether a directory may be replaced: nothing but a package's own is lost by it."""
    names = {entry.name for entry in path.iterdir()}
    return not names or (MANIFEST in names and names <= TOP_NAMES)


def _read_plan(contents: Contents) -> plans.Plan:
    plan = plans.loads(contents.plan)
    if plans.dumps(plan) != contents.plan:
        raise StageError("the plan's text is not in the form that `lingc.plan.dumps` writes")
    return plan


def _small_files(contents: Contents) -> dict[str, bytes]:
    files = {PLAN: contents.plan.encode("ascii")}
    files |= {f"model/{name}": data for name, data in contents.model_files.items()}
    files |= {f"kernels/{name}.xz": data for name, data in contents.kernels.items()}
    files |= {f"tests/{name}": data for name, data in contents.tests.items()}
    if contents.variants.keys() != contents.variant_info.keys():
        raise StageError(
            f"there are files for the targets {sorted(contents.variants)} and facts for "
            f"{sorted(contents.variant_info)}"
        )
    for target, named in contents.variants.items():
        info = canonical.encode(_plain(contents.variant_info[target], f"variant_info[{target!r}]"))
        for name, data in {VARIANT_INFO: info, **named}.items():
            files[f"variants/{target}/{name}"] = data
        if named.get(VARIANT_INFO, info) != info:
            raise StageError(f"the variant {target!r} has a variant.json that its facts contradict")
    for path in files:
        if role_of(path) is None:
            raise StageError(f"{path!r} has no place in a package")
    return files


def _refuse_wrong_weights(plan: plans.Plan, shards: Sequence[Path]) -> None:
    wrong = list(disagreements(plan.weights, shards))
    if wrong:
        listed = "".join(f"\n  - {line.sentence()}" for line in wrong[:20])
        raise StageError(f"the weights are not those of the plan:{listed}")


def _manifest(
    contents: Contents, plan: plans.Plan, digests: Mapping[str, tree.Digest]
) -> dict[str, Any]:
    checkpoint = dict(zip(("layout", "identity"), contents.checkpoint or (), strict=False))
    value = {
        "format": FORMAT,
        "format_min_reader": FORMAT,
        "producer": {**contents.producer, "lingc": lingc.__version__},
        "model": {
            "architecture": contents.architecture,
            "config_sha256": summary.config_sha256(plan),
            "checkpoint": checkpoint or None,
        },
        "request": contents.request,
        "graph": {
            "passes": contents.passes,
            "programs": summary.programs(plan),
            "states": summary.states(plan),
        },
        "quant": contents.quant,
        "weights": summary.weights(
            plan, kind="external" if contents.weights is None else "embedded"
        ),
        "variants": [
            {"target": target, **summary.variant(_plain(info, f"variant_info[{target!r}]"))}
            for target, info in sorted(contents.variant_info.items())
        ],
        "files": [
            {"path": path, "role": role_of(path), "size": taken.stamp.size, "sha256": taken.sha256}
            for path, taken in sorted(digests.items())
        ],
        "stability": {"may_ignore": MAY_IGNORE},
    }
    plain: dict[str, Any] = _plain(value, "the manifest")
    _refuse_paths(plain["request"], "request")
    _refuse_paths(plain["producer"], "producer")
    plain["bundle_id"] = bundle_id(plain)
    wrong = faults(plain)
    if wrong:
        listed = "".join(f"\n  - {p.where}: expected {p.expected}, got {p.found}" for p in wrong)
        raise StageError(f"the package would not be one:{listed}")
    return plain


def _plain(value: Any, where: str) -> Any:
    try:
        return canonical.plain(value, where=where)
    except ValueError as error:
        raise StageError(str(error)) from error


def _refuse_paths(value: Any, where: str) -> None:
    """A path of the build machine would make the bytes depend on it."""
    match value:
        case str() if value.startswith(("/", "~")):
            raise StageError(f"{where} is the path {value!r}, which means nothing elsewhere")
        case dict():
            for key, item in value.items():
                _refuse_paths(item, f"{where}.{key}")
        case list():
            for i, item in enumerate(value):
                _refuse_paths(item, f"{where}[{i}]")
