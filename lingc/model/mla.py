"""Multi-head latent attention: softmax attention over one shared low-rank row per token.

    cq = RMS(n W_qa)                 q = cq W_qb, per head nope | rope
    a  = n W_kva: latent | rope key  c = RMS(latent); the rope key is not normed
    k_h, v_h = c W_kvb, per head nope | V
    score = (q_nope . k_h + rope(q_rope) . rope(k_rope)) * scale, causal

What is cached per token is [c | rope(k_rope)]. The plain form expands c to keys and values; the
absorbed form moves W_kvb to the query and the output instead, and reads the cache alone:

    score = ((q_nope W_k,h) . c + q_rope . k_rope) * scale        o_h = (sum_s p_s c_s) W_v,h^T
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingc.model.config import ModelConfig
from lingc.model.norm import RMSNorm, widen
from lingc.model.rope import rope_pairs


class MLA(nn.Module):
    """The attention of an MLA layer; submodules are named as in the checkpoint.

    With `q_lora_rank` null the query comes from one matrix, `q_proj`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self.kv_rank = config.kv_lora_rank
        self.q_rank = config.q_lora_rank
        self.scale = config.mla_scale
        hidden, eps = config.hidden_size, config.rms_norm_eps
        queries = self.heads * config.qk_head_dim
        if self.q_rank is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, self.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(self.q_rank, eps)
            self.q_b_proj = nn.Linear(self.q_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, eps)
        self.kv_b_proj = nn.Linear(
            self.kv_rank, self.heads * (self.nope_dim + self.v_dim), bias=False
        )
        self.dense = nn.Linear(self.heads * self.v_dim, hidden, bias=False)

    def latent(self, n: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Of normed inputs [T, D]: q [T, H, nope + rope], roped, and cache rows [T, c + r]."""
        q = self._queries(n).view(-1, self.heads, self.nope_dim + self.rope_dim)
        q_nope, q_rope = q[..., : self.nope_dim], q[..., self.nope_dim :]
        q = torch.cat((q_nope, rope_pairs(q_rope, cos, sin)), dim=-1)
        a = self.kv_a_proj_with_mqa(n)
        c = self.kv_a_layernorm(a[:, : self.kv_rank])
        k_rope = rope_pairs(a[:, self.kv_rank :].unsqueeze(1), cos, sin).squeeze(1)
        return q, torch.cat((c, k_rope), dim=-1)

    def _queries(self, n: Tensor) -> Tensor:
        q: Tensor
        if self.q_rank is None:
            q = self.q_proj(n)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(n)))
        return q

    def attend(self, q: Tensor, cache: Tensor, *, absorbed: bool) -> Tensor:
        """Attention of q [B, T, H, nope + rope] over cache rows [B, S, c + r] -> [B, T, H*V]."""
        kv_b = self.kv_b_proj.weight
        if not absorbed:
            return plain_attention(q, cache, kv_b, nope_dim=self.nope_dim, scale=self.scale)
        per_head = kv_b.view(self.heads, self.nope_dim + self.v_dim, self.kv_rank)
        w_k, w_v = per_head[:, : self.nope_dim], per_head[:, self.nope_dim :]
        return absorbed_attention(q, cache, w_k, w_v, scale=self.scale)

    def finish(self, o: Tensor) -> Tensor:
        """Output projection: [T, H*V] -> [T, D]."""
        projected: Tensor = self.dense(o)
        return projected


def plain_attention(
    q: Tensor, cache: Tensor, kv_b: Tensor, *, nope_dim: int, scale: float
) -> Tensor:
    """Attention with keys and values expanded from the cache.

    Args:
        q: [B, T, H, nope + rope], the last T positions of S.
        cache: [B, S, c + r].
        kv_b: [H * (nope + V), c].
        nope_dim: Width of a query's part without RoPE.
        scale: Multiplier of the scores.

    Returns:
        [B, T, H * V], at least FP32.
    """
    batch, rows, _ = cache.shape
    heads, rank = q.shape[2], kv_b.shape[1]
    q, cache, kv_b = widen(q), widen(cache), widen(kv_b)
    kv = functional.linear(cache[..., :rank], kv_b).view(batch, rows, heads, -1)
    k_nope, v = kv[..., :nope_dim], kv[..., nope_dim:]
    scores = torch.einsum("bthn,bshn->bhts", q[..., :nope_dim], k_nope)
    scores = scores + torch.einsum("bthr,bsr->bhts", q[..., nope_dim:], cache[..., rank:])
    weights = _causal_softmax(scores * scale)
    return torch.einsum("bhts,bshv->bthv", weights, v).flatten(2)


def absorbed_attention(
    q: Tensor, cache: Tensor, w_k: Tensor, w_v: Tensor, *, scale: float
) -> Tensor:
    """Attention on the cache itself; w_k [H, nope, c] and w_v [H, V, c] are the parts of kv_b.

    The other arguments and the result are those of `plain_attention`.
    """
    nope_dim, rank = w_k.shape[1:]
    q, cache, w_k, w_v = widen(q), widen(cache), widen(w_k), widen(w_v)
    q_latent = torch.einsum("bthn,hnc->bthc", q[..., :nope_dim], w_k)
    scores = torch.einsum("bthc,bsc->bhts", q_latent, cache[..., :rank])
    scores = scores + torch.einsum("bthr,bsr->bhts", q[..., nope_dim:], cache[..., rank:])
    weights = _causal_softmax(scores * scale)
    o_latent = torch.einsum("bhts,bsc->bthc", weights, cache[..., :rank])
    return torch.einsum("bthc,hvc->bthv", o_latent, w_v).flatten(2)


def _causal_softmax(scores: Tensor) -> Tensor:
    """Softmax over the S positions up to each of the last T: [B, H, T, S]."""
    tokens, rows = scores.shape[-2:]
    position = torch.arange(rows - tokens, rows, device=scores.device).unsqueeze(1)
    hidden = torch.arange(rows, device=scores.device) > position  # [T, S]
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
