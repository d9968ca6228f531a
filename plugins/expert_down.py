"""The second half of every token's experts: down, the weighted sum and the residual.

    y[t] = residual[t] + sum_i weights[t, i] * D[ids[t, i]] @ a[t, i]  (+ D[E] @ a[t, k])

the last term where `shared` is 1: the last expert of the stack, which every token is sent to. D are
the values of `down`: its numbers (`bf16`), code times the scale of its 128x128 block (`fp8`), or
(nibble - 8) times the scale of its row and `group` (`int4`). In `fp8` a is quantized per 128
channels as in `quantize_fp8`. An id of -1 adds nothing. `pairs` and `starts` are the same ids by
expert, as `norm_router` gives them.

Shapes: a [T, k + shared, F]; ids i32, weights [T, k]; pairs i32 [T k]; starts i32 [E + 1]; down
BF16 or E4M3 [E + shared, D, F], or i32 [E + shared, D, ceil(F / 8)]; scale f32
[E + shared, ceil(D / 128), ceil(F / 128)] or BF16 [E + shared, D, ceil(F / group)]; residual, y
[T, D]. T symbolic.

Rounding: sums in f32 (f64 for f64 a); y is rounded once to the dtype of the residual.

Source: `experts`.
"""
# ruff: noqa: A002, PLR0913, PLR0917 (as many as the schema has, and its names)

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lingc.kernel import Tactic
from lingc.kernels import expert_down_one, experts, gemm
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
    stored_bytes,
)
from lingc.op import Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(
    a: Tensor, ids: Tensor, weights: Tensor, pairs: Tensor | None, starts: Tensor | None,
    down: Tensor, scale: Tensor | None, residual: Tensor, format: str, group: int, shared: int,
) -> Tensor:  # fmt: skip
    summed, inner, count = accumulator(a), a.shape[-1], down.shape[0]
    n = a.to(summed)
    if format == "fp8":
        codes, scales = quantize_fp8(a.flatten(0, 1))
        n = dequantize_rows(codes, scales, summed).view_as(a)
    slots, shares = ids, weights.to(summed)
    if shared:
        slots = torch.cat((ids, ids.new_full((len(ids), 1), count - 1)), 1)
        shares = torch.cat((shares, shares.new_ones(len(ids), 1)), 1)
    # By rising expert, so that a token's sum does not depend on who stands beside it.
    y = torch.zeros_like(residual, dtype=summed)
    for expert in torch.unique(slots[slots >= 0]).tolist():
        token, slot = (slots == expert).nonzero(as_tuple=True)
        matrix = expert_matrix(down, scale, expert, format, group, inner, summed, halves=1)
        y.index_add_(0, token, shares[token, slot, None] * matmul(n[token, slot], matrix))
    return (y + residual.to(summed)).to(residual.dtype)


def types(
    a: TensorType, ids: TensorType, weights: TensorType, pairs: TensorType | None,
    starts: TensorType | None, down: TensorType, scale: TensorType | None, residual: TensorType,
    format: str, group: int, shared: int,
) -> TensorType:  # fmt: skip
    return residual


def cost(
    a: TensorType, ids: TensorType, weights: TensorType, pairs: TensorType | None,
    starts: TensorType | None, down: TensorType, scale: TensorType | None, residual: TensorType,
    format: str, group: int, shared: int,
) -> Cost:  # fmt: skip
    count, width = number(down.shape[0]), number(down.shape[1])
    stacks = stored_bytes(down, scale)
    routed = expert_bytes(ids, count - shared, down, scale) * (count - shared) / count
    small = stored_bytes(a, ids, weights, residual, residual)
    return Cost(
        flops=2.0 * elements(a) * width, moved_bytes=small + routed + stacks * shared / count
    )


def layouts(
    a: TensorType, ids: TensorType, weights: TensorType, pairs: TensorType | None,
    starts: TensorType | None, down: TensorType, scale: TensorType | None, residual: TensorType,
    format: str, *_: int,
) -> Mapping[str, str]:  # fmt: skip
    scales = {"scale": "tiled_scales"} if format == "int4" else {}
    return {"down": "tiled", **scales}


def inputs(
    tokens: int, top_k: int, experts: int, inner: int, width: int, format: str, group: int,
    shared: int, padding: int = 0, *, dtype: str, device: str,
) -> tuple[Tensor | str | int | None, ...]:  # fmt: skip
    """Arguments in which the last `padding` tokens are sent to no expert."""
    some = Samples(dtype=dtype, device=device)
    a = some.normal(tokens, top_k + shared, inner)
    ids, weights = some.experts(tokens, top_k, experts)
    ids[tokens - padding :] = -1
    down, scale = some.stored_weight(experts + shared, width, inner, stored=format, group=group)
    lists, residual = expert_lists(ids, experts), some.normal(tokens, width)
    return a, ids, weights, *lists, down, scale, residual, format, group, shared


def _shape(
    a: TensorType, ids: TensorType, down: TensorType, format: str, group: int, shared: int
) -> experts.Shape:
    (tokens, _, inner), (count, width, _) = a.bind({}), down.bind({})
    return experts.Shape(
        tokens=tokens, width=width, inner=inner, experts=count - shared,
        top_k=number(ids.shape[1]), shared=shared, format=format, group=group, pitch=width,
    )  # fmt: skip


def refusal(
    target: Target, a: TensorType, ids: TensorType, weights: TensorType, pairs: TensorType | None,
    starts: TensorType | None, down: TensorType, scale: TensorType | None, residual: TensorType,
    format: str, group: int, shared: int,
) -> str | None:  # fmt: skip
    if a.dtype != "bf16" or residual.dtype != "bf16":
        return f"activations are {a.dtype} and {residual.dtype}, not bf16"
    shape = _shape(a, ids, down, format, group, shared)
    lists = pairs is not None and starts is not None
    if shape.tokens > experts.MOST_TOKENS:
        if not lists:
            return f"{shape.tokens} tokens without lists of their experts' pairs"
        return gemm.expert_refusal(shape)
    return experts.refusal(target, shape, lists=lists)


def tactics(
    target: Target, a: TensorType, ids: TensorType, weights: TensorType, pairs: TensorType | None,
    starts: TensorType | None, down: TensorType, scale: TensorType | None, residual: TensorType,
    format: str, group: int, shared: int,
) -> Sequence[Tactic]:  # fmt: skip
    shape = _shape(a, ids, down, format, group, shared)
    if shape.tokens > experts.MOST_TOKENS:
        return gemm.expert_down_tactics(target, shape)
    return expert_down_one.tactics(target, shape) or experts.down_tactics(target, shape)


def pinned(
    target: Target, a: TensorType, ids: TensorType, weights: TensorType, pairs: TensorType | None,
    starts: TensorType | None, down: TensorType, scale: TensorType | None, residual: TensorType,
    format: str, group: int, shared: int,
) -> Sequence[Tactic]:  # fmt: skip
    """The kernels of 64 tokens for fewer, too."""
    shape = _shape(a, ids, down, format, group, shared)
    if shape.tokens > experts.MOST_TOKENS:
        return gemm.expert_down_tactics(target, shape)
    return experts.down_tactics(target, replace(shape, most=experts.MOST_TOKENS))


def _benchmark(name: str, format: str, group: int, tokens: tuple[int, ...]) -> Benchmark:
    def vary(arguments: tuple[Any, ...], i: int) -> tuple[Any, ...]:
        ids = arguments[1]
        count = arguments[4].numel() - 1
        moved = (ids + 8 * i) % count
        return (
            arguments[0], moved, arguments[2], *expert_lists(moved, count), *arguments[5:]
        )  # fmt: skip

    return Benchmark(
        name=name,
        case=lambda t: (t, 8, 256, 1024, 4096, format, group, 1),
        tokens=tokens,
        vary=vary,
    )


OP = define(
    "expert_down(Tensor a, Tensor ids, Tensor weights, Tensor? pairs, Tensor? starts, "
    "Tensor down, Tensor? scale, Tensor residual, str format, int group, int shared) -> Tensor y",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    layouts=layouts,
    mechanism="experts",
    rows=("a", "ids", "weights", "residual"),
    cases=(
        (1, 1, 2, 8, 16, "bf16", 0, 0),
        (7, 3, 5, 16, 48, "bf16", 0, 1),
        (3, 2, 4, 32, 64, "int4", 32, 1),
        (5, 2, 3, 130, 140, "fp8", 0, 0),
        (1, 2, 4, 128, 256, "fp8", 0, 1),
        (1, 2, 4, 128, 256, "fp8", 0, 1, 1),
        (4, 2, 4, 128, 256, "fp8", 0, 1, 1),
        (1, 3, 5, 128, 512, "bf16", 0, 0),
        (8, 3, 5, 256, 256, "bf16", 0, 1),
        (1, 3, 5, 256, 256, "int4", 32, 1),
        (1, 8, 12, 1024, 64, "int4", 128, 1),
        (3, 3, 5, 256, 512, "int4", 128, 1, 2),
        (17, 2, 12, 256, 512, "fp8", 0, 1),
        (33, 2, 3, 128, 256, "int4", 32, 0, 3),
        (64, 1, 2, 128, 256, "bf16", 0, 1),
        (70, 3, 5, 256, 512, "fp8", 0, 1),
        (150, 2, 7, 128, 128, "bf16", 0, 0),
        (90, 2, 3, 128, 256, "int4", 128, 1),
        (65, 4, 40, 128, 128, "int4", 32, 0),
    ),
    refusal=refusal,
    tactics=tactics,
    pinned=pinned,
    benchmarks=(
        _benchmark("experts down, FP8", "fp8", 0, (1, 4, 16, 32, 128, 8192)),
        _benchmark("experts down, INT4 group 128", "int4", 128, (1, 16)),
        _benchmark("experts down, INT4 group 32", "int4", 32, (1,)),
        _benchmark("experts down, BF16", "bf16", 0, (1,)),
    ),
)
