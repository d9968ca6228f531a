"""The same checkpoint and request give the same bytes, wherever, whenever and whoever builds."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.robustness.conftest import LING_TINY, ROOT

# Builds the checkpoint at argv[1] into the current directory, once for each request in argv[2].
BUILDER = """
import json, sys
from pathlib import Path
from lingc.build import build
from lingc.capture import Capturer, Sizes
from lingc.compile import Request
from lingc.model.config import ModelConfig

source = Path(sys.argv[1])
capturer = Capturer(ModelConfig.from_file(source), Sizes())
for precision, weights in json.loads(sys.argv[2]):
    request = Request(precision=precision, weights=weights)
    build(source, Path(f"{precision}-{weights}.ling"), request, capturer=capturer)
"""

HERE = {
    "PYTHONHASHSEED": "1",
    "TZ": "Asia/Tokyo",
    "LANG": "C",
    "USER": "one",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "40",
}
# As on another machine: more cores, other vector instructions, another locale.
THERE = {
    "PYTHONHASHSEED": "2",
    "TZ": "America/Caracas",
    "LANG": "tr_TR.UTF-8",
    "LC_ALL": "C.UTF-8",
    "USER": "two",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "PYTHONUTF8": "1",
}

Request = tuple[str, str]
"""Precision, and where the weights go."""


def copy(checkpoint: Path, target: Path, *, mtime: int) -> Path:
    """The same files in another place, made in another order and at another time."""
    target.mkdir(parents=True)
    for path in sorted(checkpoint.iterdir(), reverse=mtime % 2 == 0):
        shutil.copyfile(path, target / path.name)
        os.utime(target / path.name, (mtime, mtime))
    return target


def start(
    checkpoint: Path,
    place: Path,
    requests: Sequence[Request],
    *,
    umask: int,
    settings: dict[str, str],
) -> subprocess.Popen[str]:
    home = place / "home"
    home.mkdir(parents=True)
    return subprocess.Popen(
        (sys.executable, "-c", BUILDER, str(checkpoint), json.dumps(requests)),
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        umask=umask,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), **settings},
    )


def contents(package: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> mode and bytes."""
    return {
        path.relative_to(package).as_posix(): (
            path.stat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [package, *package.rglob("*")]
    }


def assert_same_bytes(checkpoint: Path, place: Path, requests: Sequence[Request]) -> None:
    here, there = place / "here", place / "somewhere" / "else entirely"
    first = copy(checkpoint, place / "a", mtime=1_000_000_001)
    second = copy(
        checkpoint, place / "b" / "\N{LATIN SMALL LETTER E WITH ACUTE}", mtime=1_700_000_000
    )
    builds = [
        start(first, here, requests, umask=0o077, settings=HERE),
        start(second, there, requests, umask=0o022, settings=THERE),
    ]
    for process in builds:
        _, said = process.communicate()
        assert process.returncode == 0, said

    for precision, weights in requests:
        one = contents(here / f"{precision}-{weights}.ling")
        two = contents(there / f"{precision}-{weights}.ling")
        assert one.keys() == two.keys()
        assert [name for name in one if one[name] != two[name]] == []
        assert len(one) > 8


def test_two_builds_give_the_same_bytes_and_modes(small: Path, tmp_path: Path) -> None:
    requests = [("bf16", "embed"), ("bf16", "external"), ("fp8", "embed"), ("int4", "embed")]

    assert_same_bytes(small, tmp_path, requests)


@pytest.mark.long
def test_two_builds_of_the_trained_checkpoint_give_the_same_bytes(tmp_path: Path) -> None:
    requests = [(p, w) for p in ("bf16", "fp8", "int4") for w in ("embed", "external")]

    assert_same_bytes(LING_TINY, tmp_path, requests)


def test_nothing_in_a_package_names_the_machine(built: Path, small: Path) -> None:
    told = [str(small), str(built), str(ROOT), str(Path.home())]
    for path in built.rglob("*.json"):
        text = path.read_text()
        assert not [word for word in told if word in text], path
    for path in built.rglob("*.onnx"):
        data = path.read_bytes()
        assert not [word for word in told if word.encode() in data], path
