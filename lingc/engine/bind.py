"""Packs a checkpoint's weights for a package that has none, once for each pair of the two."""

import contextlib
from dataclasses import fields
from pathlib import Path

from lingc.checkpoint.reader import open_checkpoint
from lingc.checkpoint.source import Source
from lingc.engine import canonical, tree
from lingc.engine.bound import INDEX, BoundWeights, bind_dir, choose, index_value, open_bound
from lingc.engine.manifest import Manifest
from lingc.engine.package import Package
from lingc.errors import CheckpointError, IntegrityError, UsageError
from lingc.model.config import ModelConfig
from lingc.staging import Staging, writing
from lingc.weights import Progress, write_weights


def bind(
    package: Package,
    checkpoint: str | Path | Source,
    *,
    cache_dir: Path,
    progress: Progress | None = None,
) -> BoundWeights:
    """Pack the weights of a package, or find them packed already.

    Args:
        package: One without weights.
        checkpoint: A directory, or an open checkpoint.
        cache_dir: Where packed weights are kept, by what they are made like and of.
        progress: Told the bytes written and the bytes in all.

    Raises:
        UsageError: The package has its weights.
        CheckpointError: The checkpoint is broken, or its config is another one.
        IntegrityError: The package was made for another checkpoint.
        ResourceError: The cache cannot be written.
    """
    if package.manifest.has_weights:
        raise UsageError(
            f"{str(package.root)!r} holds its weights and takes no others",
            hint="use it as it is, without a checkpoint",
        )
    source = _opened(checkpoint)
    identity = _right_identity(package.manifest, source)
    config = ModelConfig.from_dict(package.plan.config)
    _refuse_other_config(config, source.config)
    directory = bind_dir(package.manifest, cache_dir, identity)
    if directory.exists():
        # What was packed may be broken; then it is packed again in its place.
        with contextlib.suppress(IntegrityError):
            return open_bound(directory, package.manifest, package.plan)
    try:
        return _pack(package, source, directory, identity, progress)
    except UsageError:
        # Another process was faster.
        return open_bound(directory, package.manifest, package.plan)


def find_bound(
    package: Package, *, cache_dir: Path, checkpoint: str | Path | Source | None = None
) -> BoundWeights | None:
    """The packed weights of a package, every byte checked; None where none were packed yet.

    Args:
        package: One without weights.
        cache_dir: As for `bind`.
        checkpoint: Which weights; may be left out where there can be no doubt.

    Raises:
        IntegrityError: They are not what was packed, or `checkpoint` is not the package's.
        UsageError: Several checkpoints were bound, and none is named.
    """
    identity = None
    if checkpoint is not None:
        identity = _right_identity(package.manifest, _opened(checkpoint))
    directory = choose(package.manifest, cache_dir, identity)
    return None if directory is None else open_bound(directory, package.manifest, package.plan)


def with_weights(
    package: Package,
    *,
    cache_dir: Path,
    checkpoint: str | Path | Source | None = None,
    progress: Progress | None = None,
) -> Package:
    """The package with weights to load: its own, packed ones, or now packed ones.

    Raises:
        UsageError: It has its own and a checkpoint is named.
        InputError: It has none, none were packed, and no checkpoint is named: from `shards`.
    """
    if package.manifest.has_weights and checkpoint is None:
        return package
    if checkpoint is not None:
        made = bind(package, checkpoint, cache_dir=cache_dir, progress=progress)
        return package.bound_to(made)
    found = find_bound(package, cache_dir=cache_dir)
    return package if found is None else package.bound_to(found)


def _opened(checkpoint: str | Path | Source) -> Source:
    return open_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint


def _right_identity(manifest: Manifest, source: Source) -> str:
    identity = source.identity()
    recorded = manifest.checkpoint_identity
    if recorded is not None and recorded != identity:
        raise IntegrityError(
            f"the package was made for checkpoint {recorded}, this is checkpoint {identity}",
            hint="give the checkpoint it was made for, or build a package from this one",
        )
    return identity


def _refuse_other_config(wanted: ModelConfig, given: ModelConfig) -> None:
    # A release can lack the MTP layer that its config announces; the plan knows whether it does.
    names = {f.name for f in fields(ModelConfig) if f.compare} - {"num_nextn_predict_layers"}
    differing = [
        f"{name!r} is {getattr(wanted, name)!r} in the package, {getattr(given, name)!r} here"
        for name in sorted(names)
        if getattr(wanted, name) != getattr(given, name)
    ]
    if differing:
        raise CheckpointError(
            "the checkpoint is of another model than the package:",
            problems=tuple(differing),
            hint="give a checkpoint with the config that the package was built from",
        )


def _pack(
    package: Package,
    source: Source,
    directory: Path,
    identity: str,
    progress: Progress | None,
) -> BoundWeights:
    specs = package.plan.weights.values()
    config = ModelConfig.from_dict(package.plan.config)
    with Staging(directory, replaceable=_is_bound) as staging:
        shards = write_weights(specs, source, config, staging.content, progress)
        with writing(directory):
            digests = dict(
                zip([p.name for p in shards], tree.in_threads(tree.digest, shards), strict=True)
            )
            value = index_value(package.manifest, identity, digests)
            (staging.content / INDEX).write_bytes(canonical.encode(value))
        staging.publish()
    paths = tuple(directory / name for name in sorted(digests))
    return BoundWeights(path=directory, checkpoint_identity=identity, shards=paths)


def _is_bound(path: Path) -> bool:
    """Whether a directory holds nothing but packed weights, whole or not."""
    names = {entry.name for entry in path.iterdir()}
    return all(name == INDEX or name.endswith(".safetensors") for name in names)
