"""Experts: every token's own, weighed and added up."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lingc.compare import assert_close
from lingc.plugins import expert_dispatch, experts


def token_by_token(
    x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for i, e in enumerate(ids[t].tolist()):
            inner = functional.silu(gate[e] @ x[t]) * (up[e] @ x[t])
            y[t] += weights[t, i] * (down[e] @ inner)
    return y


def test_dispatch_is_the_weighed_sum_of_each_tokens_experts() -> None:
    given = expert_dispatch.OP.inputs(7, 3, 5, 10, 12, dtype="f64", device="cpu")

    assert_close(expert_dispatch.reference(*given), token_by_token(*given), dtype="f64")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_experts_is_dispatch_with_gate_and_up_joined(dtype: str) -> None:
    x, ids, weights, gate, up, down = expert_dispatch.OP.inputs(
        7, 3, 5, 10, 12, dtype=dtype, device="cpu"
    )

    got = experts.reference(x, ids, weights, torch.cat((gate, up), 1), down, None)

    want = expert_dispatch.reference(x, ids, weights, gate, up, down)
    assert_close(got, want, dtype=dtype, mechanism="experts")


def test_base_is_added_once() -> None:
    x, ids, weights, gate_up, down, base = experts.OP.inputs(
        7, 3, 5, 10, 12, 1, dtype="f64", device="cpu"
    )

    with_base = experts.reference(x, ids, weights, gate_up, down, base)

    alone = experts.reference(x, ids, weights, gate_up, down, None)
    assert_close(with_base - base, alone, dtype="f64")


def test_experts_that_no_token_goes_to_are_not_read() -> None:
    x, ids, weights, gate_up, down, _ = experts.OP.inputs(
        4, 2, 6, 10, 12, 0, dtype="f32", device="cpu"
    )
    ids = ids % 3 * 2
    ids[:, 1] = (ids[:, 0] + 2) % 6
    gate_up[1::2] = torch.nan
    down[1::2] = torch.nan

    assert experts.reference(x, ids, weights, gate_up, down, None).isfinite().all()
