"""A directory that is filled over hours, by as many processes as it takes.

It is filled in `<name>.partial/content` beside its final place, and renamed when it is whole. What
is there after a kill is gone on with, if it was begun with the same inputs: `begun.json` says with
which. Files appear under their names when all of them is on the disk, so what is there is whole.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from lingc.errors import ResourceError, UsageError
from lingc.staging import Staging, is_empty, refuse_no_room, seal, sync, write_whole, writing

_BEGUN = "begun.json"


class Resumable:
    """Fills `content` across kills, and publishes it as `final`.

    Args:
        final: Where the directory shall be.
        inputs: What the content follows from, in words for a person: name -> value.
        fresh: Throw away what was begun.
        needed_bytes: About how much will be written, to refuse at once what cannot fit.

    Raises:
        UsageError: There is something at `final`, or what was begun had other inputs.
        ResourceError: The place cannot be written to, has no room, or another process fills it.
    """

    def __init__(
        self, final: Path, inputs: Mapping[str, str], *, fresh: bool = False, needed_bytes: int = 0
    ) -> None:
        # Staging knows how to refuse what is there and how to rename; it stages nothing itself.
        self._staging = Staging(final, replaceable=is_empty)
        self.final = self._staging.final
        self.folder = self.final.with_name(f"{self.final.name}.partial")
        self._inputs = dict(inputs)
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
        if self.final.exists() and self.folder.exists() and not self.content.exists():
            shutil.rmtree(self.folder)  # killed after its name was given
        self._staging.refuse_existing()
        with writing(self.final):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
            try:
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
            shutil.rmtree(self.folder)

    def _take(self) -> int:
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ResourceError(
                f"{str(self.folder)!r} is being filled by another process",
                hint="wait for it, or choose another output",
            ) from None
        return handle

    def _begin(self) -> None:
        begun = self._read()
        if begun is not None and not self._fresh:
            self._refuse_others(begun)
            self.is_resumed = True
        else:
            for path in (self.content, self.state):
                shutil.rmtree(path, ignore_errors=True)
            (self.folder / _BEGUN).unlink(missing_ok=True)
        refuse_no_room(self.final, self._needed_bytes - _size_bytes(self.content))
        for path in (self.content, self.state):
            path.mkdir(exist_ok=True)
        if not self.is_resumed:
            write_whole(self.folder / _BEGUN, json.dumps(self._inputs, indent=2) + "\n")

    def _read(self) -> dict[str, Any] | None:
        """What was begun; None where that was not even written down."""
        try:
            value = json.loads((self.folder / _BEGUN).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _refuse_others(self, begun: Mapping[str, Any]) -> None:
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


def _size_bytes(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
