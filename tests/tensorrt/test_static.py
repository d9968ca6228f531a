"""From sample text to engines with static scales, by the commands."""

from pathlib import Path

import numpy as np
import pytest

from lingc.checkpoint import open_checkpoint
from lingc.checkpoint.calibrated import read_document
from lingc.cli import layers, main
from lingc.engine import open_package
from lingc.weights import open_weights
from tests.tensorrt.engines import LING_TINY, has_rtx

pytestmark = [has_rtx, pytest.mark.long]

TARGETS = ("spark", "rtx-120", "rtx-89")


def run(*words: object) -> None:
    assert main([*map(str, words), "-q"]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: `calibration`, `calibrated` and `nearest` checkpoints, and an engine of each."""
    folder = tmp_path_factory.mktemp("static")
    recipe = ("--recipe", "fp8-static", "-o")
    run("calibrate", LING_TINY, "--data", "english", "--samples", 6, *recipe,
        folder / "calibration", "--min-tokens-per-expert", 0, "--fp8", "search")  # fmt: skip
    run("quantize", LING_TINY, "--calibration", folder / "calibration", *recipe,
        folder / "calibrated")  # fmt: skip
    run("quantize", LING_TINY, *recipe, folder / "nearest")
    run("build", folder / "calibrated", "--target", ",".join(TARGETS), "-o", folder / "a.ling")
    run("build", folder / "nearest", "--target", "spark", "-o", folder / "b.ling")
    return folder


def test_an_engine_has_the_scales_of_the_calibration(made: Path) -> None:
    package = open_package(made / "a.ling", level="integrity")
    bounds = read_document(made / "calibration")["input_bounds"]
    weights, source = open_weights(package.shards()), open_checkpoint(made / "calibrated")

    static = [one for one in package.plan.weights.values() if one.part == "input_scales"]
    assert package.plan.precision == "fp8-static"
    assert len(static) == 44 + 5
    for spec in static:
        module = spec.sources[0].removesuffix(".weight")
        codes, scale, _ = source.quantized(spec.sources[0])
        stem = spec.name.removesuffix("_input_scale")
        assert weights[spec.name].tolist() == [np.float32(bounds[module] / 448)]
        assert np.array_equal(weights[f"{stem}_codes"], codes)
        assert np.array_equal(weights[f"{stem}_scale"], scale)


@pytest.mark.parametrize("target", TARGETS)
def test_tensorrt_multiplies_fp8_by_fp8_in_every_phase(target: str, made: Path) -> None:
    for phase, report in layers.read(made / "a.ling", target).phases.items():
        rows = [row for row in layers.folded(report) if row[2].startswith("fp8_static")]
        products = sum(count for count, kind, *_ in rows if kind == "gemm")

        assert products == (5 if phase == "draft" else 44)


def test_what_was_never_calibrated_is_told(made: Path) -> None:
    experts = "what matrices of blocks read, as experts are, is quantized on the fly"
    notes = [
        open_package(made / name, level="integrity").manifest.value["quant"]["note"]
        for name in ("a.ling", "b.ling")
    ]

    assert notes[0] == experts
    assert notes[1] == (
        f"{experts}; 49 of 49 matrices have no calibrated scale of inputs, and get 1"
    )
