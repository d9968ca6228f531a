"""A checkpoint's weights into the model, tensor by tensor."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lingc.checkpoint import Source, open_checkpoint, validate
from lingc.model.config import ModelConfig
from lingc.model.model import LingModel


def load(checkpoint_dir: str | Path, dtype: torch.dtype = torch.float32) -> LingModel:
    """Build the model of a checkpoint in any of the three release layouts.

    Quantized weights are dequantized. `expert_bias` stays at least FP32 whatever the dtype. A
    checkpoint without MTP weights gives a model without the MTP layer.

    Raises:
        ConfigError: `config.json` is missing, contradictory or of another architecture.
        CheckpointError: Missing, extra or wrong tensors, all of them listed.
    """
    checkpoint = open_checkpoint(Path(checkpoint_dir))
    validate(checkpoint)
    return from_source(checkpoint, dtype)


def from_source(source: Source, dtype: torch.dtype = torch.float32) -> LingModel:
    """Build the model of any source of weights that is known to be sound, for inference only."""
    with torch.device("meta"):
        module = LingModel(source.config, with_mtp=source.has_mtp)
    for name, parameter in tuple(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        exact = leaf == "expert_bias" and dtype != torch.float64
        value = _read(source, name, parameter.shape, torch.float32 if exact else dtype)
        module.get_submodule(owner).register_parameter(
            leaf, nn.Parameter(value, requires_grad=False)
        )
    module.reset_constants()
    return module.eval()


def checkpoint_names(name: str, config: ModelConfig) -> tuple[str, ...]:
    """What a parameter is called in the checkpoint: one name, or one for each expert."""
    stem, found, matrix = name.partition(".mlp.experts.")
    if not found:
        return (name,)
    return tuple(f"{stem}.mlp.experts.{e}.{matrix}.weight" for e in range(config.num_experts))


def _read(source: Source, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    names = checkpoint_names(name, source.config)
    value = torch.empty(shape, dtype=dtype)
    stacked = value if len(shape) == 3 else value.unsqueeze(0)
    # Copying widens or rounds matrix by matrix, so one FP32 matrix is held besides the result.
    for slot, matrix in zip(stacked, names, strict=True):
        slot.copy_(torch.from_numpy(source.dense(matrix)))
    return value
