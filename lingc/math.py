"""Maths that several ops share, in plain torch.

An op may not import another, so what a fused op has in common with the ops it fuses is here, and
"the fused op equals the composition bit for bit" holds by construction. Inputs are widened to f32,
or to f64 where they are f64, before anything is added up. Functions that return activations round
them to the dtype of their first argument; the others leave the rounding to the op.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lingc.plan import DTYPE_BYTES, Dim, TensorType

CHUNK = 64
"""Tokens a block of lightning attention. Any block gives the same result up to rounding."""

BLOCK = 128
"""Channels that one scale of an FP8 activation covers, and rows and columns for a weight."""

E4M3_MAX = 448.0


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype to add up in: f64 for f64, else f32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    return x.to(accumulator(x))


def wide_name(dtype: str) -> str:
    """`accumulator` for the name of a dtype."""
    return "f64" if dtype == "f64" else "f32"


def uneven(tokens: int | str, sequences: int | str, most: int) -> str | None:
    """Why so many tokens are not 1 to `most` for each sequence, or None; sizes may be open yet."""
    if isinstance(tokens, str) or isinstance(sequences, str):
        return None
    if tokens % sequences == 0 and 1 <= tokens // sequences <= most:
        return None
    return f"{tokens} tokens are not 1 to {most} for each of {sequences} sequences"


def number(size: Dim) -> int:
    """A size that the config fixes, for arithmetic; symbolic ones may only be passed on."""
    assert not isinstance(size, str), f"size {size!r} is symbolic"
    return size


def times(size: Dim, by: int) -> Dim:
    """A multiple of a size, symbolic or not."""
    return f"{by}*{size}" if isinstance(size, str) else size * by


def ceil_div(size: Dim, by: int) -> int:
    return -(-number(size) // by)


def stored_bytes(*types: TensorType | None) -> float:
    """Bytes of values of these types; their sizes must be numbers."""
    return sum(DTYPE_BYTES[t.dtype] * elements(t) for t in types if t is not None)


def elements(value: TensorType) -> int:
    count = 1
    for size in value.bind({}):
        count *= size
    return count


def expert_bytes(ids: TensorType, experts: int, *stacks: TensorType | None) -> float:
    """Bytes of the experts that are hit, under uniform and independent routing."""
    tokens, top_k = ids.bind({})
    return stored_bytes(*stacks) * (1 - (1 - top_k / experts) ** tokens)


# -------------------------------------------------------------------------- linear, norm and rope


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in the accumulator of `x`, not rounded."""
    w = wide(x)
    return functional.linear(w, weight.to(w.dtype))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last axis, not rounded."""
    w = wide(x)
    return w * torch.rsqrt(w.square().mean(-1, keepdim=True) + eps) * weight.to(w.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, not rounded."""
    return functional.silu(wide(gate)) * wide(up)


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (j, j + n) of the first 2n channels of [T, H, K]; n is the width of `cos`."""
    w, n = wide(x), cos.shape[-1]
    c, s = cos[:, None].to(w.dtype), sin[:, None].to(w.dtype)
    a, b = w[..., :n], w[..., n : 2 * n]
    return torch.cat((a * c - b * s, b * c + a * s, w[..., 2 * n :]), -1)


def rope_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2j, 2j + 1) of [..., 2n], which stay side by side; `cos` broadcasts to n."""
    w = wide(x)
    c, s = cos.to(w.dtype), sin.to(w.dtype)
    a, b = w[..., 0::2], w[..., 1::2]
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Per-head norm and half-split rope of q and k; `plugins/qk_norm_rope.py` has the maths."""
    width = heads * q_weight.numel()
    q = qkv[:, :width].unflatten(1, (heads, -1))
    k = qkv[:, width : 2 * width].unflatten(1, (heads, -1))
    return (
        rope_half(rms(q, q_weight, eps), cos, sin).to(qkv.dtype),
        rope_half(rms(k, k_weight, eps), cos, sin).to(qkv.dtype),
    )


def near_ties(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """Channels [T, H, K] of k that f32 may round either way: near the middle of two numbers."""
    _, exact = qk_norm_rope(qkv.double(), q_weight, k_weight, cos, sin, heads, eps)
    below, above = ((exact * (1 + side)).to(qkv.dtype) for side in (-1e-6, 1e-6))
    return below != above


def group_norm_gate(o: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Norm of each group of channels, then the gate; `plugins/group_norm_gate.py` has the maths."""
    rows = o.reshape(gate.shape).unflatten(1, (groups, -1))
    y = rms(rows, weight.view(groups, -1), eps).flatten(1)
    return (y * torch.sigmoid(wide(gate))).to(o.dtype)


# ------------------------------------------------------------------------------------- lightning


def lightning_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One block of n tokens of one sequence: q, k [n, H, K], v [n, H, V], state [H, K, V].

    q is scaled already. exp(-s(i-j)) is computed as such: factored into exp(-si) exp(sj) it leaves
    the range of f32 from n = 107 on at the fastest decay.
    """
    n = q.shape[0]
    i = torch.arange(n, device=q.device)
    lag = (i[:, None] - i).clamp(min=0)
    within = torch.exp(-decay[:, None, None] * lag).tril()  # [H, n, n]
    since_start = torch.exp(-(i[:, None] + 1) * decay)[..., None]  # [n, H, 1]
    until_end = torch.exp(-(n - 1 - i[:, None]) * decay)[..., None]  # [n, H, 1]
    scores = torch.einsum("ihk,jhk->hij", q, k) * within
    o = torch.einsum("hij,jhv->ihv", scores, v)
    o = o + torch.einsum("ihk,hkv->ihv", q * since_start, state)
    added = torch.einsum("jhk,jhv->hkv", k * until_end, v)
    return o, torch.exp(-n * decay)[:, None, None] * state + added


def lightning_sequence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """All tokens of one sequence, in blocks. Shapes as in `lightning_chunk`, one dtype."""
    outputs = [v.new_zeros(0, *v.shape[1:])]
    for start in range(0, q.shape[0], chunk):
        part = slice(start, start + chunk)
        o, state = lightning_chunk(q[part], k[part], v[part], decay, state)
        outputs.append(o)
    return torch.cat(outputs), state


def lightning_add(k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """The states [B, H, K, V] after one more token of each sequence: k [B, H, K], v [B, H, V]."""
    kept = torch.exp(-decay)[:, None, None] * state
    return kept + k[..., :, None] * v[..., None, :]


def lightning_read(q: Tensor, state: Tensor) -> Tensor:
    """What scaled q [B, H, K] reads from states [B, H, K, V]."""
    return (q[..., :, None] * state).sum(-2)


def scaled(q: Tensor, dtype: torch.dtype) -> Tensor:
    return q.to(dtype).mul(q.shape[-1] ** -0.5)


def state_dtype(q: Tensor, state: Tensor) -> torch.dtype:
    return torch.promote_types(accumulator(q), state.dtype)


def lightning_prefill(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, where: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Whole sequences; `plugins/lightning_prefill.py` has the maths.

    Args:
        where: slots [B], offsets [B + 1] and positions [T].
    """
    slots, offsets, positions = where
    dtype = state_dtype(q, state)
    rate = decay.to(dtype)
    o = torch.zeros_like(v, dtype=q.dtype)
    ends = state.new_zeros((slots.shape[0], *state.shape[1:]), dtype=dtype)
    for b, (first, last) in enumerate(pairwise(offsets.tolist())):
        slot = int(slots[b])
        if first == last:
            ends[b] = state[slot]
            continue
        fresh = slot < 0 or positions[first] == 0
        start = torch.zeros_like(ends[b]) if fresh else state[slot].to(dtype)
        part = slice(first, last)
        wide_q, wide_k, wide_v = scaled(q[part], dtype), k[part].to(dtype), v[part].to(dtype)
        made, ends[b] = lightning_sequence(wide_q, wide_k, wide_v, rate, start)
        o[part] = made.to(q.dtype)
    return o, stored(state, slots, ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What linear attention keeps between steps, and which of it a step is about.

    Attributes:
        decay: Rates [H].
        state: [S, H, K, V].
        pending_k: [S, M, H, K], keys of the last verify.
        pending_v: [S, M, H, V].
        slots: [B], -1 for padding.
        accepted: [B], how many pending tokens of the slot are to be committed.
    """

    decay: Tensor
    state: Tensor
    pending_k: Tensor
    pending_v: Tensor
    slots: Tensor
    accepted: Tensor

    def committed(self, dtype: torch.dtype, fresh: Tensor) -> Tensor:
        """States [B, H, K, V] at the start of a step, with accepted pending tokens committed.

        A fresh sequence and slot -1 start from zero, whatever their slot and its pending tokens
        hold. Pending tokens beyond the accepted ones may hold anything, NaN too.
        """
        live, slot = (self.slots >= 0) & ~fresh, self.slots.long()
        states = torch.where(live[:, None, None, None], self.state[slot].to(dtype), 0.0)
        count = torch.where(live, self.accepted, 0)
        for i in range(self.pending_k.shape[1]):
            k, v = self.pending_k[slot, i].to(dtype), self.pending_v[slot, i].to(dtype)
            more = lightning_add(k, v, self.decay.to(dtype), states)
            states = torch.where((count > i)[:, None, None, None], more, states)
        return states


def stored(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy of `table` with `values` at `rows`, but for rows of -1, which are not written."""
    made = table.clone()
    kept = rows >= 0
    made[rows[kept].long()] = values[kept].to(table.dtype)
    return made


def lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, held: Held, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each sequence; `plugins/lightning_decode.py` has the maths."""
    dtype = state_dtype(q, held.state)
    before = held.committed(dtype, positions == 0)
    after = lightning_add(k.to(dtype), v.to(dtype), held.decay.to(dtype), before)
    o = lightning_read(scaled(q, dtype), after)
    return o.to(q.dtype), stored(held.state, held.slots, after)


def lightning_verify(
    q: Tensor, k: Tensor, v: Tensor, held: Held, offsets: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same number of tokens of each sequence; `plugins/lightning_verify.py` has the maths."""
    dtype, slots = state_dtype(q, held.state), held.slots
    sequences = slots.shape[0]
    tokens = q.shape[0] // max(sequences, 1)
    before = held.committed(dtype, positions[offsets[:-1].long()] == 0)
    by_q, by_k, by_v = (x.reshape(sequences, tokens, *x.shape[1:]) for x in (q, k, v))
    now, o = before, torch.empty_like(by_v, dtype=q.dtype)
    for i in range(tokens):
        now = lightning_add(by_k[:, i].to(dtype), by_v[:, i].to(dtype), held.decay.to(dtype), now)
        o[:, i] = lightning_read(scaled(by_q[:, i], dtype), now).to(q.dtype)
    pending_k, pending_v = (
        torch.cat((new.to(old.dtype), old[slots.long(), tokens:]), 1)
        for new, old in ((by_k, held.pending_k), (by_v, held.pending_v))
    )
    return (
        o.flatten(0, 1),
        stored(held.state, slots, before),
        stored(held.pending_k, slots, pending_k),
        stored(held.pending_v, slots, pending_v),
    )


# ----------------------------------------------------------------------- latent cache and experts


def latent_rows(a: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Cache rows of latent | rope key, not rounded; `plugins/mla_latent.py` has the maths."""
    width = weight.numel()
    return torch.cat((rms(a[:, :width], weight, eps), rope_pairs(a[:, width:], cos, sin)), -1)


def cached_rows(cache: Tensor, pages: Tensor, length: int, page_size: int) -> Tensor:
    """The first `length` rows [length, c + r] of a sequence with this row of the page table."""
    x = torch.arange(length, device=cache.device)
    return cache[pages[x // page_size].long() * page_size + x % page_size]


def causal_softmax(scores: Tensor, positions: Tensor) -> Tensor:
    """Softmax of [H, T, L] over the keys 0..positions[t] of query t."""
    keys = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(keys > positions[:, None], float("-inf")).softmax(-1)


def absorbed_attention(
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: tuple[Tensor, Tensor],
    page_size: int,
    scale: float,
) -> Tensor:
    """[T, HV] from roped queries [T, H, nope + r]; `plugins/mla_absorbed_attention.py` has more."""
    w_k, w_v = (w.to(query.dtype) for w in weights)
    nope, latent = w_k.shape[1:]
    z = torch.einsum("thn,hnc->thc", query[..., :nope], w_k)
    query = torch.cat((z, query[..., nope:]), -1)  # [T, H, c + r]
    read = torch.zeros_like(z)
    for b, (first, last) in enumerate(pairwise(offsets.tolist())):
        if first == last:
            continue
        at = positions[first:last]
        rows = cached_rows(cache, page_table[b], int(at.max()) + 1, page_size).to(query.dtype)
        scores = scale * torch.einsum("thk,xk->htx", query[first:last], rows)
        shares = causal_softmax(scores, at)
        read[first:last] = torch.einsum("htx,xc->thc", shares, rows[:, :latent])
    return torch.einsum("thc,hvc->thv", read, w_v).flatten(1)


def expert_sum(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    feed_forward: Callable[[int, Tensor], Tensor],
    base: Tensor | None,
) -> Tensor:
    """`base[t] + sum_i weights[t, i] * feed_forward(ids[t, i], x[t])`, widened, not rounded.

    A token's experts are added up by rising id, whatever tokens stand beside it, and `base` last.
    """
    y = torch.zeros_like(x, dtype=accumulator(x))
    for expert in torch.unique(ids).tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        given = feed_forward(expert, x[token]) * weights[token, choice, None].to(y.dtype)
        y.index_add_(0, token, given)
    return y if base is None else y + base.to(y.dtype)


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    topk_groups: int,
    top_k: int,
    scale: float,
    normalize: bool,  # noqa: FBT001  (the schema's order)
) -> tuple[Tensor, Tensor]:
    """Ids and weights of each token's experts; `plugins/router.py` has the maths."""
    scores = torch.sigmoid(matmul(x, weight))
    biased = (scores + bias.to(scores.dtype)).unflatten(1, (groups, -1))  # [T, groups, E/groups]
    best = biased.topk(min(2, biased.shape[-1])).values.sum(-1)
    dropped = torch.ones_like(best).scatter(1, _largest(best, topk_groups), 0)
    ids = _largest(biased.masked_fill(dropped[..., None] > 0, float("-inf")).flatten(1), top_k)
    chosen = scores.gather(1, ids)
    if normalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return ids.to(torch.int32), scale * chosen


def _largest(values: Tensor, count: int) -> Tensor:
    # Not topk, which promises no order of equal values.
    order = values.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count]


def expert_lists(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Which pairs of token and slot each expert has: pairs [T k] and starts [experts + 1], i32.

    Pair t k + i is the i-th expert of token t. Pairs stand by rising expert, each expert's by
    rising number; those of expert e are pairs[starts[e] : starts[e + 1]]. Ids of -1, padding,
    stand behind them all.
    """
    flat = torch.where(ids < 0, experts, ids).flatten().long()
    order = torch.sort(flat, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    counts.index_add_(0, flat, torch.ones_like(flat))
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)[:-1]))
    return order.indices.to(torch.int32), starts.to(torch.int32)


# ----------------------------------------------------------------------------- quantized formats


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes and f32 scales of rows; `plugins/quantize_fp8.py` has the maths."""
    w, width = wide(x), x.shape[-1]
    blocks = functional.pad(w, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = (blocks.abs().amax(-1) / E4M3_MAX).float()
    # Also where a subnormal amax leaves a scale of zero.
    scales = torch.where(scales == 0, 1.0, scales)
    # In f32 whatever x is: BF16 values often lie halfway between two codes, and which of the two
    # is taken must not depend on the precision of the division.
    ratio = (blocks.float() / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).flatten(-2)
    return ratio[..., :width].to(torch.float8_e4m3fn), scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [T, D] from E4M3 codes and one scale a token and 128 channels."""
    by_channel = scales.repeat_interleave(BLOCK, -1)[..., : codes.shape[-1]]
    return codes.to(dtype) * by_channel.to(dtype)


def dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix [N, D] from E4M3 codes and one scale a 128x128 block."""
    by_row = scales.repeat_interleave(BLOCK, 0)[: codes.shape[0]]
    return dequantize_rows(codes, by_row, dtype)


def dequantize_int4(
    packed: Tensor, scales: Tensor, width: int, group: int, dtype: torch.dtype
) -> Tensor:
    """A matrix [N, width] from nibbles, the lowest first, and one scale a row and group."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = ((packed[..., None] >> shifts) & 15).flatten(-2)[..., :width]
    by_channel = scales.repeat_interleave(group, -1)[..., :width]
    return (nibbles - 8).to(dtype) * by_channel.to(dtype)


def expert_matrix(
    stack: Tensor,
    scale: Tensor | None,
    expert: int,
    stored: str,
    group: int,
    width: int,
    dtype: torch.dtype,
    *,
    halves: int,
) -> Tensor:
    """The values [N, width] of one expert's matrix.

    Args:
        stored: `bf16`, `fp8` with blocks that begin anew with each half of the rows, or `int4`.
        group: Of `int4`.
        halves: How many matrices stand one below the other.
    """
    if scale is None:
        return stack[expert].to(dtype)
    if stored == "int4":
        return dequantize_int4(stack[expert], scale[expert], width, group, dtype)
    return dequantize_halves(stack[expert], scale[expert], dtype, halves)


def dequantize_halves(codes: Tensor, scales: Tensor, dtype: torch.dtype, halves: int) -> Tensor:
    """A matrix of halves, each in 128x128 blocks of its own."""
    parts = zip(codes.chunk(halves), scales.chunk(halves), strict=True)
    return torch.cat([dequantize_blocks(*part, dtype) for part in parts])
