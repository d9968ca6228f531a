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
@pytest.mark.parametrize("name", ["int4", "int4-fp8", "int4-all"])
def test_calibrated_int4_is_nearer_to_bf16_than_rounded_to_nearest(
    name: str, tmp_path: Path
) -> None:
    line = _line(name, tmp_path)

    ratio, _, high = line["kl_ratio"]
    assert ratio < 0.6
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
def test_calibrated_static_fp8_is_nearer_to_bf16_than_uncalibrated(tmp_path: Path) -> None:
    """Inputs are rounded on both sides, and what that costs no rounding of weights mends."""
    line = _line("fp8-static", tmp_path)

    assert line["kl_ratio"][2] < 1
    assert line["perplexity_gap"]["calibrated"][2] < 0.01
