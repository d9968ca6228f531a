"""Whole phases by their kernels: a tactic for every step, launches that fit, and their order."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lingc import pipeline, targets
from lingc.capture import Capturer, Sizes
from lingc.context import Context
from lingc.errors import InputError, StageError
from lingc.graph import Captured
from lingc.kernel import Launch, Tensor, align
from lingc.lower import lower
from lingc.model.config import ModelConfig
from lingc.plan import DTYPE_BYTES, PHASES, Plan, Ref, TensorType, refs
from lingc.quantize.recipes import built_in, load_recipe
from lingc.sizing import memory
from lingc.targets.cuda.binaries import missing_features
from lingc.targets.cuda.schedule import Schedule, Scheduled, schedule
from lingc.targets.spec import MIB
from tests.programs import copy

CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"
TINY, FULL = "ling-tiny", "ling-2.6-flash"

GPUS = [name for name, one in targets.ALL.items() if one.default_engine == "cuda"]
H200 = "h200-sxm"

FEW = (1, 3, 8, 17, 64)
TOKENS = {"prefill": (*FEW, 300, 8192), "decode": FEW, "verify": FEW, "draft": FEW}

CACHED = 400
"""Tokens of each sequence that the cache holds before the step."""


@cache
def capturer(model: str) -> Capturer:
    return Capturer(ModelConfig.from_file(CHECKPOINTS / model))


@cache
def captured(model: str, phase: str) -> Captured:
    return capturer(model).capture(phase)


@cache
def plan(model: str, precision: str, target: str) -> Plan:
    first = Context(
        config=capturer(model).config,
        phase=PHASES[0],
        target=targets.get(target),
        recipe=load_recipe(precision),
    )
    fused = {
        phase: pipeline.run(
            Captured(copy(captured(model, phase))), replace(first, phase=phase), pipeline.Report()
        )
        for phase in PHASES
    }
    return lower(fused, first, Sizes())


def sizes(phase: str, tokens: int, page_size: int) -> dict[str, int]:
    """The symbolic axes of a phase with so many tokens in all, as many of each sequence."""
    most = {"prefill": tokens, "decode": 1, "verify": 4, "draft": 4}[phase]
    each = max(n for n in range(1, most + 1) if tokens % n == 0)
    sequences = tokens // each
    pages = -(-(CACHED + each) // page_size)
    return {
        "T": tokens, "B": sequences, "B+1": sequences + 1, "N": sequences, "P": pages,
        "S": sequences + 1, "R": sequences * pages * page_size + 1,
    }  # fmt: skip


@cache
def made(model: str, precision: str, target: str, phase: str, tokens: int) -> Schedule:
    found = plan(model, precision, target)
    at = sizes(phase, tokens, found.page_size)
    return schedule(found, phase, at, targets.get(target))


def schedules(model: str, precision: str, target: str) -> Iterator[tuple[str, int, Schedule]]:
    for phase, counts in TOKENS.items():
        for tokens in counts:
            yield phase, tokens, made(model, precision, target, phase, tokens)


QUICK = [(TINY, precision, H200) for precision in built_in()]
QUICK += [(TINY, "fp8", target) for target in GPUS if target != H200]
LONG = [(FULL, precision, target) for precision in built_in() for target in GPUS]
EVERY = [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]


@pytest.mark.parametrize(("model", "precision", "target"), EVERY)
def test_every_step_has_a_tactic_whose_launches_fit(
    model: str, precision: str, target: str
) -> None:
    for phase, tokens, found in schedules(model, precision, target):
        for one in found.steps:
            faults = [*_faults(one, found, target)]
            assert faults == [], f"{phase}, {tokens} tokens, {one.step.outputs[0]}"


def _faults(one: Scheduled, found: Schedule, target: str) -> Iterator[str]:
    given = targets.get(target)
    known = {*one.buffers, *(space.name for space in one.choice.tactic.workspaces)}
    for launch in one.choice.tactic.launches:
        kernel = launch.kernel
        yield from (f"{kernel.entry} needs {x}" for x in missing_features(kernel, given.arch or ""))
        if kernel.shared_bytes > (given.smem_per_block_bytes or 0):
            yield f"{kernel.entry} wants {kernel.shared_bytes} bytes of shared memory"
        x, y, z = launch.grid
        if not (0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16):
            yield f"{kernel.entry} has a grid of {launch.grid}"
        for (name, kind), operand in zip(kernel.arguments, launch.operands, strict=True):
            if isinstance(operand, Tensor) != kind.startswith("*") and operand is not None:
                yield f"{kernel.entry} takes {operand} as {name}, {kind}"
            if isinstance(operand, Tensor) and operand.name not in known:
                yield f"{kernel.entry} takes {operand.name}, which is no operand"
    spaces = one.choice.tactic.workspaces
    for zeroed, room in ((False, found.workspace_bytes), (True, found.counter_bytes)):
        if sum(align(space.bytes) for space in spaces if space.zeroed is zeroed) > room:
            yield f"workspaces do not fit in {room} bytes"


@pytest.mark.parametrize(("model", "precision", "target"), EVERY)
def test_a_state_is_updated_where_it_lies(model: str, precision: str, target: str) -> None:
    programs = plan(model, precision, target).programs
    for phase, tokens, found in schedules(model, precision, target):
        updates = programs[phase].updates

        assert updates, phase
        assert {state: found.of[value] for state, value in updates.items()} == {
            state: state for state in updates
        }, f"{phase}, {tokens} tokens"


@pytest.mark.parametrize(("model", "precision", "target"), EVERY)
def test_no_buffer_but_a_state_is_written_twice(model: str, precision: str, target: str) -> None:
    """And none is read before it is written."""
    for phase, tokens, found in schedules(model, precision, target):
        program = plan(model, precision, target).programs[phase]
        written = {*program.inputs, *program.states, *program.weights}
        for one in found.steps:
            results = {found.of[value] for value in one.step.outputs}
            read = {found.of[name] for name in refs(one.step.args)}

            assert read <= written, f"{phase}, {tokens} tokens, {one.step.outputs[0]}"
            assert results & written <= {*program.states}, f"{phase}: {one.step.outputs[0]}"
            written |= results


@pytest.mark.parametrize(("model", "precision", "target"), EVERY)
def test_experts_come_in_the_order_that_their_kernels_rely_on(
    model: str, precision: str, target: str
) -> None:
    """`expert_down` reads ids and lists before it waits for the launch before it.

    That launch must therefore let it begin only when the router's results are there: a launch of
    `experts.cu`, which does so after its own wait. Others do it when they begin.
    """
    for phase, tokens, found in schedules(model, precision, target):
        place = f"{phase}, {tokens} tokens"
        before: Launch | None = None
        last: Scheduled | None = None
        routed: tuple[str, ...] = ()
        for one in found.steps:
            op = one.op.name
            if op == "norm_router":
                routed = one.step.outputs
            elif op == "expert_up":
                ids, _, *lists = routed
                assert _named(one, "ids", "pairs", "starts") == (ids, *lists), place
            elif op == "expert_down":
                assert last is not None, place
                assert last.op.name == "expert_up", place
                assert _named(one, "a") == last.step.outputs, place
                assert _named(one, "ids", "weights", "pairs", "starts") == routed, place
            for launch in one.choice.tactic.launches:
                if launch.kernel.entry == "expert_down" and launch.dependent:
                    assert before is not None, place
                    assert before.kernel.source == "kernels/experts.cu", place
                before = launch
            last = one


def _named(one: Scheduled, *names: str) -> tuple[str, ...]:
    """Values that a step takes as arguments of the op."""
    found: Mapping[str, object] = dict(zip(one.op.arguments, one.step.args, strict=True))
    values = [found[name] for name in names]
    assert all(isinstance(value, Ref) for value in values), one.step.outputs[0]
    return tuple(value.name for value in values if isinstance(value, Ref))


@pytest.mark.parametrize(("model", "precision", "target"), EVERY)
def test_the_memory_that_is_told_beforehand_holds_a_step(
    model: str, precision: str, target: str
) -> None:
    """The values that live at its widest point, and the workspace of the op there."""
    whole = plan(model, precision, target)
    for phase, tokens, found in schedules(model, precision, target):
        step = memory.Step(
            tokens=tokens,
            sequences=found.sizes["B"],
            context=CACHED,
            logits=tokens if phase == "verify" else found.sizes["N"],
            is_absorbed=phase != "prefill",
        )
        told = memory.workspace_bytes(capturer(model).config, targets.get(target), step, 1)

        # Kernels of few tokens hold a few megabytes that do not grow with the model.
        assert widest(whole, phase, found) <= told + 8 * MIB, f"{phase}, {tokens} tokens"


def widest(whole: Plan, phase: str, found: Schedule) -> int:
    """Bytes of the values and the workspace that a step needs at once, at the most."""
    program = whole.programs[phase]
    last = {found.of[name]: i for i, one in enumerate(found.steps) for name in refs(one.step.args)}
    last |= {found.of[name]: len(found.steps) for name in program.outputs.values()}
    kept = {*program.inputs, *program.states, *program.weights}
    live: dict[str, int] = {}
    most = 0
    for i, one in enumerate(found.steps):
        for buffer in {found.of[value] for value in one.step.outputs} - kept:
            kind = found.buffers[buffer]
            live[buffer] = DTYPE_BYTES[kind.dtype] * math.prod(kind.bind({}))
        spaces = sum(align(space.bytes) for space in one.choice.tactic.workspaces)
        most = max(most, sum(live.values()) + spaces)
        live = {buffer: size for buffer, size in live.items() if last.get(buffer, i) > i}
    return most


def launches_by_layer(found: Schedule) -> dict[int, list[str]]:
    """Layer -> op of each launch, in order."""
    listed: dict[int, list[str]] = {}
    for one in found.steps:
        names = [one.op.name] * len(one.choice.tactic.launches)
        listed.setdefault(one.step.layer, []).extend(names)
    return listed


LINEAR = ["fused_linear", "lightning_decode_qkv", "fused_linear"]


@pytest.mark.parametrize(("model", "precision", "target"), EVERY)
def test_a_token_takes_six_launches_a_layer(model: str, precision: str, target: str) -> None:
    """Of linear attention and experts; latent attention is a few launches itself.

    A shared expert that is stored otherwise than the routed ones takes two more.
    """
    shared = ["fused_linear", "fused_linear"] if precision == "int4" else []
    experts = ["norm_router", *shared, "expert_up", "expert_down"]
    listed = launches_by_layer(made(model, precision, target, "decode", 1))

    config = capturer(model).config
    assert sorted(listed) == [-1, *range(config.num_hidden_layers)]
    assert sorted(listed[-1]) == ["embedding", "fused_linear", "rms_norm", "rope_table"]
    for layer in range(config.num_hidden_layers):
        ops = listed[layer]
        if config.is_dense(layer):
            assert ops == [*LINEAR, "fused_linear", "fused_linear"]
        elif config.is_mla(layer):
            mixer = [op for op in ops if op == "mla_latent_attention"]
            assert 1 <= len(mixer) <= 3
            assert ops == ["fused_linear", "fused_linear", *mixer, "fused_linear", *experts]
        else:
            assert ops == [*LINEAR, *experts]


def test_a_step_that_is_no_op_of_ours_is_named() -> None:
    whole = plan(TINY, "fp8", H200)
    program = whole.programs["decode"]
    *others, last = program.steps
    foreign = replace(program, steps=(*others, replace(last, op="aten.tanh.default")))
    at = sizes("decode", 1, whole.page_size)

    with pytest.raises(StageError, match=r"is aten\.tanh\.default, which no kernel runs"):
        schedule(replace(whole, programs={"decode": foreign}), "decode", at, targets.get(H200))


def test_what_no_kernel_runs_is_named_with_the_reason() -> None:
    whole = plan(TINY, "fp8", H200)
    program = whole.programs["decode"]
    wide = TensorType("f32", program.types["norm.weight"].shape)
    changed = replace(program, types={**program.types, "norm.weight": wide})
    at = sizes("decode", 1, whole.page_size)

    with pytest.raises(InputError, match=r"^rms_norm has no kernel for .*: weight is f32, not bf1"):
        schedule(replace(whole, programs={"decode": changed}), "decode", at, targets.get(H200))
