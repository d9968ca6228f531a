"""The checkpoint of the odd golden outputs, made again as it was made the first time.

Its weights are draws of a seeded generator, so a seed and an order stand for seven megabytes.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lingc.checkpoint import expected_tensors
from lingc.model.config import ModelConfig

SEED = 102

TENSORS_SHA256 = "ca2c4b54c9750d809b7bf54285b3845e1f1df0038182d7a989d0e39aee75c51d"
"""Of every tensor's name and bytes, in the order of drawing."""

_SECOND_FILE_FROM = "model.layers.3.mlp.experts.8.up_proj.weight"


def write_odd(config_dir: Path, folder: Path) -> Path:
    """Write the checkpoint whose config lies in `config_dir`.

    Raises:
        AssertionError: NumPy draws other numbers than it did.
    """
    shutil.copytree(config_dir, folder)
    tensors = dict(_draw(ModelConfig.from_file(folder)))
    assert _sha256(tensors) == TENSORS_SHA256, (
        f"numpy {np.__version__} draws other numbers from seed {SEED} than the golden outputs are "
        f"of; use an older one, or keep the tensors themselves"
    )
    files: dict[str, dict[str, Tensor]] = {}
    file = "model-00001-of-00002.safetensors"
    for name, tensor in tensors.items():
        if name == _SECOND_FILE_FROM:
            file = "model-00002-of-00002.safetensors"
        elif name.startswith("model.layers.7."):
            file = "model-mtp-layer.safetensors"
        files.setdefault(file, {})[name] = tensor
    for file, held in files.items():
        save_file(held, folder / file, {"format": "pt"})
    places = {name: file for file, held in files.items() for name in held}
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def _draw(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    generator = np.random.default_rng(SEED)
    shapes = expected_tensors(config)
    for name in sorted(shapes, key=_turn):
        shape = shapes[name]
        values = generator.standard_normal(shape)
        if name.endswith(".expert_bias"):
            yield name, torch.from_numpy((values * 0.1).astype(np.float32))
            continue
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif name != "model.word_embeddings.weight":
            values *= shape[1] ** -0.5
        yield name, torch.from_numpy(values.astype(np.float32)).bfloat16()


def _turn(name: str) -> int:
    """As in the model, but what enters the MTP layer comes before what is in it."""
    if not name.startswith("model.layers.7."):
        return 0
    return 1 if name.split(".")[3] in ("enorm", "hnorm", "eh_proj") else 2


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
