"""A small checkpoint, packages of it, and the command line as a user meets it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lingc import cli
from lingc.build import build
from lingc.capture import Capturer, Sizes
from lingc.checkpoint import SyntheticCheckpoint, write_checkpoint
from lingc.compile import Request
from lingc.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
LING_TINY = ROOT / "artifacts" / "checkpoints" / "ling-tiny"

# Linear attention at 0 and 2, MLA at 1 and 3, the MTP layer is 4; experts everywhere.
SMALL: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_group_size": 2,
    "head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "intermediate_size": 96,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}

WORDS = (sys.executable, "-c", "import sys; from lingc.cli import main; sys.exit(main())")
"""How a subprocess calls `lingc`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Lingc = Callable[..., Answer]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small spend more time handing work to a second thread than doing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path_factory.mktemp("cache")))


def environment(**changes: str) -> dict[str, str]:
    """Of a subprocess: this one's, one thread, and lingc on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def run_lingc(*words: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run `lingc` in a process of its own."""
    return subprocess.run(
        [*WORDS, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(**changes),
    )


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="session")
def small_values() -> dict[str, Any]:
    return {**json.loads((LING_TINY / "config.json").read_text()), **SMALL}


def small_checkpoint(values: Mapping[str, Any], path: Path, *, seed: int = 1, layout: str) -> Path:
    """Written in several shards."""
    source = SyntheticCheckpoint(ModelConfig.from_dict(values), seed)
    return write_checkpoint(source, path, layout=layout, shard_bytes=60_000)


@pytest.fixture(scope="session")
def small(small_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint; not to be written to."""
    return small_checkpoint(small_values, tmp_path_factory.mktemp("bf16") / "small", layout="bf16")


@pytest.fixture(scope="session")
def small_fp8(small_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with FP8 blocks; not to be written to."""
    return small_checkpoint(small_values, tmp_path_factory.mktemp("fp8") / "small", layout="fp8")


@pytest.fixture(scope="session")
def other(small_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same config with other weights; not to be written to."""
    path = tmp_path_factory.mktemp("other") / "other"
    return small_checkpoint(small_values, path, seed=2, layout="bf16")


@pytest.fixture(scope="session")
def wider(small_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another config; not to be written to."""
    path = tmp_path_factory.mktemp("wider") / "wider"
    return small_checkpoint({**small_values, "intermediate_size": 128}, path, layout="bf16")


@pytest.fixture
def checkpoint(small: Path, tmp_path: Path) -> Path:
    """A BF16 checkpoint to damage."""
    return Path(shutil.copytree(small, tmp_path / "checkpoint"))


@pytest.fixture
def checkpoint_fp8(small_fp8: Path, tmp_path: Path) -> Path:
    """An FP8 checkpoint to damage."""
    return Path(shutil.copytree(small_fp8, tmp_path / "checkpoint-fp8"))


# --------------------------------------------------------------------------------------- packages


@pytest.fixture(scope="session")
def capturer(small_values: dict[str, Any]) -> Capturer:
    """Captures the small model once for all builds."""
    return Capturer(ModelConfig.from_dict(small_values), Sizes())


@pytest.fixture
def captured(capturer: Capturer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of the small model from the command line take no time for capture."""

    def make(config: ModelConfig, sizes: Sizes) -> Capturer:
        assert (config, sizes) == (capturer.config, capturer.sizes)
        return capturer

    monkeypatch.setattr("lingc.compile.Capturer", make)


@pytest.fixture(scope="session")
def built(small: Path, capturer: Capturer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with weights; not to be written to."""
    path = tmp_path_factory.mktemp("built") / "small.ling"
    build(small, path, Request(), capturer=capturer)
    return path


@pytest.fixture(scope="session")
def built_external(
    small: Path, capturer: Capturer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A package without weights; not to be written to."""
    path = tmp_path_factory.mktemp("built") / "external.ling"
    build(small, path, Request(weights="external"), capturer=capturer)
    return path


@pytest.fixture(scope="session")
def built_for_config(
    small: Path, capturer: Capturer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A package that takes any weights of the small config; not to be written to."""
    path = tmp_path_factory.mktemp("built") / "config.ling"
    build(small / "config.json", path, Request(weights="external"), capturer=capturer)
    return path


@pytest.fixture
def package(built: Path, tmp_path: Path) -> Path:
    """A package to damage."""
    return Path(shutil.copytree(built, tmp_path / "package.ling"))


@pytest.fixture
def package_external(built_external: Path, tmp_path: Path) -> Path:
    """A package without weights to damage."""
    return Path(shutil.copytree(built_external, tmp_path / "external.ling"))


# ----------------------------------------------------------------------------------- command line


@pytest.fixture
def lingc(capsys: pytest.CaptureFixture[str]) -> Lingc:
    """`lingc("build", path, ...)`: the command in this process."""

    def call(*words: object) -> Answer:
        capsys.readouterr()
        code = cli.main([*map(str, words)])
        said = capsys.readouterr()
        return Answer(code=code, out=said.out, err=said.err)

    return call


Refuses = Callable[..., str]


@pytest.fixture
def refuses(lingc: Lingc, tmp_path: Path) -> Refuses:
    """`refuses(code, *words)`: what a command says that ends with `code` and writes nothing."""

    def call(code: int, *words: object) -> str:
        before = listing(tmp_path)

        answer = lingc(*words)

        assert answer.code == code, answer.err
        assert answer.out == ""
        assert "Traceback" not in answer.err
        assert "internal error" not in answer.err
        assert listing(tmp_path) == before
        return answer.err

    return call


def listing(directory: Path) -> dict[str, int]:
    """Everything below a directory, hidden files too, with sizes."""
    return {
        path.relative_to(directory).as_posix(): path.lstat().st_size if path.is_file() else -1
        for path in directory.rglob("*")
    }
