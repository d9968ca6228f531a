"""Reads a manifest: the one file that is parsed before any digest is known."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingc.engine import canonical, tree
from lingc.engine.checks import CHECKS, Check, Report, failed, not_run, passed
from lingc.engine.layout import FORMAT, LIMITS, MANIFEST, TOP_NAMES
from lingc.engine.manifest import Manifest, bundle_id, faults, from_value
from lingc.engine.schema import shown
from lingc.errors import InputError, ResourceError

AGAIN = "get the package again from where it was made, or build it again"

_OWN_CHECKS = ("manifest", "format", "bundle-id", "path", "layout")
_MAX_ROWS = 100


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest, and no other file.

    Raises:
        InputError: There is no package at `path`.
        IntegrityError: The manifest is not what was written; everything wrong is listed.
        IncompatibleError: It is of a format that this version does not read.
    """
    root = package_root(path)
    manifest, checks = judge_manifest(root)
    report = Report(path=str(path), level="manifest", bundle_id=None, checks=tuple(checks))
    report.raise_if_bad()
    assert manifest is not None, "no failure means there is one"
    return manifest


def package_root(path: str | Path) -> Path:
    """The directory of a package; a link to it is followed, one inside of it never is.

    Raises:
        InputError: There is no directory at `path`, or it is evidently no package.
    """
    root = Path(path)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise InputError(
            f"{str(path)!r} is not a package: it {what}",
            hint="a package is the .ling directory that `lingc build` writes",
        )
    # A package that has lost its manifest still looks like one, and is told as damaged.
    if not any((root / name).exists() for name in TOP_NAMES):
        is_checkpoint = (root / "config.json").is_file()
        what = "looks like a checkpoint" if is_checkpoint else f"has no {MANIFEST}"
        raise InputError(
            f"{str(path)!r} is not a package: it {what}",
            hint="a package is the .ling directory that `lingc build` writes",
        )
    return root.resolve()


def judge_manifest(root: Path) -> tuple[Manifest | None, list[Check]]:
    """The manifest, or None with the failures, and the checks that were made of it."""
    parsed, wrong = _parse(root)
    if parsed is None:
        return None, [wrong, *not_run(_OWN_CHECKS[1:], "the manifest does not read")]
    version, oldest = parsed.get("format"), parsed.get("format_min_reader")
    spelled = wrong.verdict == "ok"
    own_id = bundle_id(parsed) if spelled else "none, as it is spelled otherwise"
    id_holds = parsed.get("bundle_id") == own_id
    # A number that was raised and explains itself, or one that this reader cannot disprove.
    if _is_newer(version) and (_is_newer(oldest) or not id_holds):
        newer = failed(
            "format",
            MANIFEST,
            f"format {FORMAT} or older",
            f"format {shown(version)}, for readers from format {shown(oldest)}",
            "update lingc (pip install -U lingc), or build the package again with this version",
        )
        rest = not_run(_OWN_CHECKS[2:], "a newer format means other things by its fields")
        return None, [wrong, newer, *rest]
    if not spelled:
        return None, [wrong, *not_run(_OWN_CHECKS[1:], "the manifest is spelled otherwise")]
    checks = [passed("format", f"format {shown(version)}")]
    checks.append(_id_check(parsed, own_id))
    rows = _field_checks(parsed)
    checks += rows
    failed_ids = {check.id for check in rows}
    checks += [passed(i, "it holds") for i in ("manifest", "path") if i not in failed_ids]
    if not rows:
        checks.append(passed("layout", f"{len(parsed['files'])} files"))
    elif "layout" not in failed_ids:
        checks += not_run(["layout"], "the fields are not what they must be")
    order = list(CHECKS)
    checks.sort(key=lambda check: order.index(check.id))
    return from_value(parsed) if not rows and id_holds else None, checks


def _parse(root: Path) -> tuple[dict[str, Any] | None, Check]:
    """The manifest as an object, and whether it is one, in its one spelling."""
    value = None
    try:
        data = tree.read(root / MANIFEST, limit=LIMITS["manifest bytes"])
        value = canonical.decode_object(data, max_nesting=LIMITS["manifest nesting"])
        canonical.refuse_other_spelling(value, data)
    except PermissionError as error:
        raise ResourceError(f"{str(root / MANIFEST)!r} cannot be read: {error.strerror}") from error
    except OSError as error:
        found = error.strerror or str(error)
    except ValueError as error:
        found = str(error)
    else:
        return value, passed("manifest", "it reads")
    return value, failed("manifest", MANIFEST, CHECKS["manifest"][1], found[:200], AGAIN)


def _is_newer(version: object) -> bool:
    return isinstance(version, int) and not isinstance(version, bool) and version > FORMAT


def _id_check(parsed: Mapping[str, Any], own_id: str) -> Check:
    said = parsed.get("bundle_id")
    if said == own_id:
        return passed("bundle-id", own_id)
    return failed("bundle-id", MANIFEST, shown(said), repr(own_id), AGAIN)


def _field_checks(parsed: Mapping[str, Any]) -> list[Check]:
    found = faults(parsed)
    rows = [
        failed(
            problem.kind if problem.kind in ("path", "layout") else "manifest",
            problem.where,
            problem.expected,
            problem.found,
            AGAIN,
        )
        for problem in found[:_MAX_ROWS]
    ]
    if more := len(found) - len(rows):
        rows.append(failed("manifest", "", "no more problems", f"{more} more", AGAIN))
    return rows
