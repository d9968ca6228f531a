"""Observers: what bounds inputs, and what error each granularity has."""

import pytest
import torch
from torch import Tensor

from lingc.calibrate.observers import RULES, Observer, round_e4m3, scale_of


def _observed(*parts: Tensor) -> Observer:
    observer = Observer(parts[0].shape[1])
    for part in parts:
        observer.see(part)
    return observer


def _normal(rows: int = 2000, width: int = 130, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_absmax_is_the_largest_magnitude() -> None:
    x = _normal()
    x[7, 3] = -40.5

    observer = _observed(x)

    assert observer.bound("absmax") == 40.5
    assert observer.channel_spread()["largest"] == 40.5
    assert observer.channel_spread()["median"] < 6


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_a_percentile_is_that_of_the_values_to_within_their_bins(percentile: float) -> None:
    x = _normal()

    bound = _observed(x).bound("percentile", percentile)

    exact = torch.quantile(x.abs().flatten()[:200_000], percentile / 100).item()
    assert bound == pytest.approx(exact, rel=0.02)


def test_mse_clips_an_outlier_that_would_push_the_rest_below_the_smallest_code() -> None:
    x = _normal() * 1e-3
    x[0, 0] = 400.0

    observer = _observed(x)
    bounds = {rule: observer.bound(rule) for rule in RULES}
    errors = {rule: observer.errors(bound)["tensor"] for rule, bound in bounds.items()}

    assert errors["mse"] <= min(errors.values()) * 1.0001


def test_the_error_of_a_tensor_is_the_one_that_rounding_makes() -> None:
    x = _normal()
    observer = _observed(x)
    bound = observer.bound("absmax")

    scale = scale_of(bound)
    real = ((round_e4m3(x / scale) * scale - x).norm() / x.norm()).item()

    assert observer.errors(bound)["tensor"] == pytest.approx(real, rel=0.05)


def test_finer_granularity_helps_where_tokens_differ() -> None:
    x = _normal() * torch.logspace(-4, 3, 2000).unsqueeze(1)

    errors = _observed(x).errors(float(x.abs().max()))

    assert errors["block"] < 0.03
    assert errors["token"] < 0.03


def test_parts_add_up_to_the_whole() -> None:
    x = _normal()

    whole, parts = _observed(x), _observed(x[:700], x[700:], x[:0])

    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.channel, parts.channel)
    for rule in RULES:
        assert whole.bound(rule) == parts.bound(rule)


def test_inputs_that_are_all_zero_have_a_scale() -> None:
    observer = _observed(torch.zeros(3, 5))

    assert {observer.bound(rule) for rule in RULES} == {0.0}
    assert scale_of(0.0) == 1.0
    assert set(observer.errors(0.0).values()) == {0.0}
