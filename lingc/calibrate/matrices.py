"""One set of matrices that read the same input: rounded by what was seen of it.

What is made is stored as a checkpoint stores it, and handed back as the values that the layers
behind shall see.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lingc.calibrate import rounding
from lingc.calibrate.observers import round_e4m3
from lingc.checkpoint.source import Source
from lingc.quantize.formats import (
    E4M3_MAX,
    FP8_BLOCK,
    blocks,
    encode_e4m3,
    pack_int4,
)
from lingc.quantize.recipes import Format

Array = NDArray[Any]

INT4_METHODS = ("gptq", "search", "nearest")
FP8_METHODS = ("search", "nearest")

DAMPINGS = (0.02, 0.1, 0.5, 3.0)
"""From trusting the samples to hardly looking at them: the less there are, the more is right."""

_USUAL_DAMPING = 0.1
_TRIED_MATRICES, _TRIED_ROWS = 8, 128

ROWS = 4096
"""Rows of a matrix that are rounded together; all rows are rounded independently."""

_FP8_STEPS = 16
"""Scales of FP8 that are tried, up to the one that is half as fine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How weights are rounded.

    Attributes:
        int4: `gptq` moves errors to columns that can still make up for them; `search` looks for
            the scale of each group that loses least; `nearest` leaves it to `lingc quantize`.
        fp8: `search` likewise for the scales of FP8, or `nearest`.
        damping: Of `gptq`, see `rounding.curvature`; where None, the one of `DAMPINGS` that does
            best for half of the samples when the other half is rounded by.
        rounds: Of `gptq`.
    """

    int4: str = "gptq"
    fp8: str = "search"
    damping: float | None = None
    rounds: int = 2

    def is_used(self, chosen: Format) -> bool:
        """Whether a format is rounded by data at all."""
        if chosen.kind == "int4_group":
            return self.int4 != "nearest"
        return chosen.kind.startswith("fp8") and self.fp8 != "nearest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A rounded matrix.

    Attributes:
        pieces: As stored: codes and scales.
        values: What they stand for, f32 [N, D].
        sums: By row, squared errors of the outputs on the samples, the same by rounding to nearest,
            and squared outputs: f64 [3, N].
    """

    pieces: tuple[Array, Array]
    values: Tensor
    sums: Tensor

    def loss_of(self, top: int, end: int) -> float:
        """Share of the outputs' energy that rounding lost, of some rows."""
        return self._share(0, top, end)

    def nearest_loss_of(self, top: int, end: int) -> float:
        """What rounding to nearest would have lost."""
        return self._share(1, top, end)

    def _share(self, which: int, top: int, end: int) -> float:
        whole = float(self.sums[2, top:end].sum())
        return float(self.sums[which, top:end].sum()) / whole if whole else 0.0


def weight_of(source: Source, module: str, device: torch.device) -> Tensor:
    """A matrix or vector of a module in f32."""
    return torch.from_numpy(source.dense(f"{module}.weight")).to(device)


def choose_damping(weights: Tensor, halves: Tensor, chosen: Format) -> float:
    """The damping with which GPTQ by one half of the samples loses least on the other.

    Args:
        weights: f32 [M, N, D], of which a few matrices and rows are tried.
        halves: f32 [M, 2, D, D], sums of x x^T over each half.
        chosen: Says the group.
    """
    traces = halves.diagonal(dim1=2, dim2=3).sum(-1)  # [M, 2]
    seen = (traces > 0).all(-1).nonzero()[:_TRIED_MATRICES, 0]
    if not len(seen):
        return _USUAL_DAMPING
    step = max(1, weights.shape[1] // _TRIED_ROWS)
    rows, halves = weights[seen][:, ::step][:, :_TRIED_ROWS], halves[seen]
    lost = {}
    for damping in DAMPINGS:
        curve = rounding.curvature(halves[:, 0], damping=damping)
        found = rounding.gptq(rows, curve, chosen.group, rounds=0)
        energy = _energy(rows - found.values(chosen.group), halves[:, 1]).sum(1)
        lost[damping] = float((energy.cpu() / traces[seen, 1].cpu()).sum())
    return min(lost, key=lambda damping: lost[damping])


def make_int4(
    weights: Tensor, hessians: Tensor, chosen: Format, method: Method, *, damping: float
) -> list[Made]:
    """Round matrices to INT4 groups by the sums of x x^T over their inputs.

    Args:
        weights: f32 [M, N, D].
        hessians: f32 [M, D, D].
        chosen: Says the group.
        method: How.
        damping: Of `gptq`.
    """
    group, count = chosen.group, weights.shape[1]
    is_gptq = method.int4 == "gptq"
    curve = rounding.curvature(hessians, damping=damping) if is_gptq else None
    parts: list[rounding.Rounded] = []
    sums = torch.zeros(len(weights), 3, count, dtype=torch.float64)
    for top in range(0, count, ROWS):
        rows = weights[:, top : top + ROWS]
        if curve is not None:
            found = rounding.gptq(rows, curve, group, rounds=method.rounds)
        else:
            scales = rounding.search_scales(rows, hessians.diagonal(dim1=1, dim2=2), group)
            found = rounding.nearest(rows, scales, group)
        plain = rounding.nearest(rows, rounding.plain_scales(rows, group), group)
        errors = (rows - found.values(group), rows - plain.values(group), rows)
        for i, error in enumerate(errors):
            sums[:, i, top : top + ROWS] = _energy(error, hessians).cpu()
        parts.append(found)
    codes = torch.cat([part.codes for part in parts], dim=1)
    scales = torch.cat([part.scales for part in parts], dim=1)
    whole = rounding.Rounded(codes=codes, scales=scales)
    values = whole.values(group)
    return [
        Made(pieces=_int4_pieces(codes[i], scales[i]), values=values[i], sums=sums[i])
        for i in range(len(weights))
    ]


def _int4_pieces(codes: Tensor, scales: Tensor) -> tuple[Array, Array]:
    bits = scales.cpu().view(torch.int16).numpy().view(np.uint16)
    return pack_int4(codes.cpu().numpy()), bits


def make_fp8(weight: Tensor, hessian: Tensor, chosen: Format) -> Made:
    """Round a matrix to FP8 by searching the scales that lose least.

    Args:
        weight: f32 [N, D].
        hessian: f32 [D, D], the sum of x x^T over its inputs.
        chosen: `fp8_block` or `fp8_tensor`.
    """
    codes: list[Array] = []
    scales: list[Array] = []
    values = torch.empty_like(weight)
    sums = torch.zeros(3, weight.shape[0], dtype=torch.float64)
    whole = _tensor_scales(weight, hessian) if chosen.kind == "fp8_tensor" else None
    for top in range(0, weight.shape[0], ROWS):
        rows = weight[top : top + ROWS]
        tried, largest = whole or (
            _block_scales(rows, hessian.diagonal()),
            _largest_by_block(rows),
        )
        found = _better_fp8(rows, hessian, tried, largest)
        plain = _fp8(rows, largest)
        codes.append(found[0])
        scales.append(found[1])
        values[top : top + ROWS] = found[2]
        for i, error in enumerate((rows - found[2], rows - plain[2], rows)):
            sums[i, top : top + ROWS] = _energy(error, hessian).cpu()
    joined = scales[0] if whole is not None else np.concatenate(scales)
    return Made(pieces=(np.concatenate(codes), joined), values=values, sums=sums)


def _energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """What rows of a matrix give on the samples, squared and added up: f64 [..., N]."""
    return ((rows @ hessian) * rows).sum(-1, dtype=torch.float64)


_Found = tuple[Array, Array, Tensor]  # codes, scales, values


def _better_fp8(rows: Tensor, hessian: Tensor, tried: Tensor, largest: Tensor) -> _Found:
    """By the scales that were searched, but where outputs are nearer by the largest values.

    The search knows the diagonal of the Hessian alone. Rows of blocks are decided one by one.
    """
    found, plain = _fp8(rows, tried), _fp8(rows, largest)
    gains = _energy(rows - plain[2], hessian) - _energy(rows - found[2], hessian)
    if tried.dim() == 1:  # decided for the whole matrix already
        return found
    short = -len(gains) % FP8_BLOCK
    bands = torch.nn.functional.pad(gains, (0, short)).unflatten(0, (-1, FP8_BLOCK)).sum(1) > 0
    scales = torch.where(bands.unsqueeze(1), tried, largest)
    return _fp8(rows, scales)


def _fp8(rows: Tensor, scales: Tensor) -> _Found:
    """Codes, scales and values of rows by scales [1] or [blocks, blocks]."""
    across = scales if scales.dim() == 1 else _spread(scales, rows.shape)
    ratio = rows / across
    codes = encode_e4m3(ratio.cpu().numpy())
    return codes, scales.cpu().numpy(), round_e4m3(ratio) * across


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    wide = scales.repeat_interleave(FP8_BLOCK, 0)[: shape[0]]
    return wide.repeat_interleave(FP8_BLOCK, 1)[:, : shape[1]]


def _largest_by_block(rows: Tensor) -> Tensor:
    return _some(_by_block(rows).abs().amax((1, 3)) / float(E4M3_MAX))


def _some(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _by_block(rows: Tensor) -> Tensor:
    """[N / 128, 128, D / 128, 128], filled up with zeros."""
    short = [blocks(size) * FP8_BLOCK - size for size in rows.shape]
    padded = torch.nn.functional.pad(rows, (0, short[1], 0, short[0]))
    tiles: Tensor = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    return tiles


def _block_scales(rows: Tensor, importance: Tensor) -> Tensor:
    """The scale of every block that loses least by the diagonal of the Hessian."""
    tiles = _by_block(rows)
    short = tiles.shape[2] * FP8_BLOCK - importance.shape[0]
    counts = torch.nn.functional.pad(importance, (0, short)).unflatten(0, (-1, FP8_BLOCK))
    return _least(tiles, counts, _largest_by_block(rows), (1, 3))


def _tensor_scales(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of a matrix to take, and the one of its largest value."""
    top = _some(weight.abs().amax().reshape(1) / float(E4M3_MAX))
    importance = hessian.diagonal()
    lost = dict.fromkeys(_shares(), 0.0)
    for rows in weight.split(ROWS):
        for share in lost:
            scale = top * share
            error = (round_e4m3(rows / scale) * scale - rows).square() * importance
            lost[share] += float(error.sum(dtype=torch.float64))
    best = top * min(lost, key=lambda share: lost[share])
    gain = sum(
        float((_energy(rows - plain, hessian) - _energy(rows - found, hessian)).sum())
        for rows in weight.split(ROWS)
        for found, plain in [[round_e4m3(rows / scale) * scale for scale in (best, top)]]
    )
    return (best if gain > 0 else top), top


def _least(tiles: Tensor, counts: Tensor, top: Tensor, axes: tuple[int, int]) -> Tensor:
    best, least = top, torch.full_like(top, torch.inf)
    for share in _shares():
        scale = top * share
        across = scale.unsqueeze(1).unsqueeze(3)
        lost = ((round_e4m3(tiles / across) * across - tiles).square() * counts).sum(axes)
        best = torch.where(lost < least, scale, best)
        least = torch.minimum(lost, least)
    return best


def _shares() -> list[float]:
    """From the largest value at code 448 up by small steps: nothing is clipped by any of them.

    Twice the scale is the same grid but for the smallest values, so one octave is all there is.
    """
    return [float(2 ** (i / _FP8_STEPS)) for i in range(_FP8_STEPS)]
