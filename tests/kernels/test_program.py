"""A whole plan by its kernels: on a GPU by themselves, elsewhere with references in their place.

The latter holds everything around the kernels to the interpreter: what a step is given, where its
results go, which state is updated where it lies.
"""

import logging
from collections.abc import Callable, Mapping
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
from lingc.bench.step import DeviceStep, KernelBackend, check_program, plain_weights, sizes_of
from lingc.capture import Capturer
from lingc.checkpoint import Source, open_checkpoint
from lingc.compile import silent
from lingc.device import Device
from lingc.interpret import InterpreterBackend
from lingc.kernel import Kernel
from lingc.model.config import ModelConfig
from lingc.model.loading import from_source
from lingc.model.model import LingModel
from lingc.op import OPS
from lingc.parity.data import SAMPLE, Row, read_rows
from lingc.parity.engine import EngineSide
from lingc.parity.side import MODES, Scores
from lingc.parity.weights import RoundedWeights
from lingc.plan import Plan, Step
from lingc.quantize.recipes import load_recipe
from lingc.runtime.backend import Array, Limits, SlotState
from lingc.runtime.slots import Lease, Piece, SlotTable
from lingc.runtime.tokenizer import Tokenizer
from lingc.targets.cuda.binaries import compile_all
from lingc.targets.cuda.binaries import kernels as kernels_of
from lingc.targets.cuda.schedule import schedule
from lingc.weights import CheckpointWeights
from tests.kernels import emulated
from tests.kernels.loss import Loss, faults, line, loss, scores

ROOT = Path(__file__).parents[2]
TINY = ROOT / "artifacts" / "checkpoints" / "ling-tiny"
LIMITS = Limits(slots=5, pages=16)
PRECISIONS = ("fp8", "bf16", "int4", "int4-fp8")
Change = Callable[[Step, torch.Tensor], None]
"""What is done to the first result of a step."""
LENGTH = 48
TOGETHER = 16
"""Rows that kernels are given at once; references get all of them."""


@cache
def capturer() -> Capturer:
    """The model is captured once for all precisions."""
    return Capturer(ModelConfig.from_file(TINY), compiler.Request().sizes)


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
        capturer=capturer(),
    ).plan
    weights = CheckpointWeights(plan.weights.values(), checkpoint, config)
    return plan, {name: weights[name] for name in plan.weights}


@cache
def rows() -> list[Row]:
    """48 rows of 48 tokens: one that goes to another expert decides nothing."""
    vocab = ModelConfig.from_file(TINY).vocab_size
    whole = read_rows(SAMPLE, vocab=vocab, tokenizer=Tokenizer.from_directory(TINY))
    parts = [
        Row(line=row.line, ids=row.ids[start : start + LENGTH])
        for row in whole
        for start in range(0, len(row.ids) - LENGTH + 1, LENGTH)
    ]
    return parts[:48]


@cache
def model(precision: str | None) -> LingModel:
    """In FP32, on the checkpoint's weights or on those that a precision makes of them."""
    source: Source = open_checkpoint(TINY)
    if precision is not None:
        plan, _ = plan_and_weights(precision)
        source = RoundedWeights(source, plan, plan.programs)
    return from_source(source)


@cache
def exact(precision: str | None, *, is_draft: bool) -> list[Scores]:
    """What that model says of `rows`."""
    module, ids = model(precision), torch.tensor([row.ids for row in rows()])
    with torch.inference_mode():
        if is_draft:  # the last token has no next one to be told
            logits, _ = module.mtp(ids[:, 1:], module.forward_hidden(ids[:, :-1]))
        else:
            logits = module(ids)
    return [Scores(logits=row.numpy(), experts={}) for row in logits]


def phases(plan: Plan) -> list[tuple[str, dict[str, Array]]]:
    """Each phase after what it follows in generation.

    First few tokens: a prompt of two sequences, steps of both, a verify, a step that commits, a
    draft. Then many: a prompt of three, a longer part that carries on from its state, and again a
    verify, a step that commits, a draft.
    """
    table = SlotTable(LIMITS, plan.page_size)
    two = [table.admit(100) for _ in range(2)]
    three = [table.admit(240) for _ in range(3)]
    random = np.random.default_rng(0)

    def given(
        phase: str, leases: list[Lease], firsts: list[int], counts: list[int], **more: Array
    ) -> tuple[str, dict[str, Array]]:
        pieces = [
            Piece(lease=lease, position=first, tokens=random.integers(0, 4000, count).tolist())
            for lease, first, count in zip(leases, firsts, counts, strict=True)
        ]
        every = table.pack(pieces) | more
        return phase, {name: every[name] for name in plan.programs[phase].inputs}

    def numbers(*values: int) -> Array:
        return np.array(values, np.int32)

    def hidden(tokens: int) -> Array:
        return random.standard_normal((tokens, plan.config["hidden_size"])).astype(np.float32)

    last, every = numbers(36, 41), np.arange(142, dtype=np.int32)
    return [
        given("prefill", two, [0, 0], [37, 5], logit_rows=last),
        given("decode", two, [37, 5], [1, 1], accepted=numbers(0, 0)),
        given("verify", two, [38, 6], [4, 4], accepted=numbers(0, 0)),
        given("decode", two, [40, 10], [1, 1], accepted=numbers(2, 4)),
        given("draft", two, [0, 0], [37, 5], hidden=hidden(42), logit_rows=last),
        given("prefill", three, [0, 0, 0], [80, 51, 11], logit_rows=every),
        given("prefill", three, [80, 51, 11], [128, 128, 44], logit_rows=numbers(127, 255, 299)),
        given("verify", three, [208, 179, 55], [4, 4, 4], accepted=numbers(0, 0, 0)),
        given("decode", three, [209, 183, 57], [1, 1, 1], accepted=numbers(1, 4, 2)),
        given("draft", three, [0, 0, 0], [80, 51, 11], hidden=hidden(142), logit_rows=every),
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


def moved(share: float) -> Change:
    """Some values of BF16, by an ulp up or down: what another order of sums does."""
    some = torch.Generator().manual_seed(1)

    def change(_: Step, result: torch.Tensor) -> None:
        if result.dtype == torch.bfloat16 and result.dim() > 1:
            bits = result.view(torch.int16)
            up = torch.where(torch.rand(bits.shape, generator=some) < 0.5, 1, -1)
            chosen = torch.rand(bits.shape, generator=some) < share
            bits += (up * (chosen & (bits & 0x7FFF > 256))).to(torch.int16)

    return change


def chunks_astray(step: Step, result: torch.Tensor) -> None:
    """Chunks of 8 channels change places beyond their row, as a narrow tile's once did."""
    if step.outputs[0] == "layers.0.fused_linear.2":
        chunks = result.unflatten(1, (-1, 8))
        at = torch.arange(chunks.shape[1]) ^ torch.arange(len(chunks))[:, None] % 8
        at = at.clamp(max=chunks.shape[1] - 1)[..., None].expand(-1, -1, 8)
        result.copy_(chunks.gather(1, at).flatten(1))


def last_token_without_experts(step: Step, result: torch.Tensor) -> None:
    """Of each row, in one layer."""
    if step.outputs[0] == "layers.3.expert_up":
        result[LENGTH - 1 :: LENGTH] = 0


def experts_weigh_more(step: Step, result: torch.Tensor) -> None:
    """By a sixteenth, in one layer."""
    if step.outputs[0] == "layers.3.expert_up":
        result.mul_(1.0625)


@pytest.mark.parametrize("precision", ["int4", pytest.param("fp8", marks=pytest.mark.long)])
def test_other_roundings_are_right_and_faults_are_seen(precision: str) -> None:
    plan, weights = plan_and_weights(precision)
    want = exact(precision, is_draft=False)
    limits = limits_of(plan, len(rows()))

    def found(*changes: Change) -> Loss:
        backend = InterpreterBackend(plan, weights, limits)

        def watch(step: Step, results: tuple[torch.Tensor, ...]) -> None:
            for change in changes:
                change(step, results[0])

        backend.watch = watch
        return loss(want, scores(EngineSide(backend, "changed"), rows(), "prefill", len(rows())))

    references = found()
    assert not faults(found(moved(0.001)), references)
    assert faults(found(moved(0.001), chunks_astray), references)
    assert faults(found(moved(0.001), last_token_without_experts), references)
    if precision == "int4":  # FP8 itself costs more than that
        assert faults(found(moved(0.001), experts_weigh_more), references)


def test_a_result_of_another_shape_is_wrong_however_alike() -> None:
    x = torch.randn(4, 64, dtype=torch.bfloat16)

    problem = problem_of(OPS["silu_mul"], [x], [torch.zeros(4, 16, dtype=torch.bfloat16)])

    assert problem is not None
    assert "shape" in problem


def test_a_few_channels_of_one_row_are_seen_among_many_rows() -> None:
    x = torch.randn(300, 2048, dtype=torch.bfloat16)
    right = OPS["silu_mul"].reference(x)
    wrong = right.clone()
    wrong[137, 64:72] = right[138, 64:72]

    assert problem_of(OPS["silu_mul"], [x], [right]) is None
    assert problem_of(OPS["silu_mul"], [x], [wrong]) is not None


# ------------------------------------------------------------------------------------- on a GPU


class Listing:
    """A backend that runs nothing and lists the kernels that would be run."""

    def __init__(self, plan: Plan, limits: Limits) -> None:
        self.plan, self.limits = plan, limits
        self.kernels: dict[Kernel, None] = {}
        self._seen: set[tuple[str, tuple[tuple[str, int], ...]]] = set()

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        sizes = sizes_of(self.plan, phase, inputs, self.limits)
        key = (phase, tuple(sorted(sizes.items())))
        if key not in self._seen:
            self._seen.add(key)
            made = schedule(self.plan, phase, sizes, targets.get(self.plan.target))
            self.kernels |= dict.fromkeys(kernels_of(one.choice.tactic for one in made.steps))
        config, tokens = self.plan.config, len(inputs["token_ids"])
        return {
            "logits": np.zeros((tokens, config["vocab_size"]), np.float32),
            "hidden": np.zeros((tokens, config["hidden_size"]), np.float32),
        }

    def state(self, name: str) -> Array:
        slots, rows = self.limits.slots + 1, self.limits.pages * self.plan.page_size + 1
        return np.zeros(self.plan.states[name].bind({"S": slots, "R": rows}), np.float32)

    def save_slot(self, slot: int) -> SlotState:
        raise AssertionError(f"no mode asks for {slot}")

    def load_slot(self, slot: int, saved: SlotState) -> None:
        raise AssertionError(f"no mode puts {list(saved)} into {slot}")

    def close(self) -> None: ...


def limits_of(plan: Plan, together: int) -> Limits:
    """Room for so many of `rows` at once."""
    return Limits.from_tokens(slots=together, tokens_per_sequence=LENGTH, page_size=plan.page_size)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has every kernel of the tests below, made at once on all cores."""
    wanted: dict[Kernel, None] = {}
    for precision in PRECISIONS:
        plan, _ = plan_and_weights(precision)
        steps = Listing(plan, LIMITS)
        for phase, inputs in phases(plan):
            steps.run(phase, inputs)
        generation = Listing(plan, limits_of(plan, TOGETHER))
        for mode in MODES:
            scores(EngineSide(generation, "listing"), rows()[:TOGETHER], mode, TOGETHER)
        wanted |= steps.kernels | generation.kernels
    folder = tmp_path_factory.mktemp("binaries")
    compile_all(wanted, "sm_90a", folder)
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_step_of_every_phase_is_its_reference(precision: str, binaries: Path) -> None:
    """And the same bits come out where launches overlap."""
    plan, weights = plan_and_weights(precision)
    backend = KernelBackend(plan, weights, LIMITS, cache_dir=binaries)
    plain = plain_weights(plan, weights)

    found = [
        fault
        for phase, inputs in phases(plan)
        for fault in check_program(backend, plain, phase, inputs)
    ]

    assert not found, "\n".join(f"{one.case}: {one.tactic}: {one.problem}" for one in found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_generation_loses_no_more_than_the_references(precision: str, binaries: Path) -> None:
    """Through the runtime's own loops, in every mode, against FP32 on two kinds of weights.

    On the checkpoint's, which is what a user loses; and on the precision's own, where what is lost
    is small enough that a fault is seen: INT4 costs this model more than a layer without its shared
    expert. The references go through prefill and draft alone; the other modes mean the same maths.
    """
    plan, weights = plan_and_weights(precision)
    kernels = EngineSide(
        KernelBackend(plan, weights, limits_of(plan, TOGETHER), cache_dir=binaries), "kernels"
    )
    whole = limits_of(plan, len(rows()))
    references = EngineSide(InterpreterBackend(plan, weights, whole, device="cuda"), "references")
    by_references = {
        mode: scores(references, rows(), mode, len(rows())) for mode in ("prefill", "draft")
    }
    told, wrong = [], 0
    for mode in MODES:
        mine = scores(kernels, rows(), mode, TOGETHER)
        other = by_references["draft" if mode == "draft" else "prefill"]
        for name in (None, precision):
            want = exact(name, is_draft=mode == "draft")
            pair = loss(want, mine), loss(want, other)
            told.append(line(f"{mode}, {name or 'checkpoint'}", *pair))
            wrong += len(faults(*pair))
    logging.getLogger(__name__).info("%s", "\n".join(told))

    assert not wrong, "\n".join(told)


@pytest.mark.gpu
@pytest.mark.long
def test_every_op_passes_its_gate(tmp_path: Path) -> None:
    settings = Settings(target=targets.get("h200-sxm"), cache_dir=tmp_path, timed=False)

    report = run(settings, silent)

    assert not report.faults, "\n".join(
        f"{one.op}, {one.case}, {one.tactic}: {one.problem}" for one in report.faults
    )
