"""A device of which only some multiprocessors are used: it stands in for one that has fewer."""

from typing import Any

from lingc.device import Device
from lingc.errors import IncompatibleError, UsageError


def open_device(sms: int | None = None, index: int = 0) -> Device:
    """The device, or a part of it with that many multiprocessors."""
    return Device(index) if sms is None else LimitedDevice(sms, index)


class LimitedDevice(Device):
    """Launches run on some of the multiprocessors: a green context, which the driver keeps to.

    Only the stream belongs to it. Memory and functions are the primary context's, and whoever uses
    another stream uses the whole device.

    Args:
        sms: How many; the driver may round up, and `sms` afterwards says what it gave.

    Raises:
        UsageError: The device has fewer, or as many.
        IncompatibleError: The driver has no green contexts.
    """

    def __init__(self, sms: int, index: int = 0) -> None:
        super().__init__(index)
        self._whole, self._green = self.stream, None
        try:
            self._limit(sms, index)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        cu = self._driver
        part, self.stream = self.stream, self._whole
        green, self._green = self._green, None
        try:
            if part is not self._whole:
                self.end_stream(part)
            if green is not None:
                self._ok(cu.cuGreenCtxDestroy(green))
        finally:
            super().close()

    def _limit(self, sms: int, index: int) -> None:
        if not 1 <= sms < self.sms:
            raise UsageError(
                f"{sms} of {self.sms} multiprocessors are no part of the device",
                hint="leave --sms out to use all of them",
            )
        cu = self._driver
        if not hasattr(cu, "cuGreenCtxCreate"):
            raise IncompatibleError(
                "this driver's bindings have no green contexts", hint="update cuda-bindings"
            )
        device = self._ok(cu.cuDeviceGet(index))
        kind = cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        whole = self._ok(cu.cuDeviceGetDevResource(device, kind))
        part, self.sms = self._split(whole, sms)
        descriptor = self._ok(cu.cuDevResourceGenerateDesc([part], 1))
        flags = cu.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        self._green = self._ok(cu.cuGreenCtxCreate(descriptor, device, flags))
        non_blocking = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = self._ok(cu.cuGreenCtxStreamCreate(self._green, non_blocking, 0))
        self.name = f"{self.name} ({self.sms} multiprocessors)"

    def synchronize(self) -> None:
        """Wait for everything on the device, and for this part of it.

        To wait for the primary context does not always wait for a green one: on one H200 results
        were read while a graph on its stream still ran.
        """
        super().synchronize()
        self._ok(self._driver.cuStreamSynchronize(self.stream))

    def _split(self, whole: Any, sms: int) -> tuple[Any, int]:
        """A part of that many, by the finest rule that the driver takes."""
        cu = self._driver
        finest = int(
            cu.CUdevSmResourceSplitByCount_flags.CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING
        )
        said = ""
        for flags in (0,) if sms % 8 == 0 else (finest, 0):
            answer = cu.cuDevSmResourceSplitByCount(1, whole, flags, sms)
            if answer[0] == cu.CUresult.CUDA_SUCCESS:
                part = answer[1][0]
                return part, int(part.sm.smCount)
            said = answer[0].name
        raise IncompatibleError(
            f"the driver makes no part of {sms} multiprocessors: {said}",
            hint="try a multiple of 8",
        )
