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
    return library.linear(x, library.wide(weight, x))


def linear_f32(library: Standard, x: Value, weight: Value) -> Value:
    return library.linear(x, library.wide(weight, x))


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
    key = q_weight.size(0)
    qk = qkv if qkv.size(1) == 2 * heads * key else qkv.slice(1, 0, 2 * heads * key)
    angles = (cos.unsqueeze(1), sin.unsqueeze(1))
    turned = normed_and_roped(
        library,
        qk.unsqueeze(1),
        (q_weight, k_weight),
        angles,
        pairs=cos.size(1),
        eps=eps,
        heads=heads,
    )
    q, k = turned.reshape(0, 2 * heads, key).split(1, [heads, heads])
    return q, k


def normed_and_roped(
    library: Standard,
    qk: Value,
    weights: tuple[Value, Value],
    angles: tuple[Value, Value],
    *,
    pairs: int,
    heads: int,
    eps: float,
) -> Value:
    """Heads of q and k [B, n, 2 H K], each normed, and rotated by cos and sin [B, n, pairs]."""
    key = weights[0].size(0)
    copies = library.body.ints([heads, key])
    weight = library.body.concat([library.body.op("Expand", w, copies) for w in weights], 0)
    by_head = library.rms_norm_of_parts(qk.reshape(0, 0, 2 * heads, key), weight, eps, width=key)
    flat = by_head.reshape(0, 0, 2 * heads * key)
    return rotated(library, flat, angles, heads=2 * heads, width=key, pairs=pairs)


def rotated(
    library: Standard,
    x: Value,
    angles: tuple[Value, Value],
    *,
    heads: int,
    width: int,
    pairs: int,
    interleaved: bool = False,
) -> Value:
    """The first channels of each head of x [B, n, heads * width], rotated by [B, n, pairs]."""
    if pairs == 0:
        return x
    attrs = {"interleaved": int(interleaved), "num_heads": heads}
    if 2 * pairs < width:
        attrs["rotary_embedding_dim"] = 2 * pairs
    return library.body.op("RotaryEmbedding", x, *angles, attrs=attrs)


def group_norm_gate(
    library: Standard, o: Value, gate: Value, weight: Value, groups: int, eps: float
) -> Value:
    width = weight.size(0)
    each = width // groups
    by_group = o.reshape(-1, groups, each)
    normed = library.rms_norm_of_parts(by_group, weight.reshape(groups, each), eps, width=each)
    return normed.reshape(-1, width) * library.body.op("Sigmoid", gate)


def silu_mul(library: Standard, gate_up: Value) -> Value:
    inner = gate_up.size(1) // 2
    gate, up = gate_up.split(1, [inner, inner])
    return library.silu_mul(gate, up)
