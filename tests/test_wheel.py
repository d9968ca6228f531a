"""What the wheel puts into site-packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_wheel_holds_lingc_and_nothing_beside_it(tmp_path: Path) -> None:
    # From a copy: a build in the tree would leave build/ there, and read what an older one left.
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "lingc", "passes", "plugins", "targets"):
        subprocess.run(("/bin/cp", "-a", str(ROOT / name), str(tree)), check=True)

    words = ("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tree))
    subprocess.run((sys.executable, *words), check=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    files = {
        str(path.relative_to(ROOT))
        for folder in ("lingc", "lingc/passes", "lingc/plugins", "lingc/targets")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lingc"}
    assert files == {name for name in names if not name.startswith("lingc-")}
