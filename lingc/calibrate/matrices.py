"""One set of matrices that read the same input: rounded by what was seen of it.

What is made is stored as a checkpoint stores it, and handed back as the values that the layers
behind shall see.
"""

from collections.abc import Iterator, Sequence
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
    widen_bf16,
)
from lingc.quantize.recipes import Format

Array = NDArray[Any]

INT4_METHODS = ("gptq", "search", "nearest")
FP8_METHODS = ("gptq", "search", "nearest")
LOSSES = ("model", "matrix")

DAMPINGS = (0.02, 0.1, 0.5, 3.0)
"""From trusting the samples to hardly looking at them: the less there are, the more is right."""

USUAL_DAMPING = 0.1
"""Where the samples are too few to choose by."""

_OUTPUT_DAMPING = 0.5
_COUPLED_ROUNDS = 2
_REFITS = 2
_TRIED_MATRICES, _TRIED_ROWS = 8, 128

ROWS = 4096
"""Rows of a matrix that are rounded together where nothing couples them: memory is of these."""

_FP8_STEPS = 16
"""Scales of FP8 that are tried, up to the one that is half as fine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How weights are rounded.

    Attributes:
        int4: `gptq` moves errors to columns that can still make up for them; `search` looks for
            the scale of each group that loses least; `nearest` leaves it to `lingc quantize`.
        fp8: The same for FP8, by blocks or whole matrices.
        loss: What `gptq` keeps small: of the `model`, by its gradients, or of each `matrix` apart.
        damping: Of `gptq`, see `rounding.curvature`; where None, the one of `DAMPINGS` that does
            best for half of the samples when the other half is rounded by.
        rounds: Of `gptq`.
    """

    int4: str = "gptq"
    fp8: str = "gptq"
    loss: str = "model"
    damping: float | None = None
    rounds: int = 2

    def is_used(self, chosen: Format) -> bool:
        """Whether a format is rounded by data at all."""
        if chosen.kind == "int4_group":
            return self.int4 != "nearest"
        return chosen.kind.startswith("fp8") and self.fp8 != "nearest"

    def compensates(self, chosen: Format) -> bool:
        """Whether a format is rounded by GPTQ."""
        if chosen.kind == "int4_group":
            return self.int4 == "gptq"
        return chosen.kind.startswith("fp8") and self.fp8 == "gptq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A rounded matrix.

    Attributes:
        pieces: As stored: codes and scales.
        values: What they stand for, f32 [N, D]; empty where nobody reads them.
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


def runs_of(source: Source, module: str, count: int, device: torch.device) -> Iterator[Tensor]:
    """Rows of a matrix, f32 [count, D] and fewer at last; of a plain one no more is read."""
    name = f"{module}.weight"
    if source.kind(name) != "plain":
        yield from weight_of(source, module, device).split(count)
        return
    values, dtype = source.plain(name)
    for first in range(0, len(values), count):
        taken = values[first : first + count]
        some = widen_bf16(taken) if dtype == "bf16" else np.array(taken)
        yield torch.from_numpy(some).to(device)


def tried_step(rows: int) -> int:
    """Every so-manieth of a matrix's rows is tried where a damping is chosen."""
    return max(1, rows // _TRIED_ROWS)


def count_matrices(source: Source, prefix: str = "") -> int:
    """Matrices that a calibration is done with one by one, of the model or a layer."""
    return sum(
        name.startswith(prefix)
        and len(source.shape(name)) == 2
        and not name.endswith(("word_embeddings.weight", ".mlp.gate.weight", "kv_b_proj.weight"))
        for name in source.names
    )


def choose_damping(weights: Tensor, halves: Tensor, chosen: Format) -> float | None:
    """The damping with which GPTQ by one half of the samples loses least on the other.

    None where no matrix was reached by both halves.

    Args:
        weights: f32 [M, N, D], of which a few matrices and rows are tried.
        halves: f32 [M, 2, D, D], sums of x x^T over each half.
        chosen: Says the group.
    """
    traces = halves.diagonal(dim1=2, dim2=3).sum(-1)  # [M, 2]
    seen = (traces > 0).all(-1).nonzero()[:_TRIED_MATRICES, 0]
    if not len(seen):
        return None
    rows = weights[:, :: tried_step(weights.shape[1])][:, :_TRIED_ROWS]
    if len(seen) < len(weights):  # those of the widest matrices are large, and not copied
        rows, halves = rows[seen], halves[seen]
    lost = {}
    for damping in DAMPINGS:
        values = _tried(rows, halves[:, 0], chosen, damping)
        energy = _energy(rows - values, halves[:, 1]).sum(1)
        lost[damping] = float((energy.cpu() / traces[seen, 1].cpu()).sum())
    return min(lost, key=lambda damping: lost[damping])


def _tried(rows: Tensor, hessians: Tensor, chosen: Format, damping: float) -> Tensor:
    """Values of rows by GPTQ; the curvature, large as it may be, does not outlive it."""
    curve = rounding.curvature(hessians, damping=damping)
    if chosen.kind == "int4_group":
        return rounding.gptq(rows, curve, chosen.group, rounds=0).values(chosen.group)
    across = _some(rows.abs().amax((1, 2), keepdim=True) / float(E4M3_MAX)).expand_as(rows)
    return rounding.compensate(rows, across, curve, rounding.e4m3) * across


def make_int4(
    weights: Tensor,
    hessians: Tensor,
    chosen: Format,
    method: Method,
    *,
    damping: float,
    outputs: Sequence[Tensor] = (),
) -> list[Made]:
    """Round matrices to INT4 groups by the sums of x x^T over their inputs.

    Args:
        weights: f32 [M, N, D].
        hessians: f32 [M, D, D].
        chosen: Says the group.
        method: How.
        damping: Of `gptq`.
        outputs: For one run of rows after the other, sums of g g^T over gradients of what they
            give, f32 [M, n, n]; none where they are not known.
    """
    group = chosen.group
    is_gptq = method.int4 == "gptq"
    curve = rounding.curvature(hessians, damping=damping) if is_gptq else None
    parts: list[rounding.Rounded] = []
    plains: list[Tensor] = []
    for span, of_outputs in _runs(weights.shape[1], outputs):
        rows = weights[:, span]
        plain = rounding.nearest(rows, rounding.plain_scales(rows, group), group)
        plains.append(_energy(rows - plain.values(group), hessians))
        if curve is not None:
            found = rounding.gptq(rows, curve, group, rounds=method.rounds)
            if of_outputs is not None:
                coupled = _coupled_int4(rows, found, curve, of_outputs, group)
                gain = plains[-1] - _energy(rows - coupled.values(group), hessians)
                better = _by_bands(gain).unsqueeze(2)
                found = rounding.Rounded(
                    codes=torch.where(better, coupled.codes, found.codes),
                    scales=torch.where(better, coupled.scales, found.scales),
                )
        else:
            scales = rounding.search_scales(rows, hessians.diagonal(dim1=1, dim2=2), group)
            found = rounding.nearest(rows, scales, group)
        parts.append(found)
    codes = torch.cat([part.codes for part in parts], dim=1)
    scales = torch.cat([part.scales for part in parts], dim=1)
    values = rounding.Rounded(codes=codes, scales=scales).values(group)
    sums = _sums(weights, values, hessians, torch.cat(plains, dim=1))
    return [
        Made(pieces=_int4_pieces(codes[i], scales[i]), values=values[i], sums=sums[i])
        for i in range(len(weights))
    ]


def _runs(count: int, outputs: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor | None]]:
    """Rows that are rounded together, and what is known of their outputs."""
    top = 0
    for each in outputs:
        yield slice(top, top + each.shape[-1]), each
        top += each.shape[-1]
    for first in range(top, count, ROWS):
        yield slice(first, min(first + ROWS, count)), None


def _coupled_int4(
    rows: Tensor,
    found: rounding.Rounded,
    curve: rounding.Curvature,
    outputs: Tensor,
    group: int,
) -> rounding.Rounded:
    """Codes moved by what errors of all rows cost together, and scales between that.

    It may pay to let outputs of a few rows be further off: `make_int4` sees to it that it is not
    further than by rounding to nearest.
    """
    codes, scales = found.codes.float(), found.scales
    outputs = rounding.damped(outputs, _OUTPUT_DAMPING)
    for turn in range(_REFITS + 1):
        if turn:
            scales = rounding.refit(rows, codes, scales, curve.hessian, group)
        across = rounding.spread(scales.float(), group, rows.shape[-1])
        codes = rounding.couple(
            rows, codes, across, curve.hessian, outputs, rounding.int4, rounds=_COUPLED_ROUNDS
        )
    return rounding.Rounded(codes=codes.to(torch.int8), scales=scales)


def _sums(weights: Tensor, values: Tensor, hessians: Tensor, plain: Tensor) -> Tensor:
    """Of each matrix what `Made.sums` holds: f64 [M, 3, N]."""
    made = torch.zeros(len(weights), 3, weights.shape[1], dtype=torch.float64)
    made[:, 1] = plain.cpu()
    for top in range(0, weights.shape[1], ROWS):
        rows = slice(top, top + ROWS)
        made[:, 0, rows] = _energy(weights[:, rows] - values[:, rows], hessians).cpu()
        made[:, 2, rows] = _energy(weights[:, rows], hessians).cpu()
    return made


def _int4_pieces(codes: Tensor, scales: Tensor) -> tuple[Array, Array]:
    bits = scales.cpu().view(torch.int16).numpy().view(np.uint16)
    return pack_int4(codes.cpu().numpy()), bits


def make_fp8(
    weights: Tensor,
    hessians: Tensor,
    chosen: Format,
    method: Method,
    *,
    damping: float,
    outputs: Sequence[Tensor] = (),
) -> list[Made]:
    """Round matrices to FP8: search the scales that lose least, then make up for errors.

    Args:
        weights: f32 [M, N, D].
        hessians: f32 [M, D, D].
        chosen: `fp8_block` or `fp8_tensor`.
        method: How.
        damping: Of `gptq`.
        outputs: As for `make_int4`.
    """
    diagonals = hessians.diagonal(dim1=1, dim2=2)
    wholes = [
        _tensor_scales(weight, hessian) if chosen.kind == "fp8_tensor" else None
        for weight, hessian in zip(weights, hessians, strict=True)
    ]
    is_gptq = method.fp8 == "gptq"
    curve = rounding.curvature(hessians, damping=damping) if is_gptq else None
    codes: list[Array] = []
    stored: list[list[Tensor]] = [[] for _ in weights]
    values = torch.empty_like(weights)
    plain = torch.empty(weights.shape[:2], dtype=torch.float64, device=weights.device)
    for span, of_outputs in _runs(weights.shape[1], outputs):
        rows = weights[:, span]
        across = torch.empty_like(rows)
        for i, whole in enumerate(wholes):
            tried, largest = whole or (
                _block_scales(rows[i], diagonals[i]),
                _largest_by_block(rows[i]),
            )
            scales = _better_scales(rows[i], hessians[i], tried, largest)
            stored[i].append(scales)
            across[i] = _spread(scales, rows[i].shape)
            plain[i, span] = _energy(rows[i] - _nearest_fp8(rows[i], largest), hessians[i])
        found = rounding.e4m3(rows, across)
        if curve is not None:
            found = _compensated_fp8(rows, found, across, hessians, curve, of_outputs, method)
        codes.append(encode_e4m3(found.cpu().numpy()))
        values[:, span] = found * across
    sums = _sums(weights, values, hessians, plain)
    joined = np.concatenate(codes, axis=1)
    return [
        Made(
            pieces=(
                joined[i],
                (mine[0] if wholes[i] is not None else torch.cat(mine)).cpu().numpy(),
            ),
            values=values[i],
            sums=sums[i],
        )
        for i, mine in enumerate(stored)
    ]


def _compensated_fp8(
    rows: Tensor,
    nearest: Tensor,
    scales: Tensor,
    hessians: Tensor,
    curve: rounding.Curvature,
    outputs: Tensor | None,
    method: Method,
) -> Tensor:
    """Codes of GPTQ, but in bands of rows where outputs would not come nearer by them."""
    found = rounding.compensate(rows, scales, curve, rounding.e4m3, rounds=method.rounds)
    if outputs is not None:
        found = rounding.couple(
            rows,
            found,
            scales,
            curve.hessian,
            rounding.damped(outputs, _OUTPUT_DAMPING),
            rounding.e4m3,
            rounds=_COUPLED_ROUNDS * (_REFITS + 1),
        )
    before, after = (_energy(rows - each * scales, hessians) for each in (nearest, found))
    return torch.where(_by_bands(before - after).unsqueeze(2), found, nearest)


def _by_bands(gains: Tensor) -> Tensor:
    """Whether 128 rows gain together: bool [M, N] of gains by row, [M, N]."""
    better = _bands(gains) > 0
    return better.repeat_interleave(FP8_BLOCK, dim=1)[:, : gains.shape[1]]


def _bands(of_rows: Tensor) -> Tensor:
    """Sums over the rows of a block: [..., N] -> [..., N / 128]."""
    short = -of_rows.shape[-1] % FP8_BLOCK
    padded = torch.nn.functional.pad(of_rows, (0, short))
    sums: Tensor = padded.unflatten(-1, (-1, FP8_BLOCK)).sum(-1)
    return sums


def _energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """What rows of a matrix give on the samples, squared and added up: f64 [..., N]."""
    return ((rows @ hessian) * rows).sum(-1, dtype=torch.float64)


def _better_scales(rows: Tensor, hessian: Tensor, tried: Tensor, largest: Tensor) -> Tensor:
    """The scales that were searched, but where outputs are nearer by the largest values.

    The search knows the diagonal of the Hessian alone. Rows of blocks are decided one by one.
    """
    if tried.dim() == 1:  # decided for the whole matrix already
        return tried
    found, plain = (_energy(rows - _nearest_fp8(rows, each), hessian) for each in (tried, largest))
    return torch.where(_bands(plain - found).unsqueeze(1) > 0, tried, largest)


def _nearest_fp8(rows: Tensor, scales: Tensor) -> Tensor:
    """Values of rows by scales [1] or [blocks, blocks]."""
    across = _spread(scales, rows.shape)
    return rounding.e4m3(rows, across) * across


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """Every value's scale, of scales [1] or [blocks, blocks]."""
    if scales.dim() == 1:
        return scales.expand(shape)
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
