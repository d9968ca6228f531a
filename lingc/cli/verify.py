"""`lingc verify`: every check of a package, and its test vectors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingc.cli import output
from lingc.cli.failure import cache_dir
from lingc.cli.output import Output
from lingc.engine.checks import Report
from lingc.engine.examine import LEVELS, Examined, Level, examine
from lingc.errors import GateError, IncompatibleError, IntegrityError, NothingToDoError

if TYPE_CHECKING:
    from lingc.runtime.vectors import VectorResult

_ID_CHARACTERS = 12


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="full",
    show_default=True,
    help="structure: manifest and names; integrity: every byte; full: this machine too.",
)
@click.option("--target", help="The variant's, of a package with several (default: this GPU's).")
@click.option("--run", "is_run", is_flag=True, help="Run the package's test vectors as well.")
@output.options
def command(out: Output, package: Path, level: Level, target: str | None, *, is_run: bool) -> None:
    """Check every byte of a package, and whether this machine can run it.

    All checks are made and shown, not only up to the first that fails; nothing of the package is
    loaded before its digest is known. A package for another machine fails the last checks there:
    `--level integrity` leaves them out. Weights that were bound on this machine are checked too.

    \b
    Exit codes: 0 good; 4 whole, but not for this version or machine; 5 a test vector failed;
    6 not what was written; 10 `--run`, and there are no vectors.

    \b
    Examples:
      lingc verify tiny.ling
      lingc verify tiny.ling --run
      lingc verify h20.ling --level integrity --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    with out.stage("check every byte" if level != "structure" else "check the manifest"):
        found = examine(
            package, level="full" if is_run else level, cache_dir=cache_dir(), target=target
        )
    results = _run_vectors(out, found) if is_run and found.report.exit_code == 0 else None
    if out.as_json:
        out.emit({**found.report.to_json(), "vectors": _vectors_json(results)})
    else:
        _show(out, found.report, results)
    _raise_if_bad(found.report, results)


def _run_vectors(out: Output, found: Examined) -> "list[VectorResult]":
    # Only these need a runtime, and the rest shall answer at once.
    from lingc.engine.bind import with_weights
    from lingc.engine.package import package_of
    from lingc.runtime.load import run_vectors

    with out.stage("run test vectors"):
        return run_vectors(with_weights(package_of(found), cache_dir=cache_dir()))


def _vectors_json(results: "list[VectorResult] | None") -> list[dict[str, Any]] | None:
    if results is None:
        return None
    return [
        {
            "case": result.case,
            "is_right": result.is_right,
            "logit_error": result.logit_error,
            "tolerance": result.tolerance,
            "compared": result.compared,
            "problems": list(result.problems),
        }
        for result in results
    ]


def _show(out: Output, report: Report, results: "list[VectorResult] | None") -> None:
    out.table(
        ("check", "of", "verdict", "expected", "found"),
        [(c.id, c.subject, c.verdict, _short(c.expected), _short(c.found)) for c in report.checks],
    )
    fixes = {c.fix: c.id for c in report.failed}
    if fixes:
        out.table(("failed", "what to do"), [(check_id, fix) for fix, check_id in fixes.items()])
    skipped = {c.fix: c.id for c in report.checks if c.verdict == "not run"}
    for why in skipped:
        ids = sorted({c.id for c in report.checks if c.verdict == "not run" and c.fix == why})
        out.line(f"not run, as {why}: {', '.join(ids)}")
    if results:
        out.table(
            ("test vector", "verdict", "largest error", "allowed", "tokens compared"),
            [
                (r.case, "ok" if r.is_right else "failed", r.logit_error, r.tolerance, r.compared)
                for r in results
            ],
        )
    if report.exit_code == 0:
        said = {"structure": "its manifest and names are sound", "integrity": "every byte is right"}
        out.line(
            f"{report.path}: {said.get(report.level, 'every byte is right, and it fits here')}"
        )


def _short(text: str) -> str:
    """A digest by its beginning; `--json` has all of it."""
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return f"{text[:_ID_CHARACTERS]}..." if is_digest else text


def _raise_if_bad(report: Report, results: "list[VectorResult] | None") -> None:
    if report.failed:
        ids = ", ".join(dict.fromkeys(check.id for check in report.failed))
        count = f"{len(report.failed)} of {len(report.checks)} checks failed: {ids}"
        first = next(check for check in report.failed if check.exit_code == report.exit_code)
        kind = IncompatibleError if report.exit_code == 4 else IntegrityError
        raise kind(f"{report.path!r}: {count}", hint=first.fix)
    if results is None:
        return
    if not results:
        raise NothingToDoError(
            f"{report.path!r} is whole, and holds no test vectors to run",
            hint="packages with their weights inside are built with vectors",
        )
    wrong = [f"{r.case}: {problem}" for r in results for problem in r.problems]
    if wrong:
        listed = "".join(f"\n  - {line}" for line in wrong)
        raise GateError(
            f"{report.path!r} does not answer as when it was built:{listed}",
            hint="`lingc parity` says where it departs; `lingc doctor` describes this machine",
        )
