"""A whole step of a plan by its kernels, as one graph.

Weights may be a checkpoint's, to hold the step to the interpreter, or drawn on the device, to time
a model that no checkpoint is there for.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lingc import targets
from lingc.bench.kernels import Fault, poisoned, problem_of
from lingc.device import Binary, Device, launch_all
from lingc.kernel import Kernel, align
from lingc.op import TORCH_DTYPE
from lingc.plan import Plan, Ref, Size, TensorType
from lingc.quantize.layouts import restore
from lingc.runtime.backend import Array, Limits
from lingc.runtime.slots import Piece, SlotTable
from lingc.targets.cuda.binaries import Compilers, compile_all
from lingc.targets.cuda.binaries import kernels as kernels_of
from lingc.targets.cuda.schedule import Schedule, Scheduled, schedule

_DRAWN = 1 << 28
"""Values that are drawn once and repeated: more than any cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """One graph of a whole step.

    Attributes:
        microseconds: Median over replays.
        launches: In the graph.
        moved_bytes: What the ops must move, by their costs.
        by_op: (op, tactic) -> calls, and microseconds a call when only those calls are recorded.
    """

    microseconds: float
    launches: int
    moved_bytes: float
    by_op: Mapping[tuple[str, str], tuple[int, float]]


class DeviceStep:
    """One phase for one set of sizes: its buffers, and the launches over them.

    Args:
        held: Tensors that are there already, by buffer: weights and state.
    """

    def __init__(
        self,
        device: Device,
        schedule: Schedule,
        binaries: Mapping[Kernel, Binary],
        held: Mapping[str, torch.Tensor],
    ) -> None:
        self.device, self.schedule, self.binaries = device, schedule, binaries
        self.tensors = {
            name: held[name]
            if name in held
            else poisoned(kind.bind({}), TORCH_DTYPE[kind.dtype], device.memory)
            for name, kind in schedule.buffers.items()
        }
        room = schedule.workspace_bytes + 256
        self._scratch = torch.full((room,), 0xFF, dtype=torch.uint8, device=device.memory)
        room = schedule.counter_bytes + 256
        self._counters = torch.zeros(room, dtype=torch.uint8, device=device.memory)
        self._addresses = [self._addresses_of(one) for one in schedule.steps]
        device.synchronize()

    def _addresses_of(self, one: Scheduled) -> dict[str, int]:
        found = {
            name: 0 if buffer is None else self.tensors[buffer].data_ptr()
            for name, buffer in one.buffers.items()
        }
        scratch, counters = self._scratch.data_ptr(), self._counters.data_ptr()
        for space in one.choice.tactic.workspaces:
            if space.zeroed:
                found[space.name], counters = counters, counters + align(space.bytes)
            else:
                found[space.name], scratch = scratch, scratch + align(space.bytes)
        return found

    def give(self, inputs: Mapping[str, Array]) -> None:
        """Put the inputs of a step where it reads them."""
        for name, value in inputs.items():
            into = self.tensors[name]
            into.copy_(torch.from_numpy(np.ascontiguousarray(value)).to(into.dtype))

    def launch_one(self, index: int) -> None:
        """Put one step on the stream, overlapping with nothing before it."""
        launches = self.schedule.steps[index].choice.tactic.launches
        launch_all(self.device, launches, self.binaries, self._addresses[index], first=True)

    def launch(self, only: tuple[str, str] | None = None) -> int:
        """Put the step on the stream, or only the calls of one op and tactic."""
        count = 0
        for one, addresses in zip(self.schedule.steps, self._addresses, strict=True):
            if only is None or (one.op.name, one.choice.tactic.name) == only:
                launches = one.choice.tactic.launches
                launch_all(self.device, launches, self.binaries, addresses, first=count == 0)
                count += len(launches)
        return count

    def value(self, name: str) -> torch.Tensor:
        """What the buffer of a value holds now."""
        return self.tensors[self.schedule.of[name]]

    def time(self, *, replays: int = 15, parts: bool = True) -> StepTiming:
        """Median of replays of the whole step; and of each kind of call alone."""
        with self.device.recording() as graph:
            count = self.launch()
        graph.seconds(3)
        whole = 1e6 * statistics.median(graph.seconds(replays))
        graph.close()
        kinds: dict[tuple[str, str], int] = {}
        for one in self.schedule.steps:
            kind = (one.op.name, one.choice.tactic.name)
            kinds[kind] = kinds.get(kind, 0) + 1
        by_op: dict[tuple[str, str], tuple[int, float]] = {}
        for kind, calls in kinds.items() if parts else ():
            with self.device.recording() as graph:
                self.launch(kind)
            graph.seconds(2)
            by_op[kind] = calls, 1e6 * statistics.median(graph.seconds(7)) / calls
            graph.close()
        return StepTiming(
            microseconds=whole,
            launches=count,
            moved_bytes=sum(one.moved_bytes for one in self.schedule.steps),
            by_op=by_op,
        )


def decode_inputs(plan: Plan, sequences: int, context: int) -> tuple[dict[str, Array], Limits]:
    """A decode step of sequences with that many tokens each, and the room that they need."""
    limits = Limits.from_tokens(
        slots=sequences, tokens_per_sequence=context + 1, page_size=plan.page_size
    )
    table = SlotTable(limits, plan.page_size)
    pieces = []
    for i in range(sequences):
        lease = table.admit(context + 1)
        token = (7919 * i + 11) % plan.config["vocab_size"]
        pieces.append(Piece(lease=lease, position=context, tokens=(token,)))
    given = table.pack(pieces) | {"accepted": np.zeros(sequences, np.int32)}
    wanted = plan.programs["decode"].inputs
    return {name: given[name] for name in wanted}, limits


def sizes_of(plan: Plan, phase: str, inputs: Mapping[str, Array], limits: Limits) -> dict[str, int]:
    """The value of every symbolic axis of a phase."""
    program = plan.programs[phase]
    return _room(plan, limits) | {
        size: value
        for name in program.inputs
        for size, value in zip(program.types[name].shape, inputs[name].shape, strict=True)
        if isinstance(size, str)
    }


def _room(plan: Plan, limits: Limits) -> dict[str, int]:
    """Slots and cache rows, scratch included."""
    return {"S": limits.slots + 1, "R": limits.pages * plan.page_size + 1}


def decode_kernels(plan: Plan, *, sequences: int, context: int) -> list[Kernel]:
    """The kernels of a decode step, which needs no device to know."""
    inputs, limits = decode_inputs(plan, sequences, context)
    sizes = sizes_of(plan, "decode", inputs, limits)
    made = schedule(plan, "decode", sizes, targets.get(plan.target))
    return kernels_of(one.choice.tactic for one in made.steps)


def time_decode(
    plan: Plan, *, sequences: int, context: int, cache_dir: Path, compilers: Compilers | None = None
) -> tuple[StepTiming, dict[str, Any]]:
    """Draw a model's weights on the device and time a whole decode step as one graph.

    Also says whether every logit is finite, and how many experts were hit a layer.
    """
    inputs, limits = decode_inputs(plan, sequences, context)
    backend = KernelBackend(
        plan, None, limits, cache_dir=cache_dir, phases=("decode",), compilers=compilers
    )
    logits = backend.run("decode", inputs)["logits"]
    step = backend.step("decode", inputs)
    timing = step.time()
    hit = [
        int(step.tensors[one.buffers["ids"] or ""].unique().numel())
        for one in step.schedule.steps
        if one.op.name == "norm_router"
    ]
    about = {
        "finite": bool(np.isfinite(logits).all()),
        "experts_hit": sum(hit) / max(len(hit), 1),
        "context": context,
        "sequences": sequences,
        "steps": len(step.schedule.steps),
    }
    backend.close()
    return timing, about


def document(timing: StepTiming, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A step in JSON's types."""
    return {
        **facts,
        "microseconds": timing.microseconds,
        "launches": timing.launches,
        "moved_bytes": timing.moved_bytes,
        "ops": [
            {"op": op, "tactic": tactic, "calls": calls, "microseconds": each}
            for (op, tactic), (calls, each) in timing.by_op.items()
        ],
    }


class KernelBackend:
    """A plan run by its kernels, launch by launch: a backend for the runtime's loops.

    Args:
        plan: For a target of this device's architecture.
        weights: Packed weights by name, as stored; drawn at random where None.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, Array] | None, limits: Limits, *, cache_dir: Path,
        phases: Iterable[str] | None = None, compilers: Compilers | None = None,
        device: Device | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.limits = plan, limits
        self.device = device or Device()
        self.target = targets.get(plan.target)
        self._cache_dir, self._compilers = cache_dir, compilers
        self._steps: dict[tuple[str, tuple[tuple[str, int], ...]], DeviceStep] = {}
        dims = _room(plan, limits)
        self.held = {
            name: torch.zeros(
                kind.bind(dims), dtype=TORCH_DTYPE[kind.dtype], device=self.device.memory
            )
            for name, kind in plan.states.items()
        }
        wanted = tuple(phases or plan.programs)
        names = dict.fromkeys(name for phase in wanted for name in plan.programs[phase].weights)
        drawn = Drawn() if weights is None else None
        for name in names:
            kind = plan.weights[name].type
            if weights is not None:
                self.held[name] = _stored(weights[name], kind, self.device.memory)
            else:
                assert drawn is not None, "weights are given or drawn"
                made = torch.empty(kind.bind({}), dtype=TORCH_DTYPE[kind.dtype], device="cuda")
                drawn.fill(name, made)
                self.held[name] = made

    def step(self, phase: str, inputs: Mapping[str, Array]) -> DeviceStep:
        """The phase for inputs of these sizes, made when it is first asked for."""
        sizes = sizes_of(self.plan, phase, inputs, self.limits)
        key = (phase, tuple(sorted(sizes.items())))
        if key not in self._steps:
            made = schedule(self.plan, phase, sizes, self.target)
            kernels = kernels_of(one.choice.tactic for one in made.steps)
            binaries = compile_all(
                kernels, self.target.arch, self._cache_dir, compilers=self._compilers
            )
            self._steps[key] = DeviceStep(self.device, made, binaries, self.held)
        return self._steps[key]

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one phase; state is updated in place."""
        step = self.step(phase, inputs)
        step.give(inputs)
        self.device.synchronize()
        step.launch()
        self.device.synchronize()
        outputs = self.plan.programs[phase].outputs
        return {role: _wide(step.value(name)) for role, name in outputs.items()}

    def state(self, name: str) -> Array:
        """A copy of a state tensor, in f32."""
        return _wide(self.held[name])

    def save_slot(self, slot: int) -> dict[str, Array]:
        """Linear state and pending tokens of one slot."""
        return {
            name: _bits(self.held[name][slot].clone().cpu())
            for name, kind in self.plan.states.items()
            if kind.shape[0] == "S"
        }

    def load_slot(self, slot: int, saved: Mapping[str, Array]) -> None:
        """Put back what `save_slot` gave."""
        for name, value in saved.items():
            self.held[name][slot] = _stored(value, self.plan.states[name], self.device.memory)

    def close(self) -> None:
        """Free weights, state and buffers."""
        self._steps.clear()
        self.held.clear()


def check_program(
    backend: KernelBackend,
    plain: Mapping[str, torch.Tensor],
    phase: str,
    inputs: Mapping[str, Array],
) -> Iterator[Fault]:
    """Run a phase step by step, each step held to its op's reference on what the step was given.

    Then run it as it runs in a graph, launches overlapping: every value must have the same bits.

    Args:
        plain: Weights in the plan's own order, on the device.
    """
    step = backend.step(phase, inputs)
    states = {name: backend.held[name].clone() for name in backend.plan.states}
    step.give(inputs)
    backend.device.synchronize()
    values: dict[str, list[torch.Tensor]] = {}
    for i, one in enumerate(step.schedule.steps):
        given = [_argument(arg, step, plain) for arg in one.step.args]
        # The kernel, on a stream of its own, may change what is copied.
        backend.device.synchronize()
        step.launch_one(i)
        backend.device.synchronize()
        got = [step.tensors[one.buffers[name] or ""] for name in one.op.results]
        values[one.step.outputs[0]] = [tensor.clone() for tensor in got]
        problem = problem_of(one.op, given, got)
        if problem is not None:
            label = f"{phase} {one.step.outputs[0]}"
            yield Fault(op=one.op.name, case=label, tactic=one.choice.tactic.name, problem=problem)
    after = {name: backend.held[name].clone() for name in states}
    for name, value in states.items():
        backend.held[name].copy_(value)
    step.give(inputs)
    backend.device.synchronize()
    step.launch()
    backend.device.synchronize()
    written = {one.buffers[name] for one in step.schedule.steps for name in one.op.results}
    for one in step.schedule.steps:
        for name, before in zip(one.op.results, values[one.step.outputs[0]], strict=True):
            if name in one.op.arguments:
                continue  # a state, which later steps may have changed
            now = step.tensors[one.buffers[name] or ""]
            if not torch.equal(now.view(torch.uint8), before.view(torch.uint8)):
                problem = f"{name} has other bits where launches overlap"
                label = f"{phase} {one.step.outputs[0]}"
                yield Fault(op=one.op.name, case=label, tactic=one.choice.tactic.name,
                            problem=problem)  # fmt: skip
    for name, value in after.items():
        if name in written and not torch.equal(
            backend.held[name].view(torch.uint8), value.view(torch.uint8)
        ):
            yield Fault(op="", case=f"{phase} {name}", tactic="",
                        problem="the state has other bits where launches overlap")  # fmt: skip


def _argument(arg: Any, step: DeviceStep, plain: Mapping[str, torch.Tensor]) -> Any:
    """An argument as references take it: state as it is before the step."""
    if isinstance(arg, Ref):
        name = step.schedule.of[arg.name]
        found = plain.get(name)
        return step.tensors[name].clone() if found is None else found
    if isinstance(arg, Size):
        return step.schedule.sizes[arg.name]
    return list(arg) if isinstance(arg, tuple) else arg


def plain_weights(
    plan: Plan, weights: Mapping[str, Array], memory: str = Device.memory
) -> dict[str, torch.Tensor]:
    """Packed weights in the plan's own order, on the device."""
    return {
        name: _stored(restore(plan.weights[name].layout, value), plan.weights[name].type, memory)
        for name, value in weights.items()
    }


class Drawn:
    """Random values of each element type, repeated over whatever is asked for."""

    def __init__(self) -> None:
        self._generator = torch.Generator(device="cuda").manual_seed(0)
        bits = torch.randint(256, (_DRAWN,), dtype=torch.uint8, device="cuda",
                             generator=self._generator)  # fmt: skip
        # No NaN, and no code so large that products overflow.
        self._codes = bits & 0xBF
        self._values = torch.randn(_DRAWN // 8, device="cuda", generator=self._generator)
        self._bits = bits

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Draw a weight: scaled so that activations stay near one."""
        flat = tensor.view(-1)
        if tensor.dtype == torch.float8_e4m3fn:
            source = self._codes.view(torch.float8_e4m3fn)
        elif tensor.dtype == torch.int32:
            source = self._bits.view(torch.int32)
        else:
            source = self._scaled(name, tensor)
        for start in range(0, flat.numel(), source.numel()):
            part = flat[start : start + source.numel()]
            part.copy_(source[: part.numel()])

    def _scaled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("scale"):
            return (self._values.abs() * 0.01 + 0.002).to(tensor.dtype)
        if "norm" in name:
            return (1 + 0.1 * self._values).to(tensor.dtype)
        if name.endswith("decay"):
            return (self._values.abs() * 0.1 + 1e-3).to(tensor.dtype)
        width = int(tensor.shape[-1]) if tensor.dim() > 1 else 1000
        scaled: torch.Tensor = self._values * width**-0.5
        return scaled.to(tensor.dtype)


def _stored(array: Array, kind: TensorType, memory: str) -> torch.Tensor:
    """A stored array on the device, with the plan's element type."""
    raw = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())
    dtype = TORCH_DTYPE[kind.dtype]
    found: torch.Tensor = raw.to(memory).view(dtype).reshape(array.shape)
    return found


def _wide(tensor: torch.Tensor) -> Array:
    """A copy in f32, which later steps leave alone."""
    found: Array = tensor.to("cpu", torch.float32, copy=True).numpy()
    return found


def _bits(tensor: torch.Tensor) -> Array:
    found: Array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found
