"""What every test shares: fixed seeds, the gpu mark, golden files."""

import difflib
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Workers share the cores; torch and ONNX Runtime would each take all of them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.settings.register_profile("lingc", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lingc")

GOLDEN = Path(__file__).parent / "golden"
DRIVER = Path("/proc/driver/nvidia/version")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lingc")
    group.addoption(
        "--require",
        default="",
        metavar="MARKS",
        help="comma-separated marks (gpu) whose tests must run: not being able to is a failure",
    )
    group.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden/ with what the code says now; review reads the difference",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts a job in the background has it ignore Ctrl-C, and so would every command
    # that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    unknown = set(filter(None, config.getoption("--require").split(","))) - {"gpu"}
    if unknown:
        raise pytest.UsageError(f"--require knows the mark gpu, not {', '.join(sorted(unknown))}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or DRIVER.exists():
        return
    reason = f"needs an NVIDIA GPU, and there is no driver ({DRIVER})"
    if "gpu" in item.config.getoption("--require").split(","):
        pytest.fail(f"--require gpu: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """What a command makes of lingc's log, `-q` say, is gone when its test is over."""
    logger = logging.getLogger("lingc")
    level, handlers, goes_on = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
    logger.propagate = goes_on


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: `text` is what `tests/golden/<name>` says."""
    is_update = bool(request.config.getoption("--update-golden"))

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if is_update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"there is no {path}; make it with --update-golden, and read it")
        want = path.read_text(encoding="utf-8")
        if text != want:
            lines = difflib.unified_diff(
                want.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="", n=2
            )
            shown = "\n".join([*lines][:120])
            pytest.fail(f"{shown}\nif this is meant: pytest --update-golden", pytrace=False)

    return check
