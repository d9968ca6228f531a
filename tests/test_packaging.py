"""What is installed, what a checkout looks like, and that the two are the same."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
ROOMS = SETUPTOOLS["package-dir"].values()
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("room", ROOMS)
def test_link_and_room_are_one_directory(room: str) -> None:
    link = ROOT / "lingc" / room

    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.samefile(ROOT / room)


def test_every_package_is_listed() -> None:
    inits = [*(ROOT / "lingc").rglob("__init__.py")]
    inits += [init for room in ROOMS for init in (ROOT / "lingc" / room).rglob("__init__.py")]
    packages = {".".join(init.parent.relative_to(ROOT).parts) for init in inits}

    assert packages == set(SETUPTOOLS["packages"])


def test_every_directory_of_modules_is_a_package() -> None:
    modules = [*(ROOT / "lingc").rglob("*.py")]
    modules += [module for room in ROOMS for module in (ROOT / room).rglob("*.py")]
    bare = {module.parent for module in modules} - {
        module.parent for module in modules if module.name == "__init__.py"
    }

    assert {str(folder.relative_to(ROOT)) for folder in bare} == set()


def test_every_data_file_is_listed() -> None:
    files = [*(ROOT / "lingc").rglob("*")]
    files += [file for room in ROOMS for file in (ROOT / "lingc" / room).rglob("*")]
    data = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts
    }
    listed = {
        found.relative_to(ROOT).as_posix()
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for found in ROOT.joinpath(*package.split(".")).glob(pattern)
    }

    assert data == listed


@pytest.mark.parametrize("room", ROOMS)
def test_bare_room_name_is_refused(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)

    with pytest.raises(ImportError, match=f"import lingc.{room}, not {room}"):
        importlib.import_module(room)


def test_every_constraint_is_one_exact_release() -> None:
    assert [pin for pin in PINS if not re.fullmatch(r"[\w.-]+==[0-9][0-9a-z.]*", pin)] == []


def test_everything_required_is_pinned() -> None:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    required = [*project["dependencies"], *(line for lines in extras for line in lines)]
    names = {_normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in required}
    pinned = {_normal(pin.partition("==")[0]) for pin in PINS}

    assert names - pinned == set()


def test_every_command_line_entry_exists() -> None:
    for entry in PYPROJECT["project"]["scripts"].values():
        module, _, name = entry.partition(":")

        assert callable(getattr(importlib.import_module(module), name))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
