"""Lightning attention: blocks equal the recurrence; rejected tokens and padding leave no trace."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lingc.compare import assert_close
from lingc.math import lightning_sequence
from lingc.op import Op
from lingc.plugins import lightning_decode, lightning_prefill, lightning_verify
from lingc.samples import Samples

HEADS, KEY, VALUE = 3, 6, 10


def same(got: Tensor, want: Tensor) -> None:
    """Equal to 1e-12."""
    assert_close(got, want, dtype="f64", mechanism="lightning")


def tokens(some: Samples, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        some.normal(count, HEADS, KEY),
        some.normal(count, HEADS, KEY),
        some.normal(count, HEADS, VALUE),
    )


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[0]):
        state = torch.exp(-decay)[:, None, None] * state + torch.einsum("hk,hv->hkv", k[t], v[t])
        outputs.append(torch.einsum("hk,hkv->hv", q[t] * KEY**-0.5, state))
    return torch.stack(outputs) if outputs else v, state


@pytest.mark.parametrize("chunk", [1, 32, 64, 200])
def test_blocks_of_any_size_equal_the_recurrence(chunk: int) -> None:
    some = Samples(dtype="f64", device="cpu")
    q, k, v = tokens(some, 200)
    decay, state = some.decay(HEADS), some.state(HEADS, KEY, VALUE)

    got = lightning_sequence(q * KEY**-0.5, k, v, decay, state, chunk)

    for made, want in zip(got, by_definition(q, k, v, decay, state), strict=True):
        same(made, want)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 130]), min_size=1, max_size=4))
def test_prefill_equals_the_recurrence_for_every_sequence(lengths: list[int]) -> None:
    q, k, v, decay, state, slots, offsets, positions = lightning_prefill.OP.inputs(
        tuple(lengths), HEADS, KEY, VALUE, dtype="f64", device="cpu"
    )

    o, after = lightning_prefill.reference(q, k, v, decay, state, slots, offsets, positions)

    want = state.clone()
    for b, (first, last) in enumerate(pairwise(offsets.tolist())):
        if first == last:
            continue
        slot = int(slots[b])
        zero = slot == -1 or positions[first] == 0
        start = torch.zeros_like(state[0]) if zero else state[slot]
        part = slice(first, last)
        expected, end = by_definition(q[part], k[part], v[part], decay, start)
        same(o[part], expected)
        if slot >= 0:
            want[slot] = end
    same(after, want)


def test_the_fastest_decay_stays_finite_over_a_long_prompt_in_f32() -> None:
    some = Samples(dtype="f32", device="cpu")
    q, k, v = tokens(some, 300)
    decay = torch.tensor([0.8409, 4.0, 60.0])
    state = some.state(3, HEADS, KEY, VALUE)
    where = some.ints([0]), some.ints([0, 300]), torch.arange(300, dtype=torch.int32)

    o, after = lightning_prefill.reference(q, k, v, decay, state, *where)

    assert o.isfinite().all()
    assert after.isfinite().all()


class Linear:
    """Slots, driven as a runtime drives them."""

    def __init__(self, some: Samples, sequences: int, pending: int) -> None:
        held = sequences + 1
        self.decay = some.decay(HEADS)
        self.state = some.state(held, HEADS, KEY, VALUE)
        self.pending_k = torch.full((held, pending, HEADS, KEY), torch.nan, dtype=torch.float64)
        self.pending_v = torch.full((held, pending, HEADS, VALUE), torch.nan, dtype=torch.float64)
        self.slots = torch.arange(sequences, dtype=torch.int32).flip(0)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, accepted: Tensor, at: Tensor) -> Tensor:
        pending = self.pending_k, self.pending_v, self.slots, accepted
        o, self.state = lightning_decode.reference(
            q, k, v, self.decay, self.state, *pending, at.to(torch.int32)
        )
        return o

    def verify(self, q: Tensor, k: Tensor, v: Tensor, accepted: Tensor, at: Tensor) -> Tensor:
        count = q.shape[0] // self.slots.numel()
        offsets = torch.arange(0, q.shape[0] + 1, count, dtype=torch.int32)
        positions = (at[:, None] + torch.arange(count)).flatten().to(torch.int32)
        pending = self.pending_k, self.pending_v, self.slots, accepted
        o, self.state, self.pending_k, self.pending_v = lightning_verify.reference(
            q, k, v, self.decay, self.state, *pending, offsets, positions
        )
        return o


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_verify_with_partial_acceptance_equals_plain_decode(data: st.DataObject) -> None:
    sequences = data.draw(st.integers(1, 3), label="B")
    most = data.draw(st.integers(1, 4), label="max_draft + 1")
    rounds = data.draw(st.integers(1, 3), label="verify steps")
    some = Samples(dtype="f64", device="cpu", seed=data.draw(st.integers(0, 99)))
    linear = Linear(some, sequences, most)
    truth = linear.state.clone()
    at = torch.arange(sequences) * 7
    truth[linear.slots[at == 0].long()] = 0.0
    accepted = torch.zeros(sequences, dtype=torch.int32)

    for step in range(rounds + 1):
        last = step == rounds
        count = 1 if last else data.draw(st.integers(1, most), label="Q")
        q, k, v = tokens(some, sequences * count)
        run = linear.decode if last else linear.verify
        o = run(q, k, v, accepted, at).unflatten(0, (sequences, count))
        kept = [data.draw(st.integers(1, count), label="accepted") for _ in range(sequences)]
        for b in range(sequences):
            slot = int(linear.slots[b])
            part = slice(b * count, (b + 1) * count)
            expected, _ = by_definition(q[part], k[part], v[part], linear.decay, truth[slot])
            same(o[b], expected)
            part = slice(b * count, b * count + kept[b])
            _, truth[slot] = by_definition(q[part], k[part], v[part], linear.decay, truth[slot])
        accepted, at = torch.tensor(kept, dtype=torch.int32), at + torch.tensor(kept)

    same(linear.state[linear.slots.long()], truth[linear.slots.long()])


def test_verify_of_one_token_then_its_commit_is_decode_bit_for_bit() -> None:
    some = Samples(dtype="f32", device="cpu")
    q, k, v, decay, state, pending_k, pending_v, slots, _, positions = lightning_decode.OP.inputs(
        4, HEADS, KEY, VALUE, 2, dtype="f32", device="cpu"
    )
    none, one = torch.zeros_like(slots), torch.ones_like(slots)
    offsets = torch.arange(5, dtype=torch.int32)

    o, verified, pending_k, pending_v = lightning_verify.reference(
        q, k, v, decay, state, pending_k, pending_v, slots, none, offsets, positions
    )
    want_o, want = lightning_decode.reference(
        q, k, v, decay, state, pending_k, pending_v, slots, none, positions
    )
    later = some.ints([9, 9, 9, 9])
    nothing = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    _, got = lightning_decode.reference(
        *nothing, decay, verified, pending_k, pending_v, slots, one, later
    )

    live = slots[slots >= 0].long()
    assert torch.equal(o, want_o)
    assert torch.equal(got[live], (torch.exp(-decay)[:, None, None] * want)[live])


def test_a_sequence_at_position_0_ignores_its_slot_and_what_is_pending() -> None:
    q, k, v, decay, state, pending_k, pending_v, slots, accepted, _ = lightning_decode.OP.inputs(
        2, HEADS, KEY, VALUE, 3, dtype="f64", device="cpu"
    )
    for dirty in (state, pending_k, pending_v):
        dirty.fill_(torch.nan)
    accepted.fill_(3)

    o, after = lightning_decode.reference(
        q, k, v, decay, state, pending_k, pending_v, slots, accepted, torch.zeros_like(slots)
    )

    want = torch.einsum("bhk,bhv->bhkv", k, v)
    same(after[slots.long()], want)
    same(o, torch.einsum("bhk,bhkv->bhv", q * KEY**-0.5, want))


@pytest.mark.parametrize(
    ("op", "case", "states"),
    [
        (lightning_prefill.OP, ((3, 2, 4), HEADS, KEY, VALUE), (4,)),
        (lightning_decode.OP, (3, HEADS, KEY, VALUE, 2), (4,)),
        (lightning_verify.OP, (3, 2, HEADS, KEY, VALUE, 2), (4, 5, 6)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_padding_touches_no_slot_and_reads_none(
    op: Op, case: tuple[object, ...], states: tuple[int, ...]
) -> None:
    given = list(op.inputs(*case, dtype="f32", device="cpu"))
    slots = given[5] if op is lightning_prefill.OP else given[7]
    slots.fill_(-1)
    for at in states:
        given[at][-1] = torch.nan

    o, *after = op.reference(*given)

    assert o.isfinite().all()
    for at, made in zip(states, after, strict=True):
        assert torch.equal(made[:-1], given[at][:-1])
