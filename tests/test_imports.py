"""Imports go down, the run tower needs no compiler, and starting is quick.

import-linter reads the sources (`lint-imports`). Here stands what it cannot see: whether every
module has a floor, and what importing really brings into a process, by whatever way.
"""

import itertools
import pkgutil
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lingc

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = {one["id"]: one for one in PYPROJECT["tool"]["importlinter"]["contracts"]}
FLOORS = [re.findall(r"[\w.]+", floor) for floor in CONTRACTS["floors"]["layers"]]

# Packages whose modules live on several floors: the package itself only docks them together.
SPLIT = {"lingc", "lingc.model", "lingc.quantize", "lingc.targets"}

COMPILER = {"torch", "triton", "onnx", "onnx_ir", "onnxscript"}
LOADED = "import sys, {module}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"


def run_python(code: str) -> str:
    done = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cpu_seconds(code: str) -> float:
    """The least processor time of several runs: what the code needs, not what the machine does."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)

    return min(once() for _ in range(4))


def test_every_module_has_one_floor() -> None:
    floored = [*itertools.chain.from_iterable(FLOORS)]
    modules = [found.name for found in pkgutil.walk_packages(lingc.__path__, "lingc.")]

    homeless = {
        module
        for module in {*modules} - SPLIT
        if sum(module == floor or module.startswith(f"{floor}.") for floor in floored) != 1
    }

    assert homeless == set(), "give it a floor in pyproject.toml, [tool.importlinter]"


def test_no_floor_is_for_a_module_that_is_gone() -> None:
    modules = {found.name for found in pkgutil.walk_packages(lingc.__path__, "lingc.")}

    assert {*itertools.chain.from_iterable(FLOORS)} - modules - {"lingc.dims"} == set()


@pytest.mark.parametrize(
    "module",
    [
        "lingc",
        "lingc.cli.doctor",
        "lingc.cli.inspect",
        "lingc.cli.run",
        "lingc.cli.verify",
        "lingc.engine",
        "lingc.model.config",
        "lingc.plan",
        "lingc.quantize.formats",
        "lingc.runtime",
        "lingc.targets.spec",
    ],
)
def test_what_runs_an_engine_brings_no_compiler(module: str) -> None:
    loaded = set(run_python(LOADED.format(module=module)).split())

    assert loaded & (COMPILER | {"onnxruntime"}) == set()


def test_help_brings_nothing_that_is_slow_to_import() -> None:
    loaded = set(run_python(LOADED.format(module="lingc.cli") + "\nlingc.cli.main(['-h'])").split())

    assert loaded & (COMPILER | {"onnxruntime", "numpy", "rich"}) == set()


def test_help_starts_at_once() -> None:
    assert cpu_seconds("import lingc.cli; lingc.cli.main(['--help'])") < 0.3


def test_the_runtime_imports_at_once() -> None:
    assert cpu_seconds("import lingc.runtime") < 0.3
