"""The latent step of MLA: norms, RoPE of the shared key and the cache write, as one op.

    cq = rms_norm(a[:, :q]; w_q)
    cache[rows] = rms_norm(a[:, q:q+c]; w_kv) | rope_pairs(a[:, q+c:])
        ->    cq, cache = mla_latent(a, w_q, w_kv, cos, sin, cache, rows)

and, where `q_lora_rank` is null, `cache = mla_latent_kv(a, ...)` of the latent projection alone.

Why: a dozen launches over a row of about 2,000 values become one; the cache row is written where it
is computed.

Runs after `merge_projections`. Costs nothing in precision in f32; in bf16 it rounds once.
"""

from typing import Any

import torch

from lingc.context import Context
from lingc.graph import Value
from lingc.plugins import mla_latent, mla_latent_kv
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten


def _rope_key(key: Value, pairs: Value, _flat: Value, cos: Value, sin: Value) -> Value:
    x = aten.reshape.default(aten.unsqueeze.default(key, 1), pairs)
    a, b = aten.select.int(x, 3, 0), aten.select.int(x, 3, 1)
    c, s = aten.unsqueeze.default(cos, 1), aten.unsqueeze.default(sin, 1)
    first = aten.sub.Tensor(aten.mul.Tensor(a, c), aten.mul.Tensor(b, s))
    second = aten.add.Tensor(aten.mul.Tensor(b, c), aten.mul.Tensor(a, s))
    turned = aten.reshape.default(aten.stack.default([first, second], -1), _flat)
    return aten.squeeze.dim(turned, 1)


def _write(
    a: Value, bounds: tuple[Value, ...], weight: Value, dims: Value, eps: Value, key: Value,
    cache: Value, rows: Value
) -> Value:  # fmt: skip
    latent = aten.slice.Tensor(a, 1, bounds[0], bounds[1])
    row = aten.cat.default([aten.rms_norm.default(latent, dims, weight, eps), key], -1)
    return aten.index_put.default(cache, [rows], row)


def pattern(
    a: Value, q_end: Value, c_end: Value, end: Value, q_weight: Value, q_dims: Value,
    kv_weight: Value, dims: Value, eps: Value, pairs: Value, _flat: Value, cos: Value, sin: Value,
    cache: Value, rows: Value
) -> Value:  # fmt: skip
    cq = aten.rms_norm.default(aten.slice.Tensor(a, 1, 0, q_end), q_dims, q_weight, eps)
    key = _rope_key(aten.slice.Tensor(a, 1, c_end, end), pairs, _flat, cos, sin)
    return cq, _write(a, (q_end, c_end), kv_weight, dims, eps, key, cache, rows)


def pattern_kv(
    a: Value, c_end: Value, end: Value, kv_weight: Value, dims: Value, eps: Value, pairs: Value,
    _flat: Value, cos: Value, sin: Value, cache: Value, rows: Value
) -> Value:  # fmt: skip
    key = _rope_key(aten.slice.Tensor(a, 1, c_end, end), pairs, _flat, cos, sin)
    return _write(a, (0, c_end), kv_weight, dims, eps, key, cache, rows)


def check(match: Match, _context: Any) -> str | None:
    return None if match.is_weight("kv_weight") else "the norm's weight is not a weight"


def check_kv(match: Match, context: Context) -> str | None:
    return check(match, context) if context.config.q_lora_rank is None else NOT_MINE


def _tail(match: Match) -> tuple[Value, ...]:
    names = ("kv_weight", "cos", "sin", "cache", "rows", "eps")
    return tuple(match[name] for name in names)


def replacement(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return build.items(
        build.call(mla_latent.OP.overload, match["a"], match["q_weight"], *_tail(match))
    )


def replacement_kv(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return (build.call(mla_latent_kv.OP.overload, match["a"], *_tail(match)),)


RULE = Rewrite(
    name="fuse_mla_latent",
    patterns=(pattern,),
    check=check,
    replacement=replacement,
    expected=lambda context: 0 if context.config.q_lora_rank is None else len(context.mla_layers),
)

KV_RULE = Rewrite(
    name="fuse_mla_latent_kv",
    patterns=(pattern_kv,),
    check=check_kv,
    replacement=replacement_kv,
    expected=lambda context: len(context.mla_layers) if context.config.q_lora_rank is None else 0,
)
