"""What goes wrong on a GPU: no room, a killed process; and requests that leave nothing behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lingc.build import build
from lingc.compile import Request as BuildRequest
from lingc.device import Device
from lingc.engine import open_package
from lingc.runtime import Generator, Request
from lingc.runtime.backend import Limits
from lingc.runtime.cuda_backend import CudaBackend
from lingc.weights import open_weights
from tests.robustness.conftest import environment

pytestmark = [pytest.mark.gpu, pytest.mark.long]

TINY = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-tiny"
MIB = 1 << 20


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "tiny.ling"
    asked = BuildRequest(precision="fp8", target="h200-sxm")
    build(TINY, path, asked, cache_dir=tmp_path_factory.mktemp("cache"))
    return path


@pytest.fixture(scope="module")
def command(engine: Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "lingc", "run", str(engine), "--prompt", "def f(n):",
            "--progress", "none")  # fmt: skip


def answer(command: tuple[str, ...], tokens: int = 8) -> tuple[int, str, str]:
    done = subprocess.run(
        (*command, "--max-tokens", str(tokens)),
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def free_bytes(device: Device) -> int:
    return device.memory_bytes()[0]


def test_too_little_free_memory_is_told_with_the_numbers(
    command: tuple[str, ...], device: Device
) -> None:
    hog = device.allocate(free_bytes(device) - 600 * MIB)
    try:
        code, _, said = answer(command)
    finally:
        device.free(hog)

    assert code == 7
    assert "of device memory: weights 24.5 MB, state" in said
    assert f"{device.name} has " in said
    assert answer(command)[0] == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)],
    ids=lambda one: getattr(one, "name", ""),
)
def test_a_process_that_is_stopped_while_it_generates_hinders_no_other(
    command: tuple[str, ...], device: Device, number: signal.Signals, code: int
) -> None:
    before, want = free_bytes(device), answer(command)
    with subprocess.Popen(
        (*command, "--max-tokens", "6000", "--ignore-eos"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(20)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)

    assert process.returncode == code
    assert b"Traceback" not in said
    _until(lambda: before - free_bytes(device) <= MIB)
    assert answer(command) == want


def test_ten_thousand_short_requests_take_no_memory(engine: Path, device: Device) -> None:
    package = open_package(engine)
    limits = Limits.from_tokens(slots=16, tokens_per_sequence=128, page_size=64)
    backend = CudaBackend(package, open_weights(package.shards()), limits, device=device)
    taken: list[tuple[int, int]] = []
    try:
        generator = Generator(backend)
        for i in range(10_000):
            tokens = tuple((31 * i + 7 * j) % 4000 + 5 for j in range(i % 7 + 1))
            request = Request(tokens=tokens, max_tokens=i % 5 + 1, stop_ids=frozenset())
            (done,) = generator.generate([request])
            assert len(done.tokens) == i % 5 + 1
            if i in {100, 9_999}:
                taken.append((_resident(), free_bytes(device)))
    finally:
        backend.close()

    (host, free), (host_after, free_after) = taken
    assert host_after - host < 4 * MIB
    assert free_after == free


def _resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def _until(holds: Callable[[], bool]) -> None:
    """What a process had on a device is given back a moment after its end."""
    for _ in range(50):
        if holds():
            return
        time.sleep(0.1)
    pytest.fail("the device's memory is not given back")
