"""The `quantization_config` of a written checkpoint.

The FP8 release's literal text is not public; this is the common form of block-quantized
checkpoints. The INT4 one is that of compressed-tensors.
"""

from collections.abc import Mapping
from typing import Any

from lingc.model.config import ModelConfig
from lingc.quantize.formats import FP8_BLOCK
from lingc.quantize.recipes import Format


def quantization_config(
    config: ModelConfig, layout: str, formats: Mapping[str, Format]
) -> dict[str, Any] | None:
    """What `config.json` says about storage, by each tensor's logical name; None for BF16."""
    quantized = {chosen for chosen in formats.values() if chosen.kind != "plain"}
    if not quantized:
        return None
    if layout == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "modules_to_not_convert": _kept(formats),
        }
    (chosen,) = quantized
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {"group_0": _group(chosen.group)},
        "ignore": _ignored(config, formats),
    }


def _kept(formats: Mapping[str, Format]) -> list[str]:
    """Modules with a matrix that stays plain, the head first as it stands outside the layers."""
    names = [
        name.removesuffix(".weight")
        for name, chosen in formats.items()
        if chosen.kind == "plain" and not _is_vector(name)
    ]
    return sorted(names, key=lambda name: name != "lm_head")


def _is_vector(name: str) -> bool:
    module = name.removesuffix(".weight")
    return module.endswith(("norm", "_bias"))


def _group(columns: int) -> dict[str, Any]:
    return {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": columns,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        },
        "input_activations": None,
        "output_activations": None,
    }


def _ignored(config: ModelConfig, formats: Mapping[str, Format]) -> list[str]:
    """Patterns of the modules that stay plain: all but the routed experts."""
    patterns = ["lm_head", "re:.*attention.*", "re:.*shared_experts.*", r"re:.*mlp\.gate$"]
    patterns += [
        rf"re:model\.layers\.{layer}\.mlp\..*" for layer in range(config.first_k_dense_replace)
    ]
    if config.has_mtp:
        eh_proj = f"model.layers.{config.mtp_layer}.eh_proj.weight"
        rest = r"eh_proj$" if eh_proj in formats else ".*"
        patterns.append(rf"re:model\.layers\.{config.mtp_layer}\.{rest}")
    return patterns
