"""A directory that is filled over hours, by as many processes as it takes.

It is filled in `<name>.partial/content` beside its final place, and renamed when it is whole. What
is there after a kill is gone on with, if it was begun with the same inputs: `begun.json` says with
which. Files appear under their names when all of them is on the disk, so what is there is whole.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from lingc import __version__
from lingc.errors import ResourceError, UsageError
from lingc.staging import (
    Staging,
    is_empty,
    refuse_no_room,
    seal,
    sync,
    try_lock,
    write_whole,
    writing,
)

_BEGUN = "begun.json"
_LOCK = "lock"
_FORMAT = 2
"""Of what stands in `content` and `state`; raise it when either changes within a version."""


class Resumable:
    """Fills `content` across kills, and publishes it as `final`.

    Args:
        final: Where the directory shall be.
        inputs: What the content follows from, in words for a person: name -> value.
        fresh: Throw away what was begun.
        needed_bytes: About how much will be written, to refuse at once what cannot fit.

    Raises:
        UsageError: There is something at `final`, or what was begun had other inputs or another
            lingc, or there is a `<name>.partial` that nothing says was begun here.
        ResourceError: The place cannot be written to, has no room, or another process fills it.
    """

    def __init__(
        self, final: Path, inputs: Mapping[str, str], *, fresh: bool = False, needed_bytes: int = 0
    ) -> None:
        # Staging knows how to refuse what is there and how to rename; it stages nothing itself.
        self._staging = Staging(final, replaceable=is_empty)
        self.final = self._staging.final
        self.folder = self.final.with_name(f"{self.final.name}.partial")
        self._inputs = {"lingc": f"{__version__}, state {_FORMAT}", **inputs}
        self._fresh = fresh
        self._needed_bytes = needed_bytes
        self._lock: int | None = None
        self.is_resumed = False
        """Whether there was something to go on with."""

    @property
    def content(self) -> Path:
        """The directory to fill."""
        return self.folder / "content"

    @property
    def state(self) -> Path:
        """A directory for what is needed only while `content` is filled."""
        return self.folder / "state"

    def __enter__(self) -> Self:
        with writing(self.final):
            self._refuse_foreign()
            if self._read() is None:
                self._staging.refuse_existing()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
            try:
                self._refuse_foreign()  # again, as nobody else changes it now
                self._begin()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def publish(self) -> None:
        """Make every byte durable, give the directory its name, and drop the rest."""
        with writing(self.final):
            seal(self.content)
            self._staging.publish_from(self.content)
            self._remove()

    def _take(self) -> int:
        handle = try_lock(self.folder)
        if handle is None:
            raise ResourceError(
                f"{str(self.folder)!r} is being filled by another process",
                hint="wait for it, or choose another output",
            )
        return handle

    def _refuse_foreign(self) -> None:
        """Refuse a folder that was not begun here: whatever it holds is not ours to remove."""
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_dir() and not self.folder.is_symlink():
            if self._read() is not None:
                return
            # Killed before anything was begun.
            if all(path.name == _LOCK or _is_staged(path) for path in self.folder.iterdir()):
                return
        raise UsageError(
            f"{str(self.folder)!r} is in the way: no {_BEGUN!r} of lingc says that it was begun "
            "here, so it is neither used nor removed",
            hint="move or remove it, or choose another output",
        )

    def _begin(self) -> None:
        begun = self._read()
        has_content = self.content.is_dir() and not is_empty(self.content)
        try:
            self._staging.refuse_existing()
        except UsageError:
            if begun is not None and not has_content:
                self._remove()  # killed after its name was given
            raise
        if begun and not self._fresh:
            self._refuse_others(begun)
            self.is_resumed = self.content.is_dir() and self.state.is_dir()
        if not self.is_resumed:
            # Empty, until the folder is: what a kill leaves of it is not gone on with.
            write_whole(self.folder / _BEGUN, "{}\n")
            for path in (self.content, self.state):
                _drop(path)
        refuse_no_room(self.final, self._needed_bytes - _size_bytes(self.folder))
        if not self.is_resumed:
            for path in (self.content, self.state):
                path.mkdir()
            write_whole(self.folder / _BEGUN, json.dumps(self._inputs, indent=2) + "\n")

    def _remove(self) -> None:
        """Remove what is ours; what says so goes last."""
        for path in (self.content, self.state):
            _drop(path)
        for path in self.folder.iterdir():
            if _is_staged(path):
                path.unlink()
        for name in (_BEGUN, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody put something else there
            self.folder.rmdir()

    def _read(self) -> dict[str, str] | None:
        """What was begun; None where that was not even written down, {} while it is removed."""
        try:
            value = json.loads((self.folder / _BEGUN).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if isinstance(value, dict) and all(isinstance(each, str) for each in value.values()):
            return value
        return None

    def _refuse_others(self, begun: Mapping[str, str]) -> None:
        names = [name for name in self._inputs if begun.get(name) != self._inputs[name]]
        names += [name for name in begun if name not in self._inputs]
        if not names:
            return
        listed = "".join(
            f"\n  - {name}: was {begun.get(name, 'not given')}, "
            f"is {self._inputs.get(name, 'not given')}"
            for name in names
        )
        raise UsageError(
            f"{str(self.folder)!r} was begun with other inputs:{listed}",
            hint="give the same ones to go on, --fresh to begin anew, or another output",
        )


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path to write to; its file gets the name `path` when the block ends well."""
    staged = path.with_name(f".{path.name}.tmp")
    staged.unlink(missing_ok=True)
    yield staged
    sync(staged)
    staged.replace(path)
    sync(path.parent)


def _is_staged(path: Path) -> bool:
    """Whether it is a `begun.json` that was not written whole."""
    return path.name.startswith(f".{_BEGUN}.tmp-")


def _drop(folder: Path) -> None:
    """Remove a directory, all of it or with an error."""
    if os.path.lexists(folder):
        shutil.rmtree(folder)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
