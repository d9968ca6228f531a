"""MLA: the latent cache's rows, and attention over them, plain and absorbed."""

# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

import numpy as np

from lingc.targets.onnx.body import Body, Value
from lingc.targets.onnx.library_standard import FAR, Standard
from lingc.targets.onnx.packing import Padding, Singles
from lingc.targets.onnx.rows import rotated


def mla_latent(
    library: Standard,
    a: Value,
    q_weight: Value,
    kv_weight: Value,
    cos: Value,
    sin: Value,
    cache: Value,
    rows: Value,
    eps: float,
) -> tuple[Value, Value]:
    sizes = [q_weight.size(0), kv_weight.size(0), 2 * cos.size(1)]
    q, latent, key = a.split(1, sizes)
    cached = _cached(library, latent, key, kv_weight, cos, sin, cache, rows, eps)
    return library.rms_norm(q, q_weight, eps), cached


def mla_latent_kv(
    library: Standard,
    a: Value,
    kv_weight: Value,
    cos: Value,
    sin: Value,
    cache: Value,
    rows: Value,
    eps: float,
) -> Value:
    own = [kv_weight.size(0), 2 * cos.size(1)]
    before = a.size(1) - sum(own)
    *_, latent, key = a.split(1, [before, *own] if before else own)
    return _cached(library, latent, key, kv_weight, cos, sin, cache, rows, eps)


def mla_query_rope(library: Standard, q: Value, cos: Value, sin: Value, heads: int) -> Value:
    width, rope = q.size(1) // heads, 2 * cos.size(1)
    nope, key = q.reshape(0, heads, width).split(2, [width - rope, rope])
    turned = _rope_pairs(library, key.reshape(0, 1, heads * rope), cos, sin, heads=heads)
    return library.body.concat([nope, turned.reshape(0, heads, rope)], 2)


def mla_attention(
    library: Standard,
    q: Value,
    cache: Value,
    page_table: Value,
    offsets: Value,
    positions: Value,
    kv_b: Value,
    page_size: int,
    nope_dim: int,
    scale: float,
) -> Value:
    heads = q.size(1)
    latent_dim = kv_b.size(1)
    rope, value = cache.size(1) - latent_dim, kv_b.size(0) // heads - nope_dim
    keys = cache.gather(_rows(library.body, page_table, page_size).reshape(-1))  # [B L, c + r]
    latent, key = keys.split(1, [latent_dim, rope])
    expanded = library.linear(latent, library.wide(kv_b, latent)).reshape(
        0, heads, nope_dim + value
    )
    k_nope, v = expanded.split(2, [nope_dim, value])
    copies = library.body.ints([1, heads, 1])
    k = library.body.concat([k_nope, library.body.op("Expand", key.unsqueeze(1), copies)], 2)
    mask = _packed_mask(library.body, page_table, offsets, positions, page_size)  # [T, B L]
    weights = _softmax(library.body, library.scores(q, k, scale) + mask)
    return library.mixed(weights, v).transpose(1, 0, 2).reshape(0, heads * value)


def mla_absorbed_attention(
    library: Standard,
    q: Value,
    cache: Value,
    page_table: Value,
    offsets: Value,
    positions: Value,
    w_k: Value,
    w_v: Value,
    page_size: int,
    scale: float,
) -> Value:
    heads, nope, latent_dim = (w_k.size(axis) for axis in range(3))
    value, width = w_v.size(1), cache.size(1)
    body = library.body
    q_nope, q_rope = q.split(2, [nope, width - latent_dim])
    by_latent = library.by_head(q_nope, library.wide(w_k, q_nope)).transpose(1, 0, 2)  # [T, H, c]
    padding = Singles() if library.single else Padding(body, offsets)
    spread = padding.spread(body.concat([by_latent, q_rope], 2))  # [B, n, H, c + r]
    sequences, tokens = page_table.length(0), spread.length(1)
    keys = cache.gather(_rows(body, page_table, page_size))  # [B, L, c + r]
    query = spread.reshape(sequences, -1, width)
    scores = library.shared_scores(query, keys, scale).reshape(sequences, tokens, heads, -1)
    mask = _mask(body, page_table, padding.spread(positions), page_size)  # [B, n, 1, L]
    weights = _softmax(body, scores + mask)
    # The rope part comes along: slicing it off the keys would copy the cache.
    mixed = weights.reshape(sequences, -1, keys.length(1)) @ keys
    latent = padding.gathered(mixed.reshape(-1, heads, width)).slice(2, 0, latent_dim)
    return library.from_latent(latent, library.wide(w_v, latent)).reshape(0, heads * value)


def _cached(
    library: Standard,
    latent: Value,
    key: Value,
    weight: Value,
    cos: Value,
    sin: Value,
    cache: Value,
    rows: Value,
    eps: float,
) -> Value:
    turned = _rope_pairs(library, key.unsqueeze(1), cos, sin, heads=1).squeeze(1)
    row = library.body.concat([library.rms_norm(latent, weight, eps), turned], 1)
    return library.body.op("ScatterND", cache, rows.cast("i64").unsqueeze(1), row)


def _rope_pairs(library: Standard, x: Value, cos: Value, sin: Value, *, heads: int) -> Value:
    """Adjacent channels of x [T, 1, heads * 2n], rotated by cos and sin [T, n]."""
    pairs = cos.size(1)
    angles = (cos.unsqueeze(1), sin.unsqueeze(1))
    return rotated(library, x, angles, heads=heads, width=2 * pairs, pairs=pairs, interleaved=True)


def _rows(body: Body, page_table: Value, page_size: int) -> Value:
    """Cache rows of positions 0, 1, … of each sequence, [B, L]."""
    # A range made there, not a constant: equal nodes of different layers are computed once.
    within = body.count_to(body.ints([page_size])).cast("i32")
    first = (page_table * np.array(page_size, np.int32)).unsqueeze(2)
    return (first + within).reshape(page_table.length(0), -1)


def _mask(body: Body, page_table: Value, positions: Value, page_size: int) -> Value:
    """What to add to scores [B, n, H, L] to leave each query positions 0 to its own."""
    places = _places(body, page_table, page_size)
    allowed = body.op("LessOrEqual", places, positions.unsqueeze(2, 3))
    return body.where(allowed, 0.0, -FAR)


def _packed_mask(
    body: Body, page_table: Value, offsets: Value, positions: Value, page_size: int
) -> Value:
    """The same for scores [H, T, B L] over the keys of all sequences: [T, B L]."""
    past = body.op("LessOrEqual", _places(body, page_table, page_size), positions.unsqueeze(1))
    if page_table.shape[0] == 1:
        return body.where(past, 0.0, -FAR)
    token = body.count_to(positions.length(0)).cast("i32").unsqueeze(1)
    begun = body.op("GreaterOrEqual", token, offsets.slice(0, 0, -1))
    own = body.op("And", begun, body.op("Less", token, offsets.slice(0, 1)))  # [T, B]
    allowed = body.op("And", own.unsqueeze(2), past.unsqueeze(1))  # [T, B, L]
    return body.where(allowed.reshape(positions.length(0), -1), 0.0, -FAR)


def _places(body: Body, page_table: Value, page_size: int) -> Value:
    """Positions 0, 1, … that the pages have room for, [L]."""
    return body.count_to(page_table.length(1) * page_size).cast("i32")


def _softmax(body: Body, scores: Value) -> Value:
    return body.op("Softmax", scores, attrs={"axis": -1})
