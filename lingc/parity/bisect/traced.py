"""Engines that tell what their steps make.

An ONNX engine is given more outputs, in memory. A CUDA engine's values share room as they live, so
it is run step by step, and each is read before the next may write over it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lingc.checkpoint.tensorfile import DTYPES, TAGS
from lingc.op import OPS
from lingc.plan import Plan, Step, TensorType
from lingc.runtime.backend import Array, Limits

if TYPE_CHECKING:
    from lingc.engine import Package
    from lingc.runtime.cuda_backend import CudaBackend
    from lingc.runtime.onnx_backend import OnnxModels

_BY_EXPERT = ("pairs", "starts")


class TracedOnnx:
    """Implements `lingc.parity.bisect.walk.Traced` for an engine on ONNX Runtime.

    Args:
        package: A checked package of the kind `onnx`, or models fresh from the lowering.
        weights: Its weights, by name, as they are stored.
    """

    def __init__(
        self,
        package: "Package | OnnxModels",
        weights: Mapping[str, Array],
        limits: Limits,
        *,
        threads: int | None = None,
    ) -> None:
        from lingc.runtime.onnx_backend import OnnxBackend, models_of  # noqa: PLC0415 its extra may be absent

        self.backend = OnnxBackend(
            package, weights, limits, threads=threads, taps=_every(package.plan)
        )
        self._models = models_of(package)
        self._weights = weights

    def run(
        self, phase: str, inputs: Mapping[str, Array]
    ) -> tuple[dict[str, Array], Mapping[str, Array]]:
        """A step with every value beside its outputs."""
        made = self.backend.run(phase, inputs)
        roles = self.backend.plan.programs[phase].outputs
        return {role: made.pop(role) for role in roles}, made

    def node(self, step: Step) -> bytes | None:
        """The step's node of the model that the last run was of, with its weights inside."""
        from lingc.parity.bisect.onnx_node import alone  # noqa: PLC0415 as above

        return alone(self._models, self.backend.ran, step.outputs[0], self._weights)


class TracedCuda:
    """The same for a loaded CUDA engine.

    Args:
        backend: With room for what will be scored: a step must fit a bucket.
    """

    def __init__(self, backend: "CudaBackend") -> None:
        self.backend = backend

    def run(
        self, phase: str, inputs: Mapping[str, Array]
    ) -> tuple[dict[str, Array], Mapping[str, Array]]:
        """A step, one op after the other, each one's results read when they are there.

        Of rows of logits those are told that the bucket has room for. Lists of tokens by expert
        are not: padding stands among them.
        """
        from lingc.runtime.cuda_inputs import sizes_of  # noqa: PLC0415 as above

        backend = self.backend
        program = backend.plan.programs[phase]
        bound = backend.prepare(phase, inputs)
        sizes = {**sizes_of(phase, program, inputs)}
        sizes["N"] = min(sizes.get("N", 0), bound.sizes.get("N", 0))
        table = {step.name: step for step in backend.code.table.phases[phase].steps}
        made: dict[str, Array] = {}
        for step in program.steps:
            if step.outputs[0] not in table:  # a view, or a copy that has become one
                continue
            graph = bound.record({step.outputs[0]})
            graph.replay()
            results = OPS[step.op.removeprefix("lingc.")].results
            for name, result in zip(step.outputs, results, strict=True):
                kind = program.types[name]
                buffer = table[step.outputs[0]].buffers.get(result)
                if buffer is None or kind.shape[0] in ("S", "R") or result in _BY_EXPERT:
                    continue
                told = TensorType(kind.dtype, kind.bind({**bound.sizes, **sizes}))
                made[name] = self._read(bound.addresses[buffer], told)
            backend.device.wait(backend.device.mark())
            graph.close()
        return {role: made[name] for role, name in program.outputs.items()}, made

    def node(self, step: Step) -> None:
        """None: a kernel runs in its engine alone."""

    def _read(self, address: int, kind: TensorType) -> Array:
        device = self.backend.device
        pinned = device.pin(kind.bytes())
        try:
            device.download(pinned.address, address, kind.bytes())
            device.wait(device.mark())
            raw = pinned.array[: kind.bytes()].copy()
        finally:
            device.unpin(pinned)
        found: Array = raw.view(DTYPES[TAGS[kind.dtype]]).reshape(kind.bind({}))
        return found


def _every(plan: Plan) -> tuple[str, ...]:
    """Names of all values that steps make."""
    steps = (step for program in plan.programs.values() for step in program.steps)
    return tuple(name for step in steps for name in step.outputs)
