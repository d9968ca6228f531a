"""Weights from files to the device, as fast as the link takes them.

Device memory is cut into windows. A few threads take one after another: each reads what belongs
into the window from the files, straight into pinned memory, and has it copied on the buffer's
stream while it fills another buffer. Reading and copying release the interpreter's lock, so threads
really run at once; together they must outrun the link, since one alone copies from the page cache
at a fraction of its rate.

Buffers are small and few, so that what is read is copied from the processor's caches, and in large
pages. What is done between two windows is little, because all threads take turns at it.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from lingc.device import Device, Pinned
from lingc.errors import IntegrityError
from lingc.runtime.backend import Array
from lingc.runtime.cuda_memory import Held
from lingc.weights import Progress, StoredWeights

WINDOW_BYTES = 4 << 20
MOST_THREADS = 12
BUFFERS = 2
"""Of each thread: one is filled while the other is copied from."""

TOLD_BYTES = 64 << 20
"""Progress is told about so often."""


class Source(Protocol):
    """A stored weight."""

    def read(self, into: memoryview, start: int) -> None:
        """Fill `into` with its bytes from `start` on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """A tensor in a file, read by the position: a copy that faults no page of a map."""

    file: int
    offset: int
    name: str

    def read(self, into: memoryview, start: int) -> None:
        done, size, begin = 0, len(into), self.offset + start
        while done < size:
            read = os.preadv(self.file, [into[done:] if done else into], begin + done)
            if read == 0:
                raise IntegrityError(
                    f"weight {self.name!r} ends early: its file was cut while it was read",
                    hint="let nothing write to a package that is in use; get it again",
                )
            done += read


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySource:
    """A weight in memory."""

    bytes: Array

    def read(self, into: memoryview, start: int) -> None:
        np.copyto(np.frombuffer(into, np.uint8), self.bytes[start : start + len(into)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A weight where it goes: `size` bytes at `offset` of the region."""

    offset: int
    size: int
    source: Source


def upload_weights(
    device: Device,
    weights: Mapping[str, Array],
    held: Mapping[str, Held],
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> None:
    """Bring every weight to its place; all are there when this returns.

    Args:
        weights: By name, as stored: mapped files, or arrays.
        held: Where each goes, by rising address.
        progress: Told after each window.
        threads: As many as help where None.

    Raises:
        IntegrityError: A weight is missing, or has another size than the plan says.
    """
    if not held:
        return
    base = next(iter(held.values())).address
    files: dict[Path, int] = {}
    try:
        parts = []
        for name, where in held.items():
            source = _source(name, where, weights, files)
            parts.append(_Part(offset=where.address - base, size=where.bytes, source=source))
        _Upload(device, base, parts, progress).run(threads)
    finally:
        for file in files.values():
            os.close(file)


def _source(name: str, where: Held, weights: Mapping[str, Array], files: dict[Path, int]) -> Source:
    known = weights.tensors if isinstance(weights, StoredWeights) else weights
    if name not in known:
        raise IntegrityError(f"weight {name!r} of the plan is not among the engine's weights")
    if isinstance(weights, StoredWeights):
        stored = weights.tensors[name]
        size = stored.length_bytes
        if stored.path not in files:
            try:
                files[stored.path] = os.open(stored.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise IntegrityError(
                    f"weight file {stored.path.name!r} cannot be read: {error.strerror}"
                ) from error
        source: Source = FileSource(file=files[stored.path], offset=stored.offset_bytes, name=name)
    else:
        raw = np.ascontiguousarray(weights[name]).reshape(-1).view(np.uint8)
        size, source = raw.nbytes, ArraySource(bytes=raw)
    if size != where.bytes:
        raise IntegrityError(
            f"weight {name!r} has {size} bytes, the plan's {where.kind} needs {where.bytes}",
            hint="the weights belong to another engine",
        )
    return source


class _Buffer:
    """Pinned memory of one window, and the stream that its copies are on."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self.pinned: Pinned = device.pin_large(size)
        self.view = self.pinned.array.data
        self.used = 0
        """Bytes that were put into it last."""
        try:
            self.stream: Any = device.new_stream()
        except BaseException:
            self._unpin()
            raise

    def close(self) -> None:
        """Give both back, once no copy from it runs any more."""
        try:
            self._device.end_stream(self.stream)
        finally:
            self._unpin()

    def _unpin(self) -> None:
        self.view.release()
        self._device.unpin(self.pinned)


class _Upload:
    """One region on its way."""

    def __init__(
        self, device: Device, base: int, parts: Sequence[_Part], progress: Progress | None
    ) -> None:
        self._device = device
        self._base = base
        self._parts = parts
        self._starts = [part.offset for part in parts]
        self._end = parts[-1].offset + parts[-1].size
        self._progress = progress
        self._lock = Lock()
        self._turns = count()
        self._done = self._told = 0
        self._failed = False

    def run(self, threads: int | None) -> None:
        windows = -(-self._end // WINDOW_BYTES)
        asked = threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
        workers = ThreadPoolExecutor(number := max(1, min(asked, windows)))
        try:
            for job in [workers.submit(self._work) for _ in range(number)]:
                job.result()
        except BaseException:
            self._failed = True
            raise
        finally:
            workers.shutdown()

    def _work(self) -> None:
        """Take windows until there are none.

        Pinning takes longer than filling, so each thread pins its own, while others copy already.
        """
        device, base, end = self._device, self._base, self._end
        device.attach()
        buffers: list[_Buffer] = []
        with ExitStack() as opened:
            try:
                turn = 0
                while (start := next(self._turns) * WINDOW_BYTES) < end and not self._failed:
                    if len(buffers) < BUFFERS:
                        now = opened.enter_context(closing(_Buffer(device, min(WINDOW_BYTES, end))))
                        buffers.append(now)
                    else:
                        now = buffers[turn % BUFFERS]
                        self._settle(now)
                    turn += 1
                    now.used = self._fill(now.view, start)
                    address = now.pinned.address
                    device.upload(base + start, address, now.used, stream=now.stream)
                for one in buffers:
                    self._settle(one)
            except BaseException:
                self._failed = True
                raise

    def _fill(self, into: memoryview, start: int) -> int:
        """Read what lies in the window that begins there; gaps keep what the buffer held."""
        size = min(WINDOW_BYTES, self._end - start)
        for part in self._within(start, start + size):
            first = max(part.offset, start)
            last = min(part.offset + part.size, start + size)
            part.source.read(into[first - start : last - start], first - part.offset)
        return size

    def _within(self, start: int, end: int) -> Iterator[_Part]:
        index = max(bisect_right(self._starts, start) - 1, 0)
        while index < len(self._parts) and (part := self._parts[index]).offset < end:
            if part.offset + part.size > start:
                yield part
            index += 1

    def _settle(self, buffer: _Buffer) -> None:
        """Wait for what is copied from a buffer, and tell of it now and then."""
        self._device.settle(buffer.stream)
        with self._lock:
            self._done += buffer.used
            buffer.used = 0
            is_due = self._done - self._told >= min(TOLD_BYTES, self._end - self._told)
            if self._progress is not None and is_due:
                self._told = self._done
                self._progress(self._done, self._end)
