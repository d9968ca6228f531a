"""Ways to damage a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lingc.checkpoint.tensorfile import Maps, TensorWriter, read_header

INDEX = "model.safetensors.index.json"

Change = tuple[str, NDArray[Any]] | None
"""A tensor's dtype and values, or None to take it away."""


def shard(checkpoint: Path) -> Path:
    """A file of the main model, neither the first nor the last."""
    return sorted(checkpoint.glob("model-0*.safetensors"))[2]


def shard_of(checkpoint: Path, tensor: str) -> Path:
    """The file that the index names for a tensor."""
    listed = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    return checkpoint / str(listed[tensor])


def edit_tensors(path: Path, changes: Mapping[str, Change]) -> None:
    """Write a safetensors file anew with tensors changed."""
    maps = Maps()
    tensors = {name: (t.dtype, maps.read(t).copy()) for name, t in read_header(path).items()}
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change
    path.unlink()
    with TensorWriter(path, {n: (d, v.shape) for n, (d, v) in tensors.items()}) as writer:
        for name, (_, values) in tensors.items():
            writer.write(name, values)
        writer.finish()


def edit_config(checkpoint: Path, **changes: object) -> None:
    """Set keys of `config.json`."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
