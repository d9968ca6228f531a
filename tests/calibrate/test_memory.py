"""What a calibration holds in memory is bounded by the widths of a model, not by its size."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lingc.calibrate import rounder
from lingc.calibrate.matrices import Method, runs_of
from lingc.calibrate.run import Settings, calibrate
from lingc.checkpoint import Checkpoint
from lingc.checkpoint.source import Source
from lingc.quantize.recipes import parse_recipe
from tests.calibrate.conftest import read

HEAD = Path("layers", "head.safetensors")


def test_a_head_that_is_read_in_runs_of_rows_is_the_same(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"modules": ["lm_head"], "format": "int4_group", "group": 32}
    recipe = parse_recipe({"name": "head", "rules": [rule]}, source="head.json")
    counts: list[int] = []

    def watched(source: Source, module: str, count: int, device: torch.device) -> Iterator[Tensor]:
        for some in runs_of(source, module, count, device):
            counts.append(len(some))
            yield some

    monkeypatch.setattr(rounder, "runs_of", watched)
    settings = Settings(method=Method(loss="matrix"))
    whole = calibrate(small, recipe, read(rows), tmp_path / "whole", settings)
    monkeypatch.setattr(rounder, "TALL", 24)
    in_runs = calibrate(small, recipe, read(rows), tmp_path / "runs", settings)

    assert counts == [64] * 2 + [24, 24, 16] * 2  # to choose a damping, and to round
    # Sums of another number of rows, in another order, could make another code here and there.
    pair = [np.fromfile(made.path / HEAD, np.uint8) for made in (whole, in_runs)]
    assert np.mean(pair[0] != pair[1]) < 0.01
    ((one,), (other,)) = (made.document["matrices"] for made in (whole, in_runs))
    assert one["nearest_loss"] == pytest.approx(other["nearest_loss"])
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
