"""MLA: absorbed equals plain; a sequence reads and writes its own cache rows and no others."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lingc.compare import assert_close
from lingc.plugins import (
    mla_absorbed_attention,
    mla_attention,
    mla_latent,
    mla_latent_attention,
    mla_latent_kv,
    mla_query_rope,
)
from lingc.samples import Samples

HEADS, NOPE, PAIRS, VALUE, LATENT, PAGE = 3, 10, 2, 6, 12, 4
LENGTHS = (5, 0, 9, 1)


Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(lengths: tuple[int, ...] = LENGTHS, page: int = PAGE) -> Given:
    q, cache, pages, offsets, positions, kv_b, *_ = mla_attention.OP.inputs(
        lengths, HEADS, NOPE, PAIRS, VALUE, LATENT, page, dtype="f64", device="cpu"
    )
    return q, cache, pages, offsets, positions, kv_b


def plain(given: Given, page: int = PAGE) -> Tensor:
    q, cache, pages, offsets, positions, kv_b = given
    return mla_attention.reference(q, cache, pages, offsets, positions, kv_b, page, NOPE, 0.25)


def absorbed(given: Given, page: int = PAGE) -> Tensor:
    q, cache, pages, offsets, positions, kv_b = given
    by_head = kv_b.unflatten(0, (HEADS, -1))
    w_k, w_v = by_head[:, :NOPE], by_head[:, NOPE:]
    return mla_absorbed_attention.reference(
        q, cache, pages, offsets, positions, w_k, w_v, page, 0.25
    )


def rows_of(pages: Tensor, length: int) -> list[int]:
    return [int(pages[x // PAGE]) * PAGE + x % PAGE for x in range(length)]


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), page=st.sampled_from([1, 4, 16])
)
def test_absorbed_attention_is_plain_attention(lengths: list[int], page: int) -> None:
    drawn = inputs(tuple(lengths), page)

    assert_close(absorbed(drawn, page), plain(drawn, page), dtype="f64")


def test_one_sequence_is_scaled_dot_product_attention() -> None:
    q, cache, pages, offsets, positions, kv_b = inputs((9,))
    rows = cache[rows_of(pages[0], 9)]
    kv = (rows[:, :LATENT] @ kv_b.T).unflatten(1, (HEADS, -1)).transpose(0, 1)
    k = torch.cat((kv[..., :NOPE], rows[:, LATENT:].expand(HEADS, -1, -1)), -1)

    got = plain((q, cache, pages, offsets, positions, kv_b))

    want = functional.scaled_dot_product_attention(
        q.transpose(0, 1), k, kv[..., NOPE:], is_causal=True, scale=0.25
    )
    assert_close(got, want.transpose(0, 1).flatten(1), dtype="f64")


def test_rows_of_others_unwritten_rows_and_scratch_do_not_leak() -> None:
    q, cache, pages, offsets, positions, kv_b = inputs()
    dirty = torch.full_like(cache, torch.nan)
    for b, last in enumerate(offsets[1:].tolist()):
        if last > offsets[b]:
            rows = rows_of(pages[b], int(positions[last - 1]) + 1)
            dirty[rows] = cache[rows]

    for attention in (plain, absorbed):
        clean = attention((q, cache, pages, offsets, positions, kv_b))
        assert torch.equal(attention((q, dirty, pages, offsets, positions, kv_b)), clean)


def test_a_sequence_alone_gets_what_it_gets_in_a_batch() -> None:
    q, cache, pages, offsets, positions, kv_b = inputs()
    part = slice(int(offsets[2]), int(offsets[3]))
    alone = q[part], cache, pages[2:3], torch.tensor([0, 9]), positions[part], kv_b

    for attention in (plain, absorbed):
        whole = attention((q, cache, pages, offsets, positions, kv_b))
        assert_close(attention(alone), whole[part], dtype="f64")


def test_the_cache_takes_normed_latent_and_turned_key_at_its_rows_only() -> None:
    a, q_weight, kv_weight, cos, sin, cache, rows, eps = mla_latent.OP.inputs(
        7, 24, 10, 3, dtype="f64", device="cpu"
    )
    cache.fill_(torch.nan)

    cq, after = mla_latent.reference(a, q_weight, kv_weight, cos, sin, cache, rows, eps)

    live = rows >= 0
    latent = functional.rms_norm(a[:, 24:34], (10,), kv_weight, eps)
    key = torch.view_as_complex(a[:, 34:].unflatten(1, (-1, 2)).contiguous())
    turned = torch.view_as_real(key * torch.complex(cos, sin)).flatten(1)
    assert_close(cq, functional.rms_norm(a[:, :24], (24,), q_weight, eps), dtype="f64")
    assert_close(after[rows[live].long()], torch.cat((latent, turned), 1)[live], dtype="f64")
    untouched = sorted(set(range(cache.shape[0])) - set(rows[live].tolist()))
    assert cache.shape[0] - 1 in untouched
    assert after[untouched].isnan().all()
    same = mla_latent_kv.reference(a[:, 24:], kv_weight, cos, sin, cache, rows, eps)
    assert torch.equal(same.nan_to_num(), after.nan_to_num())


def test_queries_turn_in_pairs_that_stay_where_they_are() -> None:
    some = Samples(dtype="f64", device="cpu")
    q = some.normal(4, HEADS * (NOPE + 2 * PAIRS))
    cos, sin = some.rope(some.ints([0, 1, 5, 400]), PAIRS)

    y = mla_query_rope.reference(q, cos, sin, HEADS)

    by_head = q.unflatten(1, (HEADS, -1))
    pairs = torch.view_as_complex(by_head[..., NOPE:].unflatten(2, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(2)
    assert torch.equal(y[..., :NOPE], by_head[..., :NOPE])
    assert_close(y[..., NOPE:], turned, dtype="f64")
    assert torch.equal(y[0], by_head[0])


def test_latent_attention_is_its_parts() -> None:
    drawn = mla_latent_attention.OP.inputs(
        (3, 0, 3), (2, 4, 0), HEADS, 16, 4, 12, 20, 2, dtype="f64", device="cpu"
    )
    a, q, kv_weight, cos, sin, cache, rows, pages, offsets, positions, w_k, w_v, *rest = drawn
    page_size, eps, scale = rest

    y, after = mla_latent_attention.reference(*drawn)

    held = mla_latent_kv.reference(a, kv_weight, cos, sin, cache, rows, eps)
    turned = mla_query_rope.reference(q, cos, sin, HEADS)
    want = mla_absorbed_attention.reference(
        turned, held, pages, offsets, positions, w_k, w_v, page_size, scale
    )
    assert torch.equal(after, held)
    assert torch.equal(y, want)
    assert (rows == -1).any()


def test_the_rows_come_from_the_last_columns_only() -> None:
    a, kv_weight, cos, sin, cache, rows, eps = mla_latent_kv.OP.inputs(
        7, 5, 10, 3, dtype="f64", device="cpu"
    )
    clean = mla_latent_kv.reference(a, kv_weight, cos, sin, cache, rows, eps)
    a[:, :5] = torch.nan

    assert torch.equal(mla_latent_kv.reference(a, kv_weight, cos, sin, cache, rows, eps), clean)
