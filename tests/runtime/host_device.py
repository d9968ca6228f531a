"""A device that is the host's memory, and an engine whose kernels are the references of its ops.

Everything around the kernels is real: the launch table, its memory plan, buckets and padding,
graphs, addresses. Work is put on streams and done only when somebody waits for it, fresh memory is
NaN, and nothing may touch memory that is not allocated.
"""

import ctypes
import hashlib
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import numpy as np
import torch

from lingc.device import Binary, Device, Graph, Pinned
from lingc.errors import ResourceError
from lingc.launch_table import Counted, LaunchTable, Place, TableLaunch, TableTactic
from lingc.op import OPS, TORCH_DTYPE, Op
from lingc.plan import Arg, Plan, Program, Ref, Size, TensorType
from lingc.quantize.layouts import PLAIN, restore
from lingc.round_memory import ROUND
from lingc.runtime.cuda_code import CudaCode
from lingc.targets.cuda.buckets import Sizes
from lingc.targets.cuda.lower import schedule_all
from lingc.targets.cuda.rounds import RoundPhase
from lingc.targets.cuda.sampling import sample_of
from lingc.targets.cuda.schedule import calls
from lingc.targets.spec import Target

POISON = 0xFF  # NaN in every floating type

Work = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Event:
    stream: int
    place: int


class HostGraph(Graph):
    def __init__(self, device: "HostDevice") -> None:
        self.host = device
        self.work: list[Work] = []
        self.is_open = True

    def replay(self) -> None:
        assert self.is_open
        self.host.replays += 1
        for one in self.work:
            self.host.later(self.host.stream, one)

    def close(self) -> None:
        self.is_open = False


class HostDevice(Device):
    """Host memory in the place of a GPU.

    Args:
        memory: Bytes that it says it has.
    """

    def __init__(
        self,
        *,
        memory: int = 8 << 30,
        capability: tuple[int, int] = (9, 0),
        driver_version: int = 13000,
    ) -> None:
        self.name, self.capability, self.driver_version = "Host GPU", capability, driver_version
        self.total = memory
        self.blocks: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, list[Work | None]] = {0: []}
        self.done: dict[int, int] = {0: 0}
        self.stream: Any = 0
        self.lock = RLock()
        self.record: list[Work] | None = None
        self.loaded: set[str] = set()
        self.restored: dict[int, torch.Tensor] = {}
        self.replays = 0
        self.is_closed = False

    def attach(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True

    def synchronize(self) -> None:
        for stream in [*self.streams]:
            self._run(stream, len(self.streams[stream]))

    # memory

    def memory_bytes(self) -> tuple[int, int]:
        taken = sum(len(block) for block in self.blocks.values())
        return self.total - taken, self.total

    def allocate(self, size: int) -> int:
        if size > self.memory_bytes()[0]:
            raise ResourceError("the device has no memory left")
        block = (ctypes.c_uint8 * (size + 256))()
        ctypes.memset(block, POISON, len(block))
        address = ctypes.addressof(block) + -ctypes.addressof(block) % 256
        self.blocks[address] = block
        return address

    def free(self, address: int) -> None:
        block = self.blocks.pop(address)
        ctypes.memset(block, POISON, len(block))

    def pin(self, size: int) -> Pinned:
        block = (ctypes.c_uint8 * max(size, 1))()
        address = ctypes.addressof(block)
        self.pinned[address] = block
        return Pinned(address=address, array=np.ctypeslib.as_array(block))

    def pin_large(self, size: int) -> Pinned:
        return self.pin(size)

    def unpin(self, pinned: Pinned) -> None:
        del self.pinned[pinned.address]

    def clear(self, address: int, size: int) -> None:
        self.check(address, size)
        self.later(0, lambda: _void(ctypes.memset(address, 0, size)))

    def upload(self, address: int, host: int, size: int, *, stream: Any = None) -> None:
        self.check(address, size)
        self.later(stream or 0, lambda: _void(ctypes.memmove(address, host, size)))

    def download(self, host: int, address: int, size: int) -> None:
        self.check(address, size)
        self.later(0, lambda: _void(ctypes.memmove(host, address, size)))

    def copy(self, address: int, source: int, size: int) -> None:
        self.check(address, size)
        self.check(source, size)
        assert abs(address - source) >= size
        self.later(0, lambda: _void(ctypes.memmove(address, source, size)))

    def check(self, address: int, size: int) -> None:
        """That memory is there."""
        assert any(
            start <= address and address + size <= start + len(block) - 256
            for start, block in [*self.blocks.items()]
        ), f"{size} bytes at {address:#x} are nobody's"

    # streams

    def new_stream(self) -> Any:
        with self.lock:
            stream = len(self.streams)
            self.streams[stream], self.done[stream] = [], 0
            return stream

    def settle(self, stream: Any) -> None:
        self._run(stream, len(self.streams[stream]))

    def end_stream(self, stream: Any) -> None:
        self.settle(stream)

    def mark(self, *, stream: Any = None) -> Any:
        on = stream or 0
        return Event(on, len(self.streams[on]))

    def wait(self, event: Any) -> None:
        self._run(event.stream, event.place)

    def later(self, stream: int, work: Work) -> None:
        assert self.record is None, "only launches are recorded"
        self.streams[stream].append(work)

    def _run(self, stream: int, end: int) -> None:
        work = self.streams[stream]
        while self.done[stream] < end:
            place = self.done[stream]
            one, work[place] = work[place], None
            assert one is not None
            one()
            self.done[stream] += 1

    # code

    def function(self, binary: Binary) -> Any:
        assert self.record is None or binary.name in self.loaded, "loaded while recording"
        self.loaded.add(binary.name)

    def put(
        self,
        binary: Binary,
        values: Sequence[Any],
        *,
        grid: tuple[int, int, int],
        cluster: tuple[int, int, int] = (1, 1, 1),
        dependent: bool = False,
    ) -> None:
        assert (grid, cluster, dependent) == ((1, 1, 1), (1, 1, 1), False)
        self.function(binary)
        given = tuple(values)

        def work() -> None:
            run_reference(self, json.loads(binary.code), given)

        if self.record is None:
            self.later(0, work)
        else:
            self.record.append(work)

    @contextmanager
    def recording(self) -> Iterator[Graph]:
        made = HostGraph(self)
        self.record = made.work
        try:
            yield made
        finally:
            self.record = None

    def tensor(self, address: int, kind: TensorType) -> torch.Tensor:
        """What lies there; not a copy."""
        size = kind.bytes()
        self.check(address, size)
        raw = (ctypes.c_uint8 * size).from_address(address)
        flat = torch.from_numpy(np.ctypeslib.as_array(raw)) if size else torch.empty(0)
        return flat.view(TORCH_DTYPE[kind.dtype]).view(kind.bind({}))


def _void(_value: object) -> None: ...


# ---------------------------------------------------------------------------------------- kernels


def run_reference(device: HostDevice, what: Mapping[str, Any], values: Sequence[Any]) -> None:
    """Run an op by its reference, over addresses."""
    op = OPS[what["op"]]
    given = iter(values)
    slots, rows = next(given), next(given)
    dims = {"S": slots, "R": rows}

    def held(item: Mapping[str, Any]) -> tuple[int, TensorType]:
        kind = TensorType(item["dtype"], tuple(item["shape"]))
        return next(given), TensorType(kind.dtype, kind.bind(dims))

    arguments: list[Any] = []
    places: dict[str, torch.Tensor] = {}
    for name, item in zip(op.arguments, what["arguments"], strict=True):
        if isinstance(item, dict):
            address, kind = held(item)
            places[name] = device.tensor(address, kind)
            arguments.append(_plain(device, address, places[name], item["layout"], kind))
        else:
            arguments.append(item)
    for name, item in what["results"].items():
        address, kind = held(item)
        places[name] = device.tensor(address, kind)
    for size in what["workspaces"]:
        address = next(given)
        device.check(address, size)
        ctypes.memset(address, POISON, size)
    for size in what["counters"]:
        address = next(given)
        device.check(address, size)
        assert not any((ctypes.c_uint8 * size).from_address(address)), "a counter is not zero"
    found = op.reference(*arguments)
    results = [found] if isinstance(found, torch.Tensor) else [*found]
    for name, value in zip(op.results, results, strict=True):
        places[name].copy_(value)


def _plain(
    device: HostDevice, address: int, tensor: torch.Tensor, layout: str, kind: TensorType
) -> torch.Tensor:
    """A copy of an argument as references take it; weights are put in order once."""
    if layout == PLAIN:
        return tensor.clone()
    if address not in device.restored:
        bits = {"bf16": torch.int16, "f8e4m3": torch.uint8}.get(kind.dtype)
        raw = tensor if bits is None else tensor.view(bits)
        ordered = torch.from_numpy(np.ascontiguousarray(restore(layout, raw.numpy())))
        device.restored[address] = ordered.view(tensor.dtype)
    return device.restored[address]


def reference_code(plan: Plan, target: Target, sizes: Sequence[Sizes]) -> CudaCode:
    """The code of a plan with each tactic's launches replaced by the op's reference."""
    table = schedule_all(plan, target, sizes=sizes).table
    files: dict[str, bytes] = {}
    tactics = [*table.tactics]
    seen: set[int] = set()
    for bucket in table.buckets:
        program = _program(plan, bucket.phase, target)
        steps = {step.outputs[0]: step for step in program.steps}
        phase = table.phases[bucket.phase]
        for step, index in zip(phase.steps, bucket.tactics, strict=True):
            if index not in seen:
                seen.add(index)
                args = steps[step.name].args
                tactics[index] = _replaced(
                    table, files, OPS[step.op], tactics[index], args, program, bucket.sizes,
                    plan.page_size,
                )  # fmt: skip
    return CudaCode(
        plan=plan,
        table=replace(table, tactics=tuple(tactics), kernels=tuple(files)),
        kernel=files.__getitem__,
    )


def _program(plan: Plan, phase: str, target: Target) -> Program:
    """With the steps that only engines have."""
    if phase == ROUND:
        return RoundPhase(plan).program
    program = plan.programs[phase]
    sampling = sample_of(phase, program, calls(program)[1], target)
    return program if sampling is None else sampling.program


def _replaced(
    table: LaunchTable, files: dict[str, bytes], op: Op, tactic: TableTactic,
    args: tuple[Arg, ...], program: Program, sizes: Mapping[str, int], page_size: int,
) -> TableTactic:  # fmt: skip
    def bound(arg: Arg) -> Any:
        if isinstance(arg, Ref):
            kind = program.types[arg.name]
            known = kind.bind({**sizes, "S": 0, "R": 0})
            pairs = zip(kind.shape, known, strict=True)
            return TensorType(kind.dtype, tuple(d if d in ("S", "R") else n for d, n in pairs))
        if isinstance(arg, Size):
            return sizes[arg.name]
        return [*arg] if isinstance(arg, tuple) else arg

    given = [bound(arg) for arg in args]
    layouts = op.layouts(*given)
    made = op.types(*given)
    types = (made,) if isinstance(made, TensorType) else made

    def shown(kind: TensorType, layout: str = PLAIN) -> dict[str, Any]:
        return {"dtype": kind.dtype, "shape": kind.shape, "layout": layout}

    arguments = [
        shown(value, layouts.get(name, PLAIN)) if isinstance(value, TensorType) else value
        for name, value in zip(op.arguments, given, strict=True)
    ]
    results = {
        name: shown(kind)
        for name, kind in zip(op.results, types, strict=True)
        if name not in op.arguments
    }
    named = zip(op.arguments, given, strict=True)
    tensors = [name for name, value in named if isinstance(value, TensorType)]
    spaces = [*tactic.workspaces, *tactic.counters]
    places = [*tensors, *results, *(name for name, _ in spaces)]
    what = {
        "op": op.name,
        "arguments": arguments,
        "results": results,
        "workspaces": [size for _, size in tactic.workspaces],
        "counters": [size for _, size in tactic.counters],
    }
    code = json.dumps(what).encode()
    binary = Binary(
        name=hashlib.sha256(code).hexdigest(),
        arch=table.arch,
        code=code,
        entry=op.name,
        arguments=(("slots", "i32"), ("rows", "i64"), *((name, "*u8") for name in places)),
        hidden=0,
        threads=32,
        shared_bytes=0,
    )
    data = lzma.compress(binary.to_bytes())
    digest = hashlib.sha256(data).hexdigest()
    files.setdefault(digest, data)
    launch = TableLaunch(
        kernel=[*files].index(digest),
        grid=(1, 1, 1),
        operands=(Counted(1, 0, 1), Counted(0, page_size, 1), *map(Place, places)),
    )
    return replace(tactic, launches=(launch,))
