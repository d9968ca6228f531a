"""What each fused op computes, written in either library.

A function takes the library, then the op's arguments in the order of its schema: tensors as values,
None for absent ones, numbers as they are. Weights come in the form that `weights.py` decides.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lingc.targets.onnx import attention, experts, lightning, quantized, rows

Function = Callable[..., Any]
"""(library, *arguments) -> a value, or a tuple of them."""

FUNCTIONS: Mapping[str, Function] = {
    function.__name__: function
    for function in (
        rows.embedding,
        rows.rope_table,
        rows.rms_norm,
        rows.add_rms_norm,
        rows.linear,
        rows.linear_f32,
        rows.qk_norm_rope,
        rows.group_norm_gate,
        rows.silu_mul,
        lightning.lightning_prefill,
        lightning.lightning_decode,
        lightning.lightning_verify,
        lightning.decode_mixer,
        lightning.verify_mixer,
        attention.mla_latent,
        attention.mla_latent_kv,
        attention.mla_query_rope,
        attention.mla_attention,
        attention.mla_absorbed_attention,
        experts.router,
        experts.experts,
        experts.fp8_weight_experts,
        experts.int4_weight_experts,
        experts.fp8_experts,
        quantized.quantize_fp8,
        quantized.fp8_linear,
        quantized.fp8_linear_f32,
        quantized.fp8_weight_linear,
        quantized.fp8_weight_linear_f32,
        quantized.int4_weight_linear,
        quantized.int4_weight_linear_f32,
        quantized.rms_norm_fp8,
        quantized.add_rms_norm_fp8,
        quantized.silu_mul_fp8,
    )
}
