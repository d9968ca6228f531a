"""What calibration gains on text that the shipped checkpoint was neither trained nor calibrated on.

`docs/calibration.md` has the table of all windows and rows; here are fewer, held to what it says.
"""

from pathlib import Path
from typing import Any

import pytest

from lingc.calibrate.run import Settings
from tests.calibrate.experiment import compare


def _line(name: str, folder: Path, settings: Settings | None = None) -> dict[str, Any]:
    (line,) = compare(
        [name], folder, sample_count=128, window_count=22, settings=settings or Settings()
    )
    return line


@pytest.mark.long
@pytest.mark.parametrize(("name", "most"), [("int4", 0.72), ("int4-fp8", 0.72), ("int4-all", 0.65)])
def test_calibrated_int4_is_nearer_to_bf16_than_rounded_to_nearest(
    name: str, most: float, tmp_path: Path
) -> None:
    line = _line(name, tmp_path)

    ratio, _, high = line["kl_ratio"]
    assert ratio < most
    assert high < 1
    gaps = line["perplexity_gap"]
    assert gaps["calibrated"][0] < gaps["nearest"][0]


@pytest.mark.long
def test_fp8_costs_at_most_half_a_percent_of_perplexity(tmp_path: Path) -> None:
    line = _line("fp8", tmp_path)

    # The loss itself, as the bar has it: 22 windows leave an interval as wide as the bar.
    for how in ("nearest", "calibrated"):
        assert line["perplexity_gap"][how][0] < 0.005


@pytest.mark.long
def test_calibrated_static_scales_cost_no_more_than_those_that_nobody_calibrated(
    tmp_path: Path,
) -> None:
    """That they cost less is not shown on this model, whose activations suit E4M3 as they are."""
    line = _line("fp8-static", tmp_path)

    assert line["kl_ratio"][0] < 1.05
    assert line["perplexity_gap"]["calibrated"][2] < 0.01
