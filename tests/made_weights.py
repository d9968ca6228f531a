"""A small made-up checkpoint, and weights of plans that are made of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lingc.checkpoint import SyntheticCheckpoint
from lingc.checkpoint.source import Source
from lingc.model.config import ModelConfig
from lingc.plan import TensorType, WeightSpec
from lingc.quantize.stored import fp8_specs, int4_specs
from lingc.weights import CheckpointWeights

Array = NDArray[Any]

LING_TINY = Path(__file__).parents[1] / "artifacts/checkpoints/ling-tiny"
RAW = ModelConfig.from_file(LING_TINY).raw

# hidden 136 is no multiple of a block or a nibble group, 200 ends in a partial block, 44 is short.
HEADS = ("num_attention_heads", "num_key_value_heads", "num_kv_heads_for_linear_attn")
WIDTHS = ("moe_intermediate_size", "moe_shared_expert_intermediate_size")
SMALL = {
    **dict.fromkeys(HEADS, 3),
    **dict.fromkeys(WIDTHS, 44),
    "hidden_size": 136,
    "num_hidden_layers": 3,
    "layer_group_size": 2,
    "head_dim": 12,
    "group_norm_size": 3,
    "intermediate_size": 200,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
CONFIG = ModelConfig.from_dict({**RAW, **SMALL})
# Every width a multiple of 128.
WIDE = ModelConfig.from_dict({**RAW, "num_hidden_layers": 4})

DENSE = "model.layers.0.attention.dense.weight"
GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
EXPERT_GATE_UP = tuple(
    f"model.layers.1.mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up")
)
DOWN = ("model.layers.1.mlp.experts.{e}.down_proj.weight",)
KV_B = "model.layers.1.attention.kv_b_proj.weight"


def plain_spec(dtype: str, shape: Sequence[int], *sources: str, **changes: Any) -> WeightSpec:
    return WeightSpec(name="w", type=TensorType(dtype, tuple(shape)), sources=sources, **changes)


def fp8_pair(rows: int, columns: int, *sources: str, experts: int = 0) -> tuple[WeightSpec, ...]:
    """Codes and scales; `rows` is that of all sources together."""
    shape = (experts, rows, columns) if experts else (rows, columns)
    return fp8_specs(plain_spec("bf16", shape, *sources, experts=experts))


def int4_pair(
    rows: int, columns: int, group: int, *sources: str, experts: int = 0
) -> tuple[WeightSpec, ...]:
    shape = (experts, rows, columns) if experts else (rows, columns)
    return int4_specs(plain_spec("bf16", shape, *sources, experts=experts), group)


def make_all(specs: Sequence[WeightSpec], source: Source) -> list[Array]:
    weights = CheckpointWeights(specs, source, source.config)
    return [weights[spec.name] for spec in specs]


def checkpoint(layout: str = "bf16", config: ModelConfig = CONFIG) -> SyntheticCheckpoint:
    return SyntheticCheckpoint(config, 1, layout)


class Counting:
    """A source that counts how often each tensor is read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.reads: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.source, name)
        if name not in ("dense", "plain", "quantized"):
            return value

        def read(tensor: str) -> Any:
            self.reads.append(tensor)
            return value(tensor)

        return read


def some_of_each() -> list[WeightSpec]:
    """A weight of every kind, with odd sizes."""
    fp8 = fp8_pair(88, 136, *EXPERT_GATE_UP, experts=4)
    int4 = int4_pair(136, 44, 32, *DOWN, experts=4)
    return [
        *(replace(spec, name=f"experts.{spec.name}") for spec in fp8),
        *(replace(spec, name=f"down.{spec.name}") for spec in int4),
        replace(plain_spec("bf16", (136,), "model.norm.weight"), name="norm"),
        replace(plain_spec("f32", (3,), format="decay", layer=0), name="decay"),
        replace(plain_spec("bf16", (136, 36), DENSE), name="dense"),
        replace(plain_spec("f32", (400, 136), GATE, UP, layout="interleaved"), name="gate_up"),
    ]
