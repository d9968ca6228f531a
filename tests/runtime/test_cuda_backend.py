"""A CUDA engine's runtime without a GPU: real tables and memory, references as kernels."""

import lzma
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lingc import compile as compiler
from lingc import targets
from lingc.checkpoint import SyntheticCheckpoint
from lingc.errors import (
    IncompatibleError,
    InputError,
    IntegrityError,
    LingcError,
    ResourceError,
    UsageError,
)
from lingc.interpret import InterpreterBackend
from lingc.launch_table import LaunchTable, Place
from lingc.model.config import ModelConfig
from lingc.plan import Plan
from lingc.quantize.formats import round_bf16, widen_bf16
from lingc.quantize.recipes import load_recipe
from lingc.runtime import Generator, Request, Sampling
from lingc.runtime.backend import Array, Limits, Ticket
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_code import CudaCode, check
from lingc.runtime.cuda_inputs import ROWS, fill, order, sizes_of, smallest
from lingc.runtime.cuda_memory import RESERVE_BYTES
from lingc.runtime.sampling import draws
from lingc.runtime.slots import Lease, Piece, SlotTable
from lingc.runtime.steps import Steps
from lingc.targets.cuda.buckets import Sizes
from lingc.weights import CheckpointWeights
from tests.made_weights import RAW
from tests.runtime.host_device import HostDevice, reference_code

TARGET = "h200-sxm"
LIMITS = Limits(slots=3, pages=12)

SMALL = {
    "num_hidden_layers": 2,
    "layer_group_size": 2,
    "intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
CONFIG = ModelConfig.from_dict({**RAW, **SMALL})
"""A linear layer, a latent one with experts, a draft layer; widths are those of the kernels."""


@cache
def plan_and_weights(precision: str = "fp8") -> tuple[Plan, dict[str, Array]]:
    torch.set_num_threads(1)
    request = compiler.Request(precision=precision, target=TARGET)
    plan = compiler.compile_plan(
        CONFIG, load_recipe(precision), targets.get(TARGET), has_mtp=True, request=request
    ).plan
    weights = CheckpointWeights(plan.weights.values(), SyntheticCheckpoint(CONFIG, 0), CONFIG)
    return plan, {name: weights[name] for name in plan.weights}


def sizes(phase: str, tokens: int, sequences: int, pages: int) -> Sizes:
    axes = {"T": tokens, "B": sequences, "B+1": sequences + 1, "P": pages, "N": sequences}
    if phase == "decode":
        del axes["T"]
    if phase in ("decode", "verify"):
        del axes["N"]
    return Sizes(phase=phase, axes=axes)


BUCKETS = (
    *(sizes("prefill", tokens, 4, 12) for tokens in (16, 64)),
    *(sizes("decode", n, n, pages) for n in (1, 2, 4) for pages in (1, 12)),
    *(sizes("verify", n * each, n, 12) for each in (2, 4) for n in (1, 4)),
    *(sizes("draft", n, n, 12) for n in (2, 16)),
    sizes("draft", 64, 4, 12),
)


@cache
def code() -> CudaCode:
    plan, _ = plan_and_weights()
    return reference_code(plan, targets.get(TARGET), BUCKETS)


def phases(plan: Plan) -> Iterator[tuple[str, dict[str, Array]]]:
    """A prompt of two sequences, steps of both, some that commit, a draft; others join."""
    table = SlotTable(LIMITS, plan.page_size)
    a, b = (table.admit(200) for _ in range(2))
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        found: list[int] = random.integers(0, 4000, count).tolist()
        return found

    def given(phase: str, pieces: list[Piece], **more: Array) -> tuple[str, dict[str, Array]]:
        every = table.pack(pieces) | more
        return phase, {name: every[name] for name in plan.programs[phase].inputs}

    def piece(lease: Lease, position: int, count: int) -> Piece:
        return Piece(lease=lease, position=position, tokens=tokens(count))

    def ints(*values: int) -> Array:
        return np.array(values, np.int32)

    prompt = [piece(a, 0, 37), piece(b, 0, 5)]
    hidden = round_bf16(random.standard_normal((42, 256)).astype(np.float32))
    yield given("prefill", prompt, logit_rows=ints(36, 41))
    yield given("decode", [piece(a, 37, 1), piece(b, 5, 1)], accepted=ints(0, 0))
    yield given("verify", [piece(a, 38, 4), piece(b, 6, 4)], accepted=ints(0, 0))
    yield given("decode", [piece(a, 40, 1), piece(b, 10, 1)], accepted=ints(2, 4))
    yield given("draft", prompt, hidden=hidden, logit_rows=ints(36, 41))
    yield given("verify", [piece(b, 11, 2)], accepted=ints(0))
    yield given("verify", [piece(b, 12, 2)], accepted=ints(1))
    c = table.admit(70)
    yield given("prefill", [piece(c, 0, 64)], logit_rows=ints(63))
    yield given("prefill", [piece(a, 41, 16)], logit_rows=ints(*range(16)))
    three = [piece(c, 64, 1), piece(a, 57, 1), piece(b, 14, 1)]
    yield given("decode", three, accepted=ints(0, 0, 2))
    table.release(b)
    yield given("prefill", [piece(table.admit(9), 0, 9)], logit_rows=ints(8, 0, 1, 2, 3))


class Padded(InterpreterBackend):
    """The interpreter on inputs that were padded to a bucket's sizes.

    Products of another number of rows are added up in another order on a CPU, so that the same step
    without its padding differs in the last bits.
    """

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        program = self.plan.programs[phase]
        step = sizes_of(phase, program, inputs)
        every = sorted((b for b in code().table.buckets if b.phase == phase), key=order)
        found = smallest(phase, every, step)
        assert found is not None
        bucket = found.sizes
        turns = range(0, step.get("N", 1), bucket.get("N", 1))
        before, made = dict(self.states), []
        for start in turns:
            now = dict(inputs)
            if ROWS in inputs:
                now[ROWS] = inputs[ROWS][start : start + bucket["N"]]
            views = {
                name: np.full(program.types[name].bind(bucket), 99, array.dtype)
                for name, array in inputs.items()
            }
            fill(phase, views, now)
            self.states = dict(before)
            given = {k: widen_bf16(v) if v.dtype == np.uint16 else v for k, v in views.items()}
            made.append(super().run(phase, given))
        rows = {role: step[str(program.types[name].shape[0])]
                for role, name in program.outputs.items()}  # fmt: skip
        logits = np.concatenate([one["logits"] for one in made])
        return {"logits": logits[: rows["logits"]], "hidden": made[0]["hidden"][: rows["hidden"]]}


def loaded(limits: Limits = LIMITS, device: HostDevice | None = None) -> CudaBackend:
    _, weights = plan_and_weights()
    return CudaBackend(code(), weights, limits, device=device or HostDevice())


def test_every_phase_is_the_interpreters_bit_for_bit() -> None:
    """In buckets that fit and in larger ones, with more rows of logits than there is room for."""
    plan, weights = plan_and_weights()
    got, want = loaded(), Padded(plan, weights, LIMITS)

    for number, (phase, inputs) in enumerate(phases(plan)):
        found, expected = got.run(phase, inputs), want.run(phase, inputs)

        assert found.keys() == expected.keys()
        wide = {
            role: widen_bf16(value) if value.dtype == np.uint16 else value
            for role, value in found.items()
        }
        for role, values in expected.items():
            np.testing.assert_array_equal(wide[role], values, err_msg=f"{role} of {number} {phase}")
        for name in plan.states:
            np.testing.assert_array_equal(
                got.state(name)[:-1], want.state(name)[:-1], err_msg=f"{name} after {phase}"
            )


REQUESTS = [
    Request(tokens=tuple(range(5, 5 + length)), max_tokens=most, stop_ids=frozenset())
    for length, most in ((20, 9), (3, 2), (70, 6), (9, 12), (1, 1))
]


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_generation_is_the_interpreters(drafts: int) -> None:
    """Five requests over three slots: they wait, join and leave; drafts are taken back."""
    plan, weights = plan_and_weights()
    reference = InterpreterBackend(plan, weights, LIMITS)
    want = Generator(reference, drafts=drafts, prefill_tokens=48).generate(REQUESTS)

    got = Generator(loaded(), drafts=drafts, prefill_tokens=48).generate(REQUESTS)

    assert [one.tokens for one in got] == [one.tokens for one in want]
    assert [one.acceptance for one in got] == [one.acceptance for one in want]


def test_sampled_tokens_are_the_hosts() -> None:
    """Drawn on the device, a step ahead of the host, or on the host where logits are asked for.

    All begin and end together: on a CPU a row's last bits depend on how many others there are, and
    what is drawn from nearly equal weights depends on them.
    """
    backend = loaded()
    for seed in range(4):
        settings = [
            Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=seed),
            Sampling(),
            Sampling(temperature=1.5, seed=(1 << 63) + seed),
        ]
        requests = [
            replace(REQUESTS[i], sampling=one, max_tokens=12)
            for i, one in zip((0, 1, 3), settings, strict=True)
        ]
        told = Generator(backend).generate([replace(one, logprobs=2) for one in requests])

        drawn = Generator(backend).generate(requests)

        assert [one.tokens for one in drawn] == [one.tokens for one in told]


def test_the_next_step_is_queued_before_the_tokens_of_this_one_are_read() -> None:
    device = HostDevice()
    backend = loaded(device=device)
    request = Request(tokens=(7, 8, 9), max_tokens=6, stop_ids=frozenset())

    with Generator(backend).start([request]) as run:
        replays = []
        while not run.is_done:
            run.step()
            replays.append(device.replays)

    # Prefill and two steps, then a step a turn, and none behind the last.
    assert replays == [3, 4, 5, 6, 6]


def test_a_sequence_that_stops_leaves_the_queued_step_behind() -> None:
    """Others go on, and whoever gets its slot is not disturbed."""
    plan, weights = plan_and_weights()
    free = Request(tokens=(5, 6, 7, 8), max_tokens=12, stop_ids=frozenset())
    reference = Generator(InterpreterBackend(plan, weights, LIMITS))
    (known,) = reference.generate([free])
    stopping = replace(free, stop_ids=frozenset({known.tokens[4]}))
    requests = [stopping, REQUESTS[0], stopping, stopping, REQUESTS[3], stopping]
    want = reference.generate(requests)

    got = Generator(loaded()).generate(requests)

    assert [one.tokens for one in got] == [one.tokens for one in want]
    assert [one.finish for one in got] == [one.finish for one in want]


def test_a_run_that_is_given_up_leaves_the_backend_to_the_next() -> None:
    backend = loaded()
    generator = Generator(backend)
    request = Request(tokens=(7, 8, 9), max_tokens=6, stop_ids=frozenset())
    (want,) = generator.generate([request])
    for _ in range(3):
        with generator.start([request]) as run:
            run.step()

    (got,) = generator.generate([request])

    assert got.tokens == want.tokens


def test_logits_that_are_not_finite_end_the_run() -> None:
    _, weights = plan_and_weights()
    bad = np.full_like(weights["norm.weight"], 0x7FC0)
    backend = CudaBackend(code(), {**weights, "norm.weight": bad}, LIMITS, device=HostDevice())

    with pytest.raises(LingcError, match="logits that are not finite"):
        Generator(backend).generate(REQUESTS[:1])


def test_queued_steps_are_taken_in_turn() -> None:
    plan, _ = plan_and_weights()
    backend = loaded()
    table = SlotTable(LIMITS, plan.page_size)
    steps, lease = Steps(backend, table), table.admit(20)
    given = draws([(Sampling(), 0, 0)])

    def queue(position: int, *, chained: bool) -> Ticket:
        piece = Piece(lease=lease, position=position, tokens=[5])
        return steps.queue([piece], given, chained=chained)

    with pytest.raises(UsageError, match="of a step that was not ahead"):
        queue(0, chained=True)
    first, _ = queue(0, chained=False), queue(1, chained=True)
    with pytest.raises(UsageError, match="a third step is queued"):
        queue(2, chained=True)
    backend.take(first)
    with pytest.raises(UsageError, match="taken once"):
        backend.take(first)
    backend.close()


def test_a_step_too_large_for_any_bucket_runs_in_parts() -> None:
    plan, weights = plan_and_weights()
    limits = Limits(slots=3, pages=12)
    small = [one for one in BUCKETS if one.phase != "verify" or one.axes["B"] == 1]
    parts = reference_code(plan, targets.get(TARGET), small)
    got = CudaBackend(parts, weights, limits, device=HostDevice())
    want = InterpreterBackend(plan, weights, limits)
    requests = [replace(REQUESTS[i], max_tokens=8) for i in (0, 1, 3)]

    for drafts in (1, 3):
        found = Generator(got, drafts=drafts).generate(requests)
        expected = Generator(want, drafts=drafts).generate(requests)
        assert [one.tokens for one in found] == [one.tokens for one in expected]


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_requests_leave_no_memory_behind(rounds: int) -> None:
    device = HostDevice()
    generator = Generator(loaded(device=device))
    request = Request(tokens=(7, 8, 9), max_tokens=3, stop_ids=frozenset())
    generator.generate([request] * 3)
    blocks, pinned = [*device.blocks], [*device.pinned]

    for _ in range(rounds):
        generator.generate([request] * 3)

    assert [*device.blocks] == blocks
    assert [*device.pinned] == pinned


def test_a_slot_is_saved_and_put_back_elsewhere() -> None:
    plan, _ = plan_and_weights()
    backend = loaded()
    first, *_ = phases(plan)
    backend.run(*first)

    saved = backend.save_slot(0)
    backend.load_slot(2, saved)

    for name, value in backend.save_slot(2).items():
        np.testing.assert_array_equal(value, saved[name])
        whole = backend.state(name)
        np.testing.assert_array_equal(whole[2], whole[0])
        assert whole[0].any() == name.startswith("linear")
    with pytest.raises(UsageError, match="slot 3 is not one of 3"):
        backend.save_slot(3)
    with pytest.raises(InputError, match="lacks 'linear_state"):
        backend.load_slot(0, {})
    with pytest.raises(InputError, match=r"is float32 \[1\], not f32\[2, 128, 128\]"):
        backend.load_slot(0, {**saved, "linear_state.0": np.zeros(1, np.float32)})


def test_state_is_zero_before_anything_ran() -> None:
    backend = loaded()

    assert not any(backend.state(name).any() for name in backend.plan.states)


def test_closing_gives_everything_back() -> None:
    device = HostDevice()
    backend = loaded(device=device)
    Generator(backend).generate(REQUESTS[:1])

    backend.close()

    assert not device.blocks
    assert not device.pinned
    assert not device.is_closed  # it was given


def test_a_step_that_no_bucket_holds_is_refused() -> None:
    plan, _ = plan_and_weights()
    backend = loaded()
    table = SlotTable(LIMITS, plan.page_size)
    piece = Piece(lease=table.admit(65), position=0, tokens=range(65))

    with pytest.raises(UsageError, match="no prefill bucket of the engine holds T = 65, B = 1"):
        Steps(backend, table).prefill([piece])


def test_inputs_of_another_type_or_shape_are_refused() -> None:
    plan, _ = plan_and_weights()
    backend = loaded()
    phase, inputs = next(phases(plan))

    with pytest.raises(InputError, match="'slots', which is missing"):
        backend.run(phase, {k: v for k, v in inputs.items() if k != "slots"})
    with pytest.raises(InputError, match=r"'slots' of phase 'prefill' is int64 \[2\], not i32"):
        backend.run(phase, inputs | {"slots": np.zeros(2, np.int64)})
    with pytest.raises(
        InputError, match=r"'slots' of phase 'prefill' is int32 \[2\], not i32 \[1\]"
    ):
        backend.run(phase, inputs | {"slots": np.zeros(2, np.int32), "offsets": inputs["slots"]})
    with pytest.raises(UsageError, match="no phase 'encode'"):
        backend.run("encode", inputs)


# ------------------------------------------------------------------------------------- refusals


class Unread(Mapping[str, Array]):
    """Weights that nobody may look at."""

    def __getitem__(self, name: str) -> Array:
        raise AssertionError(f"{name} is read")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_too_little_memory_is_refused_before_a_weight_is_read() -> None:
    device = HostDevice(memory=RESERVE_BYTES + (4 << 20))

    with pytest.raises(
        ResourceError,
        match=r"^the engine needs 4\d\d.\d MB of device memory: weights \d.\d MB, state \d.\d MB, "
        r"activations \d.\d MB, driver 402.7 MB; Host GPU has 406.8 MB free of 406.8 MB",
    ):
        CudaBackend(code(), Unread(), LIMITS, device=device)

    assert not device.blocks


def test_another_generation_of_gpu_is_refused() -> None:
    with pytest.raises(
        IncompatibleError,
        match=r"is for 'h200-sxm' \(sm_90a, compute capability 9.0\); Host GPU has compute "
        r"capability 10.0",
    ):
        CudaBackend(code(), Unread(), LIMITS, device=HostDevice(capability=(10, 0)))


def test_an_old_driver_is_refused() -> None:
    needing = replace(code(), driver=">=13.0")

    with pytest.raises(IncompatibleError, match=r"is for CUDA 12.8, the engine's .* for >=13.0"):
        CudaBackend(needing, Unread(), LIMITS, device=HostDevice(driver_version=12080))


def test_more_slots_than_a_step_has_sequences_are_refused() -> None:
    with pytest.raises(UsageError, match="slots is 4, the engine takes at most 3 sequences"):
        CudaBackend(code(), Unread(), Limits(slots=4, pages=12), device=HostDevice())


def test_only_what_the_limits_can_reach_takes_room() -> None:
    """One sequence needs no bucket of many."""
    small, large = HostDevice(), HostDevice()

    loaded(Limits(slots=1, pages=1), small)
    loaded(LIMITS, large)

    taken = [sorted(map(len, device.blocks.values())) for device in (small, large)]
    assert sum(taken[0]) < sum(taken[1])


def test_weights_that_are_missing_or_of_another_size_are_refused() -> None:
    _, weights = plan_and_weights()
    device = HostDevice()
    name = "norm.weight"

    with pytest.raises(IntegrityError, match=f"weight '{name}' of the plan is not among"):
        CudaBackend(code(), {k: v for k, v in weights.items() if k != name}, LIMITS, device=device)
    with pytest.raises(IntegrityError, match=f"'{name}' has 2 bytes, the plan's .* needs 512"):
        CudaBackend(code(), weights | {name: weights[name][:1]}, LIMITS, device=device)

    assert not device.blocks
    assert not device.pinned


# ---------------------------------------------------------------------------------- damaged code


def test_a_table_that_does_not_go_with_its_plan_is_refused() -> None:
    table = code().table
    first, *others = table.buckets
    tactic, *rest = table.tactics
    launch = tactic.launches[0]
    step, *steps = table.phases["decode"].steps
    wild = replace(step, buffers={**step.buffers, "out": "nothing"})

    def phase(**changes: Any) -> LaunchTable:
        made = replace(table.phases["decode"], **changes)
        return replace(table, phases={**table.phases, "decode": made})

    def bucket(**changes: Any) -> LaunchTable:
        return replace(table, buckets=(replace(first, **changes), *others))

    def launched(**changes: Any) -> LaunchTable:
        made = replace(tactic, launches=(replace(launch, **changes),))
        return replace(table, tactics=(made, *rest))

    wrong = {
        "has the phases": replace(table, phases={}),
        "decode has no bucket": replace(
            table, buckets=tuple(b for b in table.buckets if b.phase != "decode")
        ),
        "uses 'nothing', which is no buffer": phase(steps=(wild, *steps)),
        "two buffers have one name": phase(arena=(*table.phases["decode"].arena, "norm.weight")),
        "lies nowhere": phase(values={}),
        "is of a phase 'other'": bucket(phase="other"),
        "its steps are not those": bucket(scratch=()),
        "its buffers are not those": bucket(offsets=first.offsets[1:]),
        "does not say P": bucket(sizes={k: v for k, v in first.sizes.items() if k != "P"}),
        "lies outside of": bucket(offsets=(first.arena_bytes, *first.offsets[1:])),
        "-16": bucket(offsets=(-16, *first.offsets[1:])),
        "there is no tactic 100000": bucket(tactics=(100_000, *first.tactics[1:])),
        "its tactic is for": bucket(tactics=(*first.tactics[:-1], first.tactics[0])),
        "there is no kernel 100000": launched(kernel=100_000),
        "cannot be": launched(grid=(0, 1, 1)),
        "which is not there": launched(operands=(Place("nothing"),)),
        "need more than": replace(
            table, tactics=(replace(tactic, counters=(("c", 1 << 20),)), *rest)
        ),
    }
    for message, changed in wrong.items():
        with pytest.raises(IntegrityError, match=message):
            check(replace(code(), table=changed))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-20], "cut off"),
        (lambda data: b"x" + data[1:], "cannot be unpacked"),
        (lambda _data: lzma.compress(b"no kernel"), "is no kernel"),
        (lambda data: lzma.compress(lzma.decompress(data)[:-1] + b"?"), "is no kernel"),
    ],
)
def test_a_damaged_kernel_is_refused(damage: Callable[[bytes], bytes], message: str) -> None:
    plan, weights = plan_and_weights()
    damaged = replace(code(), kernel=lambda digest: damage(code().kernel(digest)))
    backend = CudaBackend(damaged, weights, LIMITS, device=HostDevice())

    with pytest.raises(IntegrityError, match=message):
        backend.run(*next(phases(plan)))


def test_a_kernel_that_does_not_go_with_its_launch_is_refused() -> None:
    plan, weights = plan_and_weights()
    table = code().table
    changed = [
        replace(t, launches=(replace(t.launches[0], operands=t.launches[0].operands[:-1]),))
        for t in table.tactics
    ]
    short = replace(code(), table=replace(table, tactics=tuple(changed)))
    swapped = [
        replace(t, launches=(replace(t.launches[0], operands=t.launches[0].operands[::-1]),))
        for t in table.tactics
    ]
    other = replace(code(), table=replace(table, tactics=tuple(swapped)))

    for one, message in ((short, "takes .* arguments, not"), (other, "takes i32 for 'slots', not")):
        backend = CudaBackend(one, weights, LIMITS, device=HostDevice())
        with pytest.raises(IntegrityError, match=message):
            backend.run(*next(phases(plan)))


def test_a_kernel_for_another_architecture_is_refused() -> None:
    plan, weights = plan_and_weights()
    other = replace(code(), table=replace(code().table, arch="sm_90"))
    backend = CudaBackend(other, weights, LIMITS, device=HostDevice())

    with pytest.raises(IntegrityError, match="is compiled for sm_90a, the table is for sm_90"):
        backend.run(*next(phases(plan)))
