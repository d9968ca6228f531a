"""Where there is no room or no permission, that is said, and nothing is left."""

import errno
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from lingc.checkpoint.tensorfile import TensorWriter

if TYPE_CHECKING:
    from tests.robustness.conftest import Lingc, Refuses

pytestmark = pytest.mark.usefixtures("captured")

FULL = r"/(x|package)\.ling' cannot be written: No space left on device.*\nhint: free space on that"


def full(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITES: dict[str, tuple[Any, str]] = {
    "weights": (TensorWriter, "write"),
    "the rest": (Path, "write_bytes"),
    "what must be durable": (os, "fsync"),
    "directories": (Path, "mkdir"),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_is_told_and_nothing_is_left(
    what: str, small: Path, refuses: "Refuses", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*WRITES[what], full)

    said = refuses(7, "build", small, "-o", tmp_path / "x.ling", "-q")

    assert re.search(FULL, said, re.DOTALL)


def test_a_full_disk_while_replacing_leaves_the_package_that_was(
    small: Path, package: Path, refuses: "Refuses", lingc: "Lingc", monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "write", full)
        said = refuses(7, "build", small, "-o", package, "--overwrite", "-q")

    assert re.search(FULL, said, re.DOTALL)
    assert lingc("verify", package, "-q").code == 0


def test_a_limit_on_the_size_of_files_is_told(
    small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ: the write fails with EFBIG.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        said = refuses(7, "build", small, "-o", tmp_path / "x.ling", "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert re.search(r"cannot be written: File too large.*\nhint: raise the limit", said, re.DOTALL)


# The superuser may write anywhere but there.
@pytest.mark.parametrize("place", ["/proc/x.ling", "/sys/x.ling"])
def test_a_place_that_takes_nothing_is_told(place: str, small: Path, refuses: "Refuses") -> None:
    said = refuses(7, "build", small, "-o", place, "-q")

    assert re.search(rf"'{place}' cannot be written: .*\nhint: ", said)


def test_a_cache_that_takes_nothing_is_told(
    built_external: Path, small: Path, refuses: "Refuses"
) -> None:
    words = ("bind", built_external, "--checkpoint", small, "-q")

    said = refuses(7, *words, "--cache-dir", "/proc/cache")

    assert re.search(r"'/proc/cache/weights/[-0-9a-f]+' cannot be written: .*\nhint: ", said)


def test_a_full_cache_is_told_and_nothing_is_left(
    built_external: Path,
    small: Path,
    refuses: "Refuses",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(TensorWriter, "write", full)

    words = ("bind", built_external, "--checkpoint", small, "-q")
    said = refuses(7, *words, "--cache-dir", tmp_path)

    assert re.search(r"weights/[-0-9a-f]+' cannot be written: No space left on device", said)


def forbidden(path: Path) -> Callable[..., Any]:
    """`Path.open`, but not of this file; the superuser may read them all."""
    opens = Path.open

    def call(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opens(self, *args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-mtp-layer"])
def test_a_file_that_may_not_be_read_is_named(
    name: str, checkpoint: Path, lingc: "Lingc", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = checkpoint.glob(f"{name}*")
    monkeypatch.setattr(Path, "open", forbidden(path))

    answer = lingc("build", checkpoint, "-o", tmp_path / "x.ling", "-q")

    assert answer.code in (3, 7)
    assert re.search(rf"{name}.*[Pp]ermission", answer.err)


class _Usage:
    free = 1000


def test_weights_that_cannot_fit_are_refused_before_they_are_written(
    small: Path, refuses: "Refuses", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage())

    said = refuses(7, "build", small, "-o", tmp_path / "x.ling", "-q")

    assert re.search(rf"'{tmp_path}/x\.ling' needs 0\.4\d MB, the disk has 0\.00 MB free", said)
