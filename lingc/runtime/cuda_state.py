"""The state of a CUDA engine as arrays of its host: tensors, slots, rows of the caches."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lingc.device import Device
from lingc.errors import InputError, UsageError
from lingc.plan import TensorType
from lingc.quantize.formats import widen_bf16
from lingc.runtime.backend import Array, SlotState
from lingc.runtime.cuda_inputs import NUMPY_DTYPE
from lingc.runtime.cuda_memory import Held


class CudaState:
    """State tensors where they lie.

    Args:
        held: By name, slots and rows for scratch included.
        axes: The first axis of each: `S` for slots, `R` for rows of a cache.
        fetch: Copies a tensor to the host, once what is on the stream is done.
    """

    def __init__(
        self,
        device: Device,
        held: Mapping[str, Held],
        axes: Mapping[str, str],
        fetch: Callable[[Held], Array],
    ) -> None:
        self._device, self._held, self._axes, self._fetch = device, held, axes, fetch

    def place(self, name: str) -> Held:
        """Where a state tensor lies.

        Raises:
            UsageError: There is none of that name.
        """
        if name not in self._held:
            known = ", ".join(self._held)
            raise UsageError(f"the engine has no state {name!r}", hint=f"it has: {known}")
        return self._held[name]

    def whole(self, name: str) -> Array:
        """A copy of a state tensor, scratch included; bf16 widened."""
        found = self._fetch(self.place(name))
        return widen_bf16(found) if found.dtype == np.uint16 else found

    def save_slot(self, slot: int) -> SlotState:
        """See `lingc.runtime.backend.Backend`."""
        return {name: self._fetch(held) for name, held in self._slot(slot)}

    def load_slot(self, slot: int, saved: SlotState) -> None:
        """See `lingc.runtime.backend.Backend`.

        Raises:
            InputError: A tensor is missing, or of another type or shape.
        """
        for name, held in self._slot(slot):
            self._give(held, _checked(name, saved, held.kind, "slot"))

    def save_rows(self, rows: Array) -> SlotState:
        """See `lingc.runtime.backend.Keeping`."""
        found = {}
        for name in self._names("R"):
            whole = self._held[name].kind
            kind = TensorType(whole.dtype, (0, *whole.shape[1:]))
            empty = np.empty(kind.bind({}), NUMPY_DTYPE[kind.dtype])
            parts = [self._fetch(self._rows(name, *run)) for run in runs(rows)]
            found[name] = np.concatenate([empty, *parts])
        return found

    def load_rows(self, rows: Array, saved: SlotState) -> None:
        """See `lingc.runtime.backend.Keeping`.

        Raises:
            InputError: A tensor is missing, or of another type or shape.
        """
        for name in self._names("R"):
            whole = self._held[name].kind
            kind = TensorType(whole.dtype, (len(rows), *whole.shape[1:]))
            given, done = _checked(name, saved, kind, "rows"), 0
            for first, count in runs(rows):
                self._give(self._rows(name, first, count), given[done : done + count])
                done += count

    def _names(self, axis: str) -> list[str]:
        return [name for name in self._held if self._axes[name] == axis]

    def _slot(self, slot: int) -> Iterator[tuple[str, Held]]:
        """One slot's share of every state that has slots."""
        names = self._names("S")
        slots = int(self._held[names[0]].kind.shape[0]) - 1 if names else 0
        if not 0 <= slot < slots:
            raise UsageError(f"slot {slot} is not one of {slots}")
        for name in names:
            whole = self._held[name]
            kind = TensorType(whole.kind.dtype, whole.kind.shape[1:])
            size = kind.bytes()
            yield name, Held(kind=kind, address=whole.address + slot * size, bytes=size)

    def _rows(self, name: str, first: int, count: int) -> Held:
        whole = self._held[name]
        kind = TensorType(whole.kind.dtype, (count, *whole.kind.shape[1:]))
        size = kind.bytes()
        return Held(kind=kind, address=whole.address + first * (size // count), bytes=size)

    def _give(self, held: Held, given: Array) -> None:
        self._device.upload(held.address, given.ctypes.data, held.bytes)
        self._device.wait(self._device.mark())  # it is copied from there


def runs(rows: Array) -> Iterator[tuple[int, int]]:
    """First row and how many, of rows that follow each other."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(np.asarray(rows), breaks):
        if len(part):
            yield int(part[0]), len(part)


def _checked(name: str, saved: SlotState, kind: TensorType, what: str) -> Array:
    if name not in saved:
        raise InputError(f"the saved {what} lacks {name!r}")
    given = np.ascontiguousarray(saved[name])
    if given.dtype != NUMPY_DTYPE[kind.dtype] or given.shape != kind.shape:
        raise InputError(
            f"{name!r} of the saved {what} is {given.dtype} {list(given.shape)}, not {kind}"
        )
    return given
