"""Every way a command can end has its exit code, its sentence, and no traceback."""

import errno
import importlib
import json
import os
import pkgutil
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import lingc.cli
from lingc import errors
from lingc.cli import VERBS, main, module_of, output
from lingc.cli.output import Output

ROOT = Path(__file__).parents[2]
LINGC = (sys.executable, "-c", "import sys; from lingc.cli import main; sys.exit(main())")

Raising = Callable[[BaseException], None]


@pytest.fixture
def verb_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Raising:
    """A verb `boom`, and `run`, that raise what they are told to."""
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LINGC_DEBUG", raising=False)

    def arrange(error: BaseException) -> None:
        @click.command()
        @output.options
        def command(out: Output) -> None:
            out.note("before")
            raise error

        for verb in ("boom", "run"):
            module = types.ModuleType(f"lingc.cli.{verb}")
            module.command = command  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(lingc.cli, "VERBS", {"boom": "Raise.", "run": "Raise."})

    return arrange


def test_help_names_every_verb_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0

    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said and about in said for verb, about in VERBS.items())
    codes = {kind.exit_code for kind in _purposeful()}
    assert all(f" {code}  " in said for code in {*codes, 0, 130, 141})


def test_no_verb_at_all_shows_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Usage: lingc" in shown.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_command_whose_help_shows_examples(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0

    said = capsys.readouterr().out
    assert f"Usage: lingc {verb}" in said
    assert f"\n    lingc {verb}" in said, "an `Examples:` block"
    assert "--json" in said
    assert "--no-color" in said


@pytest.mark.parametrize("verb", VERBS)
def test_examples_in_help_use_options_that_exist(verb: str) -> None:
    command: click.Command = importlib.import_module(module_of(verb)).command
    lines = [line.strip() for line in (command.help or "").splitlines()]

    for line in lines:
        if line.startswith(f"lingc {verb}"):
            words = shlex.split(line.partition(" > ")[0].partition(" | ")[0])[2:]
            context = click.Context(command, info_name=verb)
            command.make_parser(context).parse_args(words)


def test_no_command_is_missing_from_the_table() -> None:
    modules = [found.name for found in pkgutil.iter_modules(lingc.cli.__path__, "lingc.cli.")]
    commands = {name for name in modules if hasattr(importlib.import_module(name), "command")}

    assert commands == set(map(module_of, VERBS))


def test_an_unknown_verb_is_answered_with_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verfy"]) == 2

    assert "no such command 'verfy'. Did you mean 'verify'?" in capsys.readouterr().err


def test_an_unknown_option_is_answered_with_the_near_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["targets", "--jsno"]) == 2

    said = capsys.readouterr().err
    assert "lingc targets: no such option '--jsno'. Did you mean '--json'? (LINGC-E0200)" in said
    assert "see `lingc targets --help`" in said


def test_contradicting_options_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "-q", "-v"]) == 2

    assert "-v and -q contradict each other" in capsys.readouterr().err


def _purposeful() -> list[type[errors.LingcError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, errors.LingcError)]


def test_error_ids_are_unique_and_say_their_exit_code() -> None:
    ids = {kind.id: kind.exit_code for kind in _purposeful()}

    assert len(ids) == len(_purposeful())
    assert all(id_.startswith(f"LINGC-E{code:02}") for id_, code in ids.items())


@pytest.mark.parametrize("kind", _purposeful())
def test_an_error_raised_on_purpose_is_answered_with_its_code_id_and_hint(
    kind: type[errors.LingcError], verb_raises: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_raises(kind("the 'thing' is 3", hint="make it 4"))

    assert main(["boom"]) == kind.exit_code

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"before\nlingc boom: the 'thing' is 3 ({kind.id})\nhint: make it 4\n"


def test_an_error_with_json_is_the_one_document_on_stdout(
    verb_raises: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_raises(errors.CheckpointError("3 faults", problems=("a", "b"), hint="mend"))

    assert main(["boom", "--json"]) == 3

    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "error": {
            "id": "LINGC-E0302",
            "problem": "3 faults\n  - a\n  - b",
            "hint": "mend",
            "exit_code": 3,
        }
    }
    assert "lingc boom: 3 faults (LINGC-E0302)\n  - a\n  - b\nhint: mend" in shown.err


def test_a_usage_error_with_json_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json", "h100"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["id"] == "LINGC-E0201"

    assert main(["targets", "--json", "--nothing"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["id"] == "LINGC-E0200"


def test_a_report_already_printed_stays_the_only_document(
    verb_raises: Raising, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_raises(errors.GateError("KL 0.5 is above 0.1"))
    monkeypatch.setattr(Output, "note", lambda out, _text: out.emit({"verdict": "no"}))

    assert main(["boom", "--json"]) == 5

    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"verdict": "no"}
    assert "KL 0.5 is above 0.1" in shown.err


def test_interrupting_is_resumable_and_says_how(
    verb_raises: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_raises(KeyboardInterrupt())

    assert main(["boom", "--progress", "none"]) == 75

    assert "interrupted (LINGC-E7500)\nhint: to go on: lingc boom --progress none" in (
        capsys.readouterr().err
    )


def test_interrupting_run_is_130(verb_raises: Raising, capsys: pytest.CaptureFixture[str]) -> None:
    verb_raises(KeyboardInterrupt())

    assert main(["run"]) == 130

    assert "hint" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_lack_of_memory_is_a_resource(
    error: Exception, verb_raises: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_raises(error)

    assert main(["boom"]) == 7

    assert "not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission is denied"),
    ],
)
def test_lack_of_room_is_a_resource_and_names_the_path(
    code: int, why: str, verb_raises: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_raises(OSError(code, os.strerror(code), "/place/x.ling"))

    assert main(["boom"]) == 7

    assert f"cannot use '/place/x.ling': {why} (LINGC-E0700)" in capsys.readouterr().err


def test_an_optional_library_that_is_absent_is_answered_with_its_extra(
    verb_raises: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_raises(ModuleNotFoundError("No module named 'onnx.helper'", name="onnx.helper"))

    assert main(["boom"]) == 4

    said = capsys.readouterr().err
    assert "`lingc boom` needs 'onnx.helper', which is not installed (LINGC-E0401)" in said
    assert "hint: pip install 'lingc[onnx]'" in said


def test_our_own_mistake_is_reported_in_a_file_and_shows_no_traceback(
    verb_raises: Raising, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    verb_raises(ZeroDivisionError("a\nb"))

    assert main(["boom", "-v"]) == 1

    said = capsys.readouterr().err
    (report,) = (tmp_path / "cache" / "reports").iterdir()
    assert "internal error: ZeroDivisionError: a b (LINGC-E0100)" in said
    assert str(report) in said
    assert "Traceback" not in said
    text = report.read_text(encoding="utf-8")
    assert "command: lingc boom -v\n" in text
    assert f"python: {sys.version}" in text
    assert "click " in text
    assert "Traceback" in text


def test_a_report_that_cannot_lie_in_the_cache_lies_among_temporary_files(
    verb_raises: Raising,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    verb_raises(ZeroDivisionError())
    (tmp_path / "file").touch()
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))

    assert main(["boom"]) == 1

    (report,) = tmp_path.glob("*.txt")
    assert str(report) in capsys.readouterr().err


def test_the_traceback_is_shown_where_it_is_asked_for(
    verb_raises: Raising, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_raises(errors.InputError("bad"))
    monkeypatch.setenv("LINGC_DEBUG", "1")

    assert main(["boom"]) == 3

    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error_and_not_a_success() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            (*LINGC, "targets", "-q"), stdout=write, stderr=subprocess.PIPE, check=False, cwd=ROOT
        )
    finally:
        os.close(write)

    assert done.returncode == 141
    assert done.stderr == b""


def test_a_full_disk_behind_stdout_is_a_resource() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            (*LINGC, "targets", "--json"),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            cwd=ROOT,
        )

    assert done.returncode == 7
    assert b"cannot use standard output or an unnamed file: the disk is full" in done.stderr
    assert b"Traceback" not in done.stderr
