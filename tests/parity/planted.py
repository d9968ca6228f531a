"""Faults that ports of this architecture really had.

Each is a change of a plan, of its packed weights, of an engine's code or of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lingc.model import linear_attention, mla
from lingc.model.mla import MLA
from lingc.model.moe import Router
from lingc.model.rope import rope_half, rope_pairs
from lingc.parity.side import Mode
from lingc.plan import Arg, Plan, Program, Step, TensorType
from lingc.runtime.backend import Array
from lingc.targets.onnx import attention, functions, rows
from lingc.targets.onnx.body import Value
from lingc.targets.onnx.library_standard import Standard
from tests.parity import trained


@dataclass(slots=True)
class Suspect:
    """What a fault is planted in; `monkeypatch` is for what is code."""

    plan: Plan
    weights: dict[str, Array]
    monkeypatch: pytest.MonkeyPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A fault, and where it must be found.

    Attributes:
        compared: Which walk finds it: `plan` or `engine`.
        mode: How the suspect is fed.
        op: At which op, without its namespace.
        layer: In which layer.
        result: End of the tensor's name; anything where empty.
    """

    name: str
    plant: Callable[[Suspect], None]
    compared: str
    op: str
    layer: int
    precision: str = "bf16"
    mode: Mode = "prefill"
    result: str = ""


def steps_changed(plan: Plan, phase: str, change: Callable[[Step], Sequence[Step] | Step]) -> Plan:
    """A plan whose steps of one phase went through a function."""
    program = plan.programs[phase]
    steps: list[Step] = []
    for step in program.steps:
        made = change(step)
        steps += [made] if isinstance(made, Step) else made
    return replace(plan, programs={**plan.programs, phase: replace(program, steps=tuple(steps))})


def weight_changed(suspect: Suspect, name: str, change: Callable[[Array], Array]) -> None:
    """Pack one weight otherwise."""
    suspect.weights[name] = np.ascontiguousarray(change(np.array(suspect.weights[name])))


# ------------------------------------------------------------------------------------- in the plan


def decay_of_the_layer_before(suspect: Suspect) -> None:
    linear = trained.checkpoint().config.linear_layers
    specs = {
        name: replace(spec, layer=spec.layer - 1)
        if spec.format == "decay" and spec.layer - 1 in linear
        else spec
        for name, spec in suspect.plan.weights.items()
    }
    suspect.plan = replace(suspect.plan, weights=specs)
    suspect.weights.update({n: a for n, a in trained.weights(suspect.plan).items() if "decay" in n})


def scaling_left_out(suspect: Suspect) -> None:
    def change(step: Step) -> Step:
        if step.op != "lingc.router":
            return step
        args: list[Arg] = [1.0 if arg == 2.5 else arg for arg in step.args]
        return replace(step, args=tuple(args))

    suspect.plan = steps_changed(suspect.plan, "prefill", change)


def gate_and_up_swapped(suspect: Suspect) -> None:
    name = "layers.2.mlp.experts.gate_up"
    spec = suspect.plan.weights[name]
    swapped = replace(spec, sources=tuple(reversed(spec.sources)))
    suspect.plan = replace(suspect.plan, weights={**suspect.plan.weights, name: swapped})
    suspect.weights[name] = trained.weights(suspect.plan)[name]


def halves_swapped(suspect: Suspect) -> None:
    def change(step: Step) -> Step:
        if step.op != "aten.cat.default" or step.layer != 8:
            return step
        parts, *rest = step.args
        assert isinstance(parts, tuple), "two tensors"
        return replace(step, args=(tuple(reversed(parts)), *rest))

    suspect.plan = steps_changed(suspect.plan, "draft", change)


def state_in_bf16(suspect: Suspect) -> None:
    def narrow(program: Program) -> Program:
        names = {n for n in program.types if n.startswith("linear_state.")}
        names |= {program.updates[n] for n in names & program.updates.keys()}
        types = {
            n: TensorType("bf16", kind.shape) if n in names else kind
            for n, kind in program.types.items()
        }
        return replace(program, types=types)

    plan = suspect.plan
    states = {
        n: TensorType("bf16", kind.shape) if n.startswith("linear_state.") else kind
        for n, kind in plan.states.items()
    }
    programs = {phase: narrow(program) for phase, program in plan.programs.items()}
    suspect.plan = replace(plan, states=states, programs=programs)


# -------------------------------------------------------------------------- in the packed weights


def scale_transposed(suspect: Suspect) -> None:
    weight_changed(suspect, "layers.1.attention.dense.weight_scale", lambda a: a.T)


def another_experts_weights(suspect: Suspect) -> None:
    def change(stack: Array) -> Array:
        stack[5] = stack[6]
        return stack

    weight_changed(suspect, "layers.4.mlp.experts.down_proj", change)


def nibbles_reversed(suspect: Suspect) -> None:
    def change(words: Array) -> Array:
        bits = words.view(np.uint32)
        made = np.zeros_like(bits)
        for place in range(8):
            made |= (bits >> np.uint32(4 * place) & np.uint32(15)) << np.uint32(4 * (7 - place))
        return made.view(np.int32)

    weight_changed(suspect, "layers.5.mlp.experts.gate_up_packed", change)


# --------------------------------------------------------------------------- in the engine's code


def linear_rope_in_pairs(suspect: Suspect) -> None:
    _turn_otherwise(suspect, rows)


def latent_rope_in_halves(suspect: Suspect) -> None:
    _turn_otherwise(suspect, attention)


def _turn_otherwise(suspect: Suspect, module: Any) -> None:
    sound = rows.rotated

    def wrong(*args: Any, interleaved: bool = False, **more: Any) -> Value:
        return sound(*args, interleaved=not interleaved, **more)

    suspect.monkeypatch.setattr(module, "rotated", wrong)


def gate_before_norm(suspect: Suspect) -> None:
    sound = rows.group_norm_gate

    def wrong(
        library: Standard, o: Value, gate: Value, weight: Value, groups: int, eps: float
    ) -> Value:
        gated = o.reshape(-1, weight.size(0)) * library.body.op("Sigmoid", gate)
        open_gate = gate * 0.0 + 100.0
        return sound(library, gated, open_gate, weight, groups, eps)

    suspect.monkeypatch.setitem(functions.FUNCTIONS, "group_norm_gate", wrong)


# ------------------------------------------------------------------------------------ in the model


def bias_in_the_weights(suspect: Suspect) -> None:
    sound = Router.select

    def wrong(self: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, _ = sound(self, logits)
        chosen = (torch.sigmoid(logits) + self.expert_bias).gather(1, ids)
        return ids, chosen / chosen.sum(dim=-1, keepdim=True) * self.scaling

    suspect.monkeypatch.setattr(Router, "select", wrong)


def norm_over_the_rope_key(suspect: Suspect) -> None:
    sound = MLA.latent

    def wrong(self: MLA, n: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, row = sound(self, n, cos, sin)
        key = row[:, self.kv_rank :]
        return q, torch.cat(
            (row[:, : self.kv_rank], key / key.square().mean(-1, keepdim=True).sqrt()), -1
        )

    suspect.monkeypatch.setattr(MLA, "latent", wrong)


def model_rope_in_pairs(suspect: Suspect) -> None:
    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = 2 * cos.shape[-1]
        return torch.cat((rope_pairs(x[..., :width], cos, sin), x[..., width:]), dim=-1)

    suspect.monkeypatch.setattr(linear_attention, "rope_half", wrong)


def model_latent_rope_in_halves(suspect: Suspect) -> None:
    suspect.monkeypatch.setattr(mla, "rope_pairs", rope_half)


FAULTS = (
    Planted(
        name="decay from l-1", plant=decay_of_the_layer_before, compared="plan",
        op="lightning_prefill", layer=1, result=".o",
    ),
    Planted(
        name="linear RoPE in pairs, engine", plant=linear_rope_in_pairs, compared="engine",
        op="qk_norm_rope", layer=0, result=".q",
    ),
    Planted(
        name="linear RoPE in pairs, model", plant=model_rope_in_pairs, compared="plan",
        op="qk_norm_rope", layer=0, result=".q",
    ),
    Planted(
        name="MLA RoPE in halves, engine", plant=latent_rope_in_halves, compared="engine",
        op="mla_latent", layer=3, result=".cache",
    ),
    Planted(
        name="MLA RoPE in halves, model", plant=model_latent_rope_in_halves, compared="plan",
        op="mla_latent", layer=3, result=".cache",
    ),
    Planted(
        name="gate before group norm", plant=gate_before_norm, compared="engine",
        op="group_norm_gate", layer=0,
    ),
    Planted(
        name="router bias in the weights", plant=bias_in_the_weights, compared="plan",
        op="router", layer=1, result=".weights",
    ),
    Planted(
        name="2.5 left out", plant=scaling_left_out, compared="plan", op="router", layer=1,
        result=".weights",
    ),
    Planted(
        name="gate and up swapped", plant=gate_and_up_swapped, compared="plan", op="experts",
        layer=2,
    ),
    Planted(
        name="scale transposed", plant=scale_transposed, compared="plan", precision="fp8",
        op="fp8_weight_linear", layer=1, result="linear.1",
    ),
    Planted(
        name="kv_a norm over the RoPE key", plant=norm_over_the_rope_key, compared="plan",
        op="mla_latent", layer=3, result=".cache",
    ),
    Planted(
        name="state in BF16", plant=state_in_bf16, compared="plan", op="lightning_prefill",
        layer=0, result=".state",
    ),
    Planted(
        name="state in BF16, decoding", plant=state_in_bf16, compared="plan", mode="decode",
        op="lightning_prefill", layer=0, result=".state",
    ),
    Planted(
        name="MTP halves swapped", plant=halves_swapped, compared="plan", mode="draft",
        op="aten.cat.default", layer=8,
    ),
    Planted(
        name="one expert's weights of another", plant=another_experts_weights, compared="plan",
        op="experts", layer=4,
    ),
    Planted(
        name="nibbles in another order", plant=nibbles_reversed, compared="plan",
        precision="int4", op="int4_weight_experts", layer=5,
    ),
)  # fmt: skip
"""The twelve, some of them in more than one place."""


def weights_named(fault: str) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Weight that the finding must name, and experts; for faults of packed weights."""
    found = {
        "scale transposed": ("layers.1.attention.dense.weight_scale", ()),
        "one expert's weights of another": ("layers.4.mlp.experts.down_proj", (5,)),
        "nibbles in another order": ("layers.5.mlp.experts.gate_up_packed", tuple(range(16))),
    }
    return {fault: found[fault]} if fault in found else {}
