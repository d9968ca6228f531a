"""The pieces of a program as modules: what `torch.export` sees of one block in one phase.

The model's own modules do the maths. What they leave to the caller is said here: where the state
is, and how packed tokens of several sequences attend.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lingc.model.block import Block
from lingc.model.config import ModelConfig
from lingc.model.linear_attention import LinearAttention
from lingc.model.mla import MLA
from lingc.model.moe import MoE
from lingc.model.mtp import MTP
from lingc.model.norm import RMSNorm
from lingc.plugins import expert_dispatch, lightning_decode, lightning_prefill, lightning_verify


class Rope(nn.Module):
    """Cosines and sines of one rotary dimension, scaled (YaRN)."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        frequencies = torch.empty(dim // 2, dtype=torch.float32, device="meta")
        self.register_buffer(f"inv_freq_{dim}", frequencies)
        self.name = f"inv_freq_{dim}"
        self.scale = config.rope_attention_factor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions.to(torch.float32).unsqueeze(-1) * getattr(self, self.name)
        return angle.cos() * self.scale, angle.sin() * self.scale


class Entry(nn.Module):
    """Embedding and rotary tables: `x`, then cos and sin for each distinct rotary dimension."""

    def __init__(self, config: ModelConfig, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ropes = nn.ModuleList(Rope(config, dim) for dim in dims)

    def forward(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        tables = [table for rope in self.ropes for table in rope(positions)]
        return F.embedding(token_ids, self.word_embeddings.weight), *tables


def ffn(mlp: nn.Module, n: Tensor) -> Tensor:
    """The feed-forward half of a block; experts as the structural op."""
    if not isinstance(mlp, MoE):
        out: Tensor = mlp(n)
        return out
    ids, weights = mlp.gate(n)
    experts = mlp.experts
    routed: Tensor = expert_dispatch.OP.overload(
        n, ids, weights, experts.gate_proj, experts.up_proj, experts.down_proj
    )
    if mlp.shared_experts is None:
        return routed
    shared: Tensor = mlp.shared_experts(n)
    return routed + shared


class LinearLayer(nn.Module):
    """A block with lightning attention, in one phase."""

    def __init__(self, block: Block, phase: str) -> None:
        super().__init__()
        assert isinstance(block.attention, LinearAttention)
        self.block = block
        self.attention = block.attention
        self.phase = phase

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, meta: dict[str, Tensor], states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        block = self.block
        n = block.input_layernorm(x)
        q, k, v = self.attention.project(n, cos, sin)
        o, *after = self._attend(q, k, v, meta, states)
        x = x + self.attention.finish(o, n)
        x = x + ffn(block.mlp, block.post_attention_layernorm(x))
        return x, *after

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, meta: dict[str, Tensor], states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        decay = self.attention.decay
        slots, positions = meta["slots"], meta["positions"]
        result: tuple[Tensor, ...]
        if self.phase == "prefill":
            result = lightning_prefill.OP.overload(
                q, k, v, decay, states[0], slots, meta["offsets"], positions
            )
        elif self.phase == "decode":
            result = lightning_decode.OP.overload(
                q, k, v, decay, *states, slots, meta["accepted"], positions
            )
        else:
            result = lightning_verify.OP.overload(
                q, k, v, decay, *states, slots, meta["accepted"], meta["offsets"], positions
            )
        return result


class LatentLayer(nn.Module):
    """A block with MLA over the paged latent cache; the same in every phase."""

    def __init__(self, block: Block, config: ModelConfig, page_size: int) -> None:
        super().__init__()
        assert isinstance(block.attention, MLA)
        self.block = block
        self.attention = block.attention
        self.config = config
        self.page_size = page_size

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, meta: dict[str, Tensor], states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        block = self.block
        q, latent = self.attention.latent(block.input_layernorm(x), cos, sin)
        cache = torch.index_put(states[0], (meta["cache_rows"],), latent)
        o = self._attend(q, cache, meta)
        x = x + self.attention.finish(o)
        x = x + ffn(block.mlp, block.post_attention_layernorm(x))
        return x, cache

    def _attend(self, q: Tensor, cache: Tensor, meta: dict[str, Tensor]) -> Tensor:
        """Causal attention of packed tokens, each over the pages of its own sequence."""
        c = self.config
        heads, nope, value = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
        pages, offsets, positions = meta["page_table"], meta["offsets"], meta["positions"]
        batch, tokens = pages.shape[0], positions.shape[0]
        rows = (pages.unsqueeze(-1) * self.page_size + torch.arange(self.page_size)).flatten(1)
        context = cache[rows]  # [B, C, c + r]
        latent, key_rope = context.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self.attention.kv_b_proj(latent).unflatten(-1, (heads, nope + value))
        key_nope, v = kv.split([nope, value], dim=-1)
        shared = key_rope.unsqueeze(2).expand(-1, -1, heads, -1)
        k = torch.cat((key_nope, shared), dim=-1)
        sequence = (torch.arange(tokens).unsqueeze(1) >= offsets[1:]).sum(1)
        mine = sequence.unsqueeze(1) == torch.arange(batch)  # [T, B]
        past = torch.arange(rows.shape[1]) <= positions.unsqueeze(1)  # [T, C]
        mask = (mine.unsqueeze(2) & past.unsqueeze(1)).flatten(1)  # [T, B * C]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.flatten(0, 1).transpose(0, 1).unsqueeze(0),
            v.flatten(0, 1).transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            scale=c.mla_scale,
        )
        return out.squeeze(0).transpose(0, 1).flatten(1)


class Exit(nn.Module):
    """Final norm and head: logits of the wanted rows, hidden state of all."""

    def __init__(self, config: ModelConfig, *, norm: str) -> None:
        super().__init__()
        self.norm_name = norm
        self.add_module(norm, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, logit_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = getattr(self, self.norm_name)(x)
        wanted = hidden if logit_rows is None else torch.index_select(hidden, 0, logit_rows)
        return self.lm_head(wanted), hidden


class DraftEntry(nn.Module):
    """The MTP layer's input: the next token's embedding and the hidden state, merged."""

    def __init__(self, mtp: MTP) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.eh_proj = mtp.enorm, mtp.hnorm, mtp.eh_proj

    def forward(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor]:
        return (self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)),)
