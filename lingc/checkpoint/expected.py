"""Which tensors a checkpoint of a config has, and their shapes."""

from collections.abc import Iterator

from lingc.model.config import ModelConfig

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape, as in an unquantized release, the MTP layer's tensors last.

    The layer that `num_nextn_predict_layers` announces is included; a release may leave all of its
    tensors out.
    """
    tensors: dict[str, Shape] = {
        "model.word_embeddings.weight": (config.vocab_size, config.hidden_size),
    }
    for layer in range(config.num_hidden_layers):
        tensors |= _layer(config, layer)
    tensors["model.norm.weight"] = (config.hidden_size,)
    tensors["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    if config.has_mtp:
        tensors |= _layer(config, config.mtp_layer)
        prefix = mtp_prefix(config)
        for norm in ("enorm", "hnorm", "final_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = (config.hidden_size,)
        tensors[f"{prefix}eh_proj.weight"] = (config.hidden_size, 2 * config.hidden_size)
    return tensors


def mtp_prefix(config: ModelConfig) -> str:
    """What the names of the MTP layer's tensors start with."""
    return f"model.layers.{config.mtp_layer}."


def matrix_modules(config: ModelConfig) -> tuple[str, ...]:
    """Names of the modules that have a matrix for a weight: what a recipe chooses from."""
    return tuple(
        name.removesuffix(".weight")
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2
    )


def _layer(config: ModelConfig, layer: int) -> dict[str, Shape]:
    prefix = f"model.layers.{layer}."
    attention = _mla(config) if config.is_mla(layer) else _linear_attention(config)
    dense = config.is_dense(layer)
    mlp = dict(_mlp("mlp.", config, config.intermediate_size)) if dense else _moe(config)
    parts = {
        "input_layernorm.weight": (config.hidden_size,),
        **{f"attention.{name}.weight": shape for name, shape in attention.items()},
        "post_attention_layernorm.weight": (config.hidden_size,),
        **mlp,
    }
    return {prefix + name: shape for name, shape in parts.items()}


def _linear_attention(config: ModelConfig) -> dict[str, Shape]:
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    return {
        "query_key_value": (3 * width, hidden),
        "query_layernorm": (config.head_dim,),
        "key_layernorm": (config.head_dim,),
        "g_proj": (width, hidden),
        "g_norm": (width,),
        "dense": (hidden, width),
    }


def _mla(config: ModelConfig) -> dict[str, Shape]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    queries = heads * config.qk_head_dim
    query: dict[str, Shape] = {"q_proj": (queries, hidden)}
    if rank is not None:
        query = {
            "q_a_proj": (rank, hidden),
            "q_a_layernorm": (rank,),
            "q_b_proj": (queries, rank),
        }
    return {
        **query,
        "kv_a_proj_with_mqa": (config.latent_dim, hidden),
        "kv_a_layernorm": (config.kv_lora_rank,),
        "kv_b_proj": (
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            config.kv_lora_rank,
        ),
        "dense": (hidden, heads * config.v_head_dim),
    }


def _moe(config: ModelConfig) -> dict[str, Shape]:
    tensors: dict[str, Shape] = {
        "mlp.gate.weight": (config.num_experts, config.hidden_size),
        "mlp.gate.expert_bias": (config.num_experts,),
    }
    for expert in range(config.num_experts):
        tensors |= _mlp(f"mlp.experts.{expert}.", config, config.moe_intermediate_size)
    shared = config.num_shared_experts * config.moe_shared_expert_intermediate_size
    if shared:
        tensors |= _mlp("mlp.shared_experts.", config, shared)
    return tensors


def _mlp(prefix: str, config: ModelConfig, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}gate_proj.weight", (width, config.hidden_size)
    yield f"{prefix}up_proj.weight", (width, config.hidden_size)
    yield f"{prefix}down_proj.weight", (config.hidden_size, width)
