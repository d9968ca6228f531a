"""Run a plan with the ops' references, step by step, on any device.

The interpreter is a runtime backend like an engine's, so that the same generation loop runs on it,
and it can show every value between the steps: parity bisects over it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lingc.errors import StageError
from lingc.op import OPS, TORCH_DTYPE
from lingc.plan import Arg, Plan, Program, Ref, Size, Step, TensorType, refs
from lingc.plugins import table as _table
from lingc.quantize.layouts import restore
from lingc.runtime.backend import Limits

assert _table.OPS is OPS  # the table is filled by its import

Array = NDArray[Any]
Watch = Callable[[Step, tuple[Tensor, ...]], None]


class InterpreterBackend:
    """A plan, its weights and its state, run by the references.

    Args:
        plan: What to run.
        weights: Weight name -> array as stored (bf16 as uint16, E4M3 as uint8), in the plan's
            layouts.
        limits: How many slots and pages of state to hold.
        device: Where to compute.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, Array], limits: Limits, *, device: str = "cpu"
    ) -> None:
        self.plan = plan
        self.limits = limits
        self.device = torch.device(device)
        self.weights = {
            name: stored_tensor(restore(spec.layout, weights[name]), spec.type).to(self.device)
            for name, spec in plan.weights.items()
        }
        dims = {"S": limits.slots + 1, "R": limits.pages * plan.page_size + 1}
        self.states = {
            name: torch.zeros(kind.bind(dims), dtype=TORCH_DTYPE[kind.dtype], device=self.device)
            for name, kind in plan.states.items()
        }
        self.watch: Watch | None = None
        """Called after every step with its results, for taps and bisection."""
        self._last_use = {phase: _last_uses(program) for phase, program in plan.programs.items()}

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one phase; state is updated in place.

        Returns:
            Outputs by role, at least f32.

        Raises:
            StageError: The plan has no such phase, or a step fails.
        """
        program, values = self.begin(phase, inputs)
        sizes = open_sizes(program, values)
        last = self._last_use[phase]
        for index, step in enumerate(program.steps):
            results = run_step(step, values, sizes)
            values.update(zip(step.outputs, results, strict=True))
            if self.watch is not None:
                self.watch(step, results)
            for name in last.get(index, ()):
                del values[name]
        return self.end(program, values)

    def begin(self, phase: str, inputs: Mapping[str, Array]) -> tuple[Program, dict[str, Tensor]]:
        """A phase's program, and what its first step may read: inputs, states and weights by name.

        Raises:
            StageError: The plan has no such phase.
        """
        program = self.plan.programs.get(phase)
        if program is None:
            raise StageError(f"the plan has no {phase!r} program")
        values = {name: torch.from_numpy(np.asarray(inputs[name])) for name in program.inputs}
        values = {
            name: value.to(self.device, TORCH_DTYPE[program.types[name].dtype])
            for name, value in values.items()
        }
        values.update((name, self.states[name]) for name in program.states)
        values.update((name, self.weights[name]) for name in program.weights)
        return program, values

    def end(self, program: Program, values: Mapping[str, Tensor]) -> dict[str, Array]:
        """Take over the states that a program has made, and give its outputs by role."""
        for state, name in program.updates.items():
            self.states[state] = values[name]
        return {role: _wide_array(values[name]) for role, name in program.outputs.items()}

    def state(self, name: str) -> Array:
        """A copy of a state tensor, at least f32."""
        return _wide_array(self.states[name])

    def save_slot(self, slot: int) -> dict[str, Array]:
        """Linear state and pending tokens of one slot."""
        return {
            name: _stored_array(state[slot].clone().cpu())
            for name, state in self.states.items()
            if self.plan.states[name].shape[0] == "S"
        }

    def load_slot(self, slot: int, saved: Mapping[str, Array]) -> None:
        """Put back what `save_slot` gave."""
        for name, value in saved.items():
            self.states[name][slot] = stored_tensor(value, self.plan.states[name]).to(self.device)

    def save_rows(self, rows: Array) -> dict[str, Array]:
        """Rows of every cache."""
        index = torch.from_numpy(np.asarray(rows, np.int64)).to(self.device)
        return {
            name: _stored_array(state[index].cpu())
            for name, state in self.states.items()
            if self.plan.states[name].shape[0] == "R"
        }

    def load_rows(self, rows: Array, saved: Mapping[str, Array]) -> None:
        """Put back what `save_rows` gave."""
        index = torch.from_numpy(np.asarray(rows, np.int64)).to(self.device)
        for name, value in saved.items():
            kept = stored_tensor(value, self.plan.states[name])
            self.states[name][index] = kept.to(self.device, self.states[name].dtype)

    def close(self) -> None:
        """Release weights and state."""
        self.weights.clear()
        self.states.clear()


def stored_tensor(array: Array, kind: TensorType) -> Tensor:
    """A stored weight as a tensor of its element type, without a copy where possible."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    if kind.dtype == "bf16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if kind.dtype == "f8e4m3":
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def _wide_array(tensor: Tensor) -> Array:
    """A copy in f32, or in f64 where that is what it has."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    array: Array = tensor.to("cpu", dtype, copy=True).numpy()
    return array


def _stored_array(tensor: Tensor) -> Array:
    """The opposite of `stored_tensor`."""
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    values: Array = tensor.numpy()
    return values


def run_step(
    step: Step, values: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[Tensor, ...]:
    """The results of a step by its op's reference; nothing that it reads is written to.

    Args:
        step: The step.
        values: At least what it reads, by name.
        sizes: The symbolic axes that it asks for (`open_sizes`).

    Raises:
        StageError: The reference fails.
    """
    args = [_argument(arg, values, sizes) for arg in step.args]
    try:
        result = _callable(step.op)(*args)
    except (RuntimeError, IndexError, ValueError) as error:
        raise StageError(
            f"step {step.outputs[0]!r} ({step.op}, {step.source}) failed: {error}"
        ) from error
    return result if isinstance(result, tuple) else (result,)


def _callable(op: str) -> Callable[..., Any]:
    if op.startswith("lingc."):
        return OPS[op.removeprefix("lingc.")].reference
    _, name, overload = op.split(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, name), overload)
    return found


def _argument(arg: Arg, values: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Any:
    match arg:
        case Ref():
            return values[arg.name]
        case Size():
            return sizes[arg.name]
        case tuple():
            return [_argument(item, values, sizes) for item in arg]
    return arg


def open_sizes(program: Program, values: Mapping[str, Tensor]) -> dict[str, int]:
    """The value of every symbolic axis that an input or a state names."""
    sizes: dict[str, int] = {}
    for name in (*program.inputs, *program.states):
        for dim, size in zip(program.types[name].shape, values[name].shape, strict=True):
            if isinstance(dim, str):
                sizes[dim] = int(size)
    return sizes


def _last_uses(program: Program) -> dict[int, list[str]]:
    """Step index -> values that no later step and no result reads."""
    kept = {*program.outputs.values(), *program.updates.values(), *program.weights}
    kept.update((*program.inputs, *program.states))
    last: dict[str, int] = {}
    for index, step in enumerate(program.steps):
        for name in (*refs(step.args), *step.outputs):
            last[name] = index
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in kept:
            found.setdefault(index, []).append(name)
    return found
