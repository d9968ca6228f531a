"""A mixed recipe: what units cost, what is chosen for a budget, and what is told of it."""

from pathlib import Path

import pytest
import torch

from lingc.calibrate.mix import FORMATS, Mixed, bytes_per_token, mix, units_of
from lingc.calibrate.mix_page import render
from lingc.checkpoint import Checkpoint, open_checkpoint
from lingc.checkpoint.expected import matrix_modules
from lingc.checkpoint.quantizer import quantize_checkpoint
from lingc.errors import UsageError
from lingc.model.config import ModelConfig
from lingc.model.loading import from_source
from lingc.quantize.recipes import load_recipe, parse_recipe
from tests.calibrate.conftest import read

FULL = Path(__file__).parents[2] / "artifacts/checkpoints/ling-2.6-flash"


@pytest.fixture(scope="module")
def mixed(small: Checkpoint, rows: Path) -> Mixed:
    full, least = (
        bytes_per_token(small.config, load_recipe(name)) for name in ("bf16", "int4-all")
    )
    return mix(small, read(rows, count=4), (full + least) / 2)


def _eager_kl(small: Checkpoint, rows: Path, other: Path) -> float:
    """Mean divergence of a quantized checkpoint from the plain one, by eager alone."""
    plain, rounded = from_source(small), from_source(open_checkpoint(other))
    total, count = 0.0, 0
    for one in read(rows, count=4).samples:
        ids = torch.tensor([one.ids])
        with torch.inference_mode():
            p, q = (model(ids)[0].log_softmax(-1) for model in (plain, rounded))
        total += float((p.exp() * (p - q)).sum())
        count += len(one.ids)
    return total / count


def test_what_is_chosen_costs_what_eager_says(
    mixed: Mixed, small: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    made = quantize_checkpoint(small, mixed.recipe, tmp_path / "out")

    assert mixed.chosen.measured == pytest.approx(_eager_kl(small, rows, made.path), rel=1e-3)


def test_a_price_is_that_of_one_unit_alone(
    mixed: Mixed, small: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    unit = next(one for one in mixed.units if one.name == "layer 1 experts")
    rule = {"modules": list(unit.patterns), "format": "int4_group", "group": 128}
    recipe = parse_recipe({"name": "one", "rules": [rule]}, source="one")
    made = quantize_checkpoint(small, recipe, tmp_path / "out")

    prices = {(one.unit, one.format): one.kl for one in mixed.prices}

    price = prices["layer 1 experts", "int4_group(128)"]
    assert price == pytest.approx(_eager_kl(small, rows, made.path), rel=1e-3)
    assert price > prices["layer 1 experts", "fp8_block"] > 0


def test_the_budget_is_kept_and_used(mixed: Mixed, small: Checkpoint) -> None:
    assert mixed.chosen.bytes <= mixed.budget
    assert bytes_per_token(small.config, mixed.recipe) == pytest.approx(mixed.chosen.bytes)
    larger = [point for point in mixed.curve if mixed.chosen.bytes < point.bytes <= mixed.budget]
    assert not larger


def test_the_curve_falls_from_the_smallest_formats_to_none(mixed: Mixed) -> None:
    sizes = [point.bytes for point in mixed.curve]
    assert sizes == sorted(sizes)
    assert set(mixed.curve[0].formats) == {FORMATS[-1]}
    assert set(mixed.curve[-1].formats) == {FORMATS[0]}
    assert mixed.curve[-1].predicted == 0.0
    assert mixed.curve[-1].measured == pytest.approx(0.0, abs=1e-9)
    measured = [point.measured for point in mixed.curve if point.measured is not None]
    assert len(measured) >= 5
    assert measured[0] == max(measured)


def test_the_recipe_is_one_like_any_other(mixed: Mixed, small: Checkpoint) -> None:
    again = parse_recipe(mixed.recipe.document(), source="mixed")

    assert again == mixed.recipe
    again.check_matches(matrix_modules(small.config))
    mtp = f"model.layers.{small.config.mtp_layer}.mlp.experts.0.up_proj"
    votes = [
        f for u, f in zip(mixed.units, mixed.chosen.formats, strict=True) if "experts" in u.name
    ]
    assert votes.count(again.format_of(mtp)) == max(map(votes.count, FORMATS))


def test_a_budget_below_the_smallest_formats_is_refused(small: Checkpoint, rows: Path) -> None:
    with pytest.raises(UsageError, match=r"a token reads \d+ bytes with every unit in int4_group"):
        mix(small, read(rows, count=2), 1000.0)


@pytest.mark.parametrize(
    ("name", "billions"), [("bf16", 13.61), ("fp8", 7.57), ("int4", 9.13), ("int4-all", 3.7)]
)
def test_bytes_a_token_are_those_of_the_full_size_model(name: str, billions: float) -> None:
    """Without norms, and with the scales of FP8 blocks."""
    config = ModelConfig.from_file(FULL)

    assert bytes_per_token(config, load_recipe(name)) / 1e9 == pytest.approx(billions, rel=0.01)


def test_units_are_what_the_recipes_quantize() -> None:
    config = ModelConfig.from_file(FULL)
    main = f"model.layers.{config.mtp_layer}."
    recipe = load_recipe("int4-all")
    wanted = {
        module
        for module in matrix_modules(config)
        if recipe.format_of(module).kind != "plain" and not module.startswith(main)
    }

    assert {module for unit in units_of(config) for module in unit.modules} == wanted


def test_the_page_shows_curve_budget_and_prices(mixed: Mixed) -> None:
    page = render(mixed)

    assert page.count("<polyline") == 1
    assert page.count("<circle") == sum(bool(point.measured) for point in mixed.curve)
    assert 'class="budget"' in page
    assert all(unit.name in page for unit in mixed.units)
    assert "http" not in page.replace("http-equiv", "")
