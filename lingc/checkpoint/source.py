"""What every source of weights offers, a directory or a synthetic model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from lingc.model.config import ModelConfig
from lingc.quantize.formats import F32


class Source(Protocol):
    """Weights by logical name, read one at a time.

    A logical name is the name in an unquantized checkpoint (`<module>.weight`), however the tensor
    is stored.
    """

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Logical names, in the order of the layers."""
        ...

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP layer's weights are there; the config alone does not say."""
        ...

    def kind(self, name: str) -> str:
        """`plain`, `fp8_block`, `fp8_tensor` or `int4_group`."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as in an unquantized checkpoint."""
        ...

    def dense(self, name: str) -> F32:
        """The values, dequantized, in memory of their own."""
        ...

    def plain(self, name: str) -> tuple[NDArray[Any], str]:
        """A plain tensor as stored, read-only, and `bf16` (uint16 bits) or `f32`."""
        ...

    def quantized(self, name: str) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Codes, scales and group of a quantized tensor as stored, read-only.

        `fp8_block`: E4M3 codes, f32 scales, 128. `fp8_tensor`: the same with one scale, 0.
        `int4_group`: packed int32, BF16 scales, group.
        """
        ...

    def input_scale(self, name: str, /) -> float | None:
        """What an E4M3 code of a matrix's inputs stands for, where that was calibrated."""
        ...

    def identity(self) -> str:
        """A digest that tells weights apart; the same for the same weights, however sharded."""
        ...

    def tokenizer_files(self) -> tuple[Path, ...]:
        """Files of the tokenizer; none for a model that has no tokenizer."""
        ...

    def generation_config(self) -> Mapping[str, Any]:
        """What `generation_config.json` holds; empty without one."""
        ...
