"""Directories that appear whole or not at all.

Files are written to a hidden sibling, brought to the disk, and renamed. A sibling whose writer was
killed is recognised by its lock being free, and swept by the next writer.
"""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lingc.errors import ResourceError, UsageError

_LACKING = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "part of the path is a file",
    errno.EEXIST: "part of the path is a file",
    errno.EFBIG: "files so large are not allowed there (ulimit -f)",
}


@contextmanager
def staged_directory(target: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a fresh directory that becomes `target` when the block ends without an error.

    Args:
        target: Must not exist, or be an empty directory.
        needed_bytes: About how much will be written, to refuse at once what cannot fit.

    Raises:
        UsageError: `target` is there already.
        ResourceError: The disk is full, read-only or forbidden.
    """
    target = target.absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise _taken(target)
    with scratch_directory(target, needed_bytes=needed_bytes) as staging:
        yield staging
        sync(staging)
        _rename(staging, target)
        sync(target.parent)


@contextmanager
def scratch_directory(target: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a fresh hidden sibling of `target`, removed with what is left in it.

    Raises:
        ResourceError: The disk is full, read-only or forbidden.
    """
    target = target.absolute()
    with disk_trouble(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        _check_space(target, needed_bytes)
        staging, lock = _create(target)
        try:
            yield staging
        finally:
            os.close(lock)
            with suppress(FileNotFoundError):
                shutil.rmtree(staging)


@contextmanager
def disk_trouble(target: Path) -> Iterator[None]:
    """Turn what an operating system says about a disk into an error with a way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LACKING:
            raise
        raise ResourceError(
            f"{str(target)!r} cannot be written: {_LACKING[error.errno]}",
            hint="choose a place with room and write permission; nothing was left there",
        ) from error


def sweep(target: Path) -> None:
    """Remove what killed writers of `target` have left beside it."""
    for left in target.parent.glob(f".{target.name}.partial-*"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def sync(path: Path) -> None:
    """Bring a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and bring it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(staging: Path, target: Path) -> None:
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another writer was faster
            raise _taken(target) from error
        raise


def _taken(target: Path) -> UsageError:
    return UsageError(f"{str(target)!r} exists already", hint="remove it, or choose another place")


def _create(target: Path) -> tuple[Path, int]:
    """A fresh sibling with the permissions that the user's umask gives, and its held lock."""
    while True:
        staging = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        staging.mkdir()
        # A sweeper may take it between its creation and its lock; then make another.
        with suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if staging.exists():
                return staging, lock
            os.close(lock)


def _check_space(target: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(target.parent).free
    if needed_bytes > free_bytes:
        raise ResourceError(
            f"{str(target)!r} needs {needed_bytes / 1e9:.2f} GB, the disk has "
            f"{free_bytes / 1e9:.2f} GB free",
            hint="choose a place with more room",
        )
