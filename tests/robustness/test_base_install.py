"""Without extras, what needs none works, and the rest names the extra to install."""

import json
import re
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.robustness.conftest import ROOT, environment

BASE = {"click", "jinja2", "numpy", "rich", "safetensors", "tokenizers"}
OPTIONAL = ("torch", "triton", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "ml_dtypes")

# Runs each command of argv[1] with the modules of argv[2] as good as not installed.
RUNNER = """
import contextlib, importlib.abc, io, json, sys

absent = json.loads(sys.argv[2])

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from lingc.cli import main

answers = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    answers.append([code, out.getvalue(), err.getvalue()])
loaded = sorted({name.partition(".")[0] for name in sys.modules})
json.dump([answers, loaded], sys.stdout)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command, how it must end, and what it must say."""

    words: list[str]
    code: int
    says: str


def cases(built: Path, built_external: Path, small: Path, place: Path) -> list[Case]:
    package, external, checkpoint = str(built), str(built_external), str(small)
    full = str(ROOT / "artifacts" / "checkpoints" / "ling-2.6-flash")
    build = (
        r"`lingc \w+` needs 'torch', which is not installed.*\nhint: pip install 'lingc\[build\]'"
    )
    onnx = r"onnxruntime.*not installed.*\nhint: pip install 'lingc\[onnx\]'"
    return [
        Case(words=["verify", package, "--level", "integrity"], code=0, says="every byte is right"),
        Case(words=["verify", package], code=4, says=r"library.*hint: pip install 'lingc\[onnx\]'"),
        Case(words=["inspect", package], code=0, says="bundle id"),
        Case(words=["inspect", checkpoint], code=0, says="layout"),
        Case(words=["plan", full, "--precision", "fp8", "--target", "h20"], code=0, says="GB"),
        Case(words=["targets"], code=0, says="h20-3e"),
        Case(words=["doctor"], code=0, says="torch"),
        Case(words=["bind", external, "--checkpoint", checkpoint], code=0, says=r"1 files?"),
        Case(words=["build", checkpoint, "-o", str(place / "x.ling")], code=4, says=build),
        Case(words=["passes", checkpoint], code=4, says=build),
        Case(words=["run", package, "--ids", "1"], code=4, says=onnx),
        Case(words=["parity", package, checkpoint], code=4, says=onnx),
    ]


def assert_answers(python: str, asked: list[Case], cache: Path, absent: tuple[str, ...]) -> None:
    words = json.dumps([case.words for case in asked])
    done = subprocess.run(
        (python, "-c", RUNNER, words, json.dumps(absent)),
        capture_output=True,
        text=True,
        check=False,
        env=environment(LINGC_CACHE=str(cache)),
    )
    assert done.returncode == 0, done.stderr
    answers, loaded = json.loads(done.stdout)
    for case, (code, out, err) in zip(asked, answers, strict=True):
        assert code == case.code, (case.words, err)
        assert re.search(case.says, out + err, re.DOTALL), (case.words, out + err)
        assert "Traceback" not in err
    assert set(loaded).isdisjoint(OPTIONAL)


def test_without_extras_every_verb_works_or_names_the_extra(
    built: Path, built_external: Path, small: Path, tmp_path: Path
) -> None:
    asked = cases(built, built_external, small, tmp_path)

    assert_answers(sys.executable, asked, tmp_path / "cache", OPTIONAL)

    assert not (tmp_path / "x.ling").exists()


def test_the_base_is_what_the_runtime_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert {re.split(r"\W", name)[0] for name in project["dependencies"]} == BASE


@pytest.mark.long
def test_a_fresh_environment_with_the_base_alone_answers_the_same(
    built: Path, built_external: Path, small: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = ("-m", "pip", "install", "-q", "--disable-pip-version-check")
    installed = subprocess.run(
        (python, *words, "-c", str(ROOT / "constraints.txt"), *project["dependencies"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr[-300:]

    asked = cases(built, built_external, small, tmp_path)

    assert_answers(python, asked, tmp_path / "cache", ())
