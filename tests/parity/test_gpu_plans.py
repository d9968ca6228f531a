"""A plan for our own GPU kernels says what other plans of the shipped checkpoint say."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from lingc import pipeline, targets
from lingc.capture import Capturer, Sizes
from lingc.checkpoint import open_checkpoint
from lingc.context import Context
from lingc.graph import Captured
from lingc.lower import lower
from lingc.model.config import ModelConfig
from lingc.parity.engine import EngineSide
from lingc.parity.interpreted import PlanWatch
from lingc.parity.side import MODES, Scores
from lingc.plan import PHASES, Plan
from lingc.quantize.recipes import built_in, load_recipe
from lingc.runtime import Limits
from lingc.weights import CheckpointWeights
from tests.driver import in_float64
from tests.evaluate import one_thread
from tests.programs import copy

LING_TINY = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-tiny"
CONFIG = ModelConfig.from_file(LING_TINY)
GPUS = ("h20", "h20-3e", "h100-sxm", "h200-sxm")
ROWS = [[(37 * t + 11 * i) % 4096 for t in range(26 + 7 * i)] for i in range(2)]


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with torch.inference_mode(), one_thread():
        yield


@cache
def captured(phase: str) -> Captured:
    return _capturer().capture(phase)


@cache
def _capturer() -> Capturer:
    return Capturer(CONFIG)


@cache
def compiled(precision: str, target: str) -> tuple[Plan, pipeline.Report]:
    first = Context(
        config=CONFIG,
        phase=PHASES[0],
        target=targets.get(target),
        recipe=load_recipe(precision),
    )
    report = pipeline.Report()
    fused = {
        phase: pipeline.run(Captured(copy(captured(phase))), replace(first, phase=phase), report)
        for phase in PHASES
    }
    return lower(fused, first, Sizes()), report


@pytest.mark.parametrize("precision", built_in())
def test_every_rule_fires_as_the_shipped_checkpoint_has_it(precision: str) -> None:
    plan, report = compiled(precision, "h20")

    assert [line for line in report.lines if line.missed] == []
    assert all(spec.layout == "plain" for spec in plan.weights.values() if "norm" in spec.name)
    for phase in ("decode", "verify"):
        of = [[s.op for s in plan.programs[phase].steps if s.layer == layer] for layer in range(8)]
        apart = 2 * (precision == "int4")  # a shared expert in another format
        assert [*map(len, of)] == [5, *[6 + apart] * 2, 7 + apart, *[6 + apart] * 3, 7 + apart]
        assert of[1][-3:] == ["lingc.norm_router", "lingc.expert_up", "lingc.expert_down"] or apart


@pytest.mark.parametrize("target", GPUS[1:])
def test_the_gpus_have_one_plan(target: str) -> None:
    plan, report = compiled("fp8", target)

    assert [line for line in report.lines if line.missed] == []
    assert plan == replace(compiled("fp8", GPUS[0])[0], target=target)


def scored(precision: str, target: str) -> Iterator[tuple[str, list[Scores]]]:
    """What a plan in float64 says of the rows in every mode."""
    plan, _ = compiled(precision, target)
    checkpoint = open_checkpoint(LING_TINY)
    weights = CheckpointWeights(plan.weights.values(), checkpoint, CONFIG)
    backend = in_float64(plan, weights, CONFIG, Limits(slots=2, pages=4))
    side = EngineSide(backend, target, tap=PlanWatch(backend), chunk=16)
    for mode in MODES:
        yield mode, side.score(ROWS, mode)


@pytest.mark.parametrize(
    ("precision", "other"),
    [
        ("bf16", "cpu"),
        ("int4-all", "cpu"),
        # There activations are FP8 as well, but made by ops of their own.
        ("fp8", "rtx-120"),
        pytest.param("int4", "cpu", marks=pytest.mark.long),
        pytest.param("int4-fp8", "rtx-120", marks=pytest.mark.long),
    ],
)
def test_every_mode_agrees_with_another_target_in_float64(precision: str, other: str) -> None:
    pairs = zip(scored(precision, "h20"), scored(precision, other), strict=True)
    for (mode, got), (_, want) in pairs:
        for a, b in zip(got, want, strict=True):
            assert np.abs(a.logits - b.logits).max() < 1e-9, mode
            assert a.experts.keys() == b.experts.keys()
            for layer, choice in a.experts.items():
                np.testing.assert_array_equal(choice.ids, b.experts[layer].ids)
