"""Functions that work row by row: embedding, rope, norms, matrices, gates."""

from collections.abc import Sequence

import numpy as np

from lingc.targets.onnx.body import Value
from lingc.targets.onnx.library_standard import Standard


def embedding(_library: Standard, token_ids: Value, weight: Value, _dtype: str) -> Value:
    rows = weight.gather(token_ids)
    return Value(rows.name, rows.body, weight.dtype).cast("f32")


def rope_table(
    library: Standard, positions: Value, inv_freq: Sequence[float], scale: float
) -> tuple[Value, Value]:
    angle = positions.cast("f32").unsqueeze(1) * np.asarray(inv_freq, np.float32)
    cos, sin = library.body.op("Cos", angle), library.body.op("Sin", angle)
    return (cos, sin) if scale == 1 else (cos * float(scale), sin * float(scale))


def rms_norm(library: Standard, x: Value, weight: Value, eps: float) -> Value:
    return library.rms_norm(x, weight, eps)


def add_rms_norm(
    library: Standard, x: Value, residual: Value, weight: Value, eps: float
) -> tuple[Value, Value]:
    return library.add_rms_norm(x, residual, weight, eps)


def linear(library: Standard, x: Value, weight: Value) -> Value:
    return library.linear(x, library.wide(weight))


def linear_f32(library: Standard, x: Value, weight: Value) -> Value:
    return library.linear(x, library.wide(weight))


def qk_norm_rope(
    library: Standard,
    qkv: Value,
    q_weight: Value,
    k_weight: Value,
    cos: Value,
    sin: Value,
    heads: int,
    eps: float,
) -> tuple[Value, Value]:
    width = 2 * heads * q_weight.size(0)
    qk = qkv if qkv.size(1) == width else qkv.slice(1, 0, width)
    q, k = normed_and_roped(library, qk, q_weight, k_weight, cos, sin, heads, eps).split(
        1, [heads, heads]
    )
    return q, k


def normed_and_roped(
    library: Standard,
    qk: Value,
    q_weight: Value,
    k_weight: Value,
    cos: Value,
    sin: Value,
    heads: int,
    eps: float,
) -> Value:
    """q and k heads [T, 2 H K], each normed and rotated by halves, as [T, 2H, K]."""
    width = q_weight.size(0)
    copies = library.body.ints([heads, width])
    weight = library.body.concat(
        [library.body.op("Expand", w, copies) for w in (q_weight, k_weight)], 0
    )
    by_head = library.rms_norm(qk.reshape(0, 2 * heads, width), weight, eps)
    return rotated(library, by_head, cos, sin, heads=2 * heads, width=width, interleaved=False)


def rotated(
    library: Standard,
    x: Value,
    cos: Value,
    sin: Value,
    *,
    heads: int,
    width: int,
    interleaved: bool,
) -> Value:
    """The first 2n channels of x [T, heads, width], rotated by cos and sin [T, n]."""
    pairs = cos.size(1)
    if pairs == 0:
        return x
    attrs = {"interleaved": int(interleaved), "num_heads": heads}
    if 2 * pairs < width:
        attrs["rotary_embedding_dim"] = 2 * pairs
    flat = x.reshape(0, 1, heads * width)
    turned = library.body.op(
        "RotaryEmbedding", flat, cos.unsqueeze(1), sin.unsqueeze(1), attrs=attrs
    )
    return turned.reshape(0, heads, width)


def group_norm_gate(
    library: Standard, o: Value, gate: Value, weight: Value, groups: int, eps: float
) -> Value:
    return normed_and_gated(library, o, gate, weight, groups, eps)


def normed_and_gated(
    library: Standard, o: Value, gate: Value, weight: Value, groups: int, eps: float
) -> Value:
    width = weight.size(0)
    by_group = o.reshape(-1, groups, width // groups)
    normed = library.rms_norm(by_group, weight.reshape(groups, width // groups), eps)
    return normed.reshape(-1, width) * library.body.op("Sigmoid", gate)


def silu_mul(library: Standard, gate_up: Value) -> Value:
    inner = gate_up.size(1) // 2
    gate, up = gate_up.split(1, [inner, inner])
    return library.silu_mul(gate, up)
