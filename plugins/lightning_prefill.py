"""Lightning linear attention over whole sequences, state in and out.

For the tokens t = 0, 1, … of one sequence, head h with decay rate s[h], and S the state before it:

    S_t[h] = exp(-s[h]) S_{t-1}[h] + k[t, h] (outer) v[t, h]
    o[t, h] = K^-0.5 q[t, h] @ S_t[h]

computed in blocks of n tokens, i and j counted from the block's start:

    o[i] = K^-0.5 (sum_{j<=i} exp(-s (i-j)) (q[i] . k[j]) v[j]  +  exp(-s (i+1)) q[i] @ S)
    S'   = exp(-s n) S + sum_j exp(-s (n-1-j)) k[j] (outer) v[j]

A sequence whose first position is 0 starts from S = 0, another one from its slot; slot -1 starts
from 0 and writes nothing. Sequences without tokens leave their slot alone.

Shapes: q, k [T, H, K] after norm and rope, q not scaled; v, o [T, H, V]; decay [H]; state
[S, H, K, V]; slots [B]; offsets [B + 1]; positions [T]. T, B, S symbolic. q, k, v of one dtype.

Rounding: everything in f32 (f64 where q or the state is f64); o is rounded to the dtype of q.

Source: Qin et al., Lightning Attention-2, 2024, arXiv:2401.04658, eq. 4-8.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernel import Tensor as Named
from lingc.kernels import lightning
from lingc.math import elements, lightning_prefill, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor,
    slots: Tensor,
    offsets: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    return lightning_prefill(q, k, v, decay, state, (slots, offsets, positions))


def types(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    decay: TensorType,
    state: TensorType,
    *_: TensorType,
) -> tuple[TensorType, TensorType]:
    return TensorType(q.dtype, v.shape), state


def cost(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    decay: TensorType,
    state: TensorType,
    slots: TensorType,
    *_: TensorType,
) -> Cost:
    # The recurrence is the least work: a state update and a read, 2 K V each a token and head.
    live = TensorType(state.dtype, (*slots.shape, *state.shape[1:]))
    return Cost(
        flops=4.0 * elements(v) * k.bind({})[-1],
        moved_bytes=stored_bytes(q, k, v, v) + 2 * stored_bytes(live),
    )


def refusal(
    _target: Target,
    q: TensorType,
    k: TensorType,
    v: TensorType,
    decay: TensorType,
    state: TensorType,
    *_: TensorType,
) -> str | None:
    return lightning.refusal(state, q=q, k=k, v=v)


def tactics(
    target: Target,
    q: TensorType,
    k: TensorType,
    v: TensorType,
    decay: TensorType,
    state: TensorType,
    slots: TensorType,
    offsets: TensorType,
    positions: TensorType,
) -> Sequence[Tactic]:
    if refusal(target, q, k, v, decay, state) is not None:
        return ()
    (tokens, heads, width), (sequences,) = q.bind({}), slots.bind({})
    return lightning.tactics(
        target,
        lightning.Sequences(
            tokens=tokens,
            sequences=sequences,
            heads=heads,
            q=Named("q"),
            k=Named("k"),
            v=Named("v"),
            o=Named("o"),
            pitch=heads * width,
            v_pitch=heads * width,
        ),
    )


def inputs(
    lengths: tuple[int, ...], heads: int, key: int, value: int, *, dtype: str, device: str
) -> tuple[Tensor, ...]:
    some = Samples(dtype=dtype, device=device)
    slots, offsets, positions = some.sequences(lengths)
    tokens = sum(lengths)
    return (
        some.normal(tokens, heads, key),
        some.normal(tokens, heads, key),
        some.normal(tokens, heads, value),
        some.decay(heads),
        some.state(len(lengths) + 2, heads, key, value),
        slots,
        offsets,
        positions,
    )


OP = define(
    "lightning_prefill(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor state, Tensor slots, "
    "Tensor offsets, Tensor positions) -> (Tensor o, Tensor state)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    mechanism="lightning",
    # The last have the kernels' width; of them the last has segments.
    cases=(
        ((1,), 1, 4, 4),
        ((5, 0, 70, 3), 3, 6, 10),  # one without tokens, one of two blocks
        ((130, 64), 2, 16, 8),
        ((0, 7), 5, 8, 8),
        ((1,), 1, 128, 128),
        ((66, 0, 17, 127), 2, 128, 128),
        ((3, 1100, 600), 1, 128, 128),
    ),
    benchmarks=(
        Benchmark(
            name="one sequence, 32 heads",
            case=lambda tokens: ((tokens,), 32, 128, 128),
            tokens=(8192, 65536),
        ),
        Benchmark(
            name="8 sequences, 32 heads",
            case=lambda tokens: ((tokens // 8,) * 8, 32, 128, 128),
            tokens=(8192,),
        ),
    ),
)
