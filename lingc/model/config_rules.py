"""What a `config.json` must hold: every rule in one place, every breach in one list.

The class defaults of the published code belong to a small sibling, so a missing key is never
filled in from them. The few keys below that have a default have it because the releases leave
them out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "layer_group_size",
    "num_attention_heads",
    "head_dim",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "vocab_size",
    "group_norm_size",
)  # fmt: skip
COUNTS = ("first_k_dense_replace", "num_shared_experts")  # may be 0
NUMBERS = ("partial_rotary_factor", "rope_theta", "routed_scaling_factor", "rms_norm_eps")

ONLY: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rope_interleave": True,
    "score_function": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
}
"""Switches that the architecture has in one position; the file must say so."""

ONLY_IF_GIVEN: Mapping[str, Any] = {"linear_silu": False, "router_dtype": "fp32"}

YARN_DEFAULTS: Mapping[str, Any] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}


def problems(values: Mapping[str, Any], architecture: str) -> list[str]:
    """Every reason why `values` is not a config of the architecture, one sentence each."""
    found = [*_architecture(values, architecture), *_missing(values), *_types(values)]
    found += _switches(values)
    found += _rope_scaling(values)
    found += _token_ids(values)
    # Relations are judged only over values that are sound by themselves.
    found += _relations({k: v for k, v in values.items() if k in _SOUND and _SOUND[k](v)})
    return found


def yarn(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The YaRN entries with their defaults filled in, or None; `values` has no problems.

    `factor` is the stretch as given. The ratio of the two lengths, which some code uses in its
    place, would be 1 for a launch-time override that leaves `max_position_embeddings` alone.
    """
    scaling = values.get("rope_scaling")
    if scaling is None or _rope_kind(scaling) == "default":
        return None
    filled = {name: scaling.get(name) for name in YARN_DEFAULTS}
    for name, default in YARN_DEFAULTS.items():
        if filled[name] is None:
            filled[name] = default
    original = scaling.get("original_max_position_embeddings")
    return {
        **filled,
        "rope_type": "yarn",
        "factor": float(scaling["factor"]),
        "original_max_position_embeddings": original or values["max_position_embeddings"],
    }


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and value > 0


_SOUND: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(SIZES, _is_size),
    **dict.fromkeys(COUNTS, _is_count),
    **dict.fromkeys(NUMBERS, _is_positive),
    "num_key_value_heads": _is_size,
    "num_kv_heads_for_linear_attn": _is_size,
    "num_nextn_predict_layers": _is_count,
    "moe_shared_expert_intermediate_size": _is_size,
}


def _architecture(values: Mapping[str, Any], architecture: str) -> Iterator[str]:
    given = values.get("architectures")
    if given == [architecture]:
        return
    only = f"lingc builds {architecture!r} only"
    if "architectures" not in values:
        yield f"the key 'architectures' is missing; {only}"
    elif values.get("model_type") == "bailing_hybrid":
        yield (
            f"architectures is {given!r}; {only} "
            "(model_type 'bailing_hybrid' is shared with Ling-3.0, another model)"
        )
    else:
        yield f"architectures is {given!r}; {only}"


def _missing(values: Mapping[str, Any]) -> Iterator[str]:
    required = [*SIZES, *COUNTS, *NUMBERS, "q_lora_rank", *ONLY]
    if values.get("num_shared_experts") != 0:
        required.append("moe_shared_expert_intermediate_size")
    for name in required:
        if name not in values:
            yield f"the key {name!r} is missing"


def _types(values: Mapping[str, Any]) -> Iterator[str]:
    for name in SIZES:
        if name in values and not _is_size(values[name]):
            yield f"{name} is {values[name]!r}, not a positive whole number"
    for name in (*COUNTS, "num_nextn_predict_layers"):
        if name in values and not _is_count(values[name]):
            yield f"{name} is {values[name]!r}, not a whole number of 0 or more"
    for name in NUMBERS:
        if name in values and not _is_positive(values[name]):
            yield f"{name} is {values[name]!r}, not a positive finite number"
    rank = values.get("q_lora_rank")
    if rank is not None and not _is_size(rank):
        yield f"q_lora_rank is {rank!r}, neither a positive whole number nor null"
    width = values.get("moe_shared_expert_intermediate_size", 1)
    if values.get("num_shared_experts") != 0 and not _is_size(width):
        yield f"moe_shared_expert_intermediate_size is {width!r}, not a positive whole number"
    if not isinstance(values.get("norm_topk_prob", True), bool):
        yield f"norm_topk_prob is {values['norm_topk_prob']!r}, neither true nor false"
    quantization = values.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        yield f"quantization_config is {quantization!r}, neither an object nor null"


def _switches(values: Mapping[str, Any]) -> Iterator[str]:
    for name, only in (*ONLY.items(), *ONLY_IF_GIVEN.items()):
        given = values.get(name, only)
        # `1 == True` would let a number stand for a switch.
        if given != only or type(given) is not type(only):
            yield f"{name} is {given!r}; the architecture has {only!r}"


def _token_ids(values: Mapping[str, Any]) -> Iterator[str]:
    vocab = values.get("vocab_size")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = values.get(name)
        ids = given if name == "eos_token_id" and isinstance(given, list) else [given]
        for token in ids if given is not None else ():
            if not _is_count(token):
                yield f"{name} is {given!r}, not a token id"
            elif _is_size(vocab) and token >= vocab:
                yield f"{name} {token} is outside the vocabulary of {vocab}"


def _rope_kind(scaling: Mapping[str, Any]) -> object:
    return scaling.get("rope_type", scaling.get("type"))


def _rope_scaling(values: Mapping[str, Any]) -> Iterator[str]:
    scaling = values.get("rope_scaling")
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        yield f"rope_scaling is {scaling!r}, neither an object nor null"
        return
    kind = _rope_kind(scaling)
    if kind not in ("yarn", "default"):
        yield f"rope_scaling has type {kind!r}; 'yarn' and 'default' are supported"
    if kind != "yarn":
        return
    known = {*YARN_DEFAULTS, "rope_type", "type", "factor", "original_max_position_embeddings"}
    repeated = ("rope_theta", "partial_rotary_factor")
    for name, given in scaling.items():
        if name in repeated:
            if name in values and values[name] != given:
                yield f"rope_scaling has {name} {given!r}, the model has {values[name]!r}"
        elif name not in known:
            yield f"rope_scaling has the unknown key {name!r}"
        elif name == "truncate" and not isinstance(given, bool):
            yield f"rope_scaling has truncate {given!r}, neither true nor false"
    yield from _yarn_numbers(scaling)


def _yarn_numbers(scaling: Mapping[str, Any]) -> Iterator[str]:
    factor = scaling.get("factor")
    if not _is_positive(factor) or factor < 1:
        yield f"rope_scaling has factor {factor!r}, not a number of 1 or more"
    original = scaling.get("original_max_position_embeddings")
    if original is not None and not _is_size(original):
        yield f"rope_scaling has original_max_position_embeddings {original!r}, not a whole number"
    for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
        given = scaling.get(name)
        off = given is None or (name.startswith("mscale") and given == 0)
        if not off and not _is_positive(given):
            yield f"rope_scaling has {name} {given!r}, not a positive number"
    fast, slow = (scaling.get(n) or YARN_DEFAULTS[n] for n in ("beta_fast", "beta_slow"))
    if _is_positive(fast) and _is_positive(slow) and fast < slow:
        yield f"rope_scaling has beta_fast {fast} below beta_slow {slow}"


def _relations(v: Mapping[str, Any]) -> Iterator[str]:
    """Contradictions between values that are each legal; absent ones are passed over."""

    def have(*names: str) -> bool:
        return all(name in v for name in names)

    for name in ("num_key_value_heads", "num_kv_heads_for_linear_attn"):
        if have(name, "num_attention_heads") and v[name] != v["num_attention_heads"]:
            yield f"{name} is {v[name]}, but there are {v['num_attention_heads']} attention heads"
    if have("num_attention_heads", "head_dim", "group_norm_size"):
        width = v["num_attention_heads"] * v["head_dim"]
        if width % v["group_norm_size"]:
            yield (
                f"group_norm_size {v['group_norm_size']} (a count of groups) does not divide "
                f"num_attention_heads * head_dim = {width}"
            )
    yield from _rope_relations(v)
    yield from _expert_relations(v)
    if have("first_k_dense_replace", "num_hidden_layers"):
        dense, layers = v["first_k_dense_replace"], v["num_hidden_layers"]
        if dense > layers:
            yield f"first_k_dense_replace is {dense}, but there are {layers} layers"
    if v.get("num_nextn_predict_layers", 0) > 1:
        yield (
            f"num_nextn_predict_layers is {v['num_nextn_predict_layers']}; "
            "the architecture has 0 or 1 MTP layers"
        )


def _rope_relations(v: Mapping[str, Any]) -> Iterator[str]:
    if v.get("qk_rope_head_dim", 0) % 2:
        yield f"qk_rope_head_dim {v['qk_rope_head_dim']} is odd; RoPE turns pairs"
    if v.get("rope_theta", 2) <= 1:
        yield f"rope_theta is {v['rope_theta']}, not more than 1"
    if "partial_rotary_factor" not in v:
        return
    factor = v["partial_rotary_factor"]
    if factor > 1:
        yield f"partial_rotary_factor is {factor}, more than the whole head"
    elif "head_dim" in v:
        rotary = int(v["head_dim"] * factor)
        if rotary == 0 or rotary % 2:
            yield (
                f"partial_rotary_factor {factor} of head_dim {v['head_dim']} rotates {rotary} "
                "dims; RoPE turns pairs, at least one"
            )


def _expert_relations(v: Mapping[str, Any]) -> Iterator[str]:
    names = ("num_experts", "n_group", "topk_group", "num_experts_per_tok")
    if not all(name in v for name in names):
        return
    experts, groups, kept, top_k = (v[name] for name in names)
    if experts % groups:
        yield f"n_group {groups} does not divide num_experts {experts}"
    if kept > groups:
        yield f"topk_group is {kept}, but n_group is {groups}"
    elif experts % groups == 0 and top_k > kept * (experts // groups):
        yield (
            f"num_experts_per_tok is {top_k}, but {kept} of {groups} groups hold only "
            f"{kept * (experts // groups)} experts"
        )
