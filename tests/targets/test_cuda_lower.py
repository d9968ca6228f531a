"""The launch table of a plan: what it says, held to what the schedule of one bucket says."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lingc import compile as compiler
from lingc import launch_table, pipeline, targets
from lingc.capture import Capturer, Sizes
from lingc.context import Context
from lingc.errors import InputError, StageError
from lingc.kernel import Launch, Tactic, Tensor, align
from lingc.launch_table import Bucket, Counted, LaunchTable, Place, TableLaunch
from lingc.lower import lower as lower_plan
from lingc.model.config import ModelConfig
from lingc.op import OPS
from lingc.pipeline import Report
from lingc.plan import Plan, TensorType
from lingc.quantize.recipes import load_recipe
from lingc.round_memory import ROUND, round_program
from lingc.targets.cuda.buckets import Sizes as BucketSizes
from lingc.targets.cuda.lower import Scheduled, schedule_all
from lingc.targets.cuda.memory import Lifetime, fullest
from lingc.targets.cuda.rounds import round_of
from lingc.targets.cuda.schedule import schedule

CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"
H200 = targets.get("h200-sxm")


@cache
def plan() -> Plan:
    request = compiler.Request(precision="fp8", target="h200-sxm")
    config = ModelConfig.from_file(CHECKPOINTS / "ling-tiny")
    recipe = load_recipe("fp8")
    return compiler.compile_plan(config, recipe, H200, has_mtp=True, request=request).plan


@cache
def scheduled() -> Scheduled:
    return schedule_all(plan(), H200)


def table() -> LaunchTable:
    return scheduled().table


def of_programs() -> list[Bucket]:
    """Buckets of the plan's own phases, which lie in an arena."""
    return [one for one in table().buckets if one.phase != ROUND]


def axes_of(bucket: Bucket, *, slots: int, pages: int) -> dict[str, int]:
    return {**bucket.sizes, "S": slots + 1, "R": pages * plan().page_size + 1}


# -------------------------------------------------------------------------- what the table says


def test_it_reads_back_from_json_as_it_was() -> None:
    value = launch_table.to_value(table())

    assert launch_table.from_value(json.loads(json.dumps(value))) == table()


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify", "draft"])
@pytest.mark.parametrize(("slots", "pages"), [(1, 8), (33, 500)])
def test_a_bucket_launches_what_the_schedule_of_its_sizes_does(
    phase: str, slots: int, pages: int
) -> None:
    mine = [bucket for bucket in table().buckets if bucket.phase == phase]
    for bucket in mine[:: max(len(mine) // 4, 1)]:
        wanted = schedule(plan(), phase, axes_of(bucket, slots=slots, pages=pages), H200)
        found = [table().tactics[i] for i in bucket.tactics]
        assert found.pop().op == "sample"

        assert [one.tactic for one in found] == [one.choice.tactic.name for one in wanted.steps]
        for mine_, theirs in zip(found, wanted.steps, strict=True):
            tactic = theirs.choice.tactic
            got = [_bound(launch, slots, pages) for launch in mine_.launches]
            assert got == [_plain(launch) for launch in tactic.launches]
            spaces = [*mine_.workspaces, *mine_.counters]
            assert sorted(spaces) == sorted((s.name, s.bytes) for s in tactic.workspaces)
            assert mine_.moved_bytes == theirs.moved_bytes


def _bound(launch: TableLaunch, slots: int, pages: int) -> tuple[Any, ...]:
    def value(operand: launch_table.Operand) -> Any:
        if isinstance(operand, Counted):
            return operand.slots * slots + operand.pages * pages + operand.plus
        return Tensor(operand.name, operand.offset) if isinstance(operand, Place) else operand

    kernel = scheduled().wanted[launch.kernel]
    operands = tuple(map(value, launch.operands))
    return kernel, launch.grid, launch.cluster, launch.dependent, operands


def _plain(launch: Launch) -> tuple[Any, ...]:
    return launch.kernel, launch.grid, launch.cluster, launch.dependent, launch.operands


def test_layers_that_are_alike_share_their_tactics() -> None:
    bucket = next(one for one in table().buckets if one.phase == "decode")
    ops = {(one.op, one.key) for one in table().tactics}

    assert len(ops) == len(table().tactics)
    assert len(set(bucket.tactics)) < len(bucket.tactics) / 2


def test_no_address_is_without_a_buffer() -> None:
    for bucket in of_programs():
        phase = table().phases[bucket.phase]
        held = {*plan().programs[bucket.phase].states, *plan().programs[bucket.phase].weights}
        assert len(bucket.offsets) == len(phase.arena)
        for step, index in zip(phase.steps, bucket.tactics, strict=True):
            tactic = table().tactics[index]
            own = {name for name, _ in (*tactic.workspaces, *tactic.counters)}
            for launch in tactic.launches:
                named = {one.name for one in launch.operands if isinstance(one, Place)}
                assert named <= own | step.buffers.keys()
            assert {*step.buffers.values()} <= {None, *phase.arena, *held}


# ------------------------------------------------------------------------------------- the arena


def test_what_is_needed_together_lies_apart_in_the_arena() -> None:
    for bucket in of_programs():
        spans = [*_spans(bucket)]
        for at, (name, begin, end, first, last) in enumerate(spans):
            assert end <= bucket.arena_bytes
            for other, begins, ends, starts, stops in spans[:at]:
                if first <= stops and starts <= last:
                    assert end <= begins or ends <= begin, (bucket.phase, name, other)


def test_the_arena_is_hardly_larger_than_what_lives_at_its_fullest_step() -> None:
    for bucket in of_programs():
        lives = [
            Lifetime(end - begin, first, last) for _, begin, end, first, last in _spans(bucket)
        ]
        assert bucket.arena_bytes <= 1.1 * fullest(lives)


def _spans(bucket: Bucket) -> Iterator[tuple[str, int, int, int, int]]:
    """(name, begin, end, first step, last step), found from the steps alone."""
    phase, steps = table().phases[bucket.phase], table().phases[bucket.phase].steps
    sizes = _bytes(bucket)
    uses: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        for buffer in step.buffers.values():
            uses.setdefault(buffer or "", []).append(index)
    program = plan().programs[bucket.phase]
    for name, offset in zip(phase.arena, bucket.offsets, strict=True):
        first, last = min(uses.get(name, [0])), max(uses.get(name, [0]))
        if name in {phase.values[value] for value in (*program.outputs.values(), "tokens")}:
            last = len(steps)
        if name in (*program.inputs, "temperature", "top_k", "top_p", "draws"):
            first, last = -1, len(steps)
        yield name, offset, offset + sizes[name], first, last
    for index, (tactic, offset) in enumerate(zip(bucket.tactics, bucket.scratch, strict=True)):
        room = sum(align(size) for _, size in table().tactics[tactic].workspaces)
        yield f"workspaces of {steps[index].name}", offset, offset + room, index, index


def _bytes(bucket: Bucket) -> Mapping[str, int]:
    types = plan().programs[bucket.phase].types
    known = {name: kind.bytes(axes_of(bucket, slots=1, pages=1)) for name, kind in types.items()}
    rows = bucket.sizes.get("N", bucket.sizes.get("T", bucket.sizes["B"]))
    sampled = {"temperature": 4, "top_k": 4, "top_p": 4, "draws": 24, "tokens": 4}
    return {**{name: each * rows for name, each in sampled.items()}, **known}


def test_inputs_come_first_and_only_sampled_tokens_overwrite_one() -> None:
    for name in plan().programs:
        phase, inputs = table().phases[name], plan().programs[name].inputs
        assert phase.arena[: len(inputs)] == inputs
        for step in phase.steps:
            for result in OPS[step.op].results:
                if step.op != "sample":
                    assert step.buffers[result] not in inputs
        assert phase.values["tokens"] == ("token_ids" if name == "decode" else "tokens")


def test_ops_between_the_programs_of_a_round_work_on_its_own_memory() -> None:
    phase, memory = table().phases[ROUND], round_program(plan())
    mine = [one for one in table().buckets if one.phase == ROUND]

    assert [step.op for step in phase.steps] == ["verify_inputs", "judge", "accept"]
    assert mine
    for step in phase.steps:
        op = OPS[step.op]
        assert {*op.arguments, *op.results} - {"page_size"} == {*step.buffers}
        assert all(name == buffer in memory.types for name, buffer in step.buffers.items())
    for bucket in mine:
        assert (bucket.offsets, bucket.arena_bytes) == ((), 0)
        sizes = {**bucket.sizes, "B+1": bucket.sizes["B"] + 1}
        assert all(kind.bytes(sizes) > 0 for kind in memory.types.values())
        assert bucket.sizes["W"] % (4 * bucket.sizes["T"] // bucket.sizes["B"]) == 0


def test_ops_of_rounds_that_have_no_kernels_leave_them_to_the_host() -> None:
    """Rows of so many logits do not fit twice where `judge` holds them."""
    verify = plan().programs["verify"]
    logits = verify.outputs["logits"]
    wide = replace(
        verify, types={**verify.types, logits: TensorType("f32", ("T", 8 * 2048 * 12 + 4))}
    )
    less = replace(plan(), programs={**plan().programs, "verify": wide})

    assert round_of(plan(), H200) is not None
    assert round_of(less, H200) is None


def test_counters_of_every_tactic_fit() -> None:
    needed = [sum(align(size) for _, size in one.counters) for one in table().tactics]

    assert table().counter_bytes == max(needed) > 0


# ---------------------------------------------------------------------------------- what is wrong


def test_a_bucket_that_an_op_has_no_kernel_for_is_named() -> None:
    wide = BucketSizes(phase="verify", axes={"T": 18, "B": 2, "B+1": 3, "P": 8})

    with pytest.raises(InputError, match=r"verify with T 18, .*: lightning_verify_qkv has no ker"):
        schedule_all(plan(), H200, sizes=[wide])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda launch, rows: replace(launch, grid=(rows, 1, 1)), "grid or kernel"),
        (lambda launch, rows: _with(launch, Tensor("cache", 16 * rows)), "an address"),
        (lambda launch, rows: _with(launch, rows * rows), "an operand"),
        (lambda launch, rows: _with(launch, 0.5 * rows), "an operand"),
    ],
)
def test_what_depends_on_the_cache_in_no_simple_way_is_refused(
    change: Callable[[Launch, int], Launch], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = OPS["mla_latent_attention"]

    def tactics(target: Any, *args: Any) -> list[Tactic]:
        rows = args[5].shape[0]
        return [
            replace(one, launches=tuple(change(launch, rows) for launch in one.launches))
            for one in op.tactics(target, *args)
        ]

    monkeypatch.setitem(OPS, op.name, replace(op, tactics=tactics))
    one = BucketSizes(phase="decode", axes={"B": 1, "B+1": 2, "P": 8})

    with pytest.raises(StageError, match=rf"mla_latent_attention .* has {fault}.* depends on"):
        schedule_all(plan(), H200, sizes=[one])


def _with(launch: Launch, operand: Any) -> Launch:
    return replace(launch, operands=(operand, *launch.operands[1:]))


# --------------------------------------------------------------------------------- the full model


@pytest.fixture(scope="module")
def full() -> Callable[[str, str], LaunchTable]:
    """`full(precision, target)`: decode of the full-size model, one sequence."""
    capturer = Capturer(ModelConfig.from_file(CHECKPOINTS / "ling-2.6-flash"))

    def get(precision: str, target: str) -> LaunchTable:
        context = Context(
            config=capturer.config,
            phase="decode",
            target=targets.get(target),
            recipe=load_recipe(precision),
        )
        fused = pipeline.run(capturer.capture("decode"), context, Report())
        made = lower_plan({"decode": fused}, context, Sizes())
        sizes = [
            BucketSizes(phase="decode", axes={"B": 1, "B+1": 2, "P": context // made.page_size})
            for context in (512, 5120, 36_864, 131_072)
        ]
        return schedule_all(made, targets.get(target), sizes=sizes).table

    return get


@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("fp8", "h200-sxm"),
        pytest.param("int4-fp8", "h100-sxm", marks=pytest.mark.long),
        pytest.param("fp8", "h20", marks=pytest.mark.long),
        pytest.param("bf16", "h200-sxm", marks=pytest.mark.long),
    ],
)
def test_a_token_of_the_full_model_takes_few_launches(
    precision: str, target: str, full: Callable[[str, str], LaunchTable]
) -> None:
    made = full(precision, target)
    config = ModelConfig.from_file(CHECKPOINTS / "ling-2.6-flash")
    for bucket in made.buckets:
        layers: dict[int, int] = {}
        for step, tactic in zip(made.phases["decode"].steps, bucket.tactics, strict=True):
            if step.name.startswith("layers."):
                layer = int(step.name.split(".")[1])
                layers[layer] = layers.get(layer, 0) + len(made.tactics[tactic].launches)

        assert max(layers[layer] for layer in config.linear_layers) <= 6
        assert max(layers[layer] for layer in config.mla_layers) <= 11
        assert made.launches(bucket) <= 230
