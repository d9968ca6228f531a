"""Small checkpoints, and a way to damage them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from lingc.checkpoint import SyntheticCheckpoint, write_checkpoint
from lingc.checkpoint.tensorfile import Maps, TensorWriter, read_header
from lingc.model.config import ModelConfig

LING_TINY = Path(__file__).parents[2] / "artifacts/checkpoints/ling-tiny"

# No width is a multiple of what it is cut by: partial blocks, short groups, padded nibbles. MLA at
# layers 1 and 2 (a short last group), dense at 0, the MTP layer is 3.
SMALL: Mapping[str, Any] = {
    "hidden_size": 136,
    "num_hidden_layers": 3,
    "layer_group_size": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_kv_heads_for_linear_attn": 3,
    "head_dim": 12,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "intermediate_size": 200,
    "moe_intermediate_size": 44,
    "moe_shared_expert_intermediate_size": 44,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "vocab_size": 64,
    "group_norm_size": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

Change = tuple[str, NDArray[Any]] | None  # dtype and values, or None to remove
Edit = Callable[[Path, Mapping[str, Change]], None]


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    raw = ModelConfig.from_file(LING_TINY).raw
    return ModelConfig.from_dict({**raw, **SMALL})


@pytest.fixture
def written(small: ModelConfig, tmp_path: Path) -> Callable[..., Path]:
    """`written(layout, ...)`: a small checkpoint on the disk."""

    def write(layout: str = "bf16", *, index_mtp: bool = True, keep_mtp: bool = True) -> Path:
        return write_checkpoint(
            SyntheticCheckpoint(small, 1),
            tmp_path / layout,
            layout=layout,
            shard_bytes=100_000,
            index_mtp=index_mtp,
            keep_mtp=keep_mtp,
        )

    return write


@pytest.fixture
def edit() -> Edit:
    """`edit(file, changes)`: write a safetensors file anew with tensors changed."""

    def rewrite(path: Path, changes: Mapping[str, Change]) -> None:
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

    return rewrite
