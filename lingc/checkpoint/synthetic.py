"""A checkpoint of any config and size that is made up as it is read.

Each tensor comes from a generator seeded by the checkpoint's seed and the tensor's name, so the
full-size model can be streamed from nothing, in any order, and gives the same bytes each time.

Statistics keep activations sane: matrices have std fan_in^-0.5, the embedding 1, norm weights are
1 +- 0.1, and expert biases have std 0.1, so that they change which experts are chosen.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.checkpoint.convert import to_dense
from lingc.checkpoint.expected import expected_tensors
from lingc.errors import CheckpointError
from lingc.model.config import ModelConfig
from lingc.quantize.formats import (
    F32,
    FP8_BLOCK,
    U16,
    quantize_fp8_block,
    quantize_fp8_tensor,
    quantize_int4_group,
    round_bf16,
    widen_bf16,
)
from lingc.quantize.recipes import PLAIN, Format, load_recipe

_RUN = 1 << 16  # values made at a time; what they are made of stays in a core's cache


class SyntheticCheckpoint:
    """Made-up weights; reading is described by `lingc.checkpoint.source.Source`.

    Args:
        config: Of any size; the MTP layer's weights are there if it names one.
        seed: Tells checkpoints of one config apart.
        layout: Name of the recipe by which tensors are stored: `bf16`, `fp8`, `int4` or another.
    """

    def __init__(self, config: ModelConfig, seed: int, layout: str = "bf16") -> None:
        self._config = config
        self._seed = seed
        self._layout = layout
        self._recipe = load_recipe(layout)
        self._shapes = expected_tensors(config)

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self._config

    @property
    def names(self) -> tuple[str, ...]:
        """Logical names, in the order of the layers."""
        return tuple(self._shapes)

    @property
    def has_mtp(self) -> bool:
        """Whether the config names an MTP layer."""
        return self._config.has_mtp

    def kind(self, name: str) -> str:
        """`plain`, `fp8_block`, `fp8_tensor` or `int4_group`."""
        return self._format(name).kind

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as in an unquantized checkpoint."""
        if name not in self._shapes:
            raise CheckpointError(
                f"the synthetic checkpoint has no tensor {name!r}",
                hint="the plan was made for another config",
            )
        return self._shapes[name]

    def dense(self, name: str) -> F32:
        """The values, dequantized."""
        return to_dense(self, name)

    def plain(self, name: str) -> tuple[NDArray[Any], str]:
        """A plain tensor, and `bf16` (uint16 bits) or `f32`."""
        assert self.kind(name) == "plain", f"{name!r} is stored as {self.kind(name)}"
        bits = self._bits(name)
        return (widen_bf16(bits), "f32") if name.endswith(".expert_bias") else (bits, "bf16")

    def quantized(self, name: str) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Codes, scales and group of a quantized tensor."""
        chosen = self._format(name)
        assert chosen.kind != "plain", f"{name!r} is stored plain"
        if chosen.kind == "fp8_block":
            return *quantize_fp8_block(self._bits(name)), FP8_BLOCK
        if chosen.kind == "fp8_tensor":
            return *quantize_fp8_tensor(self._bits(name)), 0
        return *quantize_int4_group(self._bits(name), chosen.group), chosen.group

    def input_scale(self, _name: str) -> float | None:
        """None: nothing was seen."""
        return None

    def identity(self) -> str:
        """A SHA-256 of the config, the seed and the layout."""
        text = json.dumps([self._config.raw, self._seed, self._layout], sort_keys=True)
        return hashlib.sha256(f"lingc synthetic checkpoint 1\n{text}".encode()).hexdigest()

    def tokenizer_files(self) -> tuple[Path, ...]:
        """None: the tokens mean nothing."""
        return ()

    def generation_config(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def _format(self, name: str) -> Format:
        if len(self.shape(name)) != 2:
            return PLAIN
        return self._recipe.format_of(name.removesuffix(".weight"))

    def _bits(self, name: str) -> U16:
        shape = self.shape(name)
        mean, std = _statistics(name, shape)
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        table = round_bf16(_quantiles() * np.float32(std) + np.float32(mean))
        stream = np.random.SFC64(np.frombuffer(key, "<u4"))
        values = np.empty(math.prod(shape), np.uint16)
        for start in range(0, values.size, _RUN):
            run = values[start : start + _RUN]
            raw = stream.random_raw(-(-run.size // 4)).view(np.uint16)
            # Every uint16 is an index; without a mode, `take` would make a copy to be safe.
            np.take(table, raw[: run.size], out=run, mode="clip")
        return values.reshape(shape)


def _statistics(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor."""
    if name.endswith(".expert_bias"):
        return 0.0, 0.1
    if len(shape) == 1:
        return 1.0, 0.1
    if name == "model.word_embeddings.weight":
        return 0.0, 1.0
    return 0.0, shape[1] ** -0.5


@cache
def _quantiles() -> F32:
    """65,536 values that stand for a normal distribution: 16 random bits choose one."""
    inverse = NormalDist().inv_cdf
    upper = [inverse((i + 0.5) / 65536) for i in range(32768, 65536)]
    return np.array([-value for value in reversed(upper)] + upper, np.float32)
