"""What a step of a plan must give, in eager's values: one rule an op.

Which of eager's values belong to a step follows from its weights, whose records name tensors of the
checkpoint, and from its layer. A sum with a residual takes the residual as the step was given it.
Views and copies are known by who reads them. Codes of FP8 activations have no rule, for eager has
none; what is wrong with them shows in the step that multiplies them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lingc.math import expert_lists
from lingc.model.model import LingModel
from lingc.model.moe import MoE
from lingc.model.rope import rope_table
from lingc.op import OPS
from lingc.parity.bisect.lockstep import Told, given_to
from lingc.plan import Arg, Plan, Program, Ref, Step, refs
from lingc.runtime.backend import Array

Rule = Literal["close", "experts", "weights", "free"]
"""How a result is judged: by its rows; as ids of experts; as their weights; or not at all."""


@dataclass(frozen=True, slots=True)
class Want:
    """What a result should be; the plan goes on with it."""

    value: Tensor
    rule: Rule = "close"


Wants = tuple[Want | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A step that is to be judged, and all that a rule may ask.

    Attributes:
        values: What was computed before, by name.
        inputs: Of the phase.
    """

    plan: Plan
    program: Program
    phase: str
    step: Step
    values: Mapping[str, Tensor]
    inputs: Mapping[str, Array]
    told: Told
    module: LingModel

    def argument(self, name: str) -> Arg:
        """An argument by the op's own name for it."""
        return self.step.args[OPS[self.step.op.removeprefix("lingc.")].arguments.index(name)]

    def value(self, name: str) -> Tensor | None:
        """A tensor argument; None where it is absent."""
        found = self.argument(name)
        return self.values[found.name] if isinstance(found, Ref) else None

    def modules(self, step: Step | None = None) -> tuple[str, ...]:
        """Modules of the checkpoint whose matrix, or table, a step multiplies by."""
        given = self.step if step is None else step
        names = (a.name for a in given.args if isinstance(a, Ref) and a.name in self.plan.weights)
        specs = (self.plan.weights[name] for name in names)
        found = next(s for s in specs if s.sources and len(s.type.shape) > 1 and s.part != "scales")
        return tuple(source.removesuffix(".weight") for source in found.sources)

    def module_of(self, name: str) -> str:
        """The module of a weight argument."""
        found = self.argument(name)
        assert isinstance(found, Ref), f"{name!r} of {self.step.op} is no tensor"
        return self.plan.weights[found.name].sources[0].removesuffix(".weight")

    @property
    def block(self) -> str:
        """Prefix of the step's layer in the checkpoint."""
        return f"model.layers.{self.step.layer}"

    @property
    def attention(self) -> str:
        return f"{self.block}.attention"

    def product(self, step: Step | None = None) -> Tensor:
        """What the step's modules give, side by side."""
        names = self.modules(step)
        found = torch.cat([self.told.values[name] for name in names], dim=-1)
        if names == ("lm_head",) and "logit_rows" in self.inputs:
            return found[torch.from_numpy(self.inputs["logit_rows"]).long()]
        return found

    def state(self) -> Tensor:
        """The linear state with that of the call's slots in its place."""
        found = self._held("state")
        for slot, state in self.told.states[self.step.layer].items():
            found[slot] = state
        return found

    def pending(self, which: str) -> Tensor:
        """Keys or values of the call's tokens, where they wait."""
        found = self._held(f"pending_{which}")
        first = 0
        for slot, length in self.told.lengths.items():
            tokens = self.told.values[f"{self.attention}.{which}"][first : first + length]
            found[slot, :length] = tokens
            first += length
        return found

    def cache(self) -> Tensor:
        """The latent cache with the call's rows in their places."""
        found = self._held("cache")
        rows = torch.from_numpy(self.inputs["cache_rows"]).long()
        found[rows] = self.told.values[f"{self.attention}.row"]
        return found

    def _held(self, name: str) -> Tensor:
        """A copy of a state that nothing is rounded in when it is filled."""
        found = self.value(name)
        assert found is not None, f"{self.step.op} has no {name!r}"
        return found.to(torch.promote_types(found.dtype, torch.float32), copy=True)


def wants(call: Call) -> Wants:
    """What each result of a step should be; None where eager has no such value."""
    name = call.step.op.removeprefix("lingc.")
    rule = _view if name in _VIEWS else _RULES.get(name)
    if rule is None:
        return (None,) * len(call.step.outputs)
    found = rule(call)
    return tuple(w if isinstance(w, Want) or w is None else Want(w) for w in found)


Found = tuple[Tensor | Want | None, ...]


def _rope(call: Call) -> Found:
    positions = torch.from_numpy(call.inputs["positions"]).long()
    frequencies = call.argument("inv_freq")
    assert isinstance(frequencies, tuple), "frequencies stand in the plan"
    module = call.module
    buffer = module.mla_inv_freq
    if len(buffer) != len(frequencies):
        buffer = module.linear_inv_freq
    return rope_table(positions, buffer, module.config.rope_attention_factor)


def _product(call: Call) -> Found:
    return (call.product(),)


def _norm(call: Call) -> Found:
    return (call.told.values[call.module_of("weight")], None, None)[: len(call.step.outputs)]


def _add_norm(call: Call) -> Found:
    name = call.module_of("weight")
    found = (call.told.values[name], call.told.values[given_to(name)], None, None)
    return found[: len(call.step.outputs)]


def _norm_pair(call: Call) -> Found:
    names = (call.module_of("x_weight"), call.module_of("hidden_weight"))
    return (torch.cat([call.told.values[name] for name in names], dim=-1),)


def _fused_linear(call: Call) -> Found:
    residual = call.value("residual")
    if call.argument("after") == "swiglu":
        made = call.told.values[given_to(f"{_parent(call.modules()[0])}.down_proj")]
    else:
        made = call.product()
    return (made if residual is None else made + residual,)


def _silu(call: Call) -> Found:
    given = call.argument("gate_up")
    assert isinstance(given, Ref), "it is computed"
    maker = _maker(call.program, given.name)
    if maker.op == "aten.cat.default":  # of gate and up, which are two matrices
        maker = _maker(call.program, next(refs(maker.args)))
    return (call.told.values[given_to(f"{_parent(call.modules(maker)[0])}.down_proj")],)


def _maker(program: Program, name: str) -> Step:
    return next(step for step in program.steps if name in step.outputs)


def _qk(call: Call) -> Found:
    return tuple(call.told.values[f"{call.attention}.{x}"] for x in "qk")


def _lightning(call: Call) -> Found:
    o = call.told.values[given_to(f"{call.attention}.g_norm")]
    return (o, call.state(), *_waiting(call))


def _mixer(call: Call) -> Found:
    return (*_gated(call), call.state(), *_waiting(call))


def _waiting(call: Call) -> Found:
    return (call.pending("k"), call.pending("v")) if len(call.step.outputs) == 4 else ()


def _gated(call: Call) -> Found:
    return (call.told.values[given_to(f"{call.attention}.dense")],)


def _latent(call: Call) -> Found:
    return call.told.values[f"{call.attention}.q_a_layernorm"], call.cache()


def _cache(call: Call) -> Found:
    return (call.cache(),)


def _query(call: Call) -> Found:
    return (call.told.values[f"{call.attention}.q"],)


def _latent_attention(call: Call) -> Found:
    return (*_gated(call), call.cache())


def _router(call: Call) -> Found:
    gate = f"{call.block}.mlp.gate"
    ids, weights = (call.told.values[f"{gate}.{x}"] for x in ("ids", "weights"))
    found = (Want(ids, "experts"), Want(weights, "weights"))
    if len(call.step.outputs) == 2:
        return found
    lists = expert_lists(ids.int(), call.module.config.num_experts)
    return (*found, *(Want(x, "free") for x in lists))


def _experts(call: Call) -> Found:
    made = call.told.values[f"{call.block}.mlp.experts"]
    if call.step.op.endswith("expert_down"):
        base = call.value("residual")
        if call.argument("shared"):
            made = made + call.told.values[f"{call.block}.mlp.shared_experts.down_proj"]
    else:
        base = call.value("base")
    return (made if base is None else made + base,)


def _expert_up(call: Call) -> Found:
    mlp = call.module.model.layers[call.step.layer].mlp
    assert isinstance(mlp, MoE), "a layer with experts"
    n = call.told.values[f"{call.block}.post_attention_layernorm"]
    ids = call.told.values[f"{call.block}.mlp.gate.ids"]
    stack = mlp.experts
    made = n.new_empty(*ids.shape, stack.gate_proj.shape[1])
    for e in ids.unique().tolist():
        token, rank = torch.nonzero(ids == e, as_tuple=True)
        x = n[token]
        gate = functional.silu(functional.linear(x, stack.gate_proj[e]))
        made[token, rank] = gate * functional.linear(x, stack.up_proj[e])
    if call.argument("shared"):
        shared = call.told.values[given_to(f"{call.block}.mlp.shared_experts.down_proj")]
        made = torch.cat((made, shared[:, None]), dim=1)
    return (made,)


def _view(call: Call) -> Found:
    """A view is what its first reader is due to be given."""
    program, step = call.program, call.step
    (name,) = step.outputs
    for reader in program.steps[program.steps.index(step) + 1 :]:
        if name not in refs(reader.args):
            continue
        given = replace(call, step=reader)
        if reader.op in _VIEWS:
            return _view(given) if reader.op in _SAME else (None,)
        names = OPS[reader.op.removeprefix("lingc.")].arguments
        argument = next(n for n, arg in zip(names, reader.args, strict=True) if arg == Ref(name))
        return (_due(given, argument),)
    return (None,)


def _due(reader: Call, argument: str) -> Tensor | None:
    """What an argument of a step is due to be."""
    name = reader.step.op.removeprefix("lingc.")
    told = reader.told.values
    if _RULES.get(name) is _lightning and argument in ("q", "k", "v"):
        return told[f"{reader.attention}.{argument}"]
    if name == "group_norm_gate" and argument == "gate":
        return told[f"{reader.attention}.g_proj"]
    is_plain = _RULES.get(name) is _product or (
        _RULES.get(name) is _fused_linear and reader.argument("before") == "none"
    )
    if is_plain and argument == "x":
        (module, *_) = reader.modules()
        found = told[given_to(module)]
        if module == "lm_head" and "logit_rows" in reader.inputs:
            return found[torch.from_numpy(reader.inputs["logit_rows"]).long()]
        return found
    return None


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


_SAME = ("aten.reshape.default",)
"""Views that hold all that they read."""

_VIEWS = (
    *_SAME, "aten.slice.Tensor", "aten.cat.default", "aten.index_select.default", "gather_rows",
)  # fmt: skip

_RULES: Mapping[str, Callable[[Call], Found]] = {
    "embedding": _product,
    "rope_table": _rope,
    **dict.fromkeys(("rms_norm", "rms_norm_fp8"), _norm),
    **dict.fromkeys(("add_rms_norm", "add_rms_norm_fp8"), _add_norm),
    "rms_norm_pair": _norm_pair,
    **dict.fromkeys(
        (
            "linear", "linear_f32", "fp8_linear", "fp8_linear_f32", "fp8_weight_linear",
            "fp8_weight_linear_f32", "int4_weight_linear", "int4_weight_linear_f32",
            "fp8_static_linear", "fp8_static_linear_f32",
        ),
        _product,
    ),
    "fused_linear": _fused_linear,
    "silu_mul": _silu,
    "qk_norm_rope": _qk,
    **dict.fromkeys(
        (
            "lightning_prefill", "lightning_decode", "lightning_verify",
            "lightning_prefill_qkv", "lightning_decode_qkv", "lightning_verify_qkv",
        ),
        _lightning,
    ),
    "group_norm_gate": _gated,
    **dict.fromkeys(("decode_mixer", "verify_mixer"), _mixer),
    "mla_latent": _latent,
    "mla_latent_kv": _cache,
    "mla_query_rope": _query,
    **dict.fromkeys(("mla_attention", "mla_absorbed_attention"), _gated),
    "mla_latent_attention": _latent_attention,
    **dict.fromkeys(("router", "norm_router"), _router),
    **dict.fromkeys(
        (
            "experts", "fp8_experts", "fp8_weight_experts", "int4_weight_experts", "expert_down",
        ),
        _experts,
    ),
    "expert_up": _expert_up,
}  # fmt: skip


def ruled() -> frozenset[str]:
    """Ops whose results can be told from eager's values."""
    return frozenset({*_RULES, *_VIEWS})
