"""A CUDA engine's runtime without a GPU: real tables and memory, references as kernels."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from lingc import targets
from lingc.errors import (
    InputError,
    UsageError,
)
from lingc.interpret import InterpreterBackend
from lingc.quantize.formats import widen_bf16
from lingc.runtime import Generator, Request
from lingc.runtime.backend import Array, Limits
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_inputs import ROWS, fill, order, sizes_of, smallest
from lingc.runtime.slots import Piece, SlotTable
from lingc.runtime.steps import Steps
from tests.runtime.cuda_engine import (
    BUCKETS,
    LIMITS,
    REQUESTS,
    TARGET,
    code,
    loaded,
    phases,
    plan_and_weights,
)
from tests.runtime.host_device import HostDevice, reference_code


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
