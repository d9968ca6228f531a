"""How far the samples are trusted: chosen for each kind of matrix, and told of each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lingc.calibrate import layer, rounder
from lingc.calibrate.matrices import USUAL_DAMPING, Made, choose_damping
from lingc.calibrate.run import Settings, calibrate
from lingc.checkpoint import Checkpoint
from lingc.quantize.recipes import Format, load_recipe, parse_recipe
from tests.calibrate.conftest import brisk, read


@pytest.fixture(autouse=True)
def _brisk() -> Iterator[None]:
    with brisk():
        yield


def _watched_dampings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Formats and dampings that matrices will be rounded with, in that order."""
    used: list[tuple[str, float]] = []

    def watched(make: Callable[..., list[Made]]) -> Callable[..., list[Made]]:
        def made(*given: Any, **more: Any) -> list[Made]:
            used.append((given[2].kind, more["damping"]))
            return make(*given, **more)

        return made

    for name in ("make_int4", "make_fp8"):
        monkeypatch.setattr(rounder, name, watched(getattr(rounder, name)))
    return used


def test_experts_of_two_formats_have_dampings_of_their_own(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [
        {"modules": ["*.experts.[0-3].*"], "format": "int4_group", "group": 32},
        {"modules": ["*.experts.*"], "format": "fp8_block"},
    ]
    recipe = parse_recipe({"name": "two", "activations": "fp8", "rules": rules}, source="two.json")
    wanted = {"int4_group": 0.02, "fp8_block": 3.0}
    used = _watched_dampings(monkeypatch)
    monkeypatch.setattr(rounder, "choose_damping", lambda _w, _h, chosen: wanted[chosen.kind])

    made = calibrate(small, recipe, read(rows), tmp_path / "out", Settings(fallback_below=2))

    assert set(used) == set(wanted.items())
    told = {(one["format"].split("(")[0], one["damping"]) for one in made.document["matrices"]}
    assert told == set(wanted.items())


def test_an_expert_that_one_half_did_not_reach_decides_for_no_other(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = _watched_dampings(monkeypatch)
    chosen: list[float | None] = []

    def choose(weights: torch.Tensor, halves: torch.Tensor, form: Format) -> float | None:
        if not chosen:
            halves = halves * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        chosen.append(choose_damping(weights, halves, form))
        return chosen[-1]

    monkeypatch.setattr(layer, "STACKED", 1)
    monkeypatch.setattr(rounder, "choose_damping", choose)
    calibrate(small, load_recipe("int4"), read(rows), tmp_path / "out", Settings(fallback_below=2))

    # The gates of layer 1: of the first expert, of the second, and of all that follow.
    assert used[0] == ("int4_group", USUAL_DAMPING)
    assert chosen[2] is not None
    assert used[2] == used[4] == ("int4_group", chosen[2])
