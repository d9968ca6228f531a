"""The router, and the mixture of the experts it chose."""

# ruff: noqa: PLR0913, PLR0917 (as many as the schema has)

import numpy as np

from lingc.targets.onnx.body import Value
from lingc.targets.onnx.library_standard import Standard
from lingc.targets.onnx.quantized import dequantized_rows, requantized
from lingc.targets.onnx.stack import Stack, few_experts, grouped_experts

_DROPPED = np.array([-np.inf, 0], np.float32)


def router(
    library: Standard,
    x: Value,
    weight: Value,
    bias: Value,
    groups: int,
    topk_groups: int,
    top_k: int,
    scale: float,
    normalize: bool,  # noqa: FBT001  (the schema's order)
) -> tuple[Value, Value]:
    body, experts = library.body, weight.size(0)
    each = experts // groups
    scores = body.op("Sigmoid", library.linear(x, library.wide(weight, x)))
    biased = scores + bias
    if topk_groups < groups:
        by_group = biased.reshape(-1, groups, each)
        best = _top(by_group, min(2, each), axis=2)[0].sum(2, keep=True)  # [T, groups, 1]
        kept = _top(best, topk_groups, axis=1)[1]  # [T, topk_groups, 1]
        attrs = {"axis": 2}
        flags = body.op("OneHot", kept, np.array(groups, np.int64), _DROPPED, attrs=attrs)
        biased = (by_group + flags.max(1)).reshape(-1, experts)
    ids = _top(biased, top_k, axis=1)[1]
    chosen = body.op("GatherElements", scores, ids, attrs={"axis": 1})
    if normalize:
        chosen = chosen / (chosen.sum(1, keep=True) + 1e-20)
    return ids.cast("i32"), chosen * float(scale)


def experts(
    library: Standard,
    x: Value,
    ids: Value,
    weights: Value,
    gate_up: Value,
    down: Value,
    base: Value | None,
) -> Value:
    first = Stack(values=gate_up, scales=None, width=gate_up.size(2))
    second = Stack(values=down, scales=None, width=down.size(2))
    return _plus(library.experts(x, ids, weights, first, second), base)


def fp8_weight_experts(
    library: Standard,
    x: Value,
    ids: Value,
    weights: Value,
    gate_up: Value,
    gate_up_scale: Value | None,
    down: Value,
    down_scale: Value | None,
    base: Value | None,
) -> Value:
    first = Stack(values=gate_up, scales=gate_up_scale, width=gate_up.size(2))
    second = Stack(values=down, scales=down_scale, width=down.size(2))
    return _plus(library.experts(x, ids, weights, first, second), base)


def int4_weight_experts(
    library: Standard,
    x: Value,
    ids: Value,
    weights: Value,
    gate_up: Value,
    gate_up_scale: Value,
    down: Value,
    down_scale: Value,
    base: Value | None,
    group: int,
) -> Value:
    inner = gate_up.size(1) // 2
    first = Stack(values=gate_up, scales=gate_up_scale, width=x.size(1), group=group)
    second = Stack(values=down, scales=down_scale, width=inner, group=group)
    return _plus(library.experts(x, ids, weights, first, second), base)


def fp8_experts(
    library: Standard,
    codes: Value,
    scales: Value,
    ids: Value,
    weights: Value,
    gate_up: Value,
    gate_up_scale: Value | None,
    down: Value,
    down_scale: Value | None,
    base: Value | None,
    _dtype: str,
) -> Value:
    first = Stack(values=gate_up, scales=gate_up_scale, width=gate_up.size(2))
    second = Stack(values=down, scales=down_scale, width=down.size(2))
    x = dequantized_rows(library, codes, scales)
    run = few_experts if library.few_tokens else grouped_experts
    return _plus(run(library, x, ids, weights, first, second, requantized), base)


def _top(values: Value, count: int, *, axis: int) -> tuple[Value, Value]:
    """The largest values and their indices; of equal ones the lower index first."""
    counts = values.body.ints([count])
    top, places = values.body.ops("TopK", 2, values, counts, attrs={"axis": axis})
    return top, places


def _plus(y: Value, base: Value | None) -> Value:
    return y if base is None else y + base
