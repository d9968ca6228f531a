"""What a CUDA engine holds in device memory, and whether a device has room for it.

    weights | states | counters | arena

Each is one allocation, made when the engine is loaded and given back when it is closed; nothing is
allocated in between but by the driver itself. All buckets share one arena, as large as the largest
needs, since they run one after another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lingc.device import Device
from lingc.engine.machine import satisfies
from lingc.errors import IncompatibleError, ResourceError
from lingc.kernel import align
from lingc.launch_table import Bucket
from lingc.plan import TensorType
from lingc.runtime.backend import Limits
from lingc.runtime.cuda_code import CudaCode

RESERVE_BYTES = 384 << 20
"""Left to the driver: code, graphs, and what kernels keep on their stacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes of device memory."""

    weights: int
    states: int
    counters: int
    arena: int

    @property
    def total(self) -> int:
        return self.weights + self.states + self.counters + self.arena


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor in device memory."""

    kind: TensorType
    address: int
    bytes: int


def check_device(device: Device, code: CudaCode) -> None:
    """Refuse a device or a driver that cannot run the kernels.

    Raises:
        IncompatibleError: With what there is, and what there must be.
    """
    arch = code.table.arch
    if not _runs(arch, device.capability):
        have, want = (".".join(map(str, one)) for one in (device.capability, _capability(arch)))
        raise IncompatibleError(
            f"the engine is for {code.table.target!r} ({arch}, compute capability {want}); "
            f"{device.name} has compute capability {have}",
            hint="build it for this device: `lingc targets` lists what can be built for",
        )
    driver = _version(device.driver_version)
    if not satisfies(driver, code.driver):
        raise IncompatibleError(
            f"the driver of {device.name} is for CUDA {driver}, the engine's kernels need one for "
            f"{code.driver}",
            hint="update the NVIDIA driver",
        )


def check_room(device: Device, needs: Needs) -> None:
    """Refuse what does not fit, before anything is loaded.

    Raises:
        ResourceError: With the numbers.
    """
    free, total = device.memory_bytes()
    if needs.total + RESERVE_BYTES <= free:
        return
    raise ResourceError(
        f"the engine needs {_size(needs.total + RESERVE_BYTES)} of device memory: weights "
        f"{_size(needs.weights)}, state {_size(needs.states)}, activations "
        f"{_size(needs.arena + needs.counters)}, driver {_size(RESERVE_BYTES)}; {device.name} has "
        f"{_size(free)} free of {_size(total)}",
        hint="free memory on the device, load with fewer slots or tokens, or build with a smaller "
        "precision",
    )


def needs_of(code: CudaCode, limits: Limits, buckets: Iterable[Bucket]) -> Needs:
    """What an engine holds that may run those buckets."""
    plan, dims = code.plan, sizes_of(code, limits)
    return Needs(
        weights=sum(align(spec.type.bytes()) for spec in plan.weights.values()),
        states=sum(align(kind.bytes(dims)) for kind in plan.states.values()),
        counters=align(code.table.counter_bytes),
        arena=max(bucket.arena_bytes for bucket in buckets),
    )


def sizes_of(code: CudaCode, limits: Limits) -> dict[str, int]:
    """Slots and cache rows, scratch included."""
    return {"S": limits.slots + 1, "R": limits.pages * code.plan.page_size + 1}


class DeviceMemory:
    """All that an engine holds on a device; states and counters are zero.

    Args:
        buckets: Those that may be run.

    Raises:
        IncompatibleError: The device or its driver cannot run the engine.
        ResourceError: It has not enough free memory.
    """

    def __init__(
        self, device: Device, code: CudaCode, limits: Limits, buckets: Iterable[Bucket]
    ) -> None:
        check_device(device, code)
        needs = needs_of(code, limits, buckets)
        check_room(device, needs)
        self._device = device
        self._taken: list[int] = []
        self.needs = needs
        try:
            self.weights = self._tensors(
                {name: spec.type for name, spec in code.plan.weights.items()}, {}, needs.weights
            )
            self.states = self._tensors(code.plan.states, sizes_of(code, limits), needs.states)
            self.counters = self._take(needs.counters)
            self.arena = self._take(needs.arena)
        except ResourceError:
            self.close()
            raise
        for held in self.states.values():
            device.clear(held.address, held.bytes)
        device.clear(self.counters, needs.counters)

    def close(self) -> None:
        """Give everything back."""
        for address in self._taken:
            self._device.free(address)
        self._taken.clear()

    def _tensors(
        self, kinds: Mapping[str, TensorType], dims: Mapping[str, int], size: int
    ) -> dict[str, Held]:
        address = self._take(size)
        found = {}
        for name, kind in kinds.items():
            found[name] = Held(kind=TensorType(kind.dtype, kind.bind(dims)), address=address,
                               bytes=kind.bytes(dims))  # fmt: skip
            address += align(found[name].bytes)
        return found

    def _take(self, size: int) -> int:
        address = self._device.allocate(size)
        self._taken.append(address)
        return address


def _capability(arch: str) -> tuple[int, int]:
    """Of `sm_90a` and the like."""
    digits = "".join(c for c in arch if c.isdigit())
    return int(digits[:-1]), int(digits[-1])


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a device: with a letter on no other."""
    major, minor = _capability(arch)
    if arch[-1].isalpha():
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
