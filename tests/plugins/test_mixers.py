"""The mixers are their three parts, bit for bit; norm, rope and gate are what they say."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lingc.compare import assert_close
from lingc.plugins import (
    decode_mixer,
    group_norm_gate,
    lightning_decode,
    lightning_verify,
    qk_norm_rope,
    verify_mixer,
)

HEADS, KEY, PAIRS, GROUPS, PENDING = 3, 10, 2, 3, 4


def parts(qkvg: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gate logits."""
    width = HEADS * KEY
    return qkvg[:, 2 * width : 3 * width].unflatten(1, (HEADS, KEY)), qkvg[:, 3 * width :]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_decode_mixer_is_its_parts_bit_for_bit(dtype: str) -> None:
    given = decode_mixer.OP.inputs(4, HEADS, KEY, PAIRS, GROUPS, PENDING, dtype=dtype, device="cpu")
    qkvg, q_weight, k_weight, cos, sin, decay, norm_weight, *held, heads, groups, eps = given
    v, gate = parts(qkvg)

    y, state = decode_mixer.reference(*given)

    q, k = qk_norm_rope.reference(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    o, want = lightning_decode.reference(q, k, v, decay, *held)
    assert torch.equal(y, group_norm_gate.reference(o, gate, norm_weight, groups, eps))
    assert torch.equal(state, want)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_verify_mixer_is_its_parts_bit_for_bit(dtype: str) -> None:
    given = verify_mixer.OP.inputs(
        3, 2, HEADS, KEY, PAIRS, GROUPS, PENDING, dtype=dtype, device="cpu"
    )
    qkvg, q_weight, k_weight, cos, sin, decay, norm_weight, *held, heads, groups, eps = given
    v, gate = parts(qkvg)

    y, *states = verify_mixer.reference(*given)

    q, k = qk_norm_rope.reference(qkvg, q_weight, k_weight, cos, sin, heads, eps)
    o, *want = lightning_verify.reference(q, k, v, decay, *held)
    assert torch.equal(y, group_norm_gate.reference(o, gate, norm_weight, groups, eps))
    assert all(torch.equal(a, b) for a, b in zip(states, want, strict=True))


def test_other_slots_and_unaccepted_tokens_do_not_leak() -> None:
    given = list(
        verify_mixer.OP.inputs(3, 2, HEADS, KEY, PAIRS, GROUPS, PENDING, dtype="f32", device="cpu")
    )
    state, pending_k, pending_v, slots, accepted = given[7:12]
    clean = verify_mixer.reference(*given)
    live = set(slots.tolist()) - {-1}
    for slot in set(range(state.shape[0])) - live:
        for held in (state, pending_k, pending_v):
            held[slot] = torch.nan
    for b, slot in enumerate(slots.tolist()):
        for pending in (pending_k, pending_v):
            pending[slot, int(accepted[b]) :] = torch.nan

    y, after, *_ = verify_mixer.reference(*given)

    assert torch.equal(y, clean[0])
    assert torch.equal(after[list(live)], clean[1][list(live)])


def test_q_and_k_are_normed_by_head_and_turned_in_halves() -> None:
    qkv, q_weight, k_weight, cos, sin, heads, eps = qk_norm_rope.OP.inputs(
        7, HEADS, KEY, PAIRS, 30, dtype="f64", device="cpu"
    )

    made = qk_norm_rope.reference(qkv, q_weight, k_weight, cos, sin, heads, eps)

    for i, (y, weight) in enumerate(zip(made, (q_weight, k_weight), strict=True)):
        raw = qkv[:, i * HEADS * KEY : (i + 1) * HEADS * KEY].unflatten(1, (HEADS, KEY))
        z = functional.rms_norm(raw, (KEY,), weight, eps)
        turned = torch.complex(z[..., :PAIRS], z[..., PAIRS : 2 * PAIRS]) * torch.complex(
            cos[:, None], sin[:, None]
        )
        want = torch.cat((turned.real, turned.imag, z[..., 2 * PAIRS :]), -1)
        assert_close(y, want, dtype="f64")


def test_each_group_is_normed_by_its_own_mean_and_gated_after() -> None:
    o, gate, weight, _, eps = group_norm_gate.OP.inputs(5, (30,), 2, dtype="f64", device="cpu")

    y = group_norm_gate.reference(o, gate, weight, 2, eps)

    normed = [
        functional.rms_norm(half, (15,), w, eps)
        for half, w in zip(o.split(15, 1), weight.split(15), strict=True)
    ]
    assert_close(y, torch.cat(normed, 1) * gate.sigmoid(), dtype="f64")
