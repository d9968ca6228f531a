"""What went wrong, as an exit code, a sentence and a way out.

Errors raised on purpose carry all three. The rest are either the machine's limits, which are
named, or our own mistakes, which are written to a report file and apologised for in one line.
"""

import errno
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click

from lingc import errors

EMITTED = "lingc.emitted"
"""Key in click's shared `meta`: the one JSON document of this run is already printed."""

EXTRA_OF: Mapping[str, str] = {
    "torch": "build",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "ml_dtypes": "onnx",
}
"""The extra that brings each optional module."""

_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.EMFILE: "too many files are open",
    errno.EFBIG: "the file would be larger than allowed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one command ended otherwise than well."""

    exit_code: int
    id: str
    problem: str
    hint: str | None


def cache_dir() -> Path:
    """Where lingc may keep what it can make again: LINGC_CACHE, or ~/.cache/lingc."""
    said = os.environ.get("LINGC_CACHE")
    return Path(said) if said else Path.home() / ".cache" / "lingc"


def explain(error: BaseException, *, verb: str | None, words: Sequence[str]) -> Failure:
    """Turn whatever a command raised into an answer; writes a report for an internal error."""
    if os.environ.get("LINGC_DEBUG") == "1":
        traceback.print_exception(error)
    match error:
        case errors.LingcError():
            return _failure(type(error), error.problem, error.hint)
        case click.UsageError():
            return _failure(errors.UsageError, _sentence(error), _usage(error, verb))
        case click.ClickException():
            return _failure(errors.InputError, _sentence(error), None)
        case KeyboardInterrupt() | click.Abort():
            return _interrupted(verb, words)
    return _lack(error, verb) or _internal(error, words)


def tell(answer: Failure, *, verb: str | None, as_json: bool) -> None:
    """Print the answer on stderr and, where asked for, as the one document on stdout."""
    first, newline, rest = answer.problem.partition("\n")
    name = "lingc" if verb is None else f"lingc {verb}"
    lines = f"{name}: {first} ({answer.id}){newline}{rest}"
    if answer.hint is not None:
        lines += f"\nhint: {answer.hint}"
    click.echo(lines, err=True)
    if as_json:
        said = {
            "id": answer.id,
            "problem": answer.problem,
            "hint": answer.hint,
            "exit_code": answer.exit_code,
        }
        click.echo(json.dumps({"error": said}, indent=2, ensure_ascii=False))


def versions() -> dict[str, str | None]:
    """Versions of the libraries that lingc uses, None where absent; imports none of them."""
    names = ("numpy", "safetensors", "click", "rich", "tokenizers", "jinja2")
    optional = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "ml-dtypes")
    found: dict[str, str | None] = {}
    for name in (*names, *optional):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _failure(kind: type[errors.LingcError], problem: str, hint: str | None) -> Failure:
    return Failure(exit_code=kind.exit_code, id=kind.id, problem=problem, hint=hint)


def _sentence(error: click.ClickException) -> str:
    """Click's message in the form of ours: no capital, no full stop."""
    said = error.format_message().strip()
    return said[:1].lower() + said[1:].removesuffix(".")


def _usage(error: click.UsageError, verb: str | None) -> str:
    asked = "lingc" if verb is None else f"lingc {verb}"
    help_line = f"see `{asked} --help`"
    if error.ctx is None:
        return help_line
    usage = " ".join(error.ctx.get_usage().split()).removeprefix("Usage: ")
    return f"usage is `{usage}`; {help_line}"


def _interrupted(verb: str | None, words: Sequence[str]) -> Failure:
    if verb == "run":
        return Failure(exit_code=130, id=errors.ResumableError.id, problem="interrupted", hint=None)
    again = shlex.join(("lingc", *words))
    return _failure(errors.ResumableError, "interrupted", f"to go on: {again}")


def _no_room(error: OSError) -> tuple[str, str]:
    assert error.errno is not None
    where = error.filename if error.filename2 is None else error.filename2
    place = "standard output or an unnamed file" if where is None else f"{os.fsdecode(where)!r}"
    return (
        f"cannot use {place}: {_NO_ROOM[error.errno]}",
        "nothing was left under a final name; choose another place or make room, and try again",
    )


def _extra(error: ModuleNotFoundError) -> str | None:
    return EXTRA_OF.get((error.name or "").partition(".")[0])


def _missing(error: ModuleNotFoundError, verb: str | None) -> tuple[str, str]:
    doing = "this" if verb is None else f"`lingc {verb}`"
    return (
        f"{doing} needs {error.name!r}, which is not installed",
        f"pip install 'lingc[{_extra(error)}]'",
    )


def _lack(error: BaseException, verb: str | None) -> Failure | None:
    """What this machine lacks, if that is the reason."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return _failure(errors.ResourceError, *_no_room(error))
    if isinstance(error, ModuleNotFoundError) and _extra(error) is not None:
        return _failure(errors.MissingExtraError, *_missing(error, verb))
    # torch's CPU allocator raises a plain RuntimeError.
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or refused:
        return _failure(
            errors.ResourceError,
            "this machine has not enough memory for that",
            "`lingc plan` tells what a model needs; `lingc doctor` what is here",
        )
    return None


def _internal(error: BaseException, words: Sequence[str]) -> Failure:
    report = _write_report(error, words)
    where = (
        "no report could be written; LINGC_DEBUG=1 shows the traceback"
        if report is None
        else f"please report it with {str(report)!r}, which holds the traceback and the arguments"
    )
    said = " ".join(str(error).split())
    problem = f"internal error: {type(error).__name__}: {said}"[:300]
    return _failure(errors.LingcError, problem, where)


def _write_report(error: BaseException, words: Sequence[str]) -> Path | None:
    found = "".join(f"{name} {version or 'absent'}\n" for name, version in versions().items())
    text = (
        f"command: {shlex.join(('lingc', *words))}\n"
        f"directory: {Path.cwd()}\n"
        f"platform: {platform.platform()}\n"
        f"python: {sys.version}\n"
        f"{found}\n"
        f"{''.join(traceback.format_exception(error))}"
    )
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (cache_dir() / "reports", Path(tempfile.gettempdir())):
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError:
            continue
        return path
    return None
