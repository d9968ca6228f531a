"""Rotary position embedding in the two forms that the architecture mixes.

Linear attention rotates the first dims of a head in half-split pairs (j, j + R/2); MLA rotates its
rope dims in adjacent pairs (2j, 2j + 1). The angle of pair j at position p is p * inv_freq[j].
"""

import torch
from torch import Tensor


def rope_table(positions: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, times YaRN's factor.

    Args:
        positions: [T], whole numbers.
        inv_freq: [R/2]; its dtype is the table's.
        factor: Multiplier of both.

    Returns:
        Two tensors [T, R/2].
    """
    angle = positions.to(inv_freq.dtype).unsqueeze(1) * inv_freq
    return torch.cos(angle) * factor, torch.sin(angle) * factor


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dims of `x` [T, H, K] in pairs (j, j + R/2); the rest passes through."""
    half = cos.shape[-1]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, R/2]
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    turned = (x1 * c - x2 * s, x2 * c + x1 * s)
    if 2 * half == x.shape[-1]:
        return torch.cat(turned, dim=-1)
    return torch.cat((*turned, x[..., 2 * half :]), dim=-1)


def rope_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate all R dims of `x` [T, H, R] in pairs (2j, 2j + 1), which stay where they are."""
    tokens, heads, dim = x.shape
    pairs = x.reshape(tokens, heads, dim // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, R/2]
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).reshape(tokens, heads, dim)
