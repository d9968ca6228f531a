"""All three release layouts load, and the quantized ones give the golden outputs of their kind."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import lingc.model
from lingc.checkpoint import SyntheticCheckpoint, make_twin, open_checkpoint, write_checkpoint
from lingc.errors import IncompatibleError
from lingc.model import ModelConfig
from lingc.model.loading import checkpoint_names, from_source

if TYPE_CHECKING:
    from tests.model.conftest import Golden, Values

LOGITS = 3 * 3.8e-5

QUANTIZED = pytest.mark.parametrize("layout", ["fp8", "int4"])


@pytest.fixture(scope="session")
def twins(tiny: "Golden", tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("twins")
    source = open_checkpoint(tiny.checkpoint)
    return {layout: make_twin(source, layout, folder).path for layout in ("fp8", "int4")}


@QUANTIZED
def test_logits_of_a_quantized_checkpoint_agree(
    tiny: "Golden", twins: dict[str, Path], layout: str
) -> None:
    module = lingc.model.load(twins[layout])
    wanted = tiny.tensors(f"logits_{layout}")

    found = {prompt: module(tiny.prompts[prompt])[0, -2:] for prompt in wanted}

    differences = {p: (found[p] - wanted[p]).abs().max().item() for p in wanted}
    assert max(differences.values()) <= LOGITS, differences


@pytest.mark.long
@QUANTIZED
def test_perplexity_of_a_quantized_checkpoint_is_equal_to_four_digits(
    tiny: "Golden", twins: dict[str, Path], eval_windows: list[Tensor], layout: str
) -> None:
    metrics = json.loads((tiny.folder / "metrics.json").read_text(encoding="utf-8"))
    module = lingc.model.load(twins[layout])
    losses = [
        torch.nn.functional.cross_entropy(
            module(window)[0, :-1].double(), window[0, 1:], reduction="sum"
        ).item()
        for window in eval_windows
    ]
    predicted = sum(window.shape[1] - 1 for window in eval_windows)

    perplexity = torch.tensor(sum(losses) / predicted).exp().item()

    wanted = metrics["eval"][f"{layout}_dequantised"]["perplexity"]
    assert perplexity == pytest.approx(wanted, abs=5e-4)


def test_a_release_without_mtp_weights_gives_a_model_without_mtp(twins: dict[str, Path]) -> None:
    module = lingc.model.load(twins["int4"])

    assert module.config.has_mtp
    assert not module.has_mtp
    with pytest.raises(IncompatibleError, match="has no MTP layer"):
        module.mtp(torch.tensor([[1]]), torch.zeros(1, 1, 256))


def test_mtp_weights_load_whether_the_index_lists_their_file_or_not(
    tiny: "Golden", tmp_path: Path
) -> None:
    source = open_checkpoint(tiny.checkpoint)
    unlisted = write_checkpoint(source, tmp_path / "unlisted", index_mtp=False)

    module = lingc.model.load(unlisted)

    assert module.has_mtp
    assert torch.equal(module(tiny.prompts["p00"]), tiny.model(tiny.prompts["p00"]))


def test_parameters_carry_the_names_of_the_checkpoint(tiny: "Golden") -> None:
    config = tiny.model.config

    found = [n for name, _ in tiny.model.named_parameters() for n in checkpoint_names(name, config)]

    assert "model.layers.1.mlp.experts.15.up_proj.weight" in found
    assert sorted(found) == sorted(open_checkpoint(tiny.checkpoint).names)


def test_any_source_of_weights_makes_a_model(small_config: "Values") -> None:
    source = SyntheticCheckpoint(ModelConfig.from_dict(small_config), seed=3)

    module = from_source(source, torch.float64)

    logits = module(torch.arange(40).unsqueeze(0))
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
