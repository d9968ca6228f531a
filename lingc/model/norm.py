"""Root-mean-square norms: over a whole row, and over groups of channels."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last axis; statistics in at least FP32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (self.weight.shape[0],), self.weight, self.eps)


class GroupRMSNorm(nn.Module):
    """RMS norm of each of `groups` runs of channels by its own mean square, then one weight."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups = groups
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        width = self.weight.shape[0]
        channels = width // self.groups
        grouped = x.reshape(-1, self.groups, channels)
        y = functional.rms_norm(grouped, (channels,), None, self.eps)
        return y.reshape(-1, width) * self.weight


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype that sensitive steps compute in: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()
