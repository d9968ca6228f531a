"""Every form of the same computation agrees to 1e-9 in float64, whatever the config.

Chunk sizes, prefill and decode against one pass, absorbed against plain MLA, batches against single
sequences, drafts taken back: by property over structurally different configs.
"""

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lingc.model import LingModel
from lingc.model.linear_attention import lightning_chunk, lightning_recurrent

if TYPE_CHECKING:
    from tests.model.conftest import MakeModel, Values

CLOSE = 1e-9

FORMS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@st.composite
def changes(draw: st.DrawFn) -> "Values":
    """What makes a config structurally different; small enough to run in milliseconds."""
    heads = draw(st.integers(1, 6))
    head_dim, rotary = draw(st.sampled_from([(4, 0.5), (6, 1.0), (8, 0.25), (12, 0.5)]))
    width = heads * head_dim
    layers = draw(st.integers(1, 6))
    groups, in_group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    yarn = YARN | draw(st.sampled_from([{}, {"mscale": 1.0, "mscale_all_dim": 0.7}]))
    return {
        "hidden_size": draw(st.integers(5, 20)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "partial_rotary_factor": rotary,
        "group_norm_size": draw(st.sampled_from([n for n in range(1, width) if width % n == 0])),
        "num_hidden_layers": layers,
        "layer_group_size": draw(st.integers(1, 4)),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "q_lora_rank": draw(st.sampled_from([None, 5, 9])),
        "kv_lora_rank": draw(st.integers(3, 9)),
        "qk_rope_head_dim": draw(st.sampled_from([2, 6])),
        "v_head_dim": draw(st.integers(1, 7)),
        "rope_scaling": draw(st.sampled_from([None, yarn])),
        "num_experts": groups * in_group,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, kept * in_group)),
        "num_shared_experts": draw(st.integers(0, 2)),
        "norm_topk_prob": draw(st.booleans()),
        "num_nextn_predict_layers": draw(st.integers(0, 1)),
    }


def tokens(module: LingModel, batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(module.config.vocab_size, (batch, count), generator=generator)


def largest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="session")
def build(make_model: "MakeModel", small_config: "Values") -> "MakeModel":
    return lambda change: make_model(small_config | change)


@FORMS
@given(change=changes(), count=st.integers(2, 80))
def test_chunk_sizes_and_forms_of_mla_agree(
    build: "MakeModel", change: "Values", count: int
) -> None:
    module = build(change)
    ids = tokens(module, 2, count)

    whole = module(ids, chunk=count, absorbed=False)

    assert whole.dtype == torch.float64
    for chunk in (1, 32, 64):
        assert largest(module(ids, chunk=chunk, absorbed=False), whole) < CLOSE, chunk
    assert largest(module(ids, absorbed=True), whole) < CLOSE


@FORMS
@given(change=changes(), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_prefill_pieces_and_decode_agree_with_one_pass(
    build: "MakeModel", change: "Values", cuts: list[int]
) -> None:
    module = build(change)
    pieces = [*cuts, 1, 1, 1]
    ids = tokens(module, 2, sum(pieces))
    state = module.new_state(2)

    found = torch.cat([module(piece, state) for piece in ids.split(pieces, dim=1)], dim=1)

    assert largest(found, module(ids)) < CLOSE
    assert state.length == sum(pieces)


@FORMS
@given(change=changes(), count=st.integers(1, 20))
def test_a_batch_is_its_sequences(build: "MakeModel", change: "Values", count: int) -> None:
    module = build(change)
    ids = tokens(module, 3, count)

    alone = torch.cat([module(row.unsqueeze(0)) for row in ids])

    assert largest(module(ids), alone) < CLOSE


@FORMS
@given(change=changes(), count=st.integers(2, 20))
def test_mtp_row_by_row_agrees_with_one_pass(
    build: "MakeModel", change: "Values", count: int
) -> None:
    module = build(change | {"num_nextn_predict_layers": 1})
    ids = tokens(module, 2, count + 1)
    hidden = module.forward_hidden(ids[:, :-1])
    state = module.new_state(2)

    rows = [module.mtp(ids[:, t + 1 : t + 2], hidden[:, t : t + 1], state)[0] for t in range(count)]

    assert largest(torch.cat(rows, dim=1), module.mtp(ids[:, 1:], hidden)[0]) < CLOSE


@FORMS
@given(change=changes(), kept=st.integers(1, 4))
def test_drafts_taken_back_leave_no_trace(build: "MakeModel", change: "Values", kept: int) -> None:
    module = build(change)
    ids = tokens(module, 2, 20)
    prompt, offered, later = ids[:, :8], ids[:, 8:12], ids[:, 12:]
    state = module.new_state(2)
    module(prompt, state)

    module(offered, state.copy())
    module(offered[:, :kept], state)

    clean = module.new_state(2)
    module(torch.cat((prompt, offered[:, :kept]), dim=1), clean)
    assert largest(module(later, state), module(later, clean)) < CLOSE


@FORMS
@given(
    count=st.integers(1, 300),
    chunk=st.integers(1, 300),
    rate=st.floats(1e-4, 1.0),
    seed=st.integers(0, 9),
)
def test_lightning_chunks_of_any_size_agree_with_the_recurrence(
    count: int, chunk: int, rate: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, count, 3, 4, generator=generator, dtype=torch.float64)
    v = torch.randn(2, count, 3, 5, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    decay = rate * torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)

    o, after = lightning_chunk(q, k, v, decay, state, chunk=chunk)

    wanted_o, wanted_after = lightning_recurrent(q, k, v, decay, state)
    assert largest(o, wanted_o) < CLOSE
    assert largest(after, wanted_after) < CLOSE


def test_fast_decay_over_a_long_chunk_does_not_overflow_in_fp32() -> None:
    q, k, v = torch.randn(3, 1, 4096, 1, 8, generator=torch.Generator().manual_seed(0))
    decay, state = torch.tensor([0.8409]), torch.zeros(1, 1, 8, 8)

    o, after = lightning_chunk(q, k, v, decay, state, chunk=4096)

    wanted_o, wanted_after = lightning_recurrent(q, k, v, decay, state)
    assert torch.isfinite(o).all()
    assert largest(o, wanted_o) < 1e-4
    assert largest(after, wanted_after) < 1e-4
