"""What a CUDA engine refuses: devices, limits, weights and code that do not fit."""

import lzma
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from lingc.errors import (
    IncompatibleError,
    IntegrityError,
    ResourceError,
    UsageError,
)
from lingc.launch_table import LaunchTable, Place
from lingc.runtime.backend import Array, Limits
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_code import check
from lingc.runtime.cuda_memory import RESERVE_BYTES
from tests.runtime.cuda_engine import (
    LIMITS,
    code,
    loaded,
    phases,
    plan_and_weights,
)
from tests.runtime.host_device import HostDevice


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
