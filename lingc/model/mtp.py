"""The MTP layer: drafts the token after next.

    u = eh_proj(concat(RMS(E[x_{t+1}]; enorm), RMS(hidden_t; hnorm)))     embedding half first
    y = one decoder block on u: MLA with its own cache, and MoE
    f = RMS(y; final_layernorm)          logits = f @ lm_head^T, shared with the main model

hidden_t is the main model's output after its last norm. To draft further, f takes its place.
"""

import torch
from torch import Tensor, nn

from lingc.model.block import Block
from lingc.model.config import ModelConfig
from lingc.model.norm import RMSNorm


class MTP(Block):
    """A decoder block between a mix of two inputs and a norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.mtp_layer)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.final_layernorm = RMSNorm(hidden, eps)

    def mix(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The block's input [T, D]: next tokens' embeddings [T, D], hidden states [T, D]."""
        u: Tensor = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return u
