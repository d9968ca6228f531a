"""Faults are found where they were planted, and nothing is found where nothing is wrong."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lingc.parity.bisect.finding import Finding, finding, wrong_weights
from lingc.parity.bisect.repro import ENGINE, PLAN, of_fault, read, run_step_again
from lingc.parity.bisect.traced import TracedOnnx
from lingc.parity.bisect.walk import EngineWalk, Fault, FoundError, PlanWalk, Walk
from lingc.parity.engine import EngineSide
from lingc.parity.side import Mode
from lingc.plan import Plan, Step, refs
from lingc.quantize.layouts import arrange
from lingc.runtime.backend import Array, Limits
from lingc.runtime.onnx_backend import OnnxModels
from lingc.targets.onnx.lower import lower
from tests.evaluate import one_thread
from tests.parity import trained
from tests.parity.planted import FAULTS, Planted, Suspect, steps_changed, weights_named

ROWS = [[(37 * t + 11 * i) % 4000 for t in range(70 - 30 * i)] for i in range(2)]
LIMITS = Limits(slots=2, pages=4)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with torch.inference_mode(), one_thread():
        yield


def walked(suspect: Suspect, compared: str, modes: tuple[Mode, ...], rows: list[list[int]]) -> Walk:
    """Walk a plan, or an engine made of it, to its first fault."""
    if compared == "plan":
        plan_walk = PlanWalk(suspect.plan, suspect.weights, trained.eager(suspect.plan), LIMITS)
        side, walk = EngineSide(plan_walk, "plan", chunk=48), plan_walk.walk
    else:
        models, packed = _engine(suspect)
        engine_walk = EngineWalk(TracedOnnx(models, packed, LIMITS, threads=1), packed)
        side, walk = EngineSide(engine_walk, "engine", chunk=48), engine_walk.walk
    for mode in modes:
        try:
            side.score([row[: 70 if mode == "prefill" else 24] for row in rows], mode)
        except FoundError:
            break
    return walk


def _engine(suspect: Suspect) -> tuple[OnnxModels, dict[str, Array]]:
    """What a build makes of a plan, and its weights as the engine wants them."""
    made = lower(suspect.plan)
    layouts = {weight.name: weight.layout for weight in made.weights}
    specs = {
        name: replace(spec, layout=layouts.get(name, spec.layout))
        for name, spec in suspect.plan.weights.items()
    }
    plan = replace(suspect.plan, weights=specs)
    packed = {name: arrange(specs[name].layout, array) for name, array in suspect.weights.items()}
    return OnnxModels(plan=plan, models=made.models, info=made.info), packed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found_at_its_op(
    fault: Planted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = trained.plan(fault.precision)
    suspect = Suspect(plan, dict(trained.weights(plan)), monkeypatch)
    fault.plant(suspect)

    walk = walked(suspect, fault.compared, (fault.mode,), ROWS)

    first = walk.faults[0]
    name = first.step.op.removeprefix("lingc.")
    assert (name, first.step.layer) == (fault.op, fault.layer)
    assert first.output.endswith(fault.result)
    assert first.step.source
    assert first.judged.elements
    assert not first.judged.error <= 5 * first.judged.limit, "nothing hangs on where the limit is"
    found = _finding(fault, suspect, walk)
    for weight, experts in weights_named(fault.name).values():
        assert [(wrong.name, wrong.experts) for wrong in found.weights] == [(weight, experts)]
    assert fault.op in "\n".join(found.lines())
    _repeat(found, first, suspect.plan, tmp_path / "fault.safetensors")


def _finding(fault: Planted, suspect: Suspect, walk: Walk) -> Finding:
    wrong = wrong_weights(walk.faults[0], suspect.plan, suspect.weights, trained.checkpoint())
    return finding(PLAN if fault.compared == "plan" else ENGINE, walk.faults, wrong)


def _repeat(found: Finding, fault: Fault, plan: Plan, path: Path) -> None:
    """A saved fault is there again when its file is run, and is gone where the step is mended."""
    of_fault(found, fault, plan).write(path)
    saved = read(path)
    assert saved.about["finding"] == json.loads(json.dumps(found.to_json()))

    again = run_step_again(saved)

    assert not again.ok
    assert again.judged.error == pytest.approx(found.error, rel=1e-3)
    made = saved.tensors["want"]
    mended = {"got": made} if found.compared == ENGINE else {}
    if mended:
        tensors = {k: v for k, v in saved.tensors.items() if k != "node"} | mended
        object.__setattr__(saved, "tensors", tensors)
        assert run_step_again(saved).ok


def test_a_result_of_another_size_is_wrong_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = trained.plan("bf16")

    def change(step: Step) -> Step:
        if step.outputs != ("layers.1.slice.1",):
            return step
        return replace(step, args=(*step.args[:-1], 1000))  # the gate, cut short

    suspect = Suspect(
        steps_changed(plan, "prefill", change), dict(trained.weights(plan)), monkeypatch
    )

    walk = walked(suspect, "plan", ("prefill",), ROWS)

    first = walk.faults[0]
    assert (first.output, first.judged.error) == ("layers.1.slice.1", float("inf"))


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_a_sound_engine_has_no_fault_in_any_program(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = trained.plan(precision)
    modes: tuple[Mode, ...] = ("prefill", "decode", "draft")
    suspect = Suspect(plan, dict(trained.weights(plan)), monkeypatch)

    for compared in ("plan", "engine"):
        walk = walked(suspect, compared, modes, ROWS)

        assert walk.faults == []
        assert walk.skipped == {}
        assert max(walk.largest.values()) < 0.2, "the limits are far from what is sound"


def test_a_static_scale_that_is_wrong_is_found_and_a_right_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = trained.plan("fp8-static", "spark")
    suspect = Suspect(plan, dict(trained.weights(plan)), monkeypatch)
    name = "layers.2.mlp.shared_experts.down_proj.weight_scale"

    assert walked(suspect, "plan", ("decode",), ROWS[:1]).faults == []
    suspect.weights[name] = suspect.weights[name] * 2
    (first, *_) = walked(suspect, "plan", ("decode",), ROWS[:1]).faults

    assert (first.step.op, first.step.layer) == ("lingc.fp8_static_linear", 2)
    assert name in {*refs(first.step.args)}


@pytest.mark.long
def test_no_fault_is_reported_over_fifty_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: tuple[Mode, ...] = ("prefill", "decode", "verify", "rollback", "draft")
    phases = ("prefill", "decode", "verify", "draft")
    for seed in range(50):
        plan = trained.plan(("bf16", "fp8", "int4")[seed % 3], phases=phases)
        suspect = Suspect(plan, dict(trained.weights(plan)), monkeypatch)
        rng = np.random.default_rng(seed)
        rows = [rng.integers(0, 4096, 70 - 30 * i).tolist() for i in range(2)]
        for compared in ("plan", "engine"):
            walk = walked(suspect, compared, modes, rows)
            assert walk.faults == [], f"seed {seed}, {compared}"
