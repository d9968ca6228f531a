"""A package that was checked: the only way to its files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from lingc.engine import tree
from lingc.engine.bound import BoundWeights
from lingc.engine.checks import Report
from lingc.engine.contents import read_listed, variant_info
from lingc.engine.examine import Examined, Level, examine
from lingc.engine.layout import VARIANT_INFO
from lingc.engine.machine import Machine
from lingc.engine.manifest import FileEntry, Manifest
from lingc.errors import InputError, IntegrityError, UsageError
from lingc.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The code for one target.

    Attributes:
        info: What `variant.json` says.
        files: Name -> where it lies, `variant.json` left out.
    """

    target: str
    engine: str
    info: Mapping[str, Any]
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package whose every byte had its digest when it was opened.

    What `read` returns is checked again; what `file` names is refused if it was touched since.

    Attributes:
        weights: Those bound from a checkpoint; None where they are inside, or not bound yet.
        target: Of the variant that runs; the one that the plan was made for where None.
    """

    root: Path
    manifest: Manifest
    plan: Plan
    report: Report
    stamps: Mapping[str, tree.Stamp]
    weights: BoundWeights | None = None
    target: str | None = None

    def read(self, path: str) -> bytes:
        """The bytes of a file, by its path in the package."""
        entry = self._entry(path)
        try:
            return read_listed(self.root, entry)
        except (OSError, ValueError) as error:
            raise self._touched(path) from error

    def file(self, path: str) -> Path:
        """Where a file lies, for a library that must open it itself."""
        found = self.root / self._entry(path).path
        try:
            same = tree.Stamp.of(found.lstat()) == self.stamps[path]
        except OSError as error:
            raise self._touched(path) from error
        if not same:
            raise self._touched(path)
        return found

    def names(self, role: str) -> tuple[str, ...]:
        """Paths of the files that have a role."""
        return tuple(path for path, entry in self.manifest.files.items() if entry.role == role)

    def model_file(self, name: str) -> bytes | None:
        """A file of `model/`, or None where there is none of that name."""
        path = f"model/{name}"
        return self.read(path) if path in self.manifest.files else None

    def code(self, target: str | None = None) -> Code:
        """The code for a target; for the one that was chosen when it was opened where None.

        Raises:
            UsageError: There is none for that target.
        """
        wanted = target or self.target or self.manifest.target
        variant = self.manifest.variants.get(wanted)
        if variant is None:
            raise UsageError(
                f"{str(self.root)!r} has no code for {wanted!r}",
                hint=f"it has code for: {', '.join(self.manifest.variants)}",
            )
        prefix = f"variants/{wanted}/"
        names = [path for path in self.names("variant") if path.startswith(prefix)]
        return Code(
            target=wanted,
            engine=variant.engine,
            info=MappingProxyType(variant_info(self.root, self.manifest, wanted)),
            files=MappingProxyType(
                {
                    path.removeprefix(prefix): self.file(path)
                    for path in names
                    if path != prefix + VARIANT_INFO
                }
            ),
        )

    def shards(self) -> tuple[Path, ...]:
        """Where the weights lie: safetensors files that together hold the plan's weights.

        Raises:
            InputError: They are outside, and no checkpoint was bound.
        """
        if self.weights is not None:
            return self.weights.shards
        if self.manifest.has_weights:
            return tuple(self.file(path) for path in self.names("weights"))
        raise InputError(
            f"{str(self.root)!r} holds no weights",
            hint=f"pack them once: lingc bind {self.root} --checkpoint DIR",
        )

    def bound_to(self, weights: BoundWeights) -> Self:
        """The package together with its weights.

        Raises:
            UsageError: It has its own.
        """
        if self.manifest.has_weights:
            raise UsageError(
                f"{str(self.root)!r} holds its weights and takes no others",
                hint="leave the checkpoint out",
            )
        return replace(self, weights=weights)

    def _entry(self, path: str) -> FileEntry:
        entry = self.manifest.files.get(path)
        if entry is None:
            raise InputError(f"{str(self.root)!r} has no file {path!r}")
        return entry

    def _touched(self, path: str) -> IntegrityError:
        return IntegrityError(
            f"{path!r} of {str(self.root)!r} was changed after the package was checked",
            hint="let nothing write to a package that is in use; get it again",
        )


def open_package(
    path: str | Path, *, level: Level = "full", machine: Machine | None = None,
    target: str | None = None,
) -> Package:  # fmt: skip
    """Check a package and give access to it.

    Args:
        path: Its directory.
        level: `integrity` opens a package whose code shall not run on this machine.
        machine: The one that shall run it; this one where None.
        target: Of the variant that shall run; the one for the machine's GPU where None.

    Raises:
        InputError: There is no package at `path`.
        IntegrityError: It is not what was written; every fault is listed.
        IncompatibleError: This version or machine cannot use it; every reason is listed.
    """
    if level == "structure":
        raise UsageError("a package is opened after its bytes were checked, not before")
    return package_of(examine(path, level=level, machine=machine, target=target))


def package_of(found: Examined) -> Package:
    """The package that was examined, to at least the level `integrity`.

    Raises:
        IntegrityError: It is not what was written.
        IncompatibleError: This version or machine cannot use it.
    """
    found.report.raise_if_bad()
    assert found.manifest is not None, "no failure means that both were read"
    assert found.plan is not None, "no failure means that both were read"
    return Package(
        root=found.root,
        manifest=found.manifest,
        plan=found.plan,
        report=found.report,
        stamps=MappingProxyType(dict(found.stamps)),
        target=found.target,
    )
