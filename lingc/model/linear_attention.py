"""Lightning linear attention: a decaying outer-product state in place of a key-value cache.

    S_t = exp(-s) S_{t-1} + k_t (outer) v_t        o_t = (q_t / sqrt(K)) @ S_t

s is fixed per head and layer. The current token enters undecayed. The recurrent form is this
recurrence; the chunk form does the same for C tokens at once:

    O[i] = sum_{j<=i} exp(-s (i-j)) (q_i . k_j) v_j  +  exp(-s (i+1)) q_i @ S
    S'   = exp(-s C) S + sum_j exp(-s (C-1-j)) k_j (outer) v_j

Only differences i - j >= 0 are exponentiated. Splitting exp(-s (i-j)) into two factors would
overflow for chunks of about a hundred tokens.
"""

import torch
from torch import Tensor, nn

from lingc.model.config import ModelConfig
from lingc.model.norm import GroupRMSNorm, RMSNorm, widen
from lingc.model.rope import rope_half


class LinearAttention(nn.Module):
    """The attention of a linear layer; submodules are named as in the checkpoint.

    All methods take flattened tokens. Linear heads have V == K == `head_dim`.
    """

    decay: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim
        width = self.heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.g_norm = GroupRMSNorm(width, config.group_norm_size, config.rms_norm_eps)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)
        self.register_buffer("decay", torch.empty(0), persistent=False)
        self.reset_constants()

    def reset_constants(self) -> None:
        """Compute `decay` for the weights' device; FP32, or float64 in a float64 module."""
        weight = self.dense.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        rates = self.config.decay(self.layer).tolist()
        self.decay = torch.tensor(rates, dtype=dtype, device=weight.device)

    def project(self, n: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and roped q and k, and v, each [T, H, K], of normed inputs [T, D]."""
        shape = (-1, self.heads, self.head_dim)
        qkv = self.query_key_value(n)
        q, k, v = torch.split(qkv, self.heads * self.head_dim, dim=-1)
        q = rope_half(self.query_layernorm(q.view(shape)), cos, sin)
        k = rope_half(self.key_layernorm(k.view(shape)), cos, sin)
        return q, k, v.view(shape)

    def finish(self, o: Tensor, n: Tensor) -> Tensor:
        """Group norm, then gate, then output projection: o [T, H, V], n [T, D] -> [T, D]."""
        y = self.g_norm(o)
        y = y * torch.sigmoid(self.g_proj(n))
        projected: Tensor = self.dense(y)
        return projected


def lightning_recurrent(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    Args:
        q: [B, T, H, K], not scaled.
        k: [B, T, H, K].
        v: [B, T, H, V].
        decay: Rates s [H], in the state's dtype.
        state: [B, H, K, V], FP32 or float64; not written to.

    Returns:
        o [B, T, H, V] in the state's dtype, and the state after the last token.
    """
    keep = torch.exp(-decay).view(-1, 1, 1)
    q, k, v = (x.to(state.dtype) for x in (q * q.shape[-1] ** -0.5, k, v))
    outputs = []
    for t in range(q.shape[1]):
        state = keep * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def lightning_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """The same as `lightning_recurrent`, `chunk` tokens at a time; the last may be shorter."""
    scaled = q * q.shape[-1] ** -0.5
    q, k, v = (x.to(state.dtype).transpose(1, 2) for x in (scaled, k, v))  # [B, H, T, .]
    outputs = []
    for start in range(0, q.shape[2], chunk):
        block = slice(start, min(start + chunk, q.shape[2]))
        o, state = _one_chunk(q[:, :, block], k[:, :, block], v[:, :, block], decay, state)
        outputs.append(o)
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _one_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = q.shape[2]
    index = torch.arange(tokens, device=q.device)
    since = (index.unsqueeze(1) - index).clamp(min=0).to(decay.dtype)  # [C, C]: i - j
    s = decay.view(-1, 1, 1)
    within = torch.exp(-s * since).tril()  # [H, C, C]
    seen = torch.exp(-s * (index + 1).view(1, -1, 1))  # [H, C, 1]
    left = torch.exp(-s * (tokens - 1 - index).view(1, -1, 1))  # [H, C, 1]
    o = (q @ k.transpose(2, 3) * within) @ v + seen * (q @ state)
    state = torch.exp(-s * tokens) * state + (left * k).transpose(2, 3) @ v
    return o, state


def lightning(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """Whichever form is cheaper: recurrent for one token, chunks for more."""
    if q.shape[1] == 1:
        return lightning_recurrent(q, k, v, decay, state)
    return lightning_chunk(q, k, v, decay, state, chunk=chunk)


def new_linear_state(config: ModelConfig, batch: int, like: Tensor) -> Tensor:
    """The empty state [B, H, K, V] on the device of `like`; FP32, or float64 where that is."""
    shape = (batch, config.num_attention_heads, config.head_dim, config.head_dim)
    return widen(like).new_zeros(shape)
