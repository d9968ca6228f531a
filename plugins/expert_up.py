"""The first half of every token's experts: norm, gate and up, SwiGLU.

    n[t] = x[t, :D] * rsqrt(mean(x[t, :D]^2) + eps) * norm_weight
    a[t, i] = silu(GU[e, :F] @ n[t]) * (GU[e, F:] @ n[t])

with e = ids[t, i] for the k experts that a token was sent to, and behind them, where `shared` is 1,
the last expert of the stack. GU are the values of `gate_up`: its numbers (`bf16`), code times the
scale of its 128x128 block, gate's blocks first (`fp8`), or (nibble - 8) times the scale of its row
and `group` (`int4`). In `fp8` n is quantized per 128 channels as in `quantize_fp8`. An id of -1
gives zeros. `pairs` and `starts` are the same ids by expert, as `norm_router` gives them.

Shapes: x [T, >= D]; norm_weight [D]; ids i32 [T, k]; pairs i32 [T k]; starts i32 [E + 1]; gate_up
BF16 or E4M3 [E + shared, 2F, D], or i32 [E + shared, 2F, ceil(D / 8)]; scale f32
[E + shared, 2 ceil(F / 128), ceil(D / 128)] or BF16 [E + shared, 2F, ceil(D / group)]; a
[T, k + shared, F]. T symbolic.

Rounding: n is rounded to the dtype of x before it is multiplied in `bf16` and `int4`, and not
before it is quantized in `fp8`; sums and SwiGLU in f32 (f64 for f64 x); a is rounded once to the
dtype of x.

Source: `rms_norm` and `experts`.
"""
# ruff: noqa: A002, PLR0913, PLR0917 (as many as the schema has, and its names)

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import experts, gemm
from lingc.math import (
    accumulator,
    dequantize_rows,
    elements,
    expert_bytes,
    expert_lists,
    expert_matrix,
    matmul,
    number,
    quantize_fp8,
    rms,
    stored_bytes,
    swiglu,
)
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    x: Tensor, norm_weight: Tensor, ids: Tensor, pairs: Tensor | None, starts: Tensor | None,
    gate_up: Tensor, scale: Tensor | None, format: str, group: int, eps: float, shared: int,
) -> Tensor:  # fmt: skip
    summed, width = accumulator(x), norm_weight.numel()
    n = rms(x[:, :width], norm_weight, eps)
    n = dequantize_rows(*quantize_fp8(n), summed) if format == "fp8" else n.to(x.dtype).to(summed)
    count, rows = gate_up.shape[:2]
    chosen = [ids, ids.new_full((len(ids), 1), count - 1)] if shared else [ids]
    slots = torch.cat(chosen, 1)
    a = x.new_zeros(*slots.shape, rows // 2)
    for expert in torch.unique(slots[slots >= 0]).tolist():
        token, slot = (slots == expert).nonzero(as_tuple=True)
        halves = expert_matrix(gate_up, scale, expert, format, group, width, summed, halves=2)
        gate, up = matmul(n[token], halves).chunk(2, 1)
        a[token, slot] = swiglu(gate, up).to(x.dtype)
    return a


def types(
    x: TensorType, norm_weight: TensorType, ids: TensorType, pairs: TensorType | None,
    starts: TensorType | None, gate_up: TensorType, scale: TensorType | None, format: str,
    group: int, eps: float, shared: int,
) -> TensorType:  # fmt: skip
    inner = number(gate_up.shape[1]) // 2
    return TensorType(x.dtype, (x.shape[0], number(ids.shape[1]) + shared, inner))


def cost(
    x: TensorType, norm_weight: TensorType, ids: TensorType, pairs: TensorType | None,
    starts: TensorType | None, gate_up: TensorType, scale: TensorType | None, format: str,
    group: int, eps: float, shared: int,
) -> Cost:  # fmt: skip
    a = types(
        x, norm_weight, ids, pairs, starts, gate_up, scale, format, group, eps, shared
    )  # fmt: skip
    count, width = number(gate_up.shape[0]), elements(norm_weight)
    read = TensorType(x.dtype, (x.bind({})[0], width))
    stacks = stored_bytes(gate_up, scale)
    routed = expert_bytes(ids, count - shared, gate_up, scale) * (count - shared) / count
    return Cost(
        flops=4.0 * elements(a) * width,
        moved_bytes=stored_bytes(read, norm_weight, ids, a) + routed + stacks * shared / count,
    )


def layouts(
    x: TensorType, norm_weight: TensorType, ids: TensorType, pairs: TensorType | None,
    starts: TensorType | None, gate_up: TensorType, scale: TensorType | None, format: str,
    *_: float,
) -> Mapping[str, str]:  # fmt: skip
    scales = {"scale": "tiled_gated_scales"} if format == "int4" else {}
    return {"gate_up": "tiled_gated", **scales}


def inputs(
    tokens: int, top_k: int, experts: int, inner: int, width: int, format: str, group: int,
    shared: int, padding: int = 0, *, dtype: str, device: str,
) -> tuple[Tensor | str | float | None, ...]:  # fmt: skip
    """Arguments in which the last `padding` tokens are sent to no expert."""
    some = Samples(dtype=dtype, device=device)
    x, norm_weight = some.normal(tokens, width), some.norm_weight(width)
    ids, _ = some.experts(tokens, top_k, experts)
    ids[tokens - padding :] = -1
    gate_up, scale = some.stored_weight(
        experts + shared, 2 * inner, width, stored=format, group=group, halves=2
    )
    lists = expert_lists(ids, experts)
    return x, norm_weight, ids, *lists, gate_up, scale, format, group, 1e-6, shared


def _shape(
    x: TensorType, norm_weight: TensorType, ids: TensorType, gate_up: TensorType, format: str,
    group: int, eps: float, shared: int,
) -> experts.Shape:  # fmt: skip
    (tokens, pitch), (count, rows, _) = x.bind({}), gate_up.bind({})
    return experts.Shape(
        tokens=tokens, width=elements(norm_weight), inner=rows // 2, experts=count - shared,
        top_k=number(ids.shape[1]), shared=shared, format=format, group=group, pitch=pitch,
        eps=eps,
    )  # fmt: skip


def refusal(
    target: Target, x: TensorType, norm_weight: TensorType, ids: TensorType,
    pairs: TensorType | None, starts: TensorType | None, gate_up: TensorType,
    scale: TensorType | None, format: str, group: int, eps: float, shared: int,
) -> str | None:  # fmt: skip
    if x.dtype != "bf16":
        return f"activations are {x.dtype}, not bf16"
    shape = _shape(x, norm_weight, ids, gate_up, format, group, eps, shared)
    lists = pairs is not None and starts is not None
    if shape.tokens > experts.MOST_TOKENS:
        if not lists:
            return f"{shape.tokens} tokens without lists of their experts' pairs"
        return gemm.expert_refusal(shape)
    return experts.refusal(target, shape, lists=lists)


def tactics(
    target: Target, x: TensorType, norm_weight: TensorType, ids: TensorType,
    pairs: TensorType | None, starts: TensorType | None, gate_up: TensorType,
    scale: TensorType | None, format: str, group: int, eps: float, shared: int,
) -> Sequence[Tactic]:  # fmt: skip
    shape = _shape(x, norm_weight, ids, gate_up, format, group, eps, shared)
    if shape.tokens > experts.MOST_TOKENS:
        return gemm.expert_up_tactics(target, shape)
    return experts.up_tactics(target, shape)


def pinned(
    target: Target, x: TensorType, norm_weight: TensorType, ids: TensorType,
    pairs: TensorType | None, starts: TensorType | None, gate_up: TensorType,
    scale: TensorType | None, format: str, group: int, eps: float, shared: int,
) -> Sequence[Tactic]:  # fmt: skip
    """The kernels of 64 tokens for fewer, too."""
    shape = _shape(x, norm_weight, ids, gate_up, format, group, eps, shared)
    if shape.tokens > experts.MOST_TOKENS:
        return gemm.expert_up_tactics(target, shape)
    return experts.up_tactics(target, replace(shape, most=experts.MOST_TOKENS))


def _benchmark(name: str, format: str, group: int, tokens: tuple[int, ...]) -> Benchmark:
    def vary(arguments: tuple[Any, ...], i: int) -> tuple[Any, ...]:
        ids = arguments[2]
        count = arguments[4].numel() - 1
        moved = (ids + 8 * i) % count
        return (*arguments[:2], moved, *expert_lists(moved, count), *arguments[5:])

    return Benchmark(
        name=name,
        case=lambda t: (t, 8, 256, 1024, 4096, format, group, 1),
        tokens=tokens,
        vary=vary,
    )


OP = define(
    "expert_up(Tensor x, Tensor norm_weight, Tensor ids, Tensor? pairs, Tensor? starts, "
    "Tensor gate_up, Tensor? scale, str format, int group, float eps, int shared) -> Tensor a",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    layouts=layouts,
    mechanism="experts",
    rows=("x", "ids"),
    cases=(
        (1, 1, 2, 8, 16, "bf16", 0, 0),
        (7, 3, 5, 16, 48, "bf16", 0, 1),
        (3, 2, 4, 32, 64, "int4", 32, 1),
        (5, 2, 3, 130, 140, "fp8", 0, 0),
        (1, 2, 4, 128, 256, "fp8", 0, 1),
        (1, 2, 4, 128, 256, "fp8", 0, 1, 1),
        (4, 2, 4, 128, 256, "fp8", 0, 1, 1),
        (1, 3, 5, 128, 512, "bf16", 0, 0),
        (8, 3, 5, 128, 256, "bf16", 0, 1),
        (1, 3, 5, 128, 256, "int4", 32, 1),
        (1, 3, 5, 128, 1024, "int4", 128, 1),
        (3, 3, 5, 256, 512, "int4", 128, 1, 2),
        (17, 2, 12, 128, 512, "fp8", 0, 1),
        (33, 2, 3, 128, 256, "int4", 32, 0, 3),
        (64, 1, 2, 128, 256, "bf16", 0, 1),
        (70, 3, 5, 128, 1024, "fp8", 0, 1),
        (150, 2, 7, 128, 128, "bf16", 0, 0),
        (90, 2, 3, 128, 256, "int4", 128, 1),
        (65, 4, 40, 128, 128, "int4", 32, 0),
    ),
    refusal=refusal,
    tactics=tactics,
    pinned=pinned,
    benchmarks=(
        _benchmark("experts up, FP8", "fp8", 0, (1, 4, 16, 32, 128, 8192)),
        _benchmark("experts up, INT4 group 128", "int4", 128, (1, 16)),
        _benchmark("experts up, INT4 group 32", "int4", 32, (1,)),
        _benchmark("experts up, BF16", "bf16", 0, (1,)),
    ),
)
