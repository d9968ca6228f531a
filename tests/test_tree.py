"""What the repository may hold."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_TRACKED_BYTES = 56 * 2**20
MAX_MODULE_LINES = 500


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nobody can tell here what is tracked")
    listed = subprocess.run(
        (git, "-C", str(ROOT), "ls-files", "-z"), capture_output=True, check=True, text=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_what_is_tracked_stays_small_enough_to_clone(tracked: list[Path]) -> None:
    sizes = {path: path.lstat().st_size for path in tracked if path.exists() or path.is_symlink()}
    largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:5]
    listed = "".join(f"\n{sizes[path]:>12,} {path.relative_to(ROOT)}" for path in largest)

    assert sum(sizes.values()) < MAX_TRACKED_BYTES, f"largest:{listed}"


def test_modules_stay_short_enough_to_read(tracked: list[Path]) -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked
        if path.suffix == ".py" and path.is_file() and not path.is_symlink()
    }

    assert {name: count for name, count in lines.items() if count > MAX_MODULE_LINES} == {}


def test_no_build_output_is_tracked(tracked: list[Path]) -> None:
    stray = {".pyc", ".so", ".onnx", ".log", ".whl"}

    assert [path for path in tracked if path.suffix in stray] == []
