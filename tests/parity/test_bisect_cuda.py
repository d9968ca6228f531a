"""Plans for a GPU against eager, and a CUDA engine step by step on memory of the host."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lingc.checkpoint import SyntheticCheckpoint
from lingc.model.loading import from_source
from lingc.op import OPS
from lingc.parity.bisect.traced import TracedCuda
from lingc.parity.bisect.walk import EngineWalk, FoundError, PlanWalk
from lingc.parity.engine import EngineSide
from lingc.parity.side import MODES
from lingc.parity.weights import RoundedWeights
from lingc.plan import Arg, Step, TensorType
from lingc.runtime.backend import Limits
from tests.evaluate import one_thread
from tests.parity.planted import steps_changed
from tests.runtime import host_device
from tests.runtime.cuda_engine import CONFIG, loaded, phases, plan_and_weights

ROWS = [[(37 * t + 11 * i) % 4000 for t in range(24 - 3 * i)] for i in range(2)]
LIMITS = Limits(slots=2, pages=4)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with torch.inference_mode(), one_thread():
        yield


@pytest.mark.parametrize("precision", ["fp8", pytest.param("int4-fp8", marks=pytest.mark.long)])
def test_a_plan_for_a_gpu_has_no_fault_in_any_program(precision: str) -> None:
    plan, weights = plan_and_weights(precision)
    source = SyntheticCheckpoint(CONFIG, 0)
    module = from_source(RoundedWeights(source, plan, plan.programs))
    made = PlanWalk(plan, weights, module, LIMITS)

    for mode in MODES:
        EngineSide(made, "plan", chunk=16).score(ROWS, mode)

    assert made.walk.faults == []
    assert made.walk.judged > 500
    assert max(made.walk.largest.values()) < 0.8
    assert made.walk.skipped == {}


def test_a_scaling_that_a_gpu_plan_lacks_is_found_at_its_router() -> None:
    plan, weights = plan_and_weights()

    def change(step: Step) -> Step:
        args: list[Arg] = [1.0 if arg == 2.5 else arg for arg in step.args]
        return replace(step, args=tuple(args)) if step.op == "lingc.norm_router" else step

    source = SyntheticCheckpoint(CONFIG, 0)
    module = from_source(RoundedWeights(source, plan, plan.programs))
    made = PlanWalk(steps_changed(plan, "decode", change), weights, module, LIMITS)

    with pytest.raises(FoundError):
        EngineSide(made, "plan").score(ROWS[1:], "decode")

    first = made.walk.faults[0]
    assert (first.phase, first.step.op, first.step.layer) == ("decode", "lingc.norm_router", 1)


def walked(engine: EngineWalk) -> EngineWalk:
    """Every phase, as far as nothing is wrong."""
    for phase, inputs in phases(engine.plan):
        try:
            engine.run(phase, inputs)
        except FoundError:
            break
    return engine


def test_a_sound_cuda_engine_has_no_fault_in_any_bucket() -> None:
    _, weights = plan_and_weights()

    found = walked(EngineWalk(TracedCuda(loaded()), weights))

    assert found.walk.faults == []
    assert found.walk.calls == 11
    assert found.walk.judged > 150
    found.close()


def test_a_kernel_that_is_wrong_in_one_phase_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = OPS["lightning_decode_qkv"]

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        o, *rest = sound.reference(*args)
        return (o * 1.1, *rest)

    ops = {**OPS, "lightning_decode_qkv": replace(sound, reference=wrong)}
    monkeypatch.setattr(host_device, "OPS", ops)
    _, weights = plan_and_weights()

    found = walked(EngineWalk(TracedCuda(loaded()), weights))

    first = found.walk.faults[0]
    assert (first.phase, first.step.op) == ("decode", "lingc.lightning_decode_qkv")
    assert first.step.layer == 0
    assert first.judged.error == pytest.approx(0.1, rel=0.05)
    assert first.node is None, "a kernel runs in its engine alone"
    found.close()


def test_a_weight_that_the_device_holds_otherwise_is_found_where_it_is_read() -> None:
    _, weights = plan_and_weights()
    backend = loaded()
    device = backend.device
    assert isinstance(device, host_device.HostDevice)
    held = backend.weight(next(n for n in weights if "experts.down_proj" in n and "scale" in n))
    device.synchronize()
    scales = device.tensor(held.address, TensorType("f32", held.kind.shape))
    scales *= 1.5

    found = walked(EngineWalk(TracedCuda(backend), weights))

    first = found.walk.faults[0]
    assert (first.step.op, first.step.layer) == ("lingc.expert_down", 1)
    found.close()
