"""What a package or a checkpoint is, as one document of plain values."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingc.checkpoint.directory import scan
from lingc.checkpoint.reader import open_checkpoint
from lingc.checkpoint.tensorfile import Stored
from lingc.engine.reading import read_manifest
from lingc.model.config import ModelConfig

_NUMBER = re.compile(r"(?<=\.)(layers|experts)\.\d+(?=\.)")
_LETTER = {"layers": "layers.{l}", "experts": "experts.{e}"}
_LAYOUTS = {"fp8_block": "fp8", "fp8_tensor": "fp8 with one scale", "int4_group": "int4"}


def describe_package(path: str | Path) -> dict[str, Any]:
    """The manifest and what follows from it; reads nothing else.

    Raises:
        InputError: There is no package at `path`.
        IntegrityError: The manifest is not what was written.
        IncompatibleError: It is of a newer format.
    """
    manifest = read_manifest(path)
    return {
        "kind": "package",
        "path": str(path),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "manifest": dict(manifest.value),
    }


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """The config and the headers of a checkpoint directory, or the config alone.

    Raises:
        ConfigError: The config is broken.
        CheckpointError: The tensors are; every fault is listed.
    """
    config = ModelConfig.from_file(path)
    document: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(path),
        "layout": None,
        "identity": None,
        "parameters": None,
        "bytes": 0,
        "config": _config_facts(config),
        "tensors": [],
    }
    if not any(path.glob("*.safetensors*")):
        return document
    checkpoint = open_checkpoint(path)
    stored = scan(path).tensors
    kinds = {checkpoint.kind(name) for name in checkpoint.names} - {"plain"}
    return {
        **document,
        "layout": " and ".join(sorted(_LAYOUTS[kind] for kind in kinds)) or "bf16",
        "identity": checkpoint.identity(),
        "parameters": sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names),
        "bytes": sum(tensor.length_bytes for tensor in stored.values()),
        "tensors": _alike(stored),
    }


def _config_facts(config: ModelConfig) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "linear attention layers": len(config.linear_layers),
        "MLA layers": list(config.mla_layers),
        "dense layers": config.first_k_dense_replace,
        "MTP layers": config.num_nextn_predict_layers,
        "hidden size": config.hidden_size,
        "heads": config.num_attention_heads,
        "head dim": config.head_dim,
        "latent dim": config.latent_dim,
        "experts": config.num_experts,
        "experts a token": config.num_experts_per_tok,
        "expert width": config.moe_intermediate_size,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
    }


def _alike(stored: Mapping[str, Stored]) -> list[dict[str, Any]]:
    """Tensors that differ in layer and expert alone, as one entry."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, tensor in stored.items():
        pattern = _NUMBER.sub(lambda found: _LETTER[found[1]], name)
        groups.setdefault((pattern, tensor.dtype, tensor.shape), []).append(tensor.length_bytes)
    return [
        {"name": name, "dtype": dtype, "shape": list(shape), "count": len(each), "bytes": sum(each)}
        for (name, dtype, shape), each in sorted(groups.items())
    ]
