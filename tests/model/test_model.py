"""The module's surface: taps, states, dtypes, the meta device, the router's ties, named errors."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import lingc.model
from lingc.errors import CheckpointError, ConfigError, IncompatibleError, PromptError
from lingc.model import LingModel, ModelConfig
from lingc.model.moe import GATHERED_ROWS, Experts, Router

if TYPE_CHECKING:
    from tests.model.conftest import Golden, MakeModel, Values

CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"


@pytest.fixture(scope="session")
def small(make_model: "MakeModel", small_config: "Values") -> LingModel:
    return make_model(small_config)


def test_full_size_model_builds_without_weights_in_seconds() -> None:
    config = ModelConfig.from_file(CHECKPOINTS / "ling-2.6-flash")
    started = time.perf_counter()

    with torch.device("meta"):
        module = LingModel(config)

    # Published: 104,186,915,584 in the main model, 3,307,493,632 in the MTP layer.
    assert sum(p.numel() for p in module.parameters()) == 104_186_915_584 + 3_307_493_632
    assert sum(p.numel() for p in module.model.layers[32].parameters()) == 3_307_493_632
    assert time.perf_counter() - started < 20


def test_taps_hold_every_block_and_add_up(small: LingModel) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    taps: dict[str, Tensor] = {}

    small(ids, taps=taps)

    config = small.config
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        added = taps[f"{name}.input"] + taps[f"{name}.attention"] + taps[f"{name}.mlp"]
        torch.testing.assert_close(added, taps[f"{name}.output"])
        assert taps[f"{name}.output"].shape == (2, 5, config.hidden_size)
        assert (f"{name}.state" in taps) == (not config.is_mla(layer))
        assert (f"{name}.cache" in taps) == config.is_mla(layer)
        assert (f"{name}.router.ids" in taps) == (not config.is_dense(layer))
    assert torch.equal(taps["layers.0.input"], taps["embedding"])
    assert taps["layers.1.router.ids"].shape == (2, 5, config.num_experts_per_tok)
    torch.testing.assert_close(taps["norm"], small.forward_hidden(ids))


def test_taps_of_the_mtp_layer_are_under_its_index(small: LingModel) -> None:
    taps: dict[str, Tensor] = {}

    small.mtp(torch.tensor([[2, 3]]), small.forward_hidden(torch.tensor([[1, 2]])), taps=taps)

    assert {key.split(".")[1] for key in taps} == {"4"}
    assert "layers.4.router.weights" in taps


def test_a_pass_never_writes_into_a_state_it_was_copied_from(small: LingModel) -> None:
    state = small.new_state(1)
    small(torch.tensor([[1, 2, 3]]), state)
    kept = {**state.linear, **state.cache}
    before = {layer: tensor.clone() for layer, tensor in kept.items()}

    small(torch.tensor([[4, 5]]), state.copy())

    assert state.length == 3
    assert all(torch.equal(kept[layer], before[layer]) for layer in kept)


def test_logits_are_fp32_also_from_a_bf16_module(tiny: "Golden") -> None:
    module = lingc.model.load(tiny.checkpoint, torch.bfloat16)
    ids = tiny.prompts["p03"]
    state = module.new_state(1)

    logits = module(ids, state)

    assert module.lm_head.weight.dtype == torch.bfloat16
    assert module.model.layers[1].get_parameter("mlp.gate.expert_bias").dtype == torch.float32
    assert {tensor.dtype for tensor in state.linear.values()} == {torch.float32}
    assert logits.dtype == torch.float32
    # The golden README states at most 4.6 between BF16 and FP32 compute, rms 0.03 to 0.21.
    difference = logits - tiny.model(ids)
    assert difference.square().mean().sqrt() < 0.25
    assert module(torch.tensor([[5]]), state).dtype == torch.float32


def test_float64_module_agrees_with_fp32(tiny: "Golden") -> None:
    module = lingc.model.load(tiny.checkpoint, torch.float64)
    ids = tiny.prompts["p12"]

    logits = module(ids)

    assert logits.dtype == torch.float64
    # Stated for an independent implementation: 2.3e-5.
    assert (logits - tiny.model(ids)).abs().max() <= 3 * 2.3e-5


def test_equal_scores_go_to_the_lower_index(small_config: "Values") -> None:
    router = Router(ModelConfig.from_dict(small_config))

    ids, weights = router.select(torch.zeros(2, 8))

    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert weights.sum(-1).tolist() == pytest.approx([2.5, 2.5])


def test_router_keeps_to_the_best_groups(small_config: "Values") -> None:
    router = Router(ModelConfig.from_dict(small_config))
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))

    ids, _ = router.select(logits)

    groups = [len(set(row)) for row in (ids // 2).tolist()]
    assert max(groups) <= 2
    # The best expert overall may be left out: its group can lose by the sum of two.
    assert (ids[:, 0] != logits.argmax(-1)).any()


def test_gathered_and_looped_experts_agree(small: LingModel) -> None:
    experts = small.model.layers[2].get_submodule("mlp.experts")
    assert isinstance(experts, Experts)
    generator = torch.Generator().manual_seed(0)
    count = GATHERED_ROWS // 3
    n = torch.randn(count, 24, generator=generator, dtype=torch.float64)
    ids = torch.rand(count, 8, generator=generator).topk(3).indices
    weights = torch.rand(count, 3, generator=generator, dtype=torch.float64)

    both = experts(torch.cat((n, n)), torch.cat((ids, ids)), torch.cat((weights, weights)))

    torch.testing.assert_close(both, experts(n, ids, weights).repeat(2, 1))


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (torch.tensor([[1, 40]]), "token id 40 is outside the vocabulary of 40"),
        (torch.tensor([[-1, 3]]), "token id -1 is outside the vocabulary of 40"),
        (torch.tensor([1, 2]), r"shape \(2,\) and dtype torch.int64, not \[B, T\]"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.tensor([[0.5]]), "dtype torch.float32"),
    ],
)
def test_bad_token_ids_are_named(small: LingModel, ids: Tensor, wanted: str) -> None:
    with pytest.raises(PromptError, match=wanted):
        small(ids)


def test_a_model_without_mtp_says_so(make_model: "MakeModel", small_config: "Values") -> None:
    module = make_model(small_config | {"num_nextn_predict_layers": 0})

    assert len(module.model.layers) == 4
    with pytest.raises(IncompatibleError, match="has no MTP layer"):
        module.mtp(torch.tensor([[1]]), torch.zeros(1, 1, 24))


def test_loading_reports_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json' cannot be read"):
        lingc.model.load(tmp_path)
    with pytest.raises(CheckpointError):
        lingc.model.load(CHECKPOINTS / "ling-2.6-flash")


def test_what_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        lingc.model.laod  # noqa: B018
