"""Golden data, the models they belong to, and random models of any config."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lingc.model
from lingc.model import LingModel, ModelConfig
from tests.model.odd import write_odd

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

Values = dict[str, Any]
MakeModel = Callable[[Values], LingModel]


class Golden:
    """One folder of golden outputs and the model that they are of."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.model = lingc.model.load(checkpoint)
        self.prompts: dict[str, Tensor] = {
            line["id"]: torch.tensor([line["ids"]]) for line in self.lines("prompts.jsonl")
        }

    def lines(self, name: str) -> list[Values]:
        text = (self.folder / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def greedy(self) -> dict[str, list[int]]:
        return {line["id"]: line["ids"] for line in self.lines("greedy.jsonl")}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small spend more time handing work to a second thread than doing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> Golden:
    return Golden(GOLDEN / "ling-tiny", ROOT / "artifacts" / "checkpoints" / "ling-tiny")


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = GOLDEN / "odd"
    return Golden(folder, write_odd(folder / "checkpoint", tmp_path_factory.mktemp("odd") / "x"))


@pytest.fixture(scope="session")
def eval_windows() -> list[Tensor]:
    """The evaluation text as the perplexity rule cuts it."""
    raw = np.fromfile(GOLDEN / "ling-tiny" / "eval_ids.u16", dtype="<u2").astype(np.int64)
    return list(torch.from_numpy(raw).unsqueeze(0).split(1024, dim=1))


@pytest.fixture(scope="session")
def small_config() -> Values:
    """A legal config of a few thousand parameters, for tests to change."""
    return {
        "architectures": ["BailingMoeV2_5ForCausalLM"],
        "model_type": "bailing_hybrid",
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "layer_group_size": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "rope_theta": 10000,
        "rope_interleave": True,
        "rope_scaling": None,
        "max_position_embeddings": 64,
        "intermediate_size": 20,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 9,
        "moe_shared_expert_intermediate_size": 7,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "num_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_router_enable_expert_bias": True,
        "vocab_size": 40,
        "rms_norm_eps": 1e-6,
        "group_norm_size": 2,
        "use_qk_norm": True,
        "linear_silu": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "num_nextn_predict_layers": 1,
    }


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Build a float64 model of a config with seeded weights that keep activations near 1."""
    return _make_model


def _make_model(values: Values) -> LingModel:
    module = LingModel(ModelConfig.from_dict(values)).double()
    module.reset_constants()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("expert_bias"):
                parameter.mul_(0.1)
            elif parameter.dim() == 1:
                parameter.mul_(0.1).add_(1)
            elif "word_embeddings" not in name:
                parameter.mul_(parameter.shape[-1] ** -0.5)
    return module.eval()
