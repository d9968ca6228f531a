"""What the inputs of a module look like, and the FP8 scale that suits them.

A histogram over the high halves of the f32 bit patterns, BF16 magnitudes, holds every value to
within 2^-8 of itself, is exact to merge, and answers all that a scale for a whole tensor needs:

    absmax       the largest magnitude
    percentile   the magnitude that so many percent of the values do not exceed
    mse          the bound at which rounding to E4M3 and clipping lose least together

A scale for each channel follows from the largest of each. Those for each token, or for 128 channels
of a token, are taken on the fly when the engine runs; here the error that each way has is summed,
so that a report can say what a finer scale would gain.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lingc.quantize.formats import (
    E4M3_MAX,
    F32,
    FP8_BLOCK,
    decode_e4m3,
    encode_e4m3,
    widen_bf16,
)

RULES = ("absmax", "percentile", "mse")

_BINS = 0x8000
_STEPS = 64
"""Bounds that `mse` tries, down to 2^-6 of the largest magnitude."""


@dataclass(slots=True)
class Observer:
    """Sums over all inputs of a module.

    Attributes:
        counts: Values by BF16 magnitude, i64 [32768].
        channel: Largest magnitude of each channel, f32 [D].
        whole: Sum of squares.
        lost: Sum of squared errors of E4M3 with a scale a token, and a block of 128 channels.
    """

    width: int
    counts: Tensor = field(init=False)
    channel: Tensor = field(init=False)
    whole: float = 0.0
    lost: dict[str, float] = field(default_factory=lambda: {"token": 0.0, "block": 0.0})

    def __post_init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.channel = torch.zeros(self.width)

    def see(self, x: Tensor) -> None:
        """Count rows of inputs, f32 [T, D], all finite."""
        if x.shape[0] == 0:
            return
        flat = x.abs().contiguous()
        # Half of the dropped bits added: to the nearest, as far as a histogram cares.
        bins = ((flat.view(torch.int32) + 0x7FFF) >> 16).clamp_(max=_BINS - 1)
        self.counts += torch.bincount(bins.flatten(), minlength=_BINS).cpu()
        self.channel = torch.maximum(self.channel, flat.amax(0).cpu())
        self.whole += float(x.square().sum(dtype=torch.float64))
        self.lost["token"] += _lost(x, flat.amax(-1, keepdim=True))
        short = -self.width % FP8_BLOCK
        padded = torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, FP8_BLOCK))
        self.lost["block"] += _lost(padded, padded.abs().amax(-1, keepdim=True))

    @property
    def absmax(self) -> float:
        """Largest magnitude."""
        return float(self.channel.max())

    def bound(self, rule: str, percentile: float = 99.99) -> float:
        """The magnitude that the largest code shall stand for; what is above is clipped.

        Args:
            rule: One of `RULES`.
            percentile: Of `percentile`.
        """
        if rule == "absmax" or self.absmax == 0:
            return self.absmax
        magnitudes, counts = self._seen()
        if rule == "percentile":
            reached = np.cumsum(counts) >= percentile / 100 * counts.sum()
            return min(self.absmax, float(magnitudes[int(np.argmax(reached))]))
        bounds = self.absmax * np.exp2(-6 * np.arange(_STEPS) / _STEPS)
        losses = [_tensor_loss(magnitudes, counts, bound) for bound in bounds]
        return float(bounds[int(np.argmin(losses))])

    def errors(self, bound: float) -> dict[str, float]:
        """Relative error of E4M3 inputs by granularity; of a tensor with the given bound."""
        if not self.whole:
            return dict.fromkeys(("tensor", "token", "block"), 0.0)
        lost = {"tensor": _tensor_loss(*self._seen(), bound), **self.lost}
        return {name: float(np.sqrt(value / self.whole)) for name, value in lost.items()}

    def channel_spread(self) -> dict[str, float]:
        """Largest and median of the channels' largest magnitudes: what outliers there are."""
        return {"largest": self.absmax, "median": float(self.channel.median())}

    def _seen(self) -> tuple[F32, F32]:
        counts = self.counts.numpy()
        bins = np.flatnonzero(counts)
        return widen_bf16(bins.astype(np.uint16)), counts[bins].astype(np.float64)


def scale_of(bound: float) -> float:
    """The scale with which the largest E4M3 code stands for a bound; 1 where there is nothing."""
    return bound / float(E4M3_MAX) if bound else 1.0


def _tensor_loss(magnitudes: F32, counts: F32, bound: float) -> float:
    scale = np.float32(scale_of(bound))
    rounded = decode_e4m3(encode_e4m3((magnitudes / scale).astype(np.float32))) * scale
    return float(np.sum(counts * np.square(rounded.astype(np.float64) - magnitudes)))


def _lost(x: Tensor, largest: Tensor) -> float:
    """Squared error of E4M3 with a scale for each run of values."""
    scale = (largest / float(E4M3_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = round_e4m3(x / scale) * scale
    return float((rounded - x).square().sum(dtype=torch.float64))


def round_e4m3(x: Tensor) -> Tensor:
    """Values that E4M3 codes stand for, saturating, f32."""
    limit = float(E4M3_MAX)
    return x.clamp(-limit, limit).to(torch.float8_e4m3fn).float()
