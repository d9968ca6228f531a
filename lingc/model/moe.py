"""Mixture of experts: a sigmoid router with grouped choice, routed experts, a shared expert.

z = n W^T in FP32        p = sigmoid(z)        b = p + expert_bias, which only selects
G[g] = sum of the 2 largest b of group g; the experts of all but the `topk_group` best
groups are out; I = the top k of the rest by b
w_e = routed_scaling_factor * p_e / sum_{I} p
y = sum_{e in I} w_e expert_e(n) + shared(n), the shared expert unscaled
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingc.model.config import ModelConfig
from lingc.model.norm import widen

GATHERED_ROWS = 64
"""Up to so many (token, expert) pairs, copying each pair's matrices beats a loop over experts."""


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Router(nn.Module):
    """Chooses experts and weights them; FP32 throughout, float64 in a float64 module.

    Equal scores go to the lower index, for experts and for groups. `torch.topk` promises no order
    among equals, so the choices are stable sorts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups = config.n_group
        self.kept_groups = config.topk_group
        self.top_k = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.normalize = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Parameter(torch.zeros(config.num_experts))

    def logits(self, n: Tensor) -> Tensor:
        """Scores before the sigmoid: [T, D] -> [T, E]."""
        return functional.linear(widen(n), widen(self.weight))

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [T, k] by descending biased score, and their weights [T, k]."""
        scores = torch.sigmoid(logits)
        biased = scores + self.expert_bias
        in_group = biased.shape[-1] // self.groups
        grouped = biased.view(-1, self.groups, in_group)
        group_scores = grouped.topk(min(2, in_group), dim=-1).values.sum(dim=-1)
        keep = _largest(group_scores, self.kept_groups)
        mask = torch.zeros_like(group_scores).scatter(1, keep, 1.0)
        mask = mask.unsqueeze(-1).expand(-1, self.groups, in_group).reshape(biased.shape)
        ids = _largest(biased.masked_fill(mask == 0, -torch.inf), self.top_k)
        weights = scores.gather(1, ids)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return ids, weights * self.scaling

    def forward(self, n: Tensor) -> tuple[Tensor, Tensor]:
        return self.select(self.logits(n))


def _largest(x: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, descending, lower index first among equals."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :count]


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate and up [E, F, D], down [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden = config.num_experts, config.hidden_size
        width = config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, n: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts: n [T, D], ids and weights [T, k] -> [T, D]."""
        if ids.numel() <= GATHERED_ROWS:
            return self._gathered(n, ids, weights)
        return self._looped(n, ids, weights)

    def _gathered(self, n: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = n[:, None, :, None]  # [T, 1, D, 1]
        gate = (self.gate_proj[ids] @ x).squeeze(-1)  # [T, k, F]
        up = (self.up_proj[ids] @ x).squeeze(-1)
        inner = functional.silu(gate) * up
        y = (self.down_proj[ids] @ inner.unsqueeze(-1)).squeeze(-1)  # [T, k, D]
        return (y * weights.unsqueeze(-1)).sum(dim=1).to(n.dtype)

    def _looped(self, n: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(n, dtype=weights.dtype)
        for e in ids.unique().tolist():
            token, rank = torch.nonzero(ids == e, as_tuple=True)
            x = n[token]
            gate = functional.linear(x, self.gate_proj[e])
            up = functional.linear(x, self.up_proj[e])
            y = functional.linear(functional.silu(gate) * up, self.down_proj[e])
            total.index_add_(0, token, y * weights[token, rank].unsqueeze(-1))
        return total.to(n.dtype)


class MoE(nn.Module):
    """Routed experts and, unless the config has none, the shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.moe_shared_expert_intermediate_size * config.num_shared_experts
        self.shared_experts = MLP(config.hidden_size, width) if width else None

    def combine(self, n: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The layer's output for a choice of experts."""
        y: Tensor = self.experts(n, ids, weights)
        return y if self.shared_experts is None else y + self.shared_experts(n)

    def forward(self, n: Tensor) -> Tensor:
        return self.combine(n, *self.gate(n))
