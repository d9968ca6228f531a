"""What `config.json` says: read once, checked whole, and what follows from it.

Needs no torch, so that planning and inspection can read a config anywhere.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.errors import ConfigError
from lingc.model.config_rules import NUMBERS, problems, yarn

ARCHITECTURE = "BailingMoeV2_5ForCausalLM"
"""The one architecture; `model_type` is shared with another model and decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The architecture of one model; fields are the keys of `config.json`.

    Attributes:
        group_norm_size: How many groups the norm after linear attention has (a count, whatever
            the key's name says).
        q_lora_rank: None where MLA queries come from one matrix.
        rope_scaling: The YaRN entries, or None for plain RoPE.
        eos_token_id: As in the file: one id, several, or none.
        quantization: The file's `quantization_config`, as read.
        raw: The file without `quantization_config`.
    """

    hidden_size: int
    num_hidden_layers: int
    layer_group_size: int
    num_attention_heads: int
    head_dim: int
    partial_rotary_factor: float
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    max_position_embeddings: int
    intermediate_size: int
    first_k_dense_replace: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    num_shared_experts: int
    routed_scaling_factor: float
    norm_topk_prob: bool = True
    vocab_size: int
    rms_norm_eps: float
    group_norm_size: int
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    quantization: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    raw: Mapping[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config.json") -> "ModelConfig":
        """Read the values of a `config.json`.

        Args:
            values: The parsed file.
            source: What the message calls the values.

        Raises:
            ConfigError: Every missing key, wrong type and contradiction, all in one message.
        """
        found = problems(values, ARCHITECTURE)
        if found:
            listed = "".join(f"\n  - {line}" for line in found)
            count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
            raise ConfigError(
                f"{source!r} has {count}:{listed}",
                hint="compare with the config.json that the checkpoint was published with",
            )
        taken = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in NUMBERS:
            taken[name] = float(taken[name])
        taken["rope_scaling"] = yarn(values)
        if taken["num_shared_experts"] == 0:
            taken["moe_shared_expert_intermediate_size"] = 0
        if isinstance(taken.get("eos_token_id"), list):
            taken["eos_token_id"] = tuple(taken["eos_token_id"])
        taken["quantization"] = values.get("quantization_config")
        taken["raw"] = {k: v for k, v in values.items() if k != "quantization_config"}
        return cls(**taken)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read a `config.json`, or the one in a directory.

        Raises:
            ConfigError: No such file, not JSON, or not a config of this architecture.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{str(file)!r} cannot be read: {error.strerror or error}",
                hint="give a checkpoint directory with a config.json in it",
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{str(file)!r} is not JSON: {error}",
                hint="fetch the config.json that the checkpoint was published with",
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"{str(file)!r} holds a {type(values).__name__}, not an object")
        return cls.from_dict(values, source=str(file))

    # ------------------------------------------------------------------ layers

    def is_mla(self, layer: int) -> bool:
        """Whether a layer has softmax attention: the last of each group, and a short last group."""
        whole = self.num_hidden_layers // self.layer_group_size * self.layer_group_size
        return (layer + 1) % self.layer_group_size == 0 or layer >= whole

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a plain MLP in place of experts."""
        return layer < self.first_k_dense_replace

    @property
    def mla_layers(self) -> tuple[int, ...]:
        """Main layers with MLA; the MTP layer, also MLA, is not among them."""
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_mla(layer))

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Layers with linear attention."""
        return tuple(layer for layer in range(self.num_hidden_layers) if not self.is_mla(layer))

    @property
    def has_mtp(self) -> bool:
        """Whether the config names an MTP layer; a release may still ship no weights for it."""
        return self.num_nextn_predict_layers > 0

    @property
    def mtp_layer(self) -> int:
        """Index of the MTP layer: one past the main layers."""
        return self.num_hidden_layers

    # ------------------------------------------------------------------ widths

    @property
    def qk_head_dim(self) -> int:
        """Head dim of MLA queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """How many dims of a linear-attention head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def latent_dim(self) -> int:
        """Width of a row of the MLA cache: the normed latent, then the roped key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    # ------------------------------------------------------------------ scalars

    def decay(self, layer: int) -> NDArray[np.float64]:
        """Decay rates s of a linear layer's heads; a token multiplies the state by exp(-s).

        The depth factor takes the absolute layer index. The last layer is always MLA, so the
        rates are positive and the division is never by zero.
        """
        assert not self.is_mla(layer), f"layer {layer} is MLA and has no decay"
        depth = 1 - layer / (self.num_hidden_layers - 1) + 1e-5
        return slopes(self.num_attention_heads) * depth

    def inv_freq(self, dim: int) -> NDArray[np.float64]:
        """RoPE angles per position of the dim/2 pairs, YaRN included."""
        plain: NDArray[np.float64] = self.rope_theta ** (
            -np.arange(0, dim, 2, dtype=np.float64) / dim
        )
        if self.rope_scaling is None:
            return plain
        low, high = self._yarn_range(dim)
        # 0 below `low` (fast pairs, kept), 1 above `high` (slow pairs, stretched by the factor).
        ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
        stretched = plain / float(self.rope_scaling["factor"])
        return plain * (1 - ramp) + stretched * ramp

    def _yarn_range(self, dim: int) -> tuple[float, float]:
        assert self.rope_scaling is not None
        scaling = self.rope_scaling

        def pair(rotations: float) -> float:
            turns = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(self.rope_theta))

        low, high = pair(scaling["beta_fast"]), pair(scaling["beta_slow"])
        if scaling["truncate"]:
            low, high = float(math.floor(low)), float(math.ceil(high))
        low, high = max(low, 0.0), min(high, dim - 1.0)
        return low, high if high != low else high + 1e-3

    @property
    def rope_attention_factor(self) -> float:
        """Multiplier of every cosine and sine: 1, or YaRN's."""
        scaling = self.rope_scaling
        if scaling is None:
            return 1.0
        if scaling["attention_factor"] is not None:
            return float(scaling["attention_factor"])
        factor, mscale, all_dim = scaling["factor"], scaling["mscale"], scaling["mscale_all_dim"]
        if mscale and all_dim:
            return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
        return _yarn_mscale(factor, 1.0)

    @property
    def mla_scale(self) -> float:
        """Multiplier of MLA scores: 1/sqrt(qk_head_dim), and YaRN's only with `mscale_all_dim`."""
        scale = float(self.qk_head_dim**-0.5)
        if self.rope_scaling is not None and self.rope_scaling["mscale_all_dim"]:
            scaling = self.rope_scaling
            scale *= _yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        return scale


def slopes(heads: int) -> NDArray[np.float64]:
    """The ALiBi series of a head count, which need not be a power of two.

    >>> slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    >>> slopes(3)
    array([0.0625    , 0.00390625, 0.25      ])
    """
    power = 1 << (heads.bit_length() - 1)  # largest power of two in `heads`
    series = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    if heads == power:
        return series
    between = slopes(2 * power)[::2]
    return np.concatenate((series, between[: heads - power]))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
