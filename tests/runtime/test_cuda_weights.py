"""Weights through pinned memory: every byte to its place, from files and from arrays."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lingc.checkpoint.tensorfile import TensorWriter
from lingc.errors import IntegrityError, ResourceError
from lingc.kernel import align
from lingc.plan import TensorType
from lingc.runtime import cuda_weights
from lingc.runtime.cuda_memory import Held
from lingc.runtime.cuda_weights import upload_weights
from lingc.weights import open_weights
from tests.runtime.host_device import HostDevice

SIZES = {"a": 5000, "b": 1, "c": 256, "d": 3000, "e": 4096, "f": 17}

Bytes = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_weights, "WINDOW_BYTES", 1024)


def made() -> dict[str, Bytes]:
    random = np.random.default_rng(0)
    return {name: random.integers(0, 256, n, dtype=np.uint8) for name, n in SIZES.items()}


def places(device: HostDevice) -> dict[str, Held]:
    base = at = device.allocate(sum(map(align, SIZES.values())))
    found = {}
    for name, size in SIZES.items():
        found[name] = Held(kind=TensorType("u8", (size,)), address=at, bytes=size)
        at += align(size)
    assert at - base == sum(map(align, SIZES.values()))
    return found


def written(folder: Path, weights: dict[str, Bytes]) -> list[Path]:
    """Two files, names of both in turn."""
    paths = []
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        paths.append(folder / f"{number}.safetensors")
        with TensorWriter(paths[-1], {name: ("U8", weights[name].shape) for name in names}) as out:
            for name in names:
                out.write(name, weights[name])
            out.finish()
    return paths


def arrived(device: HostDevice, held: dict[str, Held]) -> dict[str, list[int]]:
    return {n: device.tensor(one.address, one.kind).tolist() for n, one in held.items()}


@pytest.mark.parametrize("threads", [None, 1, 3, 20])
@pytest.mark.parametrize("from_files", [True, False])
def test_every_byte_arrives(tmp_path: Path, *, threads: int | None, from_files: bool) -> None:
    device, weights = HostDevice(), made()
    held = places(device)
    given: Any = open_weights(written(tmp_path, weights)) if from_files else weights
    told: list[tuple[int, int]] = []

    upload_weights(device, given, held, threads=threads, progress=lambda *two: told.append(two))

    assert arrived(device, held) == {name: value.tolist() for name, value in weights.items()}
    assert not device.pinned
    total = held["f"].address + held["f"].bytes - held["a"].address
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_file_that_is_cut_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    device, weights = HostDevice(), made()
    paths = written(tmp_path, weights)
    opened = open_weights(paths)
    os.truncate(paths[0], paths[0].stat().st_size - 1000)

    with pytest.raises(IntegrityError, match="ends early: its file was cut while it was read"):
        upload_weights(device, opened, places(device))

    assert not device.pinned


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    device = HostDevice()
    opened = open_weights(paths := written(tmp_path, made()))
    paths[1].unlink()

    with pytest.raises(IntegrityError, match=r"'1.safetensors' cannot be read: No such file"):
        upload_weights(device, opened, places(device))


def test_no_file_stays_open(tmp_path: Path) -> None:
    device = HostDevice()
    opened = open_weights(written(tmp_path, made()))
    before = len([*Path("/proc/self/fd").iterdir()])

    upload_weights(device, opened, places(device))

    assert len([*Path("/proc/self/fd").iterdir()]) == before


class Failing(HostDevice):
    """Fails at a second stream, or the first time that a stream is ended."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.ended: list[tuple[Any, int]] = []

    def new_stream(self) -> Any:
        if self.where == "new" and len(self.streams) == 2:
            raise ResourceError("no stream is left")
        return super().new_stream()

    def end_stream(self, stream: Any) -> None:
        super().end_stream(stream)
        self.ended.append((stream, len(self.pinned)))
        if self.where == "end" and len(self.ended) == 1:
            raise ResourceError("no stream is left")


@pytest.mark.parametrize(("where", "ended"), [("new", [(1, 1)]), ("end", [(2, 2), (1, 1)])])
def test_what_fails_leaves_nothing_pinned_and_waits_first(
    where: str, ended: list[tuple[Any, int]]
) -> None:
    device = Failing(where)

    with pytest.raises(ResourceError, match="no stream is left"):
        upload_weights(device, made(), places(device), threads=1)

    assert not device.pinned
    assert device.ended == ended


def test_ctrl_c_stops_the_threads_before_their_memory_is_given_back() -> None:
    device = HostDevice()

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload_weights(device, made(), places(device), threads=2, progress=interrupt)

    assert not device.pinned
