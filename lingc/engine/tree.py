"""Looks at a directory that may be hostile, and takes the digests of its files."""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

from lingc.engine.layout import LIMITS

T = TypeVar("T")
R = TypeVar("R")

_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Something that lies in the directory.

    Attributes:
        path: Relative, with `/`; as the file system has it, so perhaps not printable.
        kind: `file`, `directory`, or what it is instead: `symbolic link`, `fifo`, `device`, ...
        links: Hard links to it.
    """

    path: str
    kind: str
    size: int
    links: int


@dataclass(frozen=True, slots=True)
class Stamp:
    """What shows that a file was replaced or written since it was looked at."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Digest:
    """The SHA-256 of a file, and the stamp it had when its reading began."""

    sha256: str
    stamp: Stamp


def walk(root: Path) -> Iterator[Node]:
    """Everything below `root`, in order, never through a link.

    A directory whose path is longer than a path may be is not entered.
    """
    pending = [""]
    while pending:
        directory = pending.pop()
        with os.scandir(root / directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            path = f"{directory}/{entry.name}" if directory else entry.name
            status = entry.stat(follow_symlinks=False)
            kind = _kind(status.st_mode)
            yield Node(path=path, kind=kind, size=status.st_size, links=status.st_nlink)
            if kind == "directory" and len(path) <= LIMITS["path characters"]:
                pending.append(path)


def open_regular(path: Path) -> int:
    """Open a file for reading, refusing anything that is not a plain file of its own.

    Raises:
        OSError: No such file, a link, a device, or a file with a second name.
    """
    # O_NONBLOCK: opening a fifo would otherwise wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return handle
    os.close(handle)
    raise OSError(f"it is a {_kind(status.st_mode)} with {status.st_nlink} links")


def digest(path: Path) -> Digest:
    """The SHA-256 of a package's file; memory does not grow with the file.

    Raises:
        OSError: As `open_regular`.
    """
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        return digest_open(file)


def digest_open(file: FileIO) -> Digest:
    """The SHA-256 of an open file."""
    hasher = hashlib.sha256()
    stamp = Stamp.of(os.fstat(file.fileno()))
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, stamp.size + 1)))
    while count := file.readinto(buffer):
        hasher.update(buffer[:count])
    return Digest(hasher.hexdigest(), stamp)


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`work` of every item, in order; hashing leaves the interpreter's lock."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))


def read(path: Path, *, limit: int) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: As `open_regular`.
        ValueError: It holds more than `limit` bytes.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return data


def collision_key(path: str) -> str:
    """What two names must differ in, so that no file system takes one for the other."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
        stat.S_IFBLK: "device",
        stat.S_IFCHR: "device",
    }
    return kinds.get(stat.S_IFMT(mode), "node of unknown kind")
