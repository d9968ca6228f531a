"""What the wheel puts into site-packages."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MOST_BYTES = 500_000_000
"""Of an installation that runs CUDA engines, beside Python itself."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: a build in the tree would leave build/ there, and read what an older one left.
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "lingc", "passes", "plugins", "targets"):
        subprocess.run(("/bin/cp", "-a", str(ROOT / name), str(tree)), check=True)
    words = ("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(tree))
    subprocess.run((sys.executable, *words), check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.long
def test_wheel_holds_lingc_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = {
        str(path.relative_to(ROOT))
        for folder in ("lingc", "lingc/passes", "lingc/plugins", "lingc/targets")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lingc"}
    assert files == {name for name in names if not name.startswith("lingc-")}


@pytest.mark.long
def test_what_runs_cuda_engines_is_small_and_compiles_nothing(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    before = _bytes(site)
    words = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile")
    installed = subprocess.run(
        (python, *words, "-c", str(ROOT / "constraints.txt"), f"{wheel}[cuda]"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr[-300:]

    done = subprocess.run(
        (python, "-c", "import cuda.bindings.driver, lingc.runtime.cuda_backend, lingc.cli"),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert not any((site / name).exists() for name in ("torch", "triton", "nvidia"))
    assert _bytes(site) - before < MOST_BYTES


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
