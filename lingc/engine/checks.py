"""The checks of a package: what they are called, what they found, and what the whole amounts to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from lingc.errors import IncompatibleError, IntegrityError

Verdict = Literal["ok", "failed", "not run"]

CHECKS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "manifest": (6, "the manifest is there, within its limits, canonical, and complete"),
        "format": (4, "this reader knows the format"),
        "bundle-id": (6, "the manifest is the one that its id was taken of"),
        "path": (6, "every listed path is relative, portable and short enough"),
        "layout": (6, "every file lies where its role says, and none is lacking"),
        "node": (6, "there are only plain files and directories, each with one name"),
        "collision": (6, "no two names differ in case or Unicode form alone"),
        "missing": (6, "every listed file is there"),
        "extra": (6, "nothing else is there"),
        "size": (6, "every file has its listed size"),
        "digest": (6, "every file has its listed SHA-256"),
        "plan-format": (4, "this reader knows the format of the plan"),
        "plan": (6, "the plan reads"),
        "agreement": (6, "manifest, plan and variants say the same"),
        "weights": (6, "the shards hold the plan's weights, all of them and no others"),
        "bound-weights": (6, "weights bound from a checkpoint are those of this package"),
        "requirement": (4, "this reader knows every requirement of the variant"),
        "os": (4, "the variant runs on this operating system"),
        "arch": (4, "the variant runs on this CPU architecture"),
        "library": (4, "the libraries that the variant needs are installed"),
        "library-version": (4, "their versions are among those that the variant was made for"),
        "gpu": (4, "there is a GPU of the generation that the variant's code was compiled for"),
        "gpu-driver": (4, "its driver is new enough for that code"),
        "gpu-memory": (4, "its memory holds the weights and the smallest step"),
    }
)
"""id -> (exit code if it fails, what holds if it passes), in the order of checking."""

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of one thing.

    Attributes:
        id: A key of `CHECKS`.
        subject: The file, field or library it is about; empty for the package.
        fix: What to do about a failure; why not, if it was not run.
    """

    id: str
    verdict: Verdict
    subject: str = ""
    expected: str = ""
    found: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.id in CHECKS, self.id

    @property
    def exit_code(self) -> int:
        """0 unless it failed."""
        return CHECKS[self.id][0] if self.verdict == "failed" else 0

    def sentence(self) -> str:
        """A failure in one line."""
        subject = f" {self.subject}" if self.subject else ""
        return f"{self.id}:{subject} expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every check of a package, passed or not.

    Attributes:
        path: As given.
        bundle_id: None where the manifest could not be read.
    """

    path: str
    level: str
    bundle_id: str | None
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict == "failed")

    @property
    def exit_code(self) -> int:
        """0; 4 where the package cannot be used here; 6 where it is not what was written.

        A format that this reader does not know comes first: it cannot judge the rest.
        """
        codes = {check.exit_code for check in self.failed}
        if any(check.id == "format" for check in self.failed):
            return 4
        return 6 if 6 in codes else max(codes, default=0)

    def raise_if_bad(self) -> None:
        """Raise what the failures amount to, all of them named.

        Raises:
            IntegrityError: The package is not what was written.
            IncompatibleError: It is, and cannot be used by this reader or machine.
        """
        if not self.failed:
            return
        lines = [check.sentence() for check in self.failed[:_SHOWN_PROBLEMS]]
        if more := len(self.failed) - len(lines):
            lines.append(f"and {more} more")
        listed = "".join(f"\n  - {line}" for line in lines)
        code = self.exit_code
        first = next(check for check in self.failed if check.exit_code == code)
        if code == 4:
            raise IncompatibleError(f"{self.path!r} cannot be used here:{listed}", hint=first.fix)
        raise IntegrityError(f"{self.path!r} is not what was written:{listed}", hint=first.fix)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": self.path,
            "level": self.level,
            "bundle_id": self.bundle_id,
            "exit_code": self.exit_code,
            "checks": [
                {
                    "id": check.id,
                    "subject": check.subject,
                    "verdict": check.verdict,
                    "expected": check.expected,
                    "found": check.found,
                    "fix": check.fix,
                }
                for check in self.checks
            ],
        }


def passed(check_id: str, found: str, *, expected: str = "") -> Check:
    """A check that holds."""
    return Check(id=check_id, verdict="ok", expected=expected or CHECKS[check_id][1], found=found)


def failed(check_id: str, subject: str, expected: str, found: str, fix: str) -> Check:
    """A check that does not hold."""
    return Check(
        id=check_id, verdict="failed", subject=subject, expected=expected, found=found, fix=fix
    )


def not_run(check_ids: Iterable[str], why: str) -> list[Check]:
    """Checks that could not be made, said so."""
    return [
        Check(id=i, verdict="not run", expected=CHECKS[i][1], found="not looked at", fix=why)
        for i in check_ids
    ]
