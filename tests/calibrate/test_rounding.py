"""Rounding by what inputs look like: less is lost, and what is made can be stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lingc.calibrate import rounding
from lingc.calibrate.matrices import DAMPINGS, Made, Method, choose_damping, make_fp8, make_int4
from lingc.calibrate.rounding import curvature, gptq, loss, nearest, plain_scales, search_scales
from lingc.quantize.formats import (
    dequantize_fp8_block,
    dequantize_fp8_tensor,
    dequantize_int4_group,
    quantize_fp8_block,
    quantize_fp8_tensor,
    quantize_int4_group,
)
from lingc.quantize.recipes import Format


def _case(rows: int = 24, columns: int = 80, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix, and x x^T of inputs whose channels have much in common."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) * 0.2 + torch.eye(columns)
    x = torch.randn(600, columns, generator=draw) @ mix
    return torch.randn(rows, columns, generator=draw), x.T @ x


def _made(weight: Tensor, hessian: Tensor, chosen: Format, *, method: Method | None = None) -> Made:
    make = make_int4 if chosen.kind == "int4_group" else make_fp8
    return make(weight[None], hessian[None], chosen, method or Method(), damping=0.01)[0]


def _outputs(rows: int, *, seed: int = 1) -> Tensor:
    """G g^T of gradients that have much in common, [1, rows, rows]."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(rows, rows, generator=draw) * 0.2 + torch.eye(rows)
    g = torch.randn(600, rows, generator=draw) @ mix
    return (g.T @ g).unsqueeze(0)


@pytest.mark.parametrize("columns", [40, 1100])  # within a block of the factorization, and over two
def test_the_factor_is_that_of_the_inverse(columns: int) -> None:
    hessians = torch.stack([_case(1, columns, seed=seed)[1] for seed in range(2)])

    curve = curvature(hessians, damping=0.1)

    for hessian, damped, order, factor in zip(
        hessians, curve.hessian, curve.order, curve.factor, strict=True
    ):
        diagonal = hessian.diagonal()
        extra = torch.diag(0.1 * diagonal.mean().expand(columns))
        torch.testing.assert_close(damped, hessian + extra)
        assert bool((diagonal[order].diff() <= 0).all())
        assert bool((factor.tril(-1) == 0).all())
        ordered = (hessian.double() + extra.double())[order][:, order]
        wide = factor.double()
        eye = torch.eye(columns, dtype=torch.float64)
        torch.testing.assert_close(wide.T @ wide @ ordered, eye, rtol=0, atol=1e-4)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_loses_less_than_searched_scales_and_these_less_than_nearest(
    group: int, seed: int
) -> None:
    weight, hessian = (x.unsqueeze(0) for x in _case(seed=seed))
    diagonal = hessian.diagonal(dim1=1, dim2=2)

    by_nearest = nearest(weight, plain_scales(weight, group), group)
    by_search = nearest(weight, search_scales(weight, diagonal, group), group)
    by_gptq = gptq(weight, curvature(hessian), group)

    losses = [
        loss(weight, x.values(group), hessian).item() for x in (by_nearest, by_search, by_gptq)
    ]
    assert losses[1] < losses[0]
    assert losses[2] < 0.8 * losses[1]


def test_moving_codes_and_scales_once_more_only_helps() -> None:
    weight, hessian = (x.unsqueeze(0) for x in _case())
    curve = curvature(hessian)

    losses = [
        loss(weight, gptq(weight, curve, 32, rounds=rounds).values(32), curve.hessian).item()
        for rounds in range(4)
    ]

    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.95 * losses[0]


def test_what_is_made_can_be_stored() -> None:
    weight, hessian = (x.unsqueeze(0) for x in _case(columns=77))
    weight[0, :, 32:64] = 0  # a group of zeros

    made = gptq(weight, curvature(hessian), 32)

    assert made.codes.dtype == torch.int8
    assert -8 <= made.codes.min() < made.codes.max() <= 7
    assert made.scales.shape == (1, 24, 3)
    assert made.scales.dtype == torch.bfloat16
    assert bool((made.scales > 0).all())
    assert bool(made.scales.isfinite().all())
    assert not made.values(32)[0, :, 32:64].any()


def test_a_stack_is_rounded_as_its_matrices_are() -> None:
    cases = [_case(seed=seed) for seed in range(3)]
    weights, hessians = (torch.stack(each) for each in zip(*cases, strict=True))

    together = gptq(weights, curvature(hessians), 32)

    for i, (weight, hessian) in enumerate(cases):
        alone = gptq(weight.unsqueeze(0), curvature(hessian.unsqueeze(0)), 32)
        same = (together.codes[i] == alone.codes[0]).float().mean()
        assert same > 0.99  # sums of another order may tip a tie


def test_without_a_token_nothing_is_better_than_the_weights_themselves() -> None:
    weight, hessian = (x.unsqueeze(0) for x in _case())

    made = gptq(weight, curvature(hessian * 0), 32)

    error = (made.values(32) - weight).square().sum()
    plain = (nearest(weight, plain_scales(weight, 32), 32).values(32) - weight).square().sum()
    assert error < plain


@pytest.mark.parametrize("kind", ["int4_group", "fp8_block", "fp8_tensor"])
@pytest.mark.parametrize("rows", [24, 300])
def test_pieces_give_back_the_values_and_are_never_worse_than_nearest(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingc.calibrate.matrices.ROWS", 128)  # several runs of rows
    weight, hessian = _case(rows, 200)
    chosen = Format(kind=kind, group=32 if kind == "int4_group" else 0)

    made = _made(weight, hessian, chosen)

    codes, scales = made.pieces
    if kind == "int4_group":
        values = dequantize_int4_group(codes, scales, 32, 200)
        want = dequantize_int4_group(*quantize_int4_group(weight.numpy(), 32), 32, 200)
    elif kind == "fp8_block":
        values = dequantize_fp8_block(codes, scales)
        want = dequantize_fp8_block(*quantize_fp8_block(weight.numpy()))
    else:
        values = dequantize_fp8_tensor(codes, scales)
        want = dequantize_fp8_tensor(*quantize_fp8_tensor(weight.numpy()))
    assert torch.equal(torch.from_numpy(values), made.values)
    by_nearest = loss(weight[None], torch.from_numpy(want)[None], hessian[None]).item()
    assert made.nearest_loss_of(0, rows) == pytest.approx(by_nearest, rel=1e-3)
    assert made.loss_of(0, rows) <= made.nearest_loss_of(0, rows)


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_tensor"])
def test_of_fp8_searching_scales_gains_something_and_making_up_for_errors_more(kind: str) -> None:
    weight, hessian = _case(256, 256)
    chosen = Format(kind=kind)

    searched = _made(weight, hessian, chosen, method=Method(fp8="search"))
    made = _made(weight, hessian, chosen)

    nearest = made.nearest_loss_of(0, 256)
    assert searched.nearest_loss_of(0, 256) == pytest.approx(nearest)
    assert searched.loss_of(0, 256) < nearest
    assert made.loss_of(0, 256) < 0.7 * searched.loss_of(0, 256)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    tokens=st.integers(0, 60),
    size=st.sampled_from((1e-6, 1.0, 1e4)),
    kind=st.sampled_from(("fp8_block", "fp8_tensor")),
    seed=st.integers(0, 2**16),
)
def test_fp8_is_never_worse_than_nearest_by_what_it_was_rounded_by(
    rows: int, columns: int, tokens: int, size: float, kind: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw) * size
    weight[:, torch.rand(columns, generator=draw) < 0.2] = 0
    x = torch.randn(tokens, columns, generator=draw)
    outputs = _outputs(rows, seed=seed)

    (made,) = make_fp8(
        weight[None], (x.T @ x)[None], Format(kind=kind), Method(), damping=0.1, outputs=[outputs]
    )

    # A search by blocks is decided by runs of 128 rows; of one scale, by all of them.
    assert made.sums[0].sum() <= made.sums[1].sum() * (1 + 1e-5)
    codes, scales = made.pieces
    back = (dequantize_fp8_block if kind == "fp8_block" else dequantize_fp8_tensor)(codes, scales)
    assert torch.equal(torch.from_numpy(back), made.values)


@pytest.mark.parametrize("grid", [rounding.int4, rounding.e4m3])
def test_rows_that_know_of_each_other_lose_less_together(grid: rounding.Grid) -> None:
    weight, hessian = (x.unsqueeze(0) for x in _case(48))
    outputs, curve = _outputs(48), curvature(hessian)
    step = weight.abs().amax() / (7.5 if grid is rounding.int4 else 448)
    scales = step.expand_as(weight)
    codes = rounding.compensate(weight, scales, curve, grid, rounds=2)

    def lost(found: Tensor) -> float:
        return float(rounding._coupled_loss(weight - found * scales, curve.hessian, outputs))

    losses = [
        lost(rounding.couple(weight, codes, scales, curve.hessian, outputs, grid, rounds=rounds))
        for rounds in (0, 1, 3)
    ]
    assert losses[0] == lost(codes)
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < losses[1]


def test_rows_that_have_nothing_in_common_are_left_as_they_are() -> None:
    weight, hessian = (x.unsqueeze(0) for x in _case())
    curve, scales = curvature(hessian), (weight.abs().amax() / 7.5).expand_as(weight)
    codes = rounding.compensate(weight, scales, curve, rounding.int4, rounds=30)
    apart = torch.eye(24).unsqueeze(0)

    found = rounding.couple(weight, codes, scales, curve.hessian, apart, rounding.int4, rounds=1)

    assert (found == codes).float().mean() > 0.999


def _halves(tokens: int, *, seed: int = 0) -> Tensor:
    """Sums over two halves of few or many tokens that are drawn alike."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(80, 80, generator=draw) * 0.2 + torch.eye(80)
    x = torch.randn(2, tokens, 80, generator=draw) @ mix
    return (x.transpose(1, 2) @ x).unsqueeze(0)


def test_few_tokens_are_trusted_less_than_many() -> None:
    weights, chosen = _case()[0].unsqueeze(0), Format(kind="int4_group", group=32)

    few, many = (choose_damping(weights, _halves(tokens), chosen) for tokens in (20, 5000))

    assert few is not None
    assert many is not None
    assert few > many
    assert many == min(DAMPINGS)


def test_without_a_second_half_no_damping_is_chosen() -> None:
    halves = _halves(100)
    halves[:, 1] = 0
    weights, chosen = _case()[0].unsqueeze(0), Format(kind="int4_group", group=32)

    assert choose_damping(weights, halves, chosen) is None


def test_losses_of_rows_add_up() -> None:
    weight, hessian = _case(40)
    made = _made(weight, hessian, Format(kind="int4_group", group=32))

    alone = rounding.loss(weight[None, :16], made.values[None, :16], hessian[None]).item()

    assert made.loss_of(0, 16) == pytest.approx(alone, rel=1e-3)
