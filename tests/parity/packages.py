"""A small checkpoint and an engine of it, made once a process."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from lingc.build import build
from lingc.checkpoint import SyntheticCheckpoint, write_checkpoint
from lingc.compile import Request
from tests.programs import config

ROWS = [[(7 * t + 3 * i) % 96 for t in range(24 + 7 * i)] for i in range(3)]


@cache
def _folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="lingc-test-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def checkpoint(seed: int = 1) -> Path:
    """BF16, with an MTP layer and no tokenizer."""
    source = SyntheticCheckpoint(config("tiny"), seed)
    return write_checkpoint(source, _folder() / f"checkpoint-{seed}")


@cache
def engine() -> Path:
    """Its engine for a CPU, experts in INT4."""
    torch.set_num_threads(1)
    path = _folder() / "small.ling"
    build(checkpoint(), path, Request(precision="int4"))
    return path
