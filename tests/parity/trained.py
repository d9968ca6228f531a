"""The shipped, trained checkpoint: its plans for a CPU, its weights, and eager on them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from lingc import pipeline, targets
from lingc.capture import Capturer, Sizes
from lingc.checkpoint import Checkpoint, open_checkpoint
from lingc.context import Context
from lingc.graph import Captured
from lingc.lower import lower
from lingc.model.loading import from_source
from lingc.model.model import LingModel
from lingc.parity.weights import RoundedWeights
from lingc.plan import Plan
from lingc.quantize.recipes import load_recipe
from lingc.runtime.backend import Array
from lingc.weights import CheckpointWeights
from tests.programs import copy

LING_TINY = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-tiny"

PHASES = ("prefill", "decode", "draft")


@cache
def checkpoint() -> Checkpoint:
    return open_checkpoint(LING_TINY)


@cache
def _capturer() -> Capturer:
    return Capturer(checkpoint().config)


@cache
def _captured(phase: str) -> Captured:
    return _capturer().capture(phase)


@cache
def plan(precision: str, target: str = "cpu", phases: tuple[str, ...] = PHASES) -> Plan:
    """As a build makes it, of some phases."""
    given = Context(
        config=checkpoint().config, phase=phases[0], target=targets.get(target),
        recipe=load_recipe(precision),
    )  # fmt: skip
    fused = {
        phase: pipeline.run(
            Captured(copy(_captured(phase))), replace(given, phase=phase), pipeline.Report()
        )
        for phase in phases
    }
    return lower(fused, given, Sizes())


def weights(of: Plan) -> Mapping[str, Array]:
    """Made from the checkpoint by the records of a plan."""
    return CheckpointWeights(of.weights.values(), checkpoint(), checkpoint().config)


def eager(of: Plan) -> LingModel:
    """On the weights that a plan has."""
    return from_source(RoundedWeights(checkpoint(), of, of.programs))
