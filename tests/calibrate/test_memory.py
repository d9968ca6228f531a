"""What a calibration holds in memory is bounded by the widths of a model, not by its size."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lingc.calibrate import rounder
from lingc.calibrate.matrices import runs_of
from lingc.calibrate.run import Settings, calibrate
from lingc.checkpoint import Checkpoint
from lingc.checkpoint.calibrated import read_document
from lingc.checkpoint.source import Source
from lingc.quantize.recipes import load_recipe
from tests.calibrate.conftest import read

HEAD = Path("layers", "head.safetensors")


def test_a_head_that_is_read_in_runs_of_rows_is_the_same(
    small: Checkpoint, rows: Path, finished: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    counts: list[int] = []

    def watched(source: Source, module: str, count: int, device: torch.device) -> Iterator[Tensor]:
        for some in runs_of(source, module, count, device):
            counts.append(len(some))
            yield some

    monkeypatch.setattr(rounder, "TALL", 24)
    monkeypatch.setattr(rounder, "runs_of", watched)
    settings = Settings(fallback_below=2)

    made = calibrate(small, load_recipe("int4-all"), read(rows), tmp_path / "out", settings)

    assert counts == [24, 24, 16] * 2  # to choose a damping, and to round
    # Sums in another order make another code here and there.
    pair = [np.fromfile(path / HEAD, np.uint8) for path in (made.path, finished("int4-all"))]
    assert np.mean(pair[0] != pair[1]) < 0.1
    of_head, want = (
        next(one for one in read_document(path)["matrices"] if one["module"] == "lm_head")
        for path in (made.path, finished("int4-all"))
    )
    assert of_head["nearest_loss"] == pytest.approx(want["nearest_loss"], rel=1e-5)
    assert of_head["loss"] == pytest.approx(want["loss"], rel=0.02)
