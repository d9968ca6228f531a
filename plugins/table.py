"""All ops, by name.

Importing this module registers every op with torch. None has its own GPU kernel yet: an op runs
through its reference, in torch, or through its ONNX function, and so refuses no shape on behalf of
a kernel (`lingc.op.no_refusal`).
"""

from lingc.op import OPS
from lingc.plugins import (
    add_rms_norm,
    add_rms_norm_fp8,
    decode_mixer,
    embedding,
    expert_dispatch,
    experts,
    fp8_experts,
    fp8_linear,
    fused_linear,
    group_norm_gate,
    int4_experts,
    int4_linear,
    lightning_decode,
    lightning_prefill,
    lightning_verify,
    linear,
    mla_absorbed_attention,
    mla_attention,
    mla_latent,
    mla_latent_kv,
    mla_query_rope,
    qk_norm_rope,
    quantize_fp8,
    rms_norm,
    rms_norm_fp8,
    rope_table,
    router,
    silu_mul,
    silu_mul_fp8,
    verify_mixer,
)

MODULES = (
    embedding,
    rope_table,
    rms_norm,
    add_rms_norm,
    rms_norm_fp8,
    add_rms_norm_fp8,
    linear,
    fp8_linear,
    int4_linear,
    fused_linear,
    quantize_fp8,
    silu_mul,
    silu_mul_fp8,
    qk_norm_rope,
    lightning_prefill,
    lightning_decode,
    lightning_verify,
    group_norm_gate,
    decode_mixer,
    verify_mixer,
    mla_latent,
    mla_latent_kv,
    mla_query_rope,
    mla_attention,
    mla_absorbed_attention,
    router,
    expert_dispatch,
    experts,
    fp8_experts,
    int4_experts,
)
"""The files of ops, in the order in which a step meets them."""

__all__ = ["MODULES", "OPS"]
