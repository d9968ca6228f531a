"""`lightning_prefill` straight from the merged projection: norms and rope of q and k are inside.

    q, k = qk_norm_rope(qkvg, …);  v = qkvg[:, 2HK:3HK]
    o, state = lightning_prefill(q, k, v, …)

Shapes: qkvg [T, >= 3HK] of q, k, v and whatever follows; q_weight, k_weight [K]; cos, sin [T, n];
decay [H]; state [S, H, K, K]; slots [B]; offsets [B + 1]; positions [T]; o [T, HK]. T, B and S
symbolic.

Rounding: q and k to the dtype of qkvg, as between the two ops; all else in f32 (f64 where qkvg or
the state is f64); o is rounded to the dtype of qkvg.

Source: `qk_norm_rope` and `lightning_prefill`.
"""
# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lingc.compare import close
from lingc.kernel import Tactic, Workspace
from lingc.kernel import Tensor as Named
from lingc.kernels import lightning, rows
from lingc.math import elements, lightning_prefill, number, qk_norm_rope, stored_bytes
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    qkvg: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, decay: Tensor,
    state: Tensor, slots: Tensor, offsets: Tensor, positions: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    width = heads * q_weight.numel()
    q, k = qk_norm_rope(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    v = qkvg[:, 2 * width : 3 * width].unflatten(1, (heads, -1))
    o, after = lightning_prefill(q, k, v, decay, state, (slots, offsets, positions))
    return o.flatten(1), after


def types(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, state: TensorType, slots: TensorType,
    offsets: TensorType, positions: TensorType, heads: int, eps: float,
) -> tuple[TensorType, TensorType]:  # fmt: skip
    return TensorType(qkvg.dtype, (qkvg.shape[0], heads * number(q_weight.shape[0]))), state


def cost(
    qkvg: TensorType, q_weight: TensorType, k_weight: TensorType, cos: TensorType,
    sin: TensorType, decay: TensorType, state: TensorType, slots: TensorType,
    offsets: TensorType, positions: TensorType, heads: int, eps: float,
) -> Cost:  # fmt: skip
    # The recurrence is the least work: a state update and a read, 2 K V each a token and head.
    o = TensorType(qkvg.dtype, (qkvg.shape[0], heads * number(q_weight.shape[0])))
    live = TensorType(state.dtype, (*slots.shape, *state.shape[1:]))
    return Cost(
        flops=elements(o) * (4.0 * number(q_weight.shape[0]) + 12.0),
        moved_bytes=stored_bytes(o, o, o, o, cos, sin) + 2 * stored_bytes(live),
    )


def refusal(
    _target: Target, qkvg: TensorType, q_weight: TensorType, k_weight: TensorType,
    cos: TensorType, sin: TensorType, decay: TensorType, state: TensorType,
    *_: TensorType | float,
) -> str | None:  # fmt: skip
    if {cos.dtype, sin.dtype} != {"f32"}:
        return f"cos and sin are {cos.dtype} and {sin.dtype}, not f32"
    return lightning.refusal(state, qkvg=qkvg, q_weight=q_weight, k_weight=k_weight)


def tactics(
    target: Target, qkvg: TensorType, q_weight: TensorType, k_weight: TensorType,
    cos: TensorType, sin: TensorType, decay: TensorType, state: TensorType, slots: TensorType,
    offsets: TensorType, positions: TensorType, heads: int, eps: float,
) -> Sequence[Tactic]:  # fmt: skip
    given = (
        qkvg,
        q_weight,
        k_weight,
        cos,
        sin,
        decay,
        state,
        slots,
        offsets,
        positions,
        heads,
        eps,
    )
    if refusal(target, *given) is not None:
        return ()
    (tokens, pitch), (sequences,) = qkvg.bind({}), slots.bind({})
    width = heads * number(q_weight.shape[0])
    turned = TensorType("bf16", (tokens, width))
    norms = Cost(flops=8.0 * elements(turned), moved_bytes=4 * stored_bytes(turned))
    first = rows.rope_heads(qkvg, q_weight, cos, heads, norms, eps, source="qkvg")[0]
    spaces = [Workspace(name=name, bytes=int(stored_bytes(turned))) for name in ("q", "k")]
    attended = lightning.tactics(
        target,
        lightning.Sequences(
            tokens=tokens,
            sequences=sequences,
            heads=heads,
            q=Named("q"),
            k=Named("k"),
            v=Named("qkvg", offset=2 * 2 * width),
            o=Named("o"),
            pitch=width,
            v_pitch=pitch,
        ),
    )
    return [
        replace(
            one, launches=(*first.launches, *one.launches), workspaces=(*spaces, *one.workspaces)
        )
        for one in attended
    ]


def judge(arguments: Sequence[Any], got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """Compare with FP64 from q and k as they are rounded on their way.

    A q or k that rounds the other way moves all sums it is in: over thousands of tokens by more
    than values near zero may be off, so a few may stray by as much as their row is large.
    `lightning_prefill` is held to f32 by itself.
    """
    qkvg, q_weight, k_weight, cos, sin, decay, state, *where, heads, eps = arguments
    q, k = qk_norm_rope(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    v = qkvg[:, 2 * heads * q.shape[2] : 3 * heads * q.shape[2]].unflatten(1, q.shape[1:])
    o, after = lightning_prefill(q.double(), k.double(), v.double(), decay, state, tuple(where))
    made = got[0].unflatten(1, q.shape[1:]), got[1]
    for name, one, other in zip(("o", "state"), made, (o, after), strict=True):
        found = close(one, other, dtype="bf16", mechanism="lightning_qkv")
        if not found.ok:
            return f"{name}: {found}"
    return None


def inputs(
    lengths: tuple[int, ...], heads: int, key: int, pairs: int, *, dtype: str, device: str
) -> tuple[Tensor | float, ...]:
    some = Samples(dtype=dtype, device=device)
    slots, offsets, positions = some.sequences(lengths)
    return (
        some.normal(sum(lengths), 4 * heads * key),
        some.norm_weight(key),
        some.norm_weight(key),
        *some.rope(positions, pairs),
        some.decay(heads),
        some.state(len(lengths) + 2, heads, key, key),
        slots,
        offsets,
        positions,
        heads,
        1e-6,
    )


OP = define(
    "lightning_prefill_qkv(Tensor qkvg, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor decay, Tensor state, Tensor slots, Tensor offsets, Tensor positions, int heads, "
    "float eps) -> (Tensor o, Tensor state)",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    judge=judge,
    mechanism="lightning",
    cases=(((1,), 1, 4, 1), ((5, 0, 70, 3), 3, 10, 2), ((66, 9), 2, 128, 32), ((700,), 1, 128, 32)),
    benchmarks=(
        Benchmark(
            name="one sequence, 32 heads",
            case=lambda tokens: ((tokens,), 32, 128, 32),
            tokens=(8192, 65536),
        ),
    ),
)
