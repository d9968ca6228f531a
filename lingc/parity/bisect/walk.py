"""Backends that run a plan step by step beside what is believed, and stop at the first fault.

They are driven like any other, by the same table of slots and pages as an engine, so that what is
walked is what generation does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lingc.interpret import InterpreterBackend, open_sizes, run_step, stored_tensor
from lingc.model.model import LingModel
from lingc.op import OPS, TORCH_DTYPE
from lingc.parity.bisect.judge import (
    LIMITS,
    Judged,
    fitted,
    judge,
    judge_experts,
    judge_weights,
    limit_of,
)
from lingc.parity.bisect.lockstep import Lockstep, Told
from lingc.parity.bisect.points import Call, Want, ruled, wants
from lingc.parity.eager import routing
from lingc.parity.engine import ROUTERS
from lingc.parity.experts import Routing
from lingc.parity.interpreted import router_scores
from lingc.plan import Arg, Plan, Program, Step, TensorType, refs
from lingc.quantize.formats import widen_bf16
from lingc.runtime.backend import Array, Backend, Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A result that is not what it should be.

    Attributes:
        call: How many calls were made before, of any phase.
        index: Of the step in its program.
        output: Name of the result.
        values: What the step was given, by name; weights included.
        got: What the suspect made of it.
        want: What it should be.
        sizes: Symbolic axes of the call.
        node: An ONNX engine's own code for the step, by itself.
        unseen: Steps before it, since the last that could be judged, that make what it is given.
    """

    phase: str
    call: int
    index: int
    step: Step
    output: str
    judged: Judged
    values: Mapping[str, Tensor] = field(repr=False)
    got: Tensor = field(repr=False)
    want: Tensor = field(repr=False)
    sizes: Mapping[str, int]
    node: bytes | None = field(default=None, repr=False)
    unseen: tuple[Step, ...] = ()


class FoundError(Exception):
    """Ends a walk: the call that was under way has faults."""


@dataclass(slots=True)
class Walk:
    """What a walk saw.

    Attributes:
        faults: Of one call, in the order of its steps; empty as long as nothing is wrong.
        largest: Op -> the largest share of its limit that a sound result used.
        judged: Results that were compared.
        skipped: Steps that were not, by op.
    """

    faults: list[Fault] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)
    judged: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    calls: int = 0

    def note(self, step: Step, judged: Judged) -> None:
        """Count a result."""
        self.judged += 1
        if judged.ok and judged.limit:
            used = judged.error / judged.limit
            self.largest[step.op] = max(self.largest.get(step.op, 0.0), used)

    def end_call(self) -> None:
        """Stop where the call had faults."""
        if self.faults:
            raise FoundError
        self.calls += 1


class PlanWalk:
    """A plan and its weights against eager; implements `lingc.runtime.backend.Backend`.

    Activations are widened to f32, so that only what is stored narrower is rounded.

    Args:
        plan: The suspect.
        weights: Its weights as packed.
        module: Eager, on the same weights made from the checkpoint.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, Array], module: LingModel, limits: Limits
    ) -> None:
        self.walk = Walk()
        self._wide = InterpreterBackend(widened(plan), weights, limits)
        self._eager = Lockstep(module)
        self._module = module

    @property
    def plan(self) -> Plan:
        return self._wide.plan

    @property
    def limits(self) -> Limits:
        return self._wide.limits

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a phase with eager's values in the place of its own.

        Raises:
            FoundError: Something is wrong; `walk.faults` has what.
        """
        told = self._eager.run(phase, inputs)
        program, values = self._wide.begin(phase, inputs)
        sizes = open_sizes(program, values)
        unseen: list[Step] = []
        for index, step in enumerate(program.steps):
            call = Call(
                plan=self.plan, program=program, phase=phase, step=step, values=values,
                inputs=inputs, told=told, module=self._module,
            )  # fmt: skip
            made = run_step(step, values, sizes)
            wanted = wants(call)
            if all(want is None for want in wanted):
                unseen.append(step)
                self.walk.skipped[step.op] = self.walk.skipped.get(step.op, 0) + 1
            self._judge(call, index, made, wanted, unseen, sizes)
            for name, got, want in zip(step.outputs, made, wanted, strict=True):
                values[name] = got if want is None else fitted(want.value, got).to(got.dtype)
        outputs = self._wide.end(program, values)
        self.walk.end_call()
        return outputs

    def _judge(
        self,
        call: Call,
        index: int,
        made: tuple[Tensor, ...],
        wanted: tuple[Want | None, ...],
        unseen: list[Step],
        sizes: Mapping[str, int],
    ) -> None:
        step, program = call.step, call.program
        for name, got, want in zip(step.outputs, made, wanted, strict=True):
            if want is None or want.rule == "free":
                continue
            limit = limit_of(step, program)
            target = want.value
            if want.rule == "experts":
                judged = self._experts(call.told, step, got, target)
            elif want.rule == "weights":
                ids = call.told.values[f"{call.block}.mlp.gate.ids"]
                judged = judge_weights(got, made[0], target, ids, limit=limit)
            else:
                judged = judge(got, target, program.types[name], limit)
            self.walk.note(step, judged)
            if not judged.ok:
                self.walk.faults.append(
                    Fault(
                        phase=call.phase, call=self.walk.calls, index=index, step=step,
                        output=name, judged=judged, values=_given(step, call.values), got=got,
                        want=fitted(target, got), sizes=sizes,
                        unseen=tuple(s for s in unseen if _feeds(s, step, program)),
                    )
                )  # fmt: skip

    def _experts(self, told: Told, step: Step, got: Tensor, want: Tensor) -> Judged:
        stem = f"model.layers.{step.layer}.mlp.gate"
        bias = self._module.get_parameter(f"{stem}.expert_bias")
        biased = torch.sigmoid(told.values[f"{stem}.logits"]) + bias
        how = routing(self._module)
        assert how is not None, "a model with a router has experts"
        return judge_experts(got, want, biased, how)

    def state(self, name: str) -> Array:
        return self._wide.state(name)

    def save_slot(self, slot: int) -> dict[str, Array]:
        return self._wide.save_slot(slot)

    def load_slot(self, slot: int, saved: Mapping[str, Array]) -> None:
        self._wide.load_slot(slot, saved)

    def close(self) -> None:
        self._wide.close()


class Traced(Protocol):
    """An engine that tells what its steps make."""

    @property
    def backend(self) -> Backend: ...

    def run(
        self, phase: str, inputs: Mapping[str, Array]
    ) -> tuple[dict[str, Array], Mapping[str, Array]]:
        """Outputs by role, and values of the program by name, as many as can be told."""
        ...

    def node(self, step: Step) -> bytes | None:
        """The code of a step of the last run by itself, as an ONNX model; None where it is not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ran:
    """A step of an engine, run again by its reference."""

    phase: str
    index: int
    step: Step
    values: Mapping[str, Tensor]
    made: tuple[Tensor, ...]
    sizes: Mapping[str, int]


class EngineWalk:
    """An engine against its plan; implements `lingc.runtime.backend.Backend`.

    Each step's reference is given what the engine's own step was given.

    Args:
        engine: The suspect.
        weights: The plan's weights, which its references are given.
    """

    def __init__(self, engine: Traced, weights: Mapping[str, Array]) -> None:
        self.walk = Walk()
        self._engine = engine
        plan = engine.backend.plan
        one = Limits(slots=1, pages=1)
        self._references = InterpreterBackend(plan, weights, one)

    @property
    def plan(self) -> Plan:
        return self._engine.backend.plan

    @property
    def limits(self) -> Limits:
        return self._engine.backend.limits

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a phase of the engine, then each of its steps again by reference.

        Raises:
            FoundError: Something is wrong; `walk.faults` has what.
        """
        program = self.plan.programs[phase]
        before = {
            name: self._tensor(self.state(name), program.types[name]).clone()
            for name in program.states
        }
        outputs, told = self._engine.run(phase, inputs)
        after = {value: self.state(state) for state, value in program.updates.items()}
        told = {**{program.outputs[role]: made for role, made in outputs.items()}, **told, **after}
        self._references.states = before
        wide = {
            name: widen_bf16(given) if given.dtype == np.uint16 else given
            for name, given in inputs.items()
        }
        _, values = self._references.begin(phase, wide)
        sizes = open_sizes(program, values)
        for index, step in enumerate(program.steps):
            made = run_step(step, values, sizes)
            ran = _Ran(
                phase=phase, index=index, step=step, values=values, made=made, sizes=sizes
            )  # fmt: skip
            is_told = [name in told for name in step.outputs]
            if not any(is_told):
                self.walk.skipped[step.op] = self.walk.skipped.get(step.op, 0) + 1
            for name, want in zip(step.outputs, made, strict=True):
                values[name] = want
                if name in told:
                    got = self._tensor(told[name], program.types[name])
                    # A bucket has room for some rows of logits; those in front are told.
                    self._hold(ran, name, got, want[: len(got)])
                    values[name] = got
        self.walk.end_call()
        return outputs

    def _hold(self, ran: "_Ran", name: str, got: Tensor, want: Tensor) -> None:
        step, program = ran.step, self.plan.programs[ran.phase]
        if step.op in ROUTERS:
            judged = self._router(ran, name, got, want)
        else:
            limit = limit_of(step, program, same_codes=True)
            judged = judge(got, want, program.types[name], limit)
        self.walk.note(step, judged)
        if not judged.ok:
            node = None if self.walk.faults else self._engine.node(step)
            self.walk.faults.append(
                Fault(
                    phase=ran.phase, call=self.walk.calls, index=ran.index, step=step,
                    output=name, judged=judged, values=_given(step, ran.values), got=got,
                    want=want, sizes=ran.sizes, node=node,
                )
            )  # fmt: skip

    def _router(self, ran: "_Ran", name: str, got: Tensor, want: Tensor) -> Judged:
        """Which of nearly equal experts comes first is judged by the scores that say so."""
        step, values, ids = ran.step, ran.values, ran.made[0]
        if name == step.outputs[0]:
            return judge_experts(got, want, router_scores(step, values), _routing(step))
        chosen = values[step.outputs[0]]
        if got.is_floating_point():
            return judge_weights(got, chosen, want, ids, limit=LIMITS["f32"])
        same = torch.equal(chosen, ids)
        return judge(got, want if same else got, TensorType("i32", ()), 0.0)

    @staticmethod
    def _tensor(array: Array, kind: TensorType) -> Tensor:
        """An engine's value in the plan's type; bf16 comes as bits, or widened."""
        if kind.dtype == "bf16" and array.dtype != np.uint16:
            return torch.from_numpy(np.ascontiguousarray(array)).bfloat16()
        return stored_tensor(array, kind).to(TORCH_DTYPE[kind.dtype])

    def state(self, name: str) -> Array:
        return self._engine.backend.state(name)

    def save_slot(self, slot: int) -> Mapping[str, Array]:
        return self._engine.backend.save_slot(slot)

    def load_slot(self, slot: int, saved: Mapping[str, Array]) -> None:
        self._engine.backend.load_slot(slot, saved)

    def close(self) -> None:
        self._engine.backend.close()


def widened(plan: Plan) -> Plan:
    """A plan whose bf16 activations are f32; states and weights stay as they are stored."""
    if plan.activation == "f32":
        return plan
    programs = {phase: _widened(program) for phase, program in plan.programs.items()}
    return replace(plan, activation="f32", programs=programs)


def _widened(program: Program) -> Program:
    kept = {*program.weights, *program.states, *program.updates.values()}
    types = {
        name: TensorType("f32", kind.shape) if kind.dtype == "bf16" and name not in kept else kind
        for name, kind in program.types.items()
    }
    steps = tuple(replace(step, args=_wide_args(step)) for step in program.steps)
    return replace(program, types=types, steps=steps)


def _wide_args(step: Step) -> tuple[Arg, ...]:
    op = OPS.get(step.op.removeprefix("lingc."))
    names = () if op is None else op.arguments
    at = names.index("dtype") if "dtype" in names else -1
    return tuple("f32" if i == at and arg == "bf16" else arg for i, arg in enumerate(step.args))


def _given(step: Step, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name] for name in refs(step.args)}


def _feeds(maker: Step, step: Step, program: Program) -> bool:
    """Whether a step's results reach another's arguments through steps that cannot be judged."""
    wanted = {*refs(step.args)}
    at = program.steps.index(step)
    for earlier in reversed(program.steps[:at]):
        if wanted & {*earlier.outputs}:
            if earlier is maker:
                return True
            if earlier.op.removeprefix("lingc.") not in ruled():
                wanted |= {*refs(earlier.args)}
    return False


def _routing(step: Step) -> Routing:
    names = OPS[step.op.removeprefix("lingc.")].arguments
    given = dict(zip(names, step.args, strict=True))
    groups, kept, top_k = (given[name] for name in ("groups", "topk_groups", "top_k"))
    assert isinstance(groups, int), "sizes of a router stand in the plan"
    assert isinstance(kept, int), "sizes of a router stand in the plan"
    assert isinstance(top_k, int), "sizes of a router stand in the plan"
    return Routing(groups=groups, kept_groups=kept, top_k=top_k)
