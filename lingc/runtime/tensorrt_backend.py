"""Runs a TensorRT engine, of either flavour: buckets padded as for a CUDA engine, decode as graphs.

Weights, states, inputs and outputs are bound to memory that is laid out once; a state lies in one
place as input and as output. Nothing of an engine reaches TensorRT before the package, the
library's version, the device and the memory were checked, and `engine_host_code_allowed` stays off.
A step of decode is recorded as a CUDA graph when its bucket is first run, after a run over padding
alone, so that Python costs nothing per step; what the plugins launch is recorded with it.

No machine with such a library and GPU was at hand: tests run it on networks that are walked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lingc import targets
from lingc.device import Device, Graph, Pinned
from lingc.engine import Package
from lingc.errors import IncompatibleError, ResourceError, UsageError
from lingc.kernel import align
from lingc.launch_table import Bucket
from lingc.plan import Program, TensorType
from lingc.runtime import tensorrt_library
from lingc.runtime.backend import Array, Limits, SlotState
from lingc.runtime.cuda_inputs import (
    NUMPY_DTYPE,
    ROWS,
    fill,
    halves,
    order,
    sizes_of,
    smallest,
    too_large,
)
from lingc.runtime.cuda_memory import RESERVE_BYTES, Held
from lingc.runtime.cuda_state import CudaState
from lingc.runtime.cuda_weights import upload_weights
from lingc.runtime.tensorrt_deploy import load_plugins
from lingc.runtime.tensorrt_package import (
    TensorrtCode,
    check_capability,
    check_engine,
    check_library,
    read_code,
)
from lingc.runtime.tensorrt_plugin import Launcher, register
from lingc.weights import Progress

GATHERED = ("token_ids", ROWS)
"""Inputs that a gather reads by, where padding may not be -1."""

GRAPHED = ("decode",)
"""Phases whose steps are recorded as graphs."""


class TensorrtBackend:
    """A loaded engine; `lingc.runtime.backend.Backend` says what it does.

    Args:
        package: A checked package of the kind `tensorrt`, or its code.
        weights: Its weights, by name, as they are stored.
        limits: How many slots and pages of state to hold.
        threads: Threads that read weights; as many as help where None.
        progress: Told while weights are loaded.
        device: The first one where None.
        plugins: A folder that `lingc deploy` wrote, of this package: its C++ plugins launch, and
            Python does nothing in a step. Python's own where None.
        trt: The library; the one that the engines ask for where None.

    Raises:
        MissingExtraError: TensorRT is not installed.
        IncompatibleError: It is another version, or the device another one.
        IntegrityError: The code is not what a build makes.
        ResourceError: The device has not enough free memory.
    """

    def __init__(
        self,
        package: Package | TensorrtCode,
        weights: Mapping[str, Array],
        limits: Limits,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
        device: Device | None = None,
        plugins: Path | None = None,
        trt: Any = None,
    ) -> None:
        code = package if isinstance(package, TensorrtCode) else read_code(package)
        self._code, self._limits = code, limits
        target = targets.get(code.target)
        self._trt = tensorrt_library.require(target) if trt is None else trt
        check_library(code, str(self._trt.__version__))
        engines = {phase: code.engines[phase]() for phase in code.plan.programs}
        for phase, data in engines.items():
            check_engine(phase, data, code.version)
        self._buckets = {
            phase: sorted((b for b in code.buckets if b.phase == phase), key=order)
            for phase in code.plan.programs
        }
        self._owns_device = device is None
        self.device = device or Device()
        self._taken: list[int] = []
        self._pinned: list[Pinned] = []
        self._graphs: dict[int, Graph] = {}
        try:
            check_capability(target, self.device.name, self.device.capability)
            self._check_room(engines)
            dims = {"S": limits.slots + 1, "R": limits.pages * code.plan.page_size + 1}
            self._weights = self._tensors(self._given_weights(), {})
            self._states = self._tensors(code.plan.states, dims)
            for held in self._states.values():
                self.device.clear(held.address, held.bytes)
            upload_weights(self.device, weights, self._weights, progress=progress, threads=threads)
            if plugins is None:
                register(self._trt, self._launcher())
            else:
                load_plugins(self._trt, plugins, code.digest)
            self._load(engines)
            self._places = {phase: self._room(phase) for phase in code.plan.programs}
            self._given = {phase: self._pin(phase) for phase in code.plan.programs}
        except BaseException:
            self.close()
            raise
        axes = {name: str(kind.shape[0]) for name, kind in code.plan.states.items()}
        self._state = CudaState(self.device, self._states, axes, self._fetch)

    @property
    def plan(self) -> Any:
        return self._code.plan

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def prefill_tokens(self) -> int:
        """The most tokens of a prefill step."""
        return max(bucket.sizes["T"] for bucket in self._buckets["prefill"])

    @property
    def batch_invariant(self) -> bool:
        return False  # TensorRT chooses products by their sizes

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one phase; see `lingc.runtime.backend.Backend`.

        Raises:
            UsageError: The plan has no such phase, or no profile holds the step.
            InputError: An input is missing, or of another type or shape.
            IncompatibleError: TensorRT or the driver failed.
        """
        program = self.plan.programs.get(phase)
        if program is None:
            known = ", ".join(self.plan.programs)
            raise UsageError(f"the engine has no phase {phase!r}", hint=f"it has: {known}")
        sizes = sizes_of(phase, program, inputs)
        rows = sizes.get("N", 0)
        roomy = (one for one in self._buckets[phase] if one.sizes.get("N", rows) >= rows)
        bucket = smallest(phase, roomy, sizes)
        if bucket is None:
            if sizes["B"] < 2:
                raise too_large(phase, sizes)
            return self._run_halves(phase, inputs)
        self._step(phase, bucket, inputs)
        found = {}
        for role, name in program.outputs.items():
            kind = program.types[name]
            count = sizes[str(kind.shape[0])]
            own = TensorType(kind.dtype, (count, *kind.shape[1:]))
            place = self._places[phase][name]
            found[role] = self._fetch(Held(kind=own, address=place.address, bytes=own.bytes()))
        return found

    def state(self, name: str) -> Array:
        """A copy of a state tensor, scratch included; bf16 widened."""
        return self._state.whole(name)

    def save_slot(self, slot: int) -> SlotState:
        return self._state.save_slot(slot)

    def load_slot(self, slot: int, saved: SlotState) -> None:
        self._state.load_slot(slot, saved)

    def save_rows(self, rows: Array) -> SlotState:
        return self._state.save_rows(rows)

    def load_rows(self, rows: Array, saved: SlotState) -> None:
        self._state.load_rows(rows, saved)

    def close(self) -> None:
        self.device.synchronize()
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._contexts: dict[str, Any] = {}
        self._engines: dict[str, Any] = {}
        for pinned in self._pinned:
            self.device.unpin(pinned)
        self._pinned.clear()
        for address in self._taken:
            self.device.free(address)
        self._taken.clear()
        if self._owns_device:
            self.device.close()

    # ------------------------------------------------------------------------------------- loading

    def _launcher(self) -> Launcher:
        return Launcher(
            table=self._code.table,
            digest=self._code.digest,
            kernel=self._code.kernel,
            device=self.device,
        )

    def _load(self, engines: Mapping[str, bytes]) -> None:
        trt = self._trt
        tensorrt_library.mend(trt)
        self._logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(self._logger)
        runtime.engine_host_code_allowed = False
        self._runtime = runtime
        self._engines, self._contexts = {}, {}
        for phase, data in engines.items():
            engine = runtime.deserialize_cuda_engine(data)
            context = None if engine is None else engine.create_execution_context()
            if context is None:
                raise IncompatibleError(
                    f"TensorRT {self._code.version} refuses the {phase} engine on "
                    f"{self.device.name}",
                    hint="its own log, above, says why; build the engine for this device",
                )
            self._engines[phase], self._contexts[phase] = engine, context

    def _check_room(self, engines: Mapping[str, bytes]) -> None:
        """Refuse what does not fit, as far as it is known before TensorRT is asked."""
        plan = self._code.plan
        dims = {"S": self._limits.slots + 1, "R": self._limits.pages * plan.page_size + 1}
        weights = sum(align(kind.bytes()) for kind in self._given_weights().values())
        states = sum(align(kind.bytes(dims)) for kind in plan.states.values())
        own = sum(map(len, engines.values()))
        free, total = self.device.memory_bytes()
        if weights + states + own + RESERVE_BYTES > free:
            raise ResourceError(
                f"the engine needs more than {(weights + states + own + RESERVE_BYTES) / 1e9:.2f} "
                f"GB of device memory: weights {weights / 1e9:.2f}, state {states / 1e9:.2f}, "
                f"engines {own / 1e9:.2f}; {self.device.name} has {free / 1e9:.2f} GB free of "
                f"{total / 1e9:.2f}",
                hint="free memory on the device, load with fewer slots or tokens, or build with a "
                "smaller precision",
            )

    def _given_weights(self) -> dict[str, TensorType]:
        """Weights that are bound; the others lie in the engines."""
        return {
            name: spec.type
            for name, spec in self._code.plan.weights.items()
            if name not in self._code.embedded
        }

    def _tensors(self, kinds: Mapping[str, TensorType], dims: Mapping[str, int]) -> dict[str, Held]:
        """Tensors side by side in one allocation."""
        bound = {name: TensorType(kind.dtype, kind.bind(dims)) for name, kind in kinds.items()}
        address = self.device.allocate(sum(align(kind.bytes()) for kind in bound.values()))
        self._taken.append(address)
        found = {}
        for name, kind in bound.items():
            found[name] = Held(kind=kind, address=address, bytes=kind.bytes())
            address += align(kind.bytes())
        return found

    def _room(self, phase: str) -> dict[str, Held]:
        """Memory of a phase's inputs and outputs, for its largest bucket."""
        program = self.plan.programs[phase]
        most: dict[str, int] = {}
        for bucket in self._buckets[phase]:
            for axis, size in bucket.sizes.items():
                most[axis] = max(size, most.get(axis, 0))
        names = (*program.inputs, *program.outputs.values())
        return self._tensors({name: program.types[name] for name in names}, most)

    def _pin(self, phase: str) -> Pinned:
        program, places = self.plan.programs[phase], self._places[phase]
        pinned = self.device.pin(max(sum(align(places[n].bytes) for n in program.inputs), 1))
        self._pinned.append(pinned)
        return pinned

    # -------------------------------------------------------------------------------------- a step

    def _step(self, phase: str, bucket: Bucket, inputs: Mapping[str, Array]) -> None:
        context, key = self._contexts[phase], id(bucket)
        self._bind(phase, bucket)
        if phase in GRAPHED and key not in self._graphs:
            # Once over padding: TensorRT prepares a shape in its first run, which cannot be
            # recorded, and a run over padding changes no state.
            self._give(phase, bucket, _nothing(self.plan.programs[phase], bucket))
            self._execute(phase, context)
            self.device.synchronize()
            with self.device.recording() as graph:
                self._execute(phase, context)
            self._graphs[key] = graph
        self._give(phase, bucket, inputs)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self._execute(phase, context)

    def _bind(self, phase: str, bucket: Bucket) -> None:
        """Tell TensorRT where everything is, and how large."""
        context, program = self._contexts[phase], self.plan.programs[phase]
        engine, places = self._engines[phase], self._places[phase]
        updates = {value: state for state, value in program.updates.items()}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if name in program.inputs:
                kind = program.types[name]
                if not context.set_input_shape(name, kind.bind(bucket.sizes)):
                    raise UsageError(
                        f"{name!r} of the {phase} engine takes no shape "
                        f"{list(kind.bind(bucket.sizes))}",
                        hint="a fault of lingc; please report it",
                    )
            elif name in self._states:
                context.set_input_shape(name, self._states[name].kind.shape)
            held = (
                places.get(name)
                or self._states.get(updates.get(name, name))
                or self._weights.get(name)
            )
            if held is None:
                raise IncompatibleError(
                    f"the {phase} engine has a tensor {name!r}, which the plan has not",
                    hint="it is of another build; get the package again",
                )
            context.set_tensor_address(name, held.address)

    def _give(self, phase: str, bucket: Bucket, inputs: Mapping[str, Array]) -> None:
        """Copy a step's inputs to the device, padded to the bucket."""
        program, pinned = self.plan.programs[phase], self._given[phase]
        self._finish()  # what was copied from there before
        views, start, copies = {}, 0, []
        for name in program.inputs:
            kind = program.types[name]
            bound = TensorType(kind.dtype, kind.bind(bucket.sizes))
            raw = pinned.array[start : start + bound.bytes()]
            views[name] = raw.view(NUMPY_DTYPE[kind.dtype]).reshape(bound.bind({}))
            copies.append(
                (self._places[phase][name].address, pinned.address + start, bound.bytes())
            )
            start += align(bound.bytes())
        fill(phase, views, inputs)
        for name in GATHERED:
            # Layers of TensorRT's own read rows by these, and take no row for padding.
            if name in views:
                np.maximum(views[name], 0, out=views[name])
        for address, source, size in copies:
            self.device.upload(address, source, size)

    def _execute(self, phase: str, context: Any) -> None:
        if not context.execute_async_v3(int(self.device.stream)):
            raise IncompatibleError(
                f"TensorRT could not run the {phase} engine on {self.device.name}",
                hint="its own log, above, says why",
            )

    def _run_halves(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """A step that no profile holds, in parts: sequences do not see each other."""
        parts = halves(inputs)
        made = [self.run(phase, part) for part, _, _ in parts]
        found = {}
        for role in self.plan.programs[phase].outputs:
            places = [tokens if role == "hidden" else rows for _, tokens, rows in parts]
            every = np.concatenate([one[role] for one in made])
            found[role] = np.empty_like(every)
            found[role][np.concatenate(places)] = every
        return found

    def _fetch(self, held: Held) -> Array:
        """A copy of a tensor; what is on the stream before it is done then."""
        found = np.empty(held.kind.bind({}), NUMPY_DTYPE[held.kind.dtype])
        if found.nbytes:
            self.device.download(found.ctypes.data, held.address, held.bytes)
            self._finish()
        return found

    def _finish(self) -> None:
        self.device.wait(self.device.mark())


def _nothing(program: Program, bucket: Bucket) -> dict[str, Array]:
    """Inputs of a step that is padding alone."""
    sizes = {**dict.fromkeys(bucket.sizes, 0), "P": bucket.sizes["P"], "B+1": 1}
    made = {}
    for name in program.inputs:
        kind = program.types[name]
        shape = kind.bind(sizes)
        made[name] = np.zeros(shape, NUMPY_DTYPE[kind.dtype])
    return made
