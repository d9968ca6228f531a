"""Compiled kernels on a device: load, launch, record a graph; memory, copies and events.

Only the driver is used, through cuda-bindings, so that whatever runs an engine needs neither torch
nor a compiler. Programmatic dependent launch and graphs are the driver's own.
"""

import ctypes
import hashlib
import importlib
import json
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lingc.errors import IncompatibleError, MissingExtraError, ResourceError
from lingc.kernel import Launch, Tensor

_MAGIC = b"lingck2\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """A device function, compiled.

    Attributes:
        name: Digest of all that it was made of.
        arch: What it was compiled for.
        code: The ELF image.
        entry: Name of the function in it.
        arguments: (name, type), as in the kernel.
        hidden: Trailing pointers beyond those, which are passed as null.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    name: str
    arch: str
    code: bytes
    entry: str
    arguments: tuple[tuple[str, str], ...]
    hidden: int
    threads: int
    shared_bytes: int

    def to_bytes(self) -> bytes:
        """One file: magic, SHA-256 of the rest, length of the header, header as JSON, image."""
        fields = {key: getattr(self, key) for key in self.__slots__ if key != "code"}
        header = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        rest = struct.pack("<I", len(header)) + header + self.code
        return _MAGIC + hashlib.sha256(rest).digest() + rest

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises ValueError where the bytes are no binary, or not those that were written."""
        start = len(_MAGIC) + hashlib.sha256().digest_size
        if data[: len(_MAGIC)] != _MAGIC or len(data) < start + 4:
            raise ValueError("no kernel binary")
        rest = data[start:]
        if hashlib.sha256(rest).digest() != data[len(_MAGIC) : start]:
            raise ValueError("a kernel binary that is not whole")
        (length,) = struct.unpack_from("<I", rest)
        header = json.loads(rest[4 : 4 + length])
        header["arguments"] = tuple((key, kind) for key, kind in header["arguments"])
        return cls(code=rest[4 + length :], **header)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """Host memory that a device copies from and to by itself, while the host does other work.

    Attributes:
        owner: What holds it, where it is not the driver's.
    """

    address: int
    array: NDArray[np.uint8]
    owner: mmap.mmap | None = None


HUGE = 2 << 20
"""Bytes of a large page of the host."""


class Device:
    """The current CUDA context, its loaded binaries and one stream.

    Args:
        index: Of the device, as the driver counts.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        IncompatibleError: No driver or no such device.
    """

    memory = "cuda"
    """Where torch puts tensors that this device's kernels can reach."""

    def __init__(self, index: int = 0) -> None:
        try:
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise MissingExtraError(
                "cuda-bindings is not installed, which launches kernels",
                hint="pip install 'lingc[cuda]'",
            ) from error
        cu = self._driver
        try:
            self._ok(cu.cuInit(0))
            device = self._ok(cu.cuDeviceGet(index))
        except (RuntimeError, IncompatibleError) as error:
            raise IncompatibleError(
                f"no CUDA device {index} can be used: {error}",
                hint="run this where an NVIDIA GPU and its driver are",
            ) from error
        self._device = device
        self._context = self._ok(cu.cuDevicePrimaryCtxRetain(device))
        self.attach()
        attribute = cu.CUdevice_attribute
        wanted = {
            "major": attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            "minor": attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            "sms": attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            "l2_bytes": attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE,
        }
        facts = {
            key: self._ok(cu.cuDeviceGetAttribute(which, device)) for key, which in wanted.items()
        }
        self.capability = (facts["major"], facts["minor"])
        self.sms, self.l2_bytes = facts["sms"], facts["l2_bytes"]
        self.name = self._ok(cu.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
        self.driver_version = self._ok(cu.cuDriverGetVersion())
        flags = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = self._ok(cu.cuStreamCreate(flags))
        self._functions: dict[str, Any] = {}
        self._modules: list[Any] = []

    def attach(self) -> None:
        """Let the calling thread use the device; the one that made it can already."""
        self._ok(self._driver.cuCtxSetCurrent(self._context))

    def close(self) -> None:
        """Give back the code and the context. What was allocated must have been freed."""
        cu = self._driver
        for module in self._modules:
            self._ok(cu.cuModuleUnload(module))
        self._modules.clear()
        self._functions.clear()
        self._ok(cu.cuStreamDestroy(self.stream))
        self._ok(cu.cuDevicePrimaryCtxRelease(self._device))

    def synchronize(self) -> None:
        """Wait for everything on the device."""
        self._ok(self._driver.cuCtxSynchronize())

    # ------------------------------------------------------------------------------------- memory

    def memory_bytes(self) -> tuple[int, int]:
        """Memory that is free, and in all."""
        cu = self._driver
        result, *both = cu.cuMemGetInfo()
        self._ok((result, None))
        free, total = map(int, both)
        return free, total

    def allocate(self, size: int) -> int:
        """Device memory, as an address that is a multiple of 256.

        Raises:
            ResourceError: There is not as much in one piece.
        """
        return int(self._ok(self._driver.cuMemAlloc(max(size, 1))))

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._ok(self._driver.cuMemFree(address))

    def pin(self, size: int) -> Pinned:
        """Host memory for copies that do not hold up the host."""
        cu = self._driver
        address = int(self._ok(cu.cuMemHostAlloc(max(size, 1), cu.CU_MEMHOSTALLOC_PORTABLE)))
        raw = (ctypes.c_uint8 * size).from_address(address)
        return Pinned(address=address, array=np.ctypeslib.as_array(raw))

    def pin_large(self, size: int) -> Pinned:
        """The same in large pages where the host has them: filled faster by what reads files."""
        cu = self._driver
        whole = -(-size // HUGE) * HUGE
        # Without these flags it is shared memory, whose large pages are of another kind.
        owner = mmap.mmap(-1, whole + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # of a kernel without them
            owner.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_uint8.from_buffer(owner))
        address = start + -start % HUGE
        self._ok(cu.cuMemHostRegister(address, whole, cu.CU_MEMHOSTREGISTER_PORTABLE))
        raw = (ctypes.c_uint8 * size).from_address(address)
        return Pinned(address=address, array=np.ctypeslib.as_array(raw), owner=owner)

    def unpin(self, pinned: Pinned) -> None:
        """Give back what was pinned; no view of it may be used any more."""
        if pinned.owner is None:
            self._ok(self._driver.cuMemFreeHost(pinned.address))
        else:
            self._ok(self._driver.cuMemHostUnregister(pinned.address))

    def clear(self, address: int, size: int) -> None:
        """Zero bytes of device memory, on the stream."""
        if size:
            self._ok(self._driver.cuMemsetD8Async(address, 0, size, self.stream))

    def upload(self, address: int, host: int, size: int, *, stream: Any = None) -> None:
        """Copy bytes from a host address, on the stream or another."""
        on = self.stream if stream is None else stream
        self._ok(self._driver.cuMemcpyHtoDAsync(address, host, size, on))

    def download(self, host: int, address: int, size: int) -> None:
        """Copy bytes to a host address, on the stream."""
        self._ok(self._driver.cuMemcpyDtoHAsync(host, address, size, self.stream))

    def copy(self, address: int, source: int, size: int) -> None:
        """Copy bytes from elsewhere on the device, on the stream; the two must not overlap."""
        self._ok(self._driver.cuMemcpyDtoDAsync(address, source, size, self.stream))

    # ------------------------------------------------------------------------- streams and events

    def new_stream(self) -> Any:
        """A stream beside the device's own, for copies that overlap with it."""
        cu = self._driver
        return self._ok(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def settle(self, stream: Any) -> None:
        """Wait for what is on a stream."""
        self._ok(self._driver.cuStreamSynchronize(stream))

    def end_stream(self, stream: Any) -> None:
        """Give back what `new_stream` gave, once what is on it is done."""
        self._ok(self._driver.cuStreamSynchronize(stream))
        self._ok(self._driver.cuStreamDestroy(stream))

    def mark(self, *, stream: Any = None) -> Any:
        """An event behind what is on the stream now; `wait` for it once."""
        cu = self._driver
        event = self._ok(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        self._ok(cu.cuEventRecord(event, self.stream if stream is None else stream))
        return event

    def wait(self, event: Any) -> None:
        """Wait until an event has come, and forget it."""
        self._ok(self._driver.cuEventSynchronize(event))
        self._ok(self._driver.cuEventDestroy(event))

    # --------------------------------------------------------------------------------------- code

    def function(self, binary: Binary) -> Any:
        """The loaded function of a binary; loaded once."""
        if binary.name not in self._functions:
            cu = self._driver
            module = self._ok(cu.cuModuleLoadData(binary.code))
            self._modules.append(module)
            function = self._ok(cu.cuModuleGetFunction(module, binary.entry.encode()))
            attribute = cu.CUfunction_attribute
            most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            if binary.shared_bytes > 48 * 1024:
                self._ok(cu.cuFuncSetAttribute(function, most, binary.shared_bytes))
            self._functions[binary.name] = function
        return self._functions[binary.name]

    def facts(self, binary: Binary) -> Mapping[str, int]:
        """Registers and local memory of a thread, and blocks that fit on a multiprocessor."""
        cu, function = self._driver, self.function(binary)
        kind = cu.CUfunction_attribute
        blocks = cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            function, binary.threads, binary.shared_bytes
        )
        return {
            "registers": self._ok(cu.cuFuncGetAttribute(kind.CU_FUNC_ATTRIBUTE_NUM_REGS, function)),
            "local_bytes": self._ok(
                cu.cuFuncGetAttribute(kind.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function)
            ),
            "blocks_per_sm": self._ok(blocks),
        }

    def launch(
        self,
        launch: Launch,
        binary: Binary,
        addresses: Mapping[str, int],
        *,
        dependent: bool | None = None,
    ) -> None:
        """Put one launch on the stream.

        Args:
            addresses: Device address of every tensor that the launch names.
            dependent: Overrides `launch.dependent`: the first launch of a series depends on none.
        """
        values = [
            _address(operand, addresses) if kind.startswith("*") else operand
            for (_, kind), operand in zip(binary.arguments, launch.operands, strict=True)
        ]
        self.put(
            binary,
            values,
            grid=launch.grid,
            cluster=launch.cluster,
            dependent=launch.dependent if dependent is None else dependent,
        )

    def put(
        self,
        binary: Binary,
        values: Sequence[Any],
        *,
        grid: tuple[int, int, int],
        cluster: tuple[int, int, int] = (1, 1, 1),
        dependent: bool = False,
    ) -> None:
        """Put one run of a function on the stream.

        Args:
            values: One for each of its arguments; addresses for pointers.
            dependent: Whether it may begin before what is ahead of it has ended.
        """
        cu = self._driver
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = binary.threads, 1, 1
        config.sharedMemBytes = binary.shared_bytes
        config.hStream = self.stream
        attributes = self._attributes(cluster, dependent=dependent)
        config.attrs, config.numAttrs = attributes, len(attributes)
        given = (*values, *(0,) * binary.hidden), _c_types(binary)
        self._ok(cu.cuLaunchKernelEx(config, self.function(binary), given, 0))

    def _attributes(self, cluster: tuple[int, int, int], *, dependent: bool) -> list[Any]:
        cu, found = self._driver, []
        kind = cu.CUlaunchAttributeID
        if dependent:
            attribute = cu.CUlaunchAttribute()
            attribute.id = kind.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            found.append(attribute)
        if cluster != (1, 1, 1):
            attribute = cu.CUlaunchAttribute()
            attribute.id = kind.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dim = attribute.value.clusterDim
            dim.x, dim.y, dim.z = cluster
            found.append(attribute)
        return found

    @contextmanager
    def recording(self) -> Iterator["Graph"]:
        """What is launched inside becomes a graph, which is ready after the block.

        Whatever happens inside, the stream records no more afterwards and can be used again.

        Raises:
            IncompatibleError: Something inside cannot be recorded, waiting for the device say.
        """
        cu = self._driver
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._ok(cu.cuStreamBeginCapture(self.stream, mode))
        made = Graph(self)
        try:
            yield made
        except BaseException:
            _, broken = cu.cuStreamEndCapture(self.stream)  # what broke it is told by the cause
            if broken is not None and int(broken):
                cu.cuGraphDestroy(broken)
            raise
        graph = self._ok(cu.cuStreamEndCapture(self.stream))
        made.executable = self._ok(cu.cuGraphInstantiate(graph, 0))
        self._ok(cu.cuGraphDestroy(graph))

    def _ok(self, answer: Any) -> Any:
        result, *values = answer if isinstance(answer, tuple) else (answer,)
        code = self._driver.CUresult
        if result == code.CUDA_ERROR_OUT_OF_MEMORY:
            raise ResourceError("the device has no memory left", hint="free some, or ask for less")
        if result != code.CUDA_SUCCESS:
            raise IncompatibleError(
                f"the CUDA driver answered {result.name}",
                hint="the kernel or the driver failed; see the steps before it",
            )
        return values[0] if values else None


class Graph:
    """Recorded launches."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.executable: Any = None

    def replay(self) -> None:
        """Put all of it on the stream."""
        cu = self._device._driver  # noqa: SLF001
        self._device._ok(cu.cuGraphLaunch(self.executable, self._device.stream))  # noqa: SLF001

    def seconds(self, replays: int) -> list[float]:
        """Seconds of each of some replays, by events around it."""
        device, cu = self._device, self._device._driver  # noqa: SLF001
        begin, end = (device._ok(cu.cuEventCreate(0)) for _ in range(2))  # noqa: SLF001
        found = []
        for _ in range(replays):
            device._ok(cu.cuEventRecord(begin, device.stream))  # noqa: SLF001
            self.replay()
            device._ok(cu.cuEventRecord(end, device.stream))  # noqa: SLF001
            device._ok(cu.cuEventSynchronize(end))  # noqa: SLF001
            found.append(device._ok(cu.cuEventElapsedTime(begin, end)) / 1e3)  # noqa: SLF001
        return found

    def close(self) -> None:
        """Free it."""
        cu = self._device._driver  # noqa: SLF001
        self._device._ok(cu.cuGraphExecDestroy(self.executable))  # noqa: SLF001


_SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "f32": ctypes.c_float}


def _c_types(binary: Binary) -> tuple[Any, ...]:
    """C types of a function's arguments, hidden ones included."""
    kinds = [
        ctypes.c_void_p if kind.startswith("*") else _SCALARS[kind.partition(":")[0]]
        for _, kind in binary.arguments
    ]
    return (*kinds, *[ctypes.c_void_p] * binary.hidden)


def _address(operand: Any, addresses: Mapping[str, int]) -> int:
    if operand is None:
        return 0
    assert isinstance(operand, Tensor), f"{operand!r} is no tensor"
    return addresses[operand.name] + operand.offset if addresses[operand.name] else 0


def launch_all(
    device: Device,
    launches: Sequence[Launch],
    binaries: Mapping[Any, Binary],
    addresses: Mapping[str, int],
    *,
    first: bool = False,
) -> None:
    """Put the launches of a tactic on the stream, in order.

    Args:
        first: Whether nothing before them may be overtaken.
    """
    for i, one in enumerate(launches):
        dependent = one.dependent and not (first and i == 0)
        device.launch(one, binaries[one.kernel], addresses, dependent=dependent)
