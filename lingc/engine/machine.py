"""What this machine has, held against what a variant asks for. Nothing native is loaded."""

import importlib.metadata
import importlib.util
import operator
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lingc.engine.checks import Check, failed, passed
from lingc.engine.manifest import Variant

_EXTRAS: Mapping[str, str] = {"onnx": "onnx", "cuda": "cuda", "tensorrt": "tensorrt"}
_KNOWN = ("arch", "libraries", "os")
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CLAUSE = re.compile(r"(>=|<=|==|!=|>|<)(\d{1,9}(?:\.\d{1,9})*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as far as a variant can ask about it.

    Attributes:
        version_of: Module name -> its version, `""` if it does not say, None if it is not there.
    """

    os: str
    arch: str
    version_of: Callable[[str], str | None]


def this_machine() -> Machine:
    """The machine that this runs on."""
    return Machine(
        os=platform.system().lower(), arch=platform.machine(), version_of=_installed_version
    )


def judge_machine(variant: Variant, machine: Machine) -> list[Check]:
    """Whether a variant can run there; every reason that it cannot."""
    needs = variant.runs_on
    rows = [
        failed(
            "requirement",
            repr(name),
            f"one of {', '.join(_KNOWN)}",
            "a requirement that this version does not know",
            "update lingc (pip install -U lingc)",
        )
        for name in sorted(set(needs) - set(_KNOWN))
    ]
    rows += [] if rows else [passed("requirement", f"{len(needs)} requirements")]
    rows.append(_one_of("os", machine.os, needs["os"], variant))
    rows.append(_one_of("arch", machine.arch, needs["arch"], variant))
    for name, versions in sorted(needs["libraries"].items()):
        rows += _library(name, versions, variant, machine)
    return rows


def satisfies(version: str, versions: str) -> bool:
    """Whether a version is among those described.

    Raises:
        ValueError: The description cannot be read.

    >>> satisfies("1.31.1", ">=1.20,<2"), satisfies("2.0.0rc1", "<2"), satisfies("3", "")
    (True, False, True)
    """
    wanted = []
    for clause in filter(None, (part.strip() for part in versions.split(","))):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise ValueError(f"{clause!r} is not a comparison with a version")
        wanted.append((_COMPARE[match[1]], _numbers(match[2])))
    have = _numbers(version)
    return all(compare(_padded(have), _padded(bound)) for compare, bound in wanted)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d{1,9}(?:\.\d{1,9})*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _padded(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return (*numbers, *(0,) * 8)[:8]


def _installed_version(module: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    for name in (module, *importlib.metadata.packages_distributions().get(module, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _one_of(check_id: str, have: str, wanted: list[str], variant: Variant) -> Check:
    listed = ", ".join(wanted)
    if have in wanted:
        return passed(check_id, have, expected=listed)
    fix = f"run it on {listed or 'no machine'}, or build it for this one"
    return failed(check_id, variant.target, listed or "nothing", have, fix)


def _library(name: str, versions: str, variant: Variant, machine: Machine) -> list[Check]:
    have = machine.version_of(name)
    extra = _EXTRAS[variant.engine]
    install = f"pip install 'lingc[{extra}]'"
    wanted = f"{name} {versions}".strip()
    if have is None:
        fix = install
        return [failed("library", name, wanted, "it is not installed", fix)]
    rows = [passed("library", f"{name} {have}".strip(), expected=wanted)]
    try:
        fits = satisfies(have, versions)
    except ValueError as error:
        return [
            *rows,
            failed("requirement", name, "versions such as >=1.2,<3", str(error), install),
        ]
    if fits:
        return [*rows, passed("library-version", have, expected=versions or "any")]
    return [*rows, failed("library-version", name, versions, have or "no version", install)]
