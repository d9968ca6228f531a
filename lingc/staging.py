"""A directory that appears under its name whole, or not at all.

It is filled in `.<name>.tmp-<pid>-<random>/content` beside its final place and renamed when it is
complete and on disk. `.../lock` is held by the process that fills it: whoever can take the lock
knows that process is gone, and may remove the directory. A pid would not do, as in a container
each build tends to have the same one.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from lingc.errors import IntegrityError, ResourceError, UsageError

_LOG = logging.getLogger(__name__)

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

_HINTS = {
    errno.ENOSPC: "free space on that file system, or choose an output on another",
    errno.EDQUOT: "free some of your quota there, or choose an output elsewhere",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "choose an output in a directory that you may write to",
    errno.EPERM: "choose an output in a directory that you may write to",
    errno.EROFS: "choose an output on a file system that is not read-only",
    errno.ENOTDIR: "a part of that path is a file; choose another output",
    errno.EEXIST: "a part of that path is a file; choose another output",
    errno.ENOENT: "make the directory that it shall be in first",
    errno.EISDIR: "that is a directory; give the name of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
}

_HIDDEN = re.compile(r"\.(.+)\.tmp-\d+-[0-9a-f]{8}")

# renameat2, flags of <linux/fs.h>: never replace; swap the two names.
_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


class Scratch:
    """A directory to fill, beside its final place; removed with all that is left in it.

    Args:
        final: What it is for.
        needed_bytes: About how much will be written, to refuse at once what cannot fit.

    Raises:
        ResourceError: The place cannot be written to, or has no room.
    """

    def __init__(self, final: Path, *, needed_bytes: int = 0) -> None:
        # Only the parent is resolved: a link at `final` itself is refused, not followed.
        self.final = final.absolute().parent.resolve() / final.absolute().name
        self._needed_bytes = needed_bytes
        self._directory: Path | None = None
        self._lock: int | None = None

    @property
    def content(self) -> Path:
        """The directory to fill."""
        assert self._directory is not None, "entered first"
        return self._directory / "content"

    def __enter__(self) -> Self:
        with writing(self.final):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            clean_stale(self.final)
            refuse_no_room(self.final, self._needed_bytes)
            self._directory, self._lock = _create(self.final)
            try:
                self.content.mkdir()
            except OSError:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._directory is not None and self._lock is not None:
            _remove(self._directory)
            os.close(self._lock)
        self._directory = self._lock = None


class Staging(Scratch):
    """Fills `content` and publishes it as `final`.

    Args:
        final: Where the directory shall be.
        replaceable: Says of a directory at `final` whether it may be replaced; None where nothing
            may be.
        needed_bytes: As for `Scratch`.

    Raises:
        UsageError: There is something at `final` that may not be replaced.
        ResourceError: The place cannot be written to, or has no room.
    """

    def __init__(
        self,
        final: Path,
        *,
        replaceable: Callable[[Path], bool] | None = None,
        needed_bytes: int = 0,
    ) -> None:
        super().__init__(final, needed_bytes=needed_bytes)
        self._replaceable = replaceable

    def __enter__(self) -> Self:
        self.refuse_existing()
        return super().__enter__()

    def publish(self) -> None:
        """Make every byte durable, then give the directory its name."""
        with writing(self.final):
            seal(self.content)
            self.publish_from(self.content)

    def refuse_existing(self) -> None:
        """Refuse what is at `final` and may not be replaced.

        Raises:
            UsageError: There is such a thing, or the path names no directory.
        """
        if self.final.name in ("", ".."):
            raise UsageError(f"{str(self.final)!r} names no new directory", hint="give it a name")
        if not os.path.lexists(self.final):
            return
        if self._replaceable is None:
            raise UsageError(
                f"{str(self.final)!r} exists already",
                hint="choose another output, or let it be replaced: --overwrite",
            )
        if self.final.is_symlink() or not self.final.is_dir():
            raise UsageError(
                f"{str(self.final)!r} exists already and is not a directory, so it is not replaced",
                hint="choose another output, or remove it first",
            )
        if not self._replaceable(self.final):
            raise UsageError(
                f"{str(self.final)!r} exists already and holds other things than what would "
                f"replace it",
                hint="choose another output, or remove it first",
            )

    def publish_from(self, content: Path) -> None:
        """Give a directory that is durable already the final name."""
        self._rename(content)
        sync(self.final.parent)

    def _rename(self, content: Path) -> None:
        # Twice, as another process can put something there, or take it away, in between.
        for _ in range(2):
            try:
                _rename_new(content, self.final)
            except FileExistsError:
                self.refuse_existing()
            else:
                return
            try:
                _exchange(content, self.final)
            except FileNotFoundError:
                continue
            return
        raise ResourceError(
            f"{str(self.final)!r} keeps changing while it is written",
            hint="another process writes to the same output",
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what could not be written, why, and what helps."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever was told of the progress is gone; no file says so
    except OSError as error:
        raise ResourceError(
            f"{str(_known(path))!r} cannot be written: {error.strerror or error}",
            hint=_HINTS.get(error.errno or 0, "check the file system of that path"),
        ) from error


def is_empty(directory: Path) -> bool:
    """Whether replacing a directory loses nobody anything."""
    return not any(directory.iterdir())


def sync(path: Path) -> None:
    """Force a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under its name when all of it is on the disk.

    Raises:
        ResourceError: It cannot be written there.
    """
    staged = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with writing(path):
            staged.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(staged)
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def refuse_same(*paths: Path | None) -> None:
    """Refuse outputs of which one would replace another.

    Raises:
        UsageError: Two are one and the same.
    """
    seen = set()
    for path in paths:
        if path is not None:
            place = os.path.realpath(path)
            if place in seen:
                raise UsageError(
                    f"{str(path)!r} is given for two outputs", hint="give each a name of its own"
                )
            seen.add(place)


def refuse_unwritable(*paths: Path | None) -> None:
    """Refuse files that could not be written, before the work whose result they are to hold.

    Raises:
        UsageError: Two are one and the same.
        ResourceError: One cannot be written there; nothing was left behind.
    """
    refuse_same(*paths)
    for path in paths:
        if path is not None:
            with writing(path):
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                staged = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
                staged.touch()
                staged.unlink()


def clean_stale(final: Path) -> None:
    """Remove what dead processes left while writing `final`. Never fails, never blocks."""
    pattern = re.compile(re.escape(f".{final.name}.tmp-") + r"\d+-[0-9a-f]{8}")
    with contextlib.suppress(OSError), os.scandir(final.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _remove_if_dead(Path(entry.path))


def _remove_if_dead(directory: Path) -> None:
    try:
        lock = try_lock(directory)
    except OSError as error:
        _LOG.warning("cannot tell whether %s is in use: %s", directory, error)
        return
    if lock is None:
        return
    _LOG.info("removing %s, left by a process that is gone", directory)
    _remove(directory)
    os.close(lock)


def _known(path: Path) -> Path:
    """A path as the user knows it: what is staged inside is a part of what it is for."""
    for directory in (path, *path.parents):
        if found := _HIDDEN.fullmatch(directory.name):
            return directory.with_name(found[1])
    return path


def refuse_no_room(final: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ResourceError: There are fewer bytes free beside `final`.
    """
    free_bytes = shutil.disk_usage(final.parent).free
    if needed_bytes > free_bytes:
        scale, unit = (1e9, "GB") if needed_bytes >= 1e9 else (1e6, "MB")
        raise ResourceError(
            f"{str(_known(final))!r} needs {needed_bytes / scale:.2f} {unit}, the disk has "
            f"{free_bytes / scale:.2f} {unit} free",
            hint=_HINTS[errno.ENOSPC],
        )


def _create(final: Path) -> tuple[Path, int]:
    """A new directory beside `final`, and the lock that keeps it."""
    while True:
        name = f".{final.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        directory = final.parent / name
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        try:
            # None: it was taken for a dead one in the moment before it was locked.
            if (lock := try_lock(directory)) is not None:
                return directory, lock
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                # Nobody can take such a directory for a dead one, so it needs no lock.
                return directory, os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
            _remove(directory)
            raise


def try_lock(directory: Path) -> int | None:
    """Take a directory's lock, or None where another holds it or has just removed it."""
    path = directory / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _remove(directory: Path) -> None:
    """Remove a directory as far as that goes; what is left is found by the next write."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        _LOG.warning("%s could not be removed whole", directory)


def seal(root: Path) -> None:
    """Set every mode, whatever the umask, and force every file and directory to disk."""
    for path in root.iterdir():
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            seal(path)
        elif stat.S_ISREG(mode):
            path.chmod(FILE_MODE)
            sync(path)
        else:
            raise IntegrityError(f"{str(path)!r} is neither a file nor a directory")
    root.chmod(DIRECTORY_MODE)
    sync(root)


def _rename_new(source: Path, target: Path) -> None:
    """Rename, failing with FileExistsError where the name is taken."""
    try:
        _renameat2(source, target, _NOREPLACE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        # Plain rename replaces an empty directory, which loses nobody anything, and no other.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists", str(target)) from None
        try:
            source.rename(target)
        except OSError as refused:
            if refused.errno != errno.ENOTEMPTY:
                raise
            raise FileExistsError(errno.EEXIST, "File exists", str(target)) from None


def _exchange(source: Path, target: Path) -> None:
    """Swap two directories; the name is never free where the file system can swap."""
    try:
        _renameat2(source, target, _EXCHANGE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        old = source.with_name("old")
        target.rename(old)
        try:
            source.rename(target)
        except OSError:
            old.rename(target)
            raise


def _renameat2(source: Path, target: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = (os.fsencode(source), os.fsencode(target))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))
