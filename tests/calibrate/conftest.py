"""A small checkpoint, rows of tokens for it, and one thread."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lingc.calibrate.run import Settings, calibrate
from lingc.calibrate.samples import Samples, Share, read_samples
from lingc.checkpoint import Checkpoint, SyntheticCheckpoint, open_checkpoint, write_checkpoint
from lingc.model.config import ModelConfig
from lingc.quantize.recipes import load_recipe

LING_TINY = Path(__file__).parents[2] / "artifacts/checkpoints/ling-tiny"

# No width is a multiple of a group or a block. MLA at layer 1 with a query latent, dense at 0, MTP.
SMALL: dict[str, Any] = {
    "hidden_size": 72, "num_hidden_layers": 3, "layer_group_size": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_kv_heads_for_linear_attn": 2, "head_dim": 20,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
    "v_head_dim": 14, "intermediate_size": 88, "moe_intermediate_size": 44,
    "moe_shared_expert_intermediate_size": 44, "num_experts": 8, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "vocab_size": 64, "group_norm_size": 2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig.from_dict({**ModelConfig.from_file(LING_TINY).raw, **SMALL})


@pytest.fixture(scope="session")
def small(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("small") / "small"
    return open_checkpoint(write_checkpoint(SyntheticCheckpoint(config, 1), path))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of tokens, of 1 to 40."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", count=12)


def write_rows(path: Path, *, count: int, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    lengths = [1, 40, *draw.integers(2, 40, count - 2).tolist()]
    lines = [json.dumps({"input_ids": draw.integers(0, 64, n).tolist()}) for n in lengths]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path, *, count: int | None = None, seed: int = 0) -> Samples:
    share = Share(path=path)
    return read_samples([share], vocab=64, tokenizer=None, count=count, max_tokens=64, seed=seed)


def content(folder: Path) -> Mapping[str, bytes]:
    """The files of a directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def brisk() -> Iterator[None]:
    """Move coupled codes once: what is made is made in the same order, in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lingc.calibrate.matrices._COUPLED_ROUNDS", 1)
        patch.setattr("lingc.calibrate.matrices._REFITS", 0)
        yield


Run = Callable[..., Path]


@pytest.fixture(scope="session")
def finished(
    small: Checkpoint, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`finished(recipe)`: a calibration by the usual settings, made once."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("finished")

    def run(name: str) -> Path:
        if name not in made:
            settings = Settings(fallback_below=2)
            recipe = load_recipe(name)
            with brisk():
                made[name] = calibrate(small, recipe, read(rows), folder / name, settings).path
        return made[name]

    return run


def killed(work: Callable[[], object], when: Callable[[], bool]) -> int:
    """Do something in a child, kill it as soon as something holds, and say how it ended."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)  # whatever it raised, a second pytest must not go on from here
    while not when():
        if os.waitpid(child, os.WNOHANG)[0]:
            return 0
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
