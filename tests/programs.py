"""Small models whose programs the tests share: captured once a process, copied to be edited."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import fx

from lingc import pipeline, stages, targets
from lingc.capture import Capturer, Sizes
from lingc.context import Context
from lingc.graph import Captured, Fused, Program, target_name
from lingc.lower import lower
from lingc.model.config import ModelConfig
from lingc.plan import PHASES, Plan
from lingc.quantize.recipes import Recipe, load_recipe
from lingc.rewrite import Outcome, Rewrite, apply, sweep
from lingc.targets.spec import Target

SIZES = Sizes(page_size=4, max_draft=3)
RULES = tuple((stage, rule) for stage in pipeline.PIPELINE for rule in stage.rules)

TINY: dict[str, Any] = {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_hybrid",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_group_size": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "rope_theta": 6000000,
    "rope_interleave": True,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "intermediate_size": 80,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 40,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_router_enable_expert_bias": True,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "group_norm_size": 2,
    "use_qk_norm": True,
    "linear_silu": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "num_nextn_predict_layers": 1,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

WIDE_GPU = "h20 in f32"
"""A GPU that our own kernels are launched on, with activations that rewrites cannot round apart."""

CHANGES: dict[str, dict[str, Any]] = {
    "tiny": {},
    # Matrices whose rows end within an FP8 block, and two layers past the last whole group.
    "odd": {
        "hidden_size": 36, "num_hidden_layers": 6, "num_attention_heads": 3,
        "num_key_value_heads": 3, "head_dim": 10, "partial_rotary_factor": 0.4,
        "q_lora_rank": None, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8,
        "v_head_dim": 5, "intermediate_size": 50, "first_k_dense_replace": 2,
        "moe_intermediate_size": 9, "num_experts": 6, "num_experts_per_tok": 3, "n_group": 3,
        "num_shared_experts": 0, "norm_topk_prob": False, "group_norm_size": 3,
        "num_nextn_predict_layers": 0,
    },
    "whole-head-rope": {
        "partial_rotary_factor": 1.0, "num_shared_experts": 2, "rope_scaling": YARN,
        "first_k_dense_replace": 0,
    },
    "no-linear-layers": {
        "num_hidden_layers": 2, "layer_group_size": 1, "first_k_dense_replace": 0,
    },
    "dense-layers-alone": {"first_k_dense_replace": 4, "num_hidden_layers": 4},
    "one-head": {
        "num_attention_heads": 1, "num_key_value_heads": 1, "group_norm_size": 1,
        "n_group": 16, "topk_group": 16, "num_experts_per_tok": 16,
    },
    "one-expert-group": {
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "routed_scaling_factor": 1,
        "group_norm_size": 64, "qk_rope_head_dim": 2, "partial_rotary_factor": 0.125,
    },
    "whole-blocks": {
        "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
        "q_lora_rank": 128, "kv_lora_rank": 128, "intermediate_size": 256,
        "moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128,
    },
    "one-rope-table": {"qk_rope_head_dim": 8, "num_shared_experts": 0, "q_lora_rank": None},
    "one-layer": {
        "num_hidden_layers": 1, "layer_group_size": 1, "num_nextn_predict_layers": 0,
    },
    "groups-of-two": {
        "num_hidden_layers": 5, "layer_group_size": 2, "first_k_dense_replace": 3,
        "num_attention_heads": 5, "num_key_value_heads": 5, "group_norm_size": 5,
    },
}  # fmt: skip
"""Structurally different models, as what they change of `TINY`."""

EVERYDAY = ("tiny", "odd", "whole-head-rope")
"""Those that the short run goes through."""


@cache
def config(model: str) -> ModelConfig:
    return ModelConfig.from_dict({**TINY, **CHANGES[model]}, source=model)


def phases(model: str) -> tuple[str, ...]:
    return tuple(p for p in PHASES if p != "draft" or config(model).has_mtp)


def context(
    model: str,
    phase: str,
    precision: str = "bf16",
    target: str = "cpu",
    *,
    recipe: Recipe | None = None,
) -> Context:
    return Context(
        config=config(model),
        phase=phase,
        target=_target(target),
        recipe=recipe or load_recipe(precision),
    )


def _target(name: str) -> Target:
    if name != WIDE_GPU:
        return targets.get(name)
    return replace(targets.get("h20"), activations="f32", fp8_activations=False)


@cache
def capturer(model: str) -> Capturer:
    """With what it captured so far for others."""
    return Capturer(config(model), SIZES)


@cache
def _captured(model: str, phase: str) -> Captured:
    return capturer(model).capture(phase)


def captured(model: str, phase: str) -> Captured:
    """A captured program that the caller may edit."""
    return Captured(copy(_captured(model, phase)))


def copy(program: Program) -> Program:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(program.graph, copies))
    return Program(
        phase=program.phase,
        graph=graph,
        outputs=program.outputs,
        updates=program.updates,
        weights={name: copies[node] for name, node in program.weights.items()},
    )


@cache
def compiled(model: str, precision: str = "bf16", target: str = "cpu") -> Plan:
    """The plan of all phases."""
    fused: dict[str, Fused] = {}
    for phase in phases(model):
        given = context(model, phase, precision, target)
        fused[phase] = pipeline.run(captured(model, phase), given, pipeline.Report(), check=True)
    return lower(fused, context(model, "prefill", precision, target), SIZES)


# --------------------------------------------------------------------------- one rule at its place


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """What one rule did where it stands in the pipeline.

    Attributes:
        before: The program that the rules before it left.
        after: The same when the rule has been applied.
        again: What a second application did.
    """

    before: Program
    after: Program
    outcome: Outcome
    again: Outcome
    expected: int | None


@cache
def fire(
    rule: Rewrite, model: str, phase: str, precision: str = "bf16", target: str = "cpu"
) -> Fired:
    """Apply a rule to what the rules before it made of a model's phase."""
    given = context(model, phase, precision, target)
    program = _after(_place(rule), model, phase, precision, target)
    after = copy(program)
    outcome = apply(after, rule, given)
    return Fired(
        before=program,
        after=after,
        outcome=outcome,
        again=apply(copy(after), rule, given),
        expected=rule.expected(given),
    )


def before(
    rule: Rewrite,
    model: str,
    phase: str,
    precision: str = "bf16",
    target: str = "cpu",
    *,
    recipe: Recipe | None = None,
) -> Program:
    """The program that the rules before a rule leave; the caller may edit it."""
    if recipe is None:
        return copy(_after(_place(rule), model, phase, precision, target))
    program = captured(model, phase)
    for stage, other in RULES[: _place(rule)]:
        _apply(program, stage, other, context(model, phase, precision, target, recipe=recipe))
    return program


def _place(rule: Rewrite) -> int:
    return next(i for i, (_, other) in enumerate(RULES) if other is rule)


@cache
def _after(count: int, model: str, phase: str, precision: str, target: str) -> Program:
    """The program after the first `count` rules of the pipeline."""
    if count == 0:
        return captured(model, phase)
    stage, rule = RULES[count - 1]
    program = copy(_after(count - 1, model, phase, precision, target))
    _apply(program, stage, rule, context(model, phase, precision, target))
    return program


def _apply(program: Program, stage: pipeline.Stage, rule: Rewrite, given: Context) -> None:
    apply(program, rule, given)
    if rule is stage.rules[-1]:
        sweep(program)
        if stage.ensures == "fused":
            stages.retype(program, given.target.activations)


def names(program: Program) -> list[str]:
    """What each call calls, in order."""
    return [target_name(node) for node in program.calls()]


def calls(program: Program, name: str) -> list[Any]:
    """The calls of one op, as nodes; any, because their arguments may be anything."""
    return [node for node in program.calls() if target_name(node) == name]


def output(program: Program) -> Any:
    """The node that holds the results."""
    return next(iter(program.graph.find_nodes(op="output")))
