"""A part of a device, with a driver that only remembers what it was asked."""

from types import SimpleNamespace
from typing import Any

import pytest

from lingc.bench.limited import LimitedDevice
from lingc.device import Device
from lingc.errors import IncompatibleError, UsageError


class Driver:
    """As much of the driver as makes a green context; it gives multiples of 8, or of 2."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="sm")
    CUdevSmResourceSplitByCount_flags = SimpleNamespace(
        CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING=1
    )
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUresult = SimpleNamespace(
        CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"), CUDA_ERROR_OUT_OF_MEMORY=None
    )

    def __init__(self, *, splits: bool = True, fine: bool = True) -> None:
        self.splits, self.fine = splits, fine
        self.asked: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def answer(*words: Any) -> tuple[Any, ...]:
            self.asked.append((name, *words))
            return self.CUresult.CUDA_SUCCESS, name

        return answer

    def cuDevSmResourceSplitByCount(self, groups: int, whole: str, flags: int, sms: int) -> Any:  # noqa: N802
        assert (groups, whole) == (1, "cuDeviceGetDevResource")
        if not self.splits or (flags == 1 and not self.fine):
            return SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE"), [], 0, None
        step = 2 if flags == 1 else 8
        part = SimpleNamespace(sm=SimpleNamespace(smCount=-(-sms // step) * step))
        return self.CUresult.CUDA_SUCCESS, [part], 1, None


CLOSED = [("cuStreamDestroy", "whole"), ("cuDevicePrimaryCtxRelease", 0)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()

    def init(self: Device, index: int = 0) -> None:
        self._driver, self.sms, self.name = found, 132, f"GPU {index}"
        self.stream, self._device = "whole", index
        self._modules, self._functions = [], {}

    monkeypatch.setattr(Device, "__init__", init)
    return found


@pytest.mark.parametrize(("asked", "given"), [(72, 72), (78, 78), (77, 78), (80, 80)])
def test_the_stream_is_of_a_part_that_says_its_size(driver: Driver, asked: int, given: int) -> None:
    device = LimitedDevice(asked)

    assert device.sms == given
    assert device.name == f"GPU 0 ({given} multiprocessors)"
    assert device.stream == "cuGreenCtxStreamCreate"
    assert driver.asked[-1][:2] == ("cuGreenCtxStreamCreate", "cuGreenCtxCreate")


def test_a_driver_without_fine_parts_rounds_up(driver: Driver) -> None:
    driver.fine = False

    assert LimitedDevice(78).sms == 80


def test_what_is_no_part_is_refused(driver: Driver) -> None:
    with pytest.raises(UsageError, match="132 of 132 multiprocessors are no part"):
        LimitedDevice(132)
    assert driver.asked == CLOSED


def test_a_driver_that_splits_nothing_says_why(driver: Driver) -> None:
    driver.splits = False

    with pytest.raises(IncompatibleError, match=r"no part of 78 .*CUDA_ERROR_INVALID_VALUE"):
        LimitedDevice(78)
    assert driver.asked[-2:] == CLOSED


def test_to_close_gives_back_the_part_and_the_whole(driver: Driver) -> None:
    device = LimitedDevice(80)
    driver.asked.clear()

    device.close()

    part = "cuGreenCtxStreamCreate"
    destroyed = [("cuStreamSynchronize", part), ("cuStreamDestroy", part),
                 ("cuGreenCtxDestroy", "cuGreenCtxCreate")]  # fmt: skip
    assert driver.asked == [*destroyed, *CLOSED]


def test_to_wait_is_to_wait_for_the_part_as_well(driver: Driver) -> None:
    device = LimitedDevice(80)
    driver.asked.clear()

    device.synchronize()

    assert driver.asked == [("cuCtxSynchronize",), ("cuStreamSynchronize", device.stream)]
