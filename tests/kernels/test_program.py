"""A whole plan by its kernels: on a GPU by themselves, elsewhere with references in their place.

The latter holds everything around the kernels to the interpreter: what a step is given, where its
results go, which state is updated where it lies.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lingc import compile as compiler
from lingc import targets
from lingc.bench import step
from lingc.bench.kernels import problem_of
from lingc.bench.ops import Settings, run
from lingc.bench.step import DeviceStep, KernelBackend, check_program, plain_weights
from lingc.checkpoint import open_checkpoint
from lingc.compile import silent
from lingc.device import Device
from lingc.interpret import InterpreterBackend
from lingc.model.config import ModelConfig
from lingc.op import OPS
from lingc.parity.data import SAMPLE, Row, read_rows
from lingc.parity.engine import EngineSide
from lingc.parity.run import compare
from lingc.parity.side import Mode
from lingc.plan import Plan
from lingc.quantize.recipes import load_recipe
from lingc.runtime.backend import Array, Limits
from lingc.runtime.slots import Piece, SlotTable
from lingc.runtime.tokenizer import Tokenizer
from lingc.weights import CheckpointWeights
from tests.kernels import emulated

ROOT = Path(__file__).parents[2]
TINY = ROOT / "artifacts" / "checkpoints" / "ling-tiny"
LIMITS = Limits(slots=3, pages=12)
MODES: tuple[Mode, ...] = ("prefill", "decode", "verify", "rollback", "draft")


@cache
def plan_and_weights(precision: str) -> tuple[Plan, dict[str, Array]]:
    config, checkpoint = ModelConfig.from_file(TINY), open_checkpoint(TINY)
    request = compiler.Request(precision=precision, target="h200-sxm")
    plan = compiler.compile_plan(
        config,
        load_recipe(precision),
        targets.get("h200-sxm"),
        has_mtp=True,
        request=request,
    ).plan
    weights = CheckpointWeights(plan.weights.values(), checkpoint, config)
    return plan, {name: weights[name] for name in plan.weights}


@cache
def rows() -> list[Row]:
    vocab = ModelConfig.from_file(TINY).vocab_size
    tokenizer = Tokenizer.from_directory(TINY)
    return read_rows(SAMPLE, vocab=vocab, tokenizer=tokenizer, samples=6, max_tokens=150)


def phases(plan: Plan) -> list[tuple[str, dict[str, Array]]]:
    """A prompt of two sequences, steps of both, a verify, a step that commits, a draft."""
    table = SlotTable(LIMITS, plan.page_size)
    a, b = (table.admit(100) for _ in range(2))
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        found: list[int] = random.integers(0, 4000, count).tolist()
        return found

    def given(phase: str, pieces: list[Piece], **more: Array) -> tuple[str, dict[str, Array]]:
        every = table.pack(pieces) | more
        return phase, {name: every[name] for name in plan.programs[phase].inputs}

    def none() -> Array:
        return np.zeros(2, np.int32)

    prompt = [Piece(lease=a, position=0, tokens=tokens(37)),
              Piece(lease=b, position=0, tokens=tokens(5))]  # fmt: skip
    hidden = random.standard_normal((42, plan.config["hidden_size"])).astype(np.float32)
    last = np.array([36, 41], np.int32)

    def both(first: int, second: int, count: int) -> list[Piece]:
        return [Piece(lease=a, position=first, tokens=tokens(count)),
                Piece(lease=b, position=second, tokens=tokens(count))]  # fmt: skip

    return [
        given("prefill", prompt, logit_rows=last),
        given("decode", both(37, 5, 1), accepted=none()),
        given("verify", both(38, 6, 4), accepted=none()),
        given("decode", both(40, 10, 1), accepted=np.array([2, 4], np.int32)),
        given("draft", prompt, hidden=hidden, logit_rows=last),
    ]


# ---------------------------------------------------------------------- references in their place


class Nowhere(Device):
    """No device: memory is the host's, and nothing is launched."""

    memory = "cpu"

    def __init__(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def by_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run by the references of their ops, over the buffers that kernels would have."""

    def launch_one(self: DeviceStep, index: int) -> None:
        one = self.schedule.steps[index]
        found = one.op.reference(*(step._argument(arg, self, PLAIN) for arg in one.step.args))
        results = [found] if isinstance(found, torch.Tensor) else list(found)
        for name, value in zip(one.op.results, results, strict=True):
            self.tensors[one.buffers[name] or ""].copy_(value)

    def launch(self: DeviceStep, only: Any = None) -> int:
        assert only is None
        for index in range(len(self.schedule.steps)):
            launch_one(self, index)
        return len(self.schedule.steps)

    monkeypatch.setattr(DeviceStep, "launch_one", launch_one)
    monkeypatch.setattr(DeviceStep, "launch", launch)
    monkeypatch.setattr(step, "compile_all", lambda *_args, **_more: {})


PLAIN: dict[str, torch.Tensor] = {}


@pytest.mark.usefixtures("by_references")
@pytest.mark.parametrize("precision", ["fp8", pytest.param("int4", marks=pytest.mark.long)])
def test_with_references_in_their_place_it_is_the_interpreter(
    precision: str, tmp_path: Path
) -> None:
    plan, weights = plan_and_weights(precision)
    PLAIN.clear()
    PLAIN.update(plain_weights(plan, weights, "cpu"))
    got = KernelBackend(plan, weights, LIMITS, cache_dir=tmp_path, device=Nowhere())
    want = InterpreterBackend(plan, weights, LIMITS)

    for phase, inputs in phases(plan):
        found, expected = got.run(phase, inputs), want.run(phase, inputs)

        for role, values in expected.items():
            np.testing.assert_array_equal(found[role], values, err_msg=f"{role} of {phase}")
        for name in plan.states:
            same = np.array_equal(got.state(name)[:-1], want.state(name)[:-1], equal_nan=True)
            assert same, f"{name} after {phase}"


@pytest.mark.usefixtures("by_references")
def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan, weights = plan_and_weights("fp8")
    plain = plain_weights(plan, weights, "cpu")
    PLAIN.clear()
    PLAIN.update(plain)
    backend = KernelBackend(plan, weights, LIMITS, cache_dir=tmp_path, device=Nowhere())
    right = DeviceStep.launch_one

    def wrong(self: DeviceStep, index: int) -> None:
        right(self, index)
        one = self.schedule.steps[index]
        if one.step.outputs[0] == "layers.3.expert_up":
            self.tensors["layers.3.expert_up"][7] = 0.0

    monkeypatch.setattr(DeviceStep, "launch_one", wrong)
    phase, inputs = phases(plan)[0]

    found = list(check_program(backend, plain, phase, inputs))

    named = [fault for fault in found if "other bits" not in fault.problem]
    assert [fault.case for fault in named] == ["prefill layers.3.expert_up"]
    assert "differ by more than allowed" in named[0].problem


@pytest.mark.long
@pytest.mark.skipif(emulated.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
def test_kernels_that_can_be_emulated_do_a_trained_models_steps(tmp_path: Path) -> None:
    """Two of three steps; the others go by their references."""
    plan, weights = plan_and_weights("fp8")
    plain = plain_weights(plan, weights, "cpu")
    backend = KernelBackend(plan, weights, LIMITS, cache_dir=tmp_path, device=Nowhere())
    ran, steps = 0, 0
    for phase, inputs in phases(plan):
        now = backend.step(phase, inputs)
        now.give(inputs)
        for one in now.schedule.steps:
            given = [step._argument(arg, now, plain) for arg in one.step.args]
            if emulated.runs(one.choice.tactic):
                got = emulated.results(one.op, given, one.choice.tactic, tmp_path)
                problem = problem_of(one.op, given, got)
                assert problem is None, f"{phase} {one.step.outputs[0]}: {problem}"
                ran += 1
            else:
                found = one.op.reference(*given)
                got = [found] if isinstance(found, torch.Tensor) else list(found)
            steps += 1
            for name, value in zip(one.op.results, got, strict=True):
                now.tensors[one.buffers[name] or ""].copy_(value)

    assert ran > steps // 2


def test_a_result_of_another_shape_is_wrong_however_alike() -> None:
    x = torch.randn(4, 64, dtype=torch.bfloat16)

    problem = problem_of(OPS["silu_mul"], [x], [torch.zeros(4, 16, dtype=torch.bfloat16)])

    assert problem is not None
    assert "shape" in problem


# ------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16", "int4", "int4-fp8"])
def test_every_step_of_every_phase_is_its_reference(precision: str, tmp_path: Path) -> None:
    """And the same bits come out where launches overlap."""
    plan, weights = plan_and_weights(precision)
    backend = KernelBackend(plan, weights, LIMITS, cache_dir=tmp_path)
    plain = plain_weights(plan, weights)

    found = [
        fault
        for phase, inputs in phases(plan)
        for fault in check_program(backend, plain, phase, inputs)
    ]

    assert not found, "\n".join(f"{one.case}: {one.tactic}: {one.problem}" for one in found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16", "int4"])
def test_generation_is_the_interpreters(precision: str, tmp_path: Path) -> None:
    """Through the runtime's own loops, in every mode.

    Between kernels and references lie bf16 roundings and, where experts nearly tie, other experts:
    the mean KL is held to a tenth of what FP8 itself costs this model (0.0057 nats).
    """
    plan, weights = plan_and_weights(precision)
    limits = Limits.from_tokens(slots=3, tokens_per_sequence=160, page_size=plan.page_size)
    want = EngineSide(InterpreterBackend(plan, weights, limits, device="cuda"), "interpreter")
    got = EngineSide(KernelBackend(plan, weights, limits, cache_dir=tmp_path), "kernels")

    for mode, comparison in compare(want, got, rows(), MODES, None, 3):
        summary = comparison.summary(0.1)
        assert summary.not_finite == 0, mode
        assert summary.mean_kl < 6e-4, f"{mode}: {summary.mean_kl}"
        assert summary.top1_above_margin == 0, mode


@pytest.mark.gpu
@pytest.mark.long
def test_every_op_passes_its_gate(tmp_path: Path) -> None:
    settings = Settings(target=targets.get("h200-sxm"), cache_dir=tmp_path, timed=False)

    report = run(settings, silent)

    assert not report.faults, "\n".join(
        f"{one.op}, {one.case}, {one.tactic}: {one.problem}" for one in report.faults
    )
