"""Large checkpoints: memory is bounded by a few matrices, and time by reading and rounding.

The long form is the full-size model's widths, vocabulary included, in 12 GB; the short form is the
same walk over 0.3 GB.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lingc.checkpoint import SyntheticCheckpoint, write_checkpoint
from lingc.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
FULL = ROOT / "artifacts/checkpoints/ling-2.6-flash"

LARGE = {"num_hidden_layers": 3, "layer_group_size": 3, "num_experts": 192}
SHORT = {
    "hidden_size": 1024, "num_hidden_layers": 3, "layer_group_size": 3, "num_experts": 16,
    "vocab_size": 16384, "intermediate_size": 2048, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "num_attention_heads": 8, "num_key_value_heads": 8,
    "num_kv_heads_for_linear_attn": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """How a command went."""

    seconds: float
    cpu_seconds: float
    peak_anonymous_bytes: int


def run(*words: object) -> Run:
    """Run lingc in a process of its own, and watch its anonymous memory."""
    command = [sys.executable, "-m", "lingc", *map(str, words), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    started, before = time.monotonic(), os.times()
    peak = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(0.005)
    assert process.returncode == 0
    after = os.times()
    return Run(
        seconds=time.monotonic() - started,
        cpu_seconds=sum(after[2:4]) - sum(before[2:4]),  # of children that have ended
        peak_anonymous_bytes=peak,
    )


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(next(lines, "RssAnon: 0 kB").split()[1])


def written(folder: Path, changes: Mapping[str, object]) -> tuple[Path, int]:
    """A checkpoint of the full-size config with changes, and how many bytes it has."""
    raw = {**ModelConfig.from_file(FULL).raw, "num_nextn_predict_layers": 0, **changes}
    path = write_checkpoint(SyntheticCheckpoint(ModelConfig.from_dict(raw), 1), folder / "large")
    return path, sum(file.stat().st_size for file in path.glob("*.safetensors"))


def tell(what: str, size_bytes: int, done: Run) -> None:
    """A line for whoever runs this with `-s`."""
    print(  # noqa: T201 figures for the documentation
        f"{what}: {size_bytes / 1e9:.2f} GB in {done.seconds:.1f} s, "
        f"{size_bytes / done.seconds / 1e6:.0f} MB/s, {done.cpu_seconds:.1f} s of CPU, "
        f"{done.peak_anonymous_bytes / 1e6:.0f} MB of anonymous memory"
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to watch memory")
def test_quantizing_holds_a_few_matrices_and_not_the_model(tmp_path: Path) -> None:
    path, size_bytes = written(tmp_path, SHORT)
    assert size_bytes > 250e6

    for recipe in ("fp8", "int4-all"):
        done = run("quantize", path, "--recipe", recipe, "-o", tmp_path / recipe)

        tell(recipe, size_bytes, done)
        assert done.peak_anonymous_bytes < 100e6  # half of which is Python and its libraries


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A checkpoint of 12.9 GB, dropped when the tests of it are over, and how many bytes it has."""
    folder = tmp_path_factory.mktemp("large")
    yield written(folder, LARGE)
    shutil.rmtree(folder)


@pytest.mark.long
def test_twelve_gigabytes_are_quantized_quickly_in_three(
    large: tuple[Path, int], tmp_path: Path
) -> None:
    path, size_bytes = large
    assert size_bytes > 12e9

    for recipe in ("fp8", "int4", "int4-all"):
        done = run("quantize", path, "--recipe", recipe, "-o", tmp_path / recipe)
        shutil.rmtree(tmp_path / recipe)

        tell(recipe, size_bytes, done)
        assert done.peak_anonymous_bytes < 3e9
        # By time of CPU, which does not hang on what else runs.
        assert size_bytes / (done.cpu_seconds / 2) > 250e6


@pytest.mark.long
def test_twelve_gigabytes_are_calibrated_in_three(large: tuple[Path, int], tmp_path: Path) -> None:
    """By searched scales, all of the way; GPTQ takes hours here, its memory is told elsewhere."""
    path, size_bytes = large
    rows = tmp_path / "rows.jsonl"
    ids = [[(7 * i + 13 * j + i * j * j) % 157_000 for j in range(128)] for i in range(4)]
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))

    options = ("--int4", "search", "--fallback-below", 64)
    done = run(
        "calibrate", path, "--data", rows, "--recipe", "int4-all", *options,
        "--min-tokens-per-expert", 0, "-o", tmp_path / "c",
    )  # fmt: skip

    tell("calibrate", size_bytes, done)
    assert done.peak_anonymous_bytes < 3e9
