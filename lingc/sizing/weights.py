"""The weights of a plan from config and recipe alone.

The records are those that compiling puts into the plan, phase by phase: same names, types, sources
and axes. What decides them is shared with the compiler where that needs no torch (`Context` says
which matrices are merged, `lingc.quantize.stored` what a format is made of), and a test compares
the rest with compiled plans, up to the full-size model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from lingc.checkpoint.expected import expected_tensors, matrix_modules
from lingc.context import Context, module_of
from lingc.errors import RecipeError
from lingc.model.config import ModelConfig
from lingc.plan import DTYPE_BYTES, PHASES, TensorType, WeightSpec
from lingc.quantize.formats import FP8_BLOCK, NIBBLES
from lingc.quantize.layouts import (
    TILED,
    TILED_GATED,
    TILED_GATED_SCALES,
    TILED_SCALES,
    layout_refusal,
)
from lingc.quantize.recipes import Recipe
from lingc.quantize.stored import fp8_specs, fp8_tensor_specs, int4_specs
from lingc.targets.spec import Target

Specs = Mapping[str, WeightSpec]

MERGED: Mapping[str, str] = {
    "query_key_value": "qkvg",
    "q_a_proj": "qkv_a",
    "gate_proj": "gate_up",
}
"""Name of a merged matrix, by the module whose rows come first."""

SHARD_AXIS: Mapping[str, int] = {
    "query_key_value": 0, "g_proj": 0, "g_norm": 0, "dense": 1,
    "q_b_proj": 0, "q_proj": 0, "kv_b_proj": 0, "lm_head": 0, "word_embeddings": 0,
    "gate_proj": 0, "up_proj": 0, "down_proj": 1,
}  # fmt: skip
"""Axis that tensor parallelism splits, by module; what is not named is whole on every rank."""

PLAIN_MODULES = frozenset({"word_embeddings", "gate", "kv_b_proj"})
"""Matrices that are read by other ops than a linear, and stay BF16 whatever the recipe says."""


def plan_weights(
    config: ModelConfig, recipe: Recipe, target: Target, *, has_mtp: bool
) -> dict[str, dict[str, WeightSpec]]:
    """What each phase of the plan reads: phase -> name -> record.

    Raises:
        RecipeError: A pattern matches nothing, or the recipe asks for what cannot be compiled.
    """
    recipe.check_matches(matrix_modules(config))
    records = parameters(config)
    return {
        phase: _phase(Context(config=config, phase=phase, target=target, recipe=recipe), records)
        for phase in PHASES
        if phase != "draft" or has_mtp
    }


def merged(phases: Mapping[str, Specs]) -> dict[str, WeightSpec]:
    """The weights of all phases, each once."""
    return {name: spec for specs in phases.values() for name, spec in specs.items()}


def share_bytes(spec: WeightSpec, ranks: int) -> int:
    """Bytes on the rank with most, where tensor parallelism splits the weight over `ranks`.

    Every source is cut for itself, and no block of shared scales is cut in two.
    """
    axis = spec.shard_axis
    if ranks == 1 or axis is None:
        return spec.type.bytes()
    shape = list(spec.type.bind({}))
    parts = len(spec.sources) if len(spec.sources) and shape[axis] % len(spec.sources) == 0 else 1
    unit = _unit(spec, is_last=axis == len(shape) - 1)
    units = -(-shape[axis] // (parts * unit))
    shape[axis] = min(shape[axis], parts * unit * -(-units // ranks))
    return TensorType(spec.type.dtype, tuple(shape)).bytes()


def _unit(spec: WeightSpec, *, is_last: bool) -> int:
    """Rows or columns that share a scale and so stay together."""
    if spec.part == "codes" and spec.format == "fp8_block":
        return FP8_BLOCK
    if spec.part == "codes" and spec.format == "int4_group" and is_last:
        return spec.group // NIBBLES
    return 1


# ------------------------------------------------------------------------------------------ phases


def parameters(config: ModelConfig) -> dict[str, WeightSpec]:
    """The model's parameters by their names in the plan; the experts of a layer as one."""
    specs: dict[str, WeightSpec] = {}
    for full, shape in expected_tensors(config).items():
        stack, inner, leaf = full.partition(".experts.0.")
        if inner:
            name = f"{stack.removeprefix('model.')}.experts.{leaf.removesuffix('.weight')}"
            source = f"{stack}.experts.{{e}}.{leaf}"
            axis = SHARD_AXIS[leaf.removesuffix(".weight")]
            specs[name] = WeightSpec(
                name=name,
                type=TensorType("bf16", (config.num_experts, *shape)),
                sources=(source,),
                experts=config.num_experts,
                shard_axis=axis + 1,
            )
        elif ".experts." not in full:
            name = full.removeprefix("model.")
            dtype = "f32" if name.endswith("expert_bias") else "bf16"
            specs[name] = WeightSpec(
                name=name,
                type=TensorType(dtype, shape),
                sources=(full,),
                shard_axis=SHARD_AXIS.get(_module(name)),
            )
    for layer in config.linear_layers:
        name = f"layers.{layer}.attention.decay"
        kind = TensorType("f32", (config.num_attention_heads,))
        specs[name] = WeightSpec(
            name=name, type=kind, sources=(), format="decay", layer=layer, shard_axis=0
        )
    return specs


def _module(name: str) -> str:
    """`dense` of `layers.3.attention.dense.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _phase(context: Context, parameters: Specs) -> dict[str, WeightSpec]:
    outside = {"word_embeddings.weight", "lm_head.weight"}
    if context.phase != "draft":
        outside.add("norm.weight")
    layers = set(context.layers)
    specs = {
        name: spec
        for name, spec in parameters.items()
        if name in outside or (name.startswith("layers.") and int(name.split(".")[1]) in layers)
    }
    _merge(context, specs)
    _stack(context, specs)
    if context.phase != "prefill":
        _absorb(context, specs)
    if context.fuses_launches:
        _join_shared(context, specs)
    made = (made for spec in specs.values() for made in _stored(context, spec))
    return {spec.name: _laid_out(context, spec) for spec in made}


def _join(specs: dict[str, WeightSpec], first: str, second: str, name: str) -> None:
    """Put one matrix below another, or each expert's."""
    a, b = specs.pop(first), specs.pop(second)
    *stack, rows, columns = a.type.bind({})
    kind = TensorType(a.type.dtype, (*stack, rows + b.type.bind({})[-2], columns))
    specs[name] = replace(a, name=name, type=kind, sources=a.sources + b.sources)


def _merge(context: Context, specs: dict[str, WeightSpec]) -> None:
    for first, second, rows in context.pairs():
        if context.join_refusal(first, second, rows) is None:
            parent, _, leaf = first.removeprefix("model.").rpartition(".")
            above, below = (f"{m.removeprefix('model.')}.weight" for m in (first, second))
            _join(specs, above, below, f"{parent}.{MERGED[leaf]}.weight")


def _stack(context: Context, specs: dict[str, WeightSpec]) -> None:
    for layer in context.moe_layers:
        prefix = f"layers.{layer}.mlp.experts."
        names = [f"{prefix}{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
        formats = {context.format_of(specs[name]) for name in names}
        if len(formats) > 1:
            raise RecipeError(
                f"recipe {context.recipe.name!r} stores the matrices of an expert of layer"
                f" {layer} differently: {', '.join(map(str, sorted(formats, key=str)))}",
                hint="give gate_proj, up_proj and down_proj of an expert one format",
            )
        _join(specs, names[0], names[1], f"{prefix}gate_up")


def _join_shared(context: Context, specs: dict[str, WeightSpec]) -> None:
    """Put a shared expert of the routed ones' width and format behind them."""
    for layer in context.shared_layers:
        if not context.is_joined_expert(layer):
            continue
        mlp = f"layers.{layer}.mlp"
        for leaf in ("gate_up", "down_proj"):
            stack = specs.pop(f"{mlp}.experts.{leaf}")
            last = specs.pop(f"{mlp}.shared_experts.{leaf}.weight")
            name = f"{mlp}.all_experts.{leaf}"
            count, *shape = stack.type.bind({})
            kind = TensorType(stack.type.dtype, (count + 1, *shape))
            specs[name] = replace(stack, name=name, type=kind, last=last.sources)


def _absorb(context: Context, specs: dict[str, WeightSpec]) -> None:
    config = context.config
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    for layer in context.mla_layers:
        prefix = f"layers.{layer}.attention."
        whole = specs.pop(f"{prefix}kv_b_proj.weight")
        kind = context.format_of(whole)
        if kind.kind != "plain":
            raise RecipeError(
                f"recipe {context.recipe.name!r} stores {module_of(whole.sources[0])!r} as {kind},"
                " which cannot be cut into the parts that decoding absorbs",
                hint="leave kv_b_proj out of the recipe's patterns",
            )
        for take, width in (("absorb_k", nope), ("absorb_v", value)):
            specs[prefix + take] = replace(
                whole,
                name=prefix + take,
                type=TensorType(whole.type.dtype, (heads, width, config.kv_lora_rank)),
                take=take,
                split=(heads, nope, value),
            )


def _stored(context: Context, spec: WeightSpec) -> Iterable[WeightSpec]:
    """The weight in the recipe's format: itself, or codes and scales."""
    is_matrix = len(spec.type.shape) > 1 and spec.take is None
    if not is_matrix or _module(spec.name) in PLAIN_MODULES:
        return (spec,)
    stored = context.format_of(spec)
    if stored.kind == "fp8_block":
        return fp8_specs(spec)
    if stored.kind == "fp8_tensor":
        return fp8_tensor_specs(spec)
    return int4_specs(spec, stored.group) if stored.kind == "int4_group" else (spec,)


def _laid_out(context: Context, spec: WeightSpec) -> WeightSpec:
    """The weight in the layout that the kernels of its linear or its experts want."""
    is_matrix = len(spec.type.shape) > 1 and spec.take is None
    stem = spec.name.removesuffix("_codes").removesuffix("_packed").removesuffix("_scale")
    if not (context.fuses_launches and is_matrix) or _module(stem) in PLAIN_MODULES:
        return spec
    if spec.part == "scales" and spec.format == "fp8_block":
        return spec
    layout = {
        (False, False): TILED,
        (False, True): TILED_GATED,
        (True, False): TILED_SCALES,
        (True, True): TILED_GATED_SCALES,
    }[spec.part == "scales", _module(stem) == "gate_up"]
    *_, rows, width = spec.type.bind({})
    refused = layout_refusal(layout, rows, width * DTYPE_BYTES[spec.type.dtype])
    return spec if refused else replace(spec, layout=layout)


# ------------------------------------------------------------------------------------------- parts

PARTS = (
    "linear attention", "MLA", "dense MLP", "router", "routed experts", "shared experts",
    "norms", "LM head", "embedding", "MTP layer",
)  # fmt: skip
"""What a table of weights lists, in the order of the model."""


_BY_MARK = (
    ("lm_head", "LM head"),
    ("word_embeddings", "embedding"),
    ("norm", "norms"),
    (".mlp.experts.", "routed experts"),
    (".mlp.all_experts.", "routed experts"),
    (".shared_experts.", "shared experts"),
    (".mlp.gate.", "router"),
    (".mlp.", "dense MLP"),
)


def part_of(config: ModelConfig, name: str) -> str:
    """Which of `PARTS` a weight of the plan belongs to; of stacked experts that of the routed."""
    layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
    if layer == config.mtp_layer:
        return "MTP layer"
    attention = "MLA" if config.is_mla(layer) else "linear attention"
    return next((part for mark, part in _BY_MARK if mark in name), attention)
