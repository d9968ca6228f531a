"""Error-compensated rounding to INT4 groups and to E4M3: the GPTQ family.

Rounding W to Q makes the output of a linear wrong by (W - Q) X. GPTQ rounds column after column and
moves what each rounding lost onto the columns that are not rounded yet, such that the loss

    tr((W - Q) H (W - Q)^T)        H = X X^T over the calibration tokens

grows least (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", arXiv 2210.17323, 2022). With U the upper
Cholesky factor of H^-1, column j loses e = (w_j - q_j) / U_jj, and the columns behind it give up
e U_j,j+1:. Columns are taken in the order of falling H_jj, so that those that matter most are
rounded while most others can still make up for it; scales are settled before, since the groups of
the stored format are neighbours in the original order.

A scale of INT4 is the one of some candidates about amax / 7.5 that loses least by the diagonal of
H. Afterwards, a few times, every code is moved to where the loss is least while all others stay,
and every scale to the least-squares one for the codes it has. Scales of E4M3 are given.

Where it is known what errors of the outputs cost together, O = G G^T over the gradients G of the
model's loss, the loss is

    tr(O (W - Q) H (W - Q)^T)

which is the model's Fisher information with each matrix's part taken for a Kronecker product
(Tseng, Sun, Hou, De Sa: "Model-preserving adaptive rounding", arXiv 2505.22988, 2025). Codes are
then moved by it, so that an error of one row is made up for in others too.

All matrices of a stack are rounded together. Letters: M matrices, N rows, D columns, G groups.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lingc.calibrate.observers import round_e4m3
from lingc.quantize.formats import INT4_SPAN

Grid = Callable[[Tensor, Tensor], Tensor]
"""Codes of values by scales of the same shape: f32, the multiples that a format can store."""

BLOCK = 64
"""Columns that are rounded before the rest of the matrix is told."""

_SOLVED = 512
"""Rows and columns that are factored together."""

LEAST_SHARE, LARGEST_SHARE = 0.6, 1.075
"""Scales that are tried, as shares of amax / 7.5: from clipping to reaching what is positive."""

CANDIDATES = 20

TURNS = 8
"""Rows of which every so-manieth are moved at once: their pull on each other is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """INT4 values and the BF16 scales they are multiplied by.

    Attributes:
        codes: int8 [M, N, D], -8 to 7.
        scales: bf16 [M, N, G].
    """

    codes: Tensor
    scales: Tensor

    def values(self, group: int) -> Tensor:
        """What they stand for, f32 [M, N, D]."""
        return self.codes.float() * spread(self.scales.float(), group, self.codes.shape[-1])


def spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """Every column's scale: [..., G] -> [..., columns]."""
    return scales.repeat_interleave(group, dim=-1)[..., :columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curvature:
    """What rounding needs of the inputs of a matrix, made once for all that read them.

    Attributes:
        hessian: f32 [M, D, D], damped.
        order: i64 [M, D], columns by falling diagonal.
        factor: f32 [M, D, D], upper U with U^T U the inverse of the ordered hessian.
    """

    hessian: Tensor
    order: Tensor
    factor: Tensor


def curvature(hessian: Tensor, *, damping: float = 0.01) -> Curvature:
    """Prepare sums over tokens of x x^T, f32 or f64 [M, D, D].

    Args:
        hessian: The sums.
        damping: What is added to the diagonal, as a share of its mean; where no token came, the
            diagonal is 1.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).double()
    mean = diagonal.mean(-1, keepdim=True)
    extra = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    order = torch.argsort(diagonal, dim=-1, descending=True, stable=True)
    factor = _factor(hessian, order, extra)
    damped = hessian.to(torch.float32, copy=True)
    damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal + extra)
    return Curvature(hessian=damped, order=order, factor=factor)


def _factor(hessian: Tensor, order: Tensor, extra: Tensor) -> Tensor:
    """U of `Curvature`, with one f64 matrix in memory: those of the widest take a gigabyte.

    In reversed order the damped matrix is L L^T, thus R R^T in the right one, where R, L from back
    to front, is upper. The inverse is R^-T R^-1, and R^-1 is U.
    """
    back = order.flip(-1)
    wide = torch.empty_like(hessian, dtype=torch.float64)
    for rows in _blocks(wide):
        some = hessian.gather(1, back[:, rows].unsqueeze(2).expand_as(wide[:, rows]))
        wide[:, rows] = some.gather(2, back.unsqueeze(1).expand_as(some)).double()
    wide.diagonal(dim1=-2, dim2=-1).add_(extra)
    _to_cholesky(wide)
    _to_inverse(wide)
    factor = torch.empty_like(wide, dtype=torch.float32)
    for rows in _blocks(wide):
        turned = slice(wide.shape[-1] - rows.stop, wide.shape[-1] - rows.start)
        factor[:, turned] = wide[:, rows].tril(rows.start).flip(1, 2)
    return factor


def _to_cholesky(matrix: Tensor) -> None:
    """Put L of L L^T, block row after block row, in the place of a matrix's lower half."""
    for rows in _blocks(matrix):
        for columns in _blocks(matrix[:, :, : rows.start]):
            behind = slice(columns.start)
            left = (
                matrix[:, rows, columns] - matrix[:, rows, behind] @ matrix[:, columns, behind].mT
            )
            own = matrix[:, columns, columns].mT
            made = torch.linalg.solve_triangular(own, left, upper=True, left=False)
            matrix[:, rows, columns] = made
        behind = slice(rows.start)
        own = matrix[:, rows, rows] - matrix[:, rows, behind] @ matrix[:, rows, behind].mT
        matrix[:, rows, rows] = torch.linalg.cholesky(own)


def _to_inverse(lower: Tensor) -> None:
    """Put the inverse of a lower triangle in its place.

    With X the inverse of the block rows above, and A | B the next, of which B stands on the
    diagonal, the next rows of the inverse are -B^-1 A X | B^-1.
    """
    for rows in _blocks(lower):
        own = lower[:, rows, rows].clone()
        unit = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device).expand_as(own)
        lower[:, rows, rows] = torch.linalg.solve_triangular(own, unit, upper=False)
        for columns in _blocks(lower[:, :, : rows.start]):
            behind = slice(columns.start, rows.start)  # X is zero above its diagonal
            above = lower[:, rows, behind] @ lower[:, behind, columns].tril()
            made = torch.linalg.solve_triangular(own, above, upper=False)
            lower[:, rows, columns] = -made


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Runs of a matrix's columns."""
    width = matrix.shape[-1]
    return (slice(i, min(i + _SOLVED, width)) for i in range(0, width, _SOLVED))


def gptq(weight: Tensor, curve: Curvature, group: int, *, rounds: int = 2) -> Rounded:
    """Round matrices to INT4 so that their outputs stay what they were, as far as that goes.

    Args:
        weight: f32 [M, N, D].
        curve: Of their inputs.
        group: Columns that share a scale.
        rounds: How often codes and scales are moved once more.
    """
    diagonal = curve.hessian.diagonal(dim1=-2, dim2=-1)  # [M, D]
    scales = search_scales(weight, diagonal, group)
    codes = compensate(weight, spread(scales.float(), group, weight.shape[-1]), curve, int4)
    for _ in range(rounds):
        across = spread(scales.float(), group, weight.shape[-1])
        codes = _descend(weight, codes, across, curve.hessian, int4)
        scales = refit(weight, codes, scales, curve.hessian, group)
    return Rounded(codes=codes.to(torch.int8), scales=scales)


def compensate(
    weight: Tensor, scales: Tensor, curve: Curvature, grid: Grid, *, rounds: int = 0
) -> Tensor:
    """The codes of GPTQ by given scales, f32 [M, N, D].

    Args:
        weight: f32 [M, N, D].
        scales: Of every value, f32 [M, N, D].
        curve: Of their inputs.
        grid: What can be stored.
        rounds: How often codes are moved once more.
    """
    rows = curve.order.unsqueeze(1).expand_as(weight)
    codes = _sweep(weight.gather(2, rows), scales.gather(2, rows), curve.factor, grid)
    codes = torch.empty_like(codes).scatter_(2, rows, codes)
    for _ in range(rounds):
        codes = _descend(weight, codes, scales, curve.hessian, grid)
    return codes


def couple(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    hessian: Tensor,
    outputs: Tensor,
    grid: Grid,
    *,
    rounds: int,
) -> Tensor:
    """Move codes to where less is lost by what errors of all rows cost together.

    A matrix for which that did not help keeps its codes.

    Args:
        weight: f32 [M, N, D].
        codes: f32 [M, N, D].
        scales: Of every value, f32 [M, N, D].
        hessian: Of the inputs, f32 [M, D, D].
        outputs: Sums of g g^T over gradients of the outputs, f32 [M, N, N].
        grid: What can be stored.
        rounds: How often every code is moved.
    """
    found = codes
    for _ in range(rounds):
        found = _descend(weight, found, scales, hessian, grid, outputs)
    before, after = (
        _coupled_loss(weight - each * scales, hessian, outputs) for each in (codes, found)
    )
    return torch.where((after < before).view(-1, 1, 1), found, codes)


def damped(sums: Tensor, share: float) -> Tensor:
    """Sums of products, [M, N, N], with a share of their mean diagonal added; 1 where that is 0."""
    mean = sums.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    found = sums.clone()
    extra = torch.where(mean > 0, share * mean, torch.ones_like(mean))
    found.diagonal(dim1=-2, dim2=-1).add_(extra)
    return found


def _coupled_loss(error: Tensor, hessian: Tensor, outputs: Tensor) -> Tensor:
    """tr(O E H E^T) of each matrix, f64 [M]."""
    return ((outputs @ error) * (error @ hessian)).sum((1, 2), dtype=torch.float64)


def nearest(weight: Tensor, scales: Tensor, group: int) -> Rounded:
    """Round each value for itself, by given scales."""
    across = spread(scales.float(), group, weight.shape[-1])
    return Rounded(codes=int4(weight, across).to(torch.int8), scales=scales)


def search_scales(weight: Tensor, importance: Tensor, group: int) -> Tensor:
    """The BF16 scale of every group that loses least when values are rounded to nearest.

    Args:
        weight: f32 [M, N, D].
        importance: [M, D], what an error of a column counts.
        group: Columns that share a scale.
    """
    columns = weight.shape[-1]
    short = -columns % group
    grouped = torch.nn.functional.pad(weight, (0, short)).unflatten(-1, (-1, group))
    counts = torch.nn.functional.pad(importance, (0, short)).unflatten(-1, (-1, group)).unsqueeze(1)
    top = grouped.abs().amax(-1) / float(INT4_SPAN)  # [M, N, G]
    best = _bf16(top)
    least = torch.full_like(top, torch.inf)
    for share in torch.linspace(LARGEST_SHARE, LEAST_SHARE, CANDIDATES).tolist():
        scale = _bf16(top * share)
        across = scale.float().unsqueeze(-1)
        lost = (int4(grouped, across) * across - grouped).square_().mul_(counts).sum(-1)
        better = lost < least
        best = torch.where(better, scale, best)
        least = torch.where(better, lost, least)
    return best


def plain_scales(weight: Tensor, group: int) -> Tensor:
    """The scales of rounding to nearest, amax / 7.5 of every group: bf16 [M, N, G]."""
    short = -weight.shape[-1] % group
    grouped = torch.nn.functional.pad(weight, (0, short)).unflatten(-1, (-1, group))
    return _bf16(grouped.abs().amax(-1) / float(INT4_SPAN))


def _bf16(scales: Tensor) -> Tensor:
    """In BF16, 1 where there is nothing to scale."""
    rounded = scales.bfloat16()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) of each matrix, over tr(W H W^T): [M]."""
    error = weight - values
    hessian = hessian.float()
    lost = ((error @ hessian) * error).sum((1, 2))
    whole = ((weight @ hessian) * weight).sum((1, 2))
    return lost / whole.clamp_min(torch.finfo(torch.float32).tiny)


def int4(values: Tensor, scales: Tensor) -> Tensor:
    """The grid of INT4."""
    return torch.round(values / scales).clamp_(-8, 7)


def e4m3(values: Tensor, scales: Tensor) -> Tensor:
    """The grid of FP8: what E4M3 codes stand for."""
    return round_e4m3(values / scales)


def _sweep(weight: Tensor, scales: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """The codes, f32 [M, N, D], rounding columns from first to last."""
    left = weight.clone()
    codes = torch.empty_like(left)
    for start in range(0, weight.shape[-1], BLOCK):
        end = min(start + BLOCK, weight.shape[-1])
        inner = factor[:, start:end, start:end]
        block, lost = left[..., start:end], torch.empty_like(left[..., start:end])
        for j in range(end - start):
            column, scale = block[..., j], scales[..., start + j]
            code = grid(column, scale)
            codes[..., start + j] = code
            error = (column - code * scale) / inner[:, j, j].unsqueeze(1)
            lost[..., j] = error
            block[..., j + 1 :] -= error.unsqueeze(2) * inner[:, j, j + 1 :].unsqueeze(1)
        left[..., end:] -= lost @ factor[:, start:end, end:]
    return codes


def _descend(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    hessian: Tensor,
    grid: Grid,
    outputs: Tensor | None = None,
) -> Tensor:
    """Move every code to where the loss is least while the others stay, column after column.

    With `outputs` rows know of each other: those of a column are moved in `TURNS` turns.
    """
    codes = codes.clone()
    slope = (weight - codes * scales) @ hessian  # what a column still lacks, by H
    turns = _turns(outputs, weight.shape[1])
    weighs = None if outputs is None else outputs.diagonal(dim1=1, dim2=2).contiguous()
    for start in range(0, weight.shape[-1], BLOCK):
        end = min(start + BLOCK, weight.shape[-1])
        inner = hessian[:, start:end, start:end]
        near, moved = slope[..., start:end].clone(), torch.empty_like(slope[..., start:end])
        for j in range(end - start):
            curve = inner[:, j, j].unsqueeze(1)
            scale, code = scales[..., start + j].contiguous(), codes[..., start + j].contiguous()
            value, better = code * scale, torch.empty_like(code)
            if weighs is None:
                better = grid(value + near[..., j] / curve, scale)
            else:
                lacks, bends = near[..., j].clone(), weighs * curve
                for rows, together in turns:
                    mine = scale[:, rows]
                    pull = (together @ lacks.unsqueeze(2)).squeeze(2)
                    found = grid(value[:, rows] + pull / bends[:, rows], mine)
                    better[:, rows] = found
                    lacks[:, rows] -= (found - code[:, rows]) * mine * curve
            codes[..., start + j] = better
            change = (better - code) * scale
            moved[..., j] = change
            near -= change.unsqueeze(2) * inner[:, j].unsqueeze(1)
        slope -= moved @ hessian[:, start:end]
    return codes


def _turns(outputs: Tensor | None, count: int) -> list[tuple[slice, Tensor]]:
    """Rows that are moved at once, and their rows of `outputs`."""
    if outputs is None:
        return []
    parts = [slice(turn, None, TURNS) for turn in range(min(TURNS, count))]
    return [(rows, outputs[:, rows].contiguous()) for rows in parts]


def refit(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, group: int) -> Tensor:
    """The least-squares scale of every group for its codes, group after group, in BF16."""
    columns = weight.shape[-1]
    found = scales.clone()
    error = weight - codes * spread(scales.float(), group, columns)
    for g in range(scales.shape[-1]):
        part = slice(g * group, min((g + 1) * group, columns))
        mine, before = codes[..., part], found[..., g].float()
        pull = (error @ hessian[:, :, part] * mine).sum(-1)
        weighed = (mine @ hessian[:, part, part] * mine).sum(-1)
        after = before + pull / weighed.clamp_min(torch.finfo(torch.float32).tiny)
        # A group of codes that are nearly all zero would take any scale.
        sound = (weighed > 0) & (after > before / 2) & (after < before * 2)
        after = torch.where(sound, after, before).bfloat16()
        error[..., part] -= mine * (after.float() - before).unsqueeze(-1)
        found[..., g] = after
    return found
