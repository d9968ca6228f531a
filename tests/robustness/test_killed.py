"""Whenever a build ends, what is under its name is whole, and nothing hinders the next."""

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lingc.engine import verify
from tests.robustness.conftest import environment, run_lingc

# Captures once; then, for each line of stdin, a child that does what the line says is killed in it:
# {"verb": "build" or "bind", "output": path, "overwrite": bool, "after": share of a whole run, or
# null to let it be}.
FORKING = """
import json, os, signal, sys, time
from pathlib import Path
from lingc.build import build
from lingc.capture import Capturer, Sizes
from lingc.compile import Request
from lingc.engine import open_package
from lingc.engine.bind import bind
from lingc.model.config import ModelConfig

source, spare = map(Path, sys.argv[1:3])
capturer = Capturer(ModelConfig.from_file(source), Sizes())

def act(verb, output, *, overwrite):
    if verb == "build":
        build(source, Path(output), Request(), overwrite=overwrite, capturer=capturer)
    else:
        bind(open_package(spare / "external.ling"), source, cache_dir=Path(output))

build(source, spare / "external.ling", Request(weights="external"), capturer=capturer)
needed = {}
for verb in ("build", "bind"):
    for number in range(2):
        start = time.perf_counter()
        act(verb, spare / f"{verb}-{number}", overwrite=False)
        needed[verb] = time.perf_counter() - start
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        act(asked["verb"], asked["output"], overwrite=asked["overwrite"])
        os._exit(0)
    if asked["after"] is not None:
        time.sleep(asked["after"] * needed[asked["verb"]])
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Victim:
    """A process whose children build or bind, and are killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def kill(self, verb: str, output: Path, *, after: float | None, overwrite: bool = False) -> int:
        asked = {"verb": verb, "output": str(output), "after": after, "overwrite": overwrite}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def victim(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    command = (sys.executable, "-c", FORKING, str(small), str(tmp_path_factory.mktemp("spare")))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Victim(process)
        process.kill()


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def moments(count: int) -> list[float]:
    """Shares of a whole run, one in each of as many parts, and a little beyond."""
    draw = random.Random(count)  # noqa: S311 a seeded choice of moments
    return [(number + draw.random()) / count * 1.1 for number in range(count)]


def test_a_killed_build_leaves_a_whole_package_or_none(victim: Victim, tmp_path: Path) -> None:
    target = tmp_path / "x.ling"

    codes = []
    for after in moments(8):
        codes.append(victim.kill("build", target, after=after))
        if target.exists():
            assert verify(target).exit_code == 0
            target.rename(tmp_path / f"{len(codes)}.ling")

    assert -signal.SIGKILL in codes
    assert victim.kill("build", target, after=None) == 0
    assert verify(target).exit_code == 0
    assert all(re.fullmatch(r"[\dx]\.ling", name) for name in names(tmp_path))


def test_a_build_killed_while_replacing_leaves_the_old_or_the_new(
    victim: Victim, built: Path, tmp_path: Path
) -> None:
    target = tmp_path / "x.ling"
    assert victim.kill("build", target, after=None) == 0
    assert verify(target).exit_code == 0

    for after in moments(8):
        victim.kill("build", target, after=after, overwrite=True)
        assert verify(target).exit_code == 0

    assert victim.kill("build", target, after=None, overwrite=True) == 0
    assert verify(target).bundle_id == verify(built).bundle_id
    assert names(tmp_path) == ["x.ling"]


def test_a_killed_binding_leaves_whole_weights_or_none(
    victim: Victim, built_external: Path, tmp_path: Path
) -> None:
    for after in moments(8):
        victim.kill("bind", tmp_path, after=after)
        assert verify(built_external, cache_dir=tmp_path).exit_code == 0

    assert victim.kill("bind", tmp_path, after=None) == 0
    report = verify(built_external, cache_dir=tmp_path)
    assert [c.verdict for c in report.checks if c.id == "bound-weights"] == ["ok"]
    assert len(names(tmp_path / "weights")) == 1


@pytest.mark.long
def test_thirty_builds_killed_from_the_command_line_leave_whole_packages(
    small: Path, tmp_path: Path
) -> None:
    started = time.perf_counter()
    assert run_lingc("build", small, "-o", tmp_path / "whole.ling").returncode == 0
    whole_s = time.perf_counter() - started
    target = tmp_path / "x.ling"

    for number, after in enumerate(moments(30)):
        words = [] if number % 3 else ["--weights", "external"]
        with building(small, target, *words, errors=subprocess.DEVNULL) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(after * whole_s)
            process.kill()
        if target.exists():
            assert verify(target).exit_code == 0
            target.rename(tmp_path / f"{number}.ling")

    finished = run_lingc("build", small, "-o", target)
    assert finished.returncode == 0, finished.stderr
    assert verify(target).exit_code == 0
    assert all(name.endswith(".ling") and name[0] != "." for name in names(tmp_path))


# ------------------------------------------------------------------------------------- interrupts

# A shell starts what it puts into the background deaf to Ctrl-C, and the tests with it.
LISTEN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lingc.cli import main
sys.exit(main())
"""


@contextlib.contextmanager
def building(
    checkpoint: Path, output: Path, *words: str, errors: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    command = (
        sys.executable,
        "-c",
        LISTEN,
        "build",
        str(checkpoint),
        "-o",
        str(output),
        "--progress",
        "events",
        *words,
    )
    with subprocess.Popen(command, stderr=errors, text=True, env=environment()) as process:
        yield process


def wait_for(process: subprocess.Popen[str], stage: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if json.loads(line)["stage"] == stage:
            return
    raise AssertionError(f"the build ended before it came to {stage!r}")


def assert_interrupted(process: subprocess.Popen[str], output: Path) -> None:
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait() == 75, said
    assert "Traceback" not in said
    assert re.search(
        rf"lingc build: interrupted \(LINGC-E7500\)\nhint: to go on: lingc build .*{output.name}",
        said,
    )
    assert list(output.parent.iterdir()) == []


def test_an_interrupted_build_leaves_nothing_and_says_how_to_go_on(
    small: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / name / "x.ling" for name in ("c", "term")]
    with building(small, outputs[0]) as first, building(small, outputs[1]) as second:
        for process, number in ((first, signal.SIGINT), (second, signal.SIGTERM)):
            wait_for(process, "capture and fuse")
            process.send_signal(number)

        assert_interrupted(first, outputs[0])
        assert_interrupted(second, outputs[1])


@pytest.mark.long
@pytest.mark.parametrize("stage", ["lower to ONNX", "pack weights", "record test vectors"])
def test_a_build_interrupted_in_any_stage_leaves_nothing(
    stage: str, small: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "x.ling"
    with building(small, output) as process:
        wait_for(process, stage)
        process.send_signal(signal.SIGTERM)

        assert_interrupted(process, output)


@pytest.mark.long
def test_builds_interrupted_at_random_moments_leave_nothing_or_a_package(
    small: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "x.ling"
    for after_s in (0.4, 0.9, 1.6, 2.5, 3.5, 4.5, 6.0):
        with building(small, output) as process:
            time.sleep(after_s)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
        if process.returncode == 0:
            assert verify(output).exit_code == 0
            break
        assert process.returncode == 75, said
        assert "Traceback" not in said
        assert not output.parent.exists() or list(output.parent.iterdir()) == []
