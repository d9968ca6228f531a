"""Runs an ONNX engine on ONNX Runtime's CPU provider.

Each phase is a session, made when it is first used. All sessions read one copy of the weights,
mapped from the package or widened once. State tensors are bound as input and as output of a
session at one address, so that a step writes the rows that changed and copies nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingc.engine import Package
from lingc.errors import InputError, UsageError
from lingc.plan import Plan, Program, TensorType
from lingc.runtime.backend import Array, Limits, SlotState
from lingc.runtime.onnx_runner import NUMPY_DTYPE, Runner
from lingc.runtime.onnx_session import OrtValue, make_session, value_of, with_outputs
from lingc.runtime.onnx_weights import initializer_from_json, load
from lingc.weights import Progress

PREPACKED_BYTES = 256 << 20
"""Up to here each session may keep its own copy of the weights, in the order its kernels like best:
steps of many tokens are up to twice as fast, steps of one token the same."""

PREPACKED_4_BIT_BYTES = 2 << 30
"""The same for an engine that widens in every step: there only 4-bit weights are copied, and
without the copy ONNX Runtime dequantizes whole matrices, which is several times slower."""

PREFILL_ONE = "prefill_one"
"""The model for prefill of one sequence."""

SETTLED, DECODE_ONE = "decode_settled", "decode_one"
"""The models for decode steps of neighbouring slots in which every sequence goes on and none has
accepted tokens to commit: of any number of sequences, and of one."""


_NONE = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModels:
    """What `lingc.targets.onnx.lower` makes of a plan.

    Attributes:
        models: phase -> serialized model.
        info: What the lowering says beside them.
    """

    plan: Plan
    models: Mapping[str, bytes]
    info: Mapping[str, Any]


class OnnxBackend:
    """A loaded engine; `lingc.runtime.backend.Backend` says what it does.

    Args:
        package: A checked package of the kind `onnx`, or models fresh from the lowering.
        weights: Its weights, by name, as they are stored.
        limits: How many slots and pages of state to hold.
        threads: Threads of a step; as many as this process may use where None.
        progress: Told when the weights are mapped or widened.
        taps: Values of the plan that every run returns beside the outputs, by name.
    """

    def __init__(
        self,
        package: Package | OnnxModels,
        weights: Mapping[str, Array],
        limits: Limits,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
        taps: Sequence[str] = (),
    ) -> None:
        given = models_of(package)
        self._plan = given.plan
        self._limits = limits
        self._threads = threads
        self._models = given.models
        self._info = given.info
        self._taps = {
            phase: _tapped(program, taps) for phase, program in self._plan.programs.items()
        }
        self._weights, self._values = _initializers(given.info, weights)
        if progress is not None:
            total = sum(array.nbytes for array in self._weights.values())
            progress(total, total)
        self._states = _zeros(self._plan, limits)
        self._state_values = {
            name: value_of(array, self._plan.states[name].dtype)
            for name, array in self._states.items()
        }
        self._runners: dict[str, Runner] = {}
        self._bound_slots: dict[str, range] = {}
        self.ran = ""
        """Name of the model that the last run was of."""

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def limits(self) -> Limits:
        return self._limits

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one phase; see `lingc.runtime.backend.Backend`.

        Raises:
            UsageError: The plan has no such phase.
            InputError: An input is missing, or of another type or shape.
        """
        program = self._plan.programs.get(phase)
        if program is None:
            known = ", ".join(self._plan.programs)
            raise UsageError(f"the engine has no phase {phase!r}", hint=f"it has: {known}")
        sizes: dict[str, int] = {}
        arrays = [
            _checked(phase, name, program.types[name], inputs, sizes) for name in program.inputs
        ]
        settled = self._settled_slots(phase, inputs)
        name = self._model_name(phase, inputs, settled)
        runner = self._runner(phase, name)
        if settled is not None and self._bound_slots.get(name) != settled:
            runner.bind_states(self._slots_alone(program, settled))
            self._bound_slots[name] = settled
        self.ran = name
        return runner.run(arrays, sizes)

    def state(self, name: str) -> Array:
        """A state tensor, scratch included; not a copy."""
        if name not in self._states:
            known = ", ".join(self._states)
            raise UsageError(f"the engine has no state {name!r}", hint=f"it has: {known}")
        return self._states[name]

    def save_slot(self, slot: int) -> SlotState:
        return {name: self._states[name][slot].copy() for name in self._slot_states(slot)}

    def load_slot(self, slot: int, saved: SlotState) -> None:
        for name in self._slot_states(slot):
            if name not in saved:
                raise InputError(f"the saved slot lacks {name!r}")
            self._states[name][slot] = saved[name]

    def save_rows(self, rows: Array) -> SlotState:
        kinds = self.plan.states
        return {n: self._states[n][rows] for n, kind in kinds.items() if kind.shape[0] == "R"}

    def load_rows(self, rows: Array, saved: SlotState) -> None:
        for name, value in saved.items():
            self._states[name][rows] = value

    def close(self) -> None:
        self._runners.clear()
        self._values.clear()
        self._weights.clear()
        self._state_values.clear()
        self._states.clear()

    def _model_name(self, phase: str, arrays: Mapping[str, Array], settled: range | None) -> str:
        """The model with the fewest nodes for these inputs."""
        if settled is not None:
            return DECODE_ONE if len(settled) == 1 else SETTLED
        one = phase == "prefill" and arrays.get("slots", _NONE).shape == (1,)
        return PREFILL_ONE if one and len(arrays["positions"]) else phase

    def _settled_slots(self, phase: str, arrays: Mapping[str, Array]) -> range | None:
        """The slots of a decode step that the models for settled ones can run, else None."""
        if phase != "decode" or not len(arrays.get("slots", _NONE)):
            return None
        slots, first = arrays["slots"], int(arrays["slots"][0])
        found = range(first, first + len(slots))
        goes_on = arrays["positions"].min() > 0 and not arrays["accepted"].any()
        if not goes_on or first < 0 or found.stop > self._limits.slots:
            return None
        return found if len(slots) == 1 or np.array_equal(slots, found) else None

    def _slots_alone(self, program: Program, slots: range) -> dict[str, OrtValue]:
        """The states of slots that a program updates, where these slots lie in them."""
        return {
            name: value_of(self._states[name][slots.start : slots.stop], kind.dtype)
            for name, kind in self._plan.states.items()
            if name in program.updates and kind.shape[0] == "S"
        }

    def _runner(self, phase: str, name: str) -> Runner:
        """What runs one model, whose inputs and outputs are those of the phase."""
        if name not in self._runners:
            program, taps = self._plan.programs[phase], self._taps[phase]
            model = self._models[name]
            session = make_session(
                with_outputs(model, {t: program.types[t] for t in taps}) if taps else model,
                {key: self._values[key] for key in self._info["phases"][name]},
                threads=self._threads,
                prepack=self._prepacks(),
            )
            self._runners[name] = Runner(session, phase, program, taps)
            self._runners[name].bind_states(self._state_values)
        return self._runners[name]

    def _prepacks(self) -> bool:
        """Whether every session may copy the weights that its kernels read as they are."""
        total_bytes = sum(array.nbytes for array in self._weights.values())
        if total_bytes <= PREPACKED_BYTES:
            return True
        four_bit_bytes = sum(a.nbytes for a in self._weights.values() if a.dtype == np.uint8)
        return self._info["widen"] == "step" and 0 < four_bit_bytes <= PREPACKED_4_BIT_BYTES

    def _slot_states(self, slot: int) -> list[str]:
        if not 0 <= slot < self._limits.slots:
            raise UsageError(f"slot {slot} is not one of {self._limits.slots}")
        return [name for name, kind in self._plan.states.items() if kind.shape[0] == "S"]


def models_of(package: Package | OnnxModels) -> OnnxModels:
    """The models of a package, read; models as they are."""
    if isinstance(package, OnnxModels):
        return package
    code = package.code()
    models = {
        name: package.read(f"variants/{code.target}/{name}.onnx") for name in code.info["phases"]
    }
    return OnnxModels(plan=package.plan, models=models, info=code.info)


def _initializers(
    info: Mapping[str, Any], weights: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, OrtValue]]:
    """Arrays, and the values that stand on them, by name."""
    arrays, values = {}, {}
    for item in info["initializers"]:
        made = initializer_from_json(item)
        arrays[made.name] = np.ascontiguousarray(load(made, weights))
        values[made.name] = value_of(arrays[made.name], made.dtype)
    return arrays, values


def _zeros(plan: Plan, limits: Limits) -> dict[str, Array]:
    sizes = {"S": limits.slots + 1, "R": limits.pages * plan.page_size + 1}
    return {
        name: np.zeros(kind.bind(sizes), NUMPY_DTYPE[kind.dtype])
        for name, kind in plan.states.items()
    }


def _tapped(program: Program, taps: Sequence[str]) -> tuple[str, ...]:
    """Those of the taps that the program computes and does not return anyway."""
    computed = {name for step in program.steps for name in step.outputs}
    returned = {*program.outputs.values(), *program.updates.values()}
    return tuple(name for name in taps if name in computed and name not in returned)


def _checked(
    phase: str,
    name: str,
    wanted: TensorType,
    inputs: Mapping[str, Array],
    sizes: dict[str, int],
) -> Array:
    """The input, if it is of the type and shape that the phase takes; notes its open sizes."""
    array = inputs.get(name)
    if array is None:
        raise InputError(f"phase {phase!r} takes {name!r}, which is missing")
    dtype = NUMPY_DTYPE[wanted.dtype]
    fits = array.dtype == dtype and array.ndim == len(wanted.shape)
    for size, found in zip(wanted.shape, array.shape, strict=False):
        fits = fits and found == _noted(size, found, sizes)
    if not fits:
        known = [_noted(size, None, sizes) for size in wanted.shape]
        raise InputError(
            f"input {name!r} of phase {phase!r} is {array.dtype} {list(array.shape)}, "
            f"not {wanted.dtype} {known}"
        )
    return array


def _noted(size: int | str, found: int | None, sizes: dict[str, int]) -> int | str:
    """What a size must be; an open one, `B` or `B+1`, is what it is found to be first."""
    if isinstance(size, int):
        return size
    name, _, more = size.partition("+")
    if found is not None:
        sizes.setdefault(name, found - int(more or 0))
    return sizes[name] + int(more or 0) if name in sizes else size
