"""One model of an ONNX engine: a session with its inputs, outputs and state bound in memory.

Binding costs more than copying the few numbers of a step, so the buffers stay bound from one step
to the next and are made anew only when a shape changes. A provider with memory of its own copies an
input when it is bound, not when a step runs; it is given everything with every step instead.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lingc.plan import Program
from lingc.runtime.backend import Array
from lingc.runtime.onnx_session import InferenceSession, OrtValue, guarded, is_elsewhere, value_of

NUMPY_DTYPE: Mapping[str, type[np.generic]] = {
    "f64": np.float64, "f32": np.float32, "i64": np.int64, "i32": np.int32,
}  # fmt: skip


class Runner:
    """A session of a phase's program.

    Args:
        session: The session.
        phase: The phase's name, for messages.
        program: The phase.
        taps: Names of values that are outputs beside the program's.
    """

    def __init__(
        self, session: InferenceSession, phase: str, program: Program, taps: Sequence[str]
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._is_elsewhere = is_elsewhere(session)
        self._phase = phase
        self._program = program
        self._taps = taps
        self._order = [output.name for output in session.get_outputs()]
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._inputs: list[Array] = []
        self._values: dict[str, OrtValue] = {}
        self._updates: dict[str, OrtValue] = {}
        self._outputs: dict[str, Array] = {}

    def bind_states(self, values: Mapping[str, OrtValue]) -> None:
        """Read and update these states where they lie."""
        for state in self._program.states:
            if state in values:
                self._bind_input(state, values[state])
        for state, updated in self._program.updates.items():
            if state in values:
                self._bind_output(updated, values[state])

    def run(self, arrays: Sequence[Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        """Run a step.

        Args:
            arrays: The program's inputs, in order.
            sizes: Open sizes, by name.

        Returns:
            The outputs by role, and the taps by name, as copies.
        """
        shapes = tuple(array.shape for array in arrays)
        if shapes != self._shapes:
            self._bind(arrays, sizes)
            self._shapes = shapes
        for buffer, array in zip(self._inputs, arrays, strict=True):
            buffer[...] = array
        tapped = guarded(f"phase {self._phase!r} failed", self._run)
        made = {role: buffer.copy() for role, buffer in self._outputs.items()}
        return made | {name: value.numpy() for name, value in tapped.items()}

    def _run(self) -> dict[str, OrtValue]:
        """Run, and return the taps."""
        if self._is_elsewhere:
            names = [*self._updates, *self._taps]
            values = self._session.run_with_ort_values(names, self._values)
            found = dict(zip(names, values, strict=True))
            for name, value in self._updates.items():
                value.update_inplace(found[name].numpy())
        else:
            for name in self._taps:
                self._binding.bind_output(name)
            self._session.run_with_iobinding(self._binding)
            found = {}
            if self._taps:
                found = dict(zip(self._order, self._binding.get_outputs(), strict=True))
        return {name: found[name] for name in self._taps}

    def _bind_input(self, name: str, value: OrtValue) -> None:
        self._values[name] = value
        if not self._is_elsewhere:
            self._binding.bind_ortvalue_input(name, value)

    def _bind_output(self, name: str, value: OrtValue) -> None:
        self._updates[name] = value
        if not self._is_elsewhere:
            self._binding.bind_ortvalue_output(name, value)

    def _bind(self, arrays: Sequence[Array], sizes: Mapping[str, int]) -> None:
        program = self._program
        self._inputs = [np.empty(array.shape, array.dtype) for array in arrays]
        for name, buffer in zip(program.inputs, self._inputs, strict=True):
            value = value_of(buffer, program.types[name].dtype)
            self._bind_input(name, value)
        for role, name in program.outputs.items():
            kind = program.types[name]
            self._outputs[role] = np.empty(kind.bind(sizes), NUMPY_DTYPE[kind.dtype])
            self._bind_output(name, value_of(self._outputs[role], kind.dtype))
