"""Reading `config.json`: what follows from it, and that every fault in it is named at once."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lingc.errors import ConfigError
from lingc.model.config import ModelConfig, slopes

if TYPE_CHECKING:
    from tests.model.conftest import Values

CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 131072}


@pytest.fixture(scope="module")
def full() -> ModelConfig:
    return ModelConfig.from_file(CHECKPOINTS / "ling-2.6-flash")


def test_full_size_config_has_the_published_layers(full: ModelConfig) -> None:
    assert full.mla_layers == (7, 15, 23, 31)
    assert len(full.linear_layers) == 28
    assert [layer for layer in range(32) if full.is_dense(layer)] == [0]
    assert full.has_mtp
    assert (full.mtp_layer, full.is_mla(32), full.is_dense(32)) == (32, True, False)
    assert (full.qk_head_dim, full.rotary_dim, full.latent_dim) == (192, 64, 576)
    assert full.norm_topk_prob  # the key is absent


def test_a_short_last_group_is_mla(small_config: "Values") -> None:
    config = ModelConfig.from_dict(small_config | {"num_hidden_layers": 7, "layer_group_size": 3})

    assert config.mla_layers == (2, 5, 6)


def test_groups_longer_than_the_model_leave_mla_alone(small_config: "Values") -> None:
    config = ModelConfig.from_dict(small_config | {"layer_group_size": 9})

    assert config.linear_layers == ()


def test_decay_of_the_full_model_spans_the_published_range(full: ModelConfig) -> None:
    assert full.decay(0)[0] == pytest.approx(0.8409, abs=1e-4)
    assert full.decay(30)[31] == pytest.approx(1.26e-4, rel=3e-3)
    assert full.decay(12).tolist() == pytest.approx(
        [2 ** (-8 * (i + 1) / 32) * (1 - 12 / 31 + 1e-5) for i in range(32)], rel=1e-15
    )


def test_slopes_of_six_heads_take_every_second_of_the_longer_series() -> None:
    assert slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def test_plain_rope_turns_by_powers_of_theta(full: ModelConfig) -> None:
    wanted = [6e6 ** (-2 * j / 64) for j in range(32)]

    assert full.inv_freq(64).tolist() == pytest.approx(wanted, rel=1e-14)
    assert full.rope_attention_factor == 1.0
    assert full.mla_scale == pytest.approx(192**-0.5)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(full: ModelConfig) -> None:
    plain = full.inv_freq(64)
    stretched = ModelConfig.from_dict({**full.raw, "rope_scaling": YARN})

    ratio = stretched.inv_freq(64) / plain

    # Pairs that turn 32 times or more within 131072 positions, and once or less.
    turns = 131072 * plain / (2 * math.pi)
    assert np.all(ratio[turns > 40] == 1)
    assert np.allclose(ratio[turns < 0.9], 0.5, rtol=1e-15)
    assert np.all(np.diff(ratio) <= 0)
    assert stretched.rope_attention_factor == pytest.approx(1.0693, abs=1e-4)
    assert stretched.mla_scale == full.mla_scale


def test_yarn_moves_the_softmax_scale_only_with_mscale_all_dim(full: ModelConfig) -> None:
    scaling = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    config = ModelConfig.from_dict({**full.raw, "rope_scaling": scaling})

    assert config.rope_attention_factor == 1.0
    assert config.mla_scale == pytest.approx(192**-0.5 * (0.1 * math.log(2) + 1) ** 2)


def test_quantization_is_kept_apart(small_config: "Values") -> None:
    quantized = ModelConfig.from_dict(small_config | {"quantization_config": {"quant_method": "x"}})

    assert quantized.quantization == {"quant_method": "x"}
    assert "quantization_config" not in quantized.raw
    assert quantized == ModelConfig.from_dict(small_config)


def test_reading_a_config_imports_no_torch() -> None:
    script = "import sys, lingc.model.config; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def problems(values: "Values") -> list[str]:
    with pytest.raises(ConfigError, match=r"has \d+ problem") as caught:
        ModelConfig.from_dict(values)
    return caught.value.problem.split("\n  - ")[1:]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"n_group": 3}, "n_group 3 does not divide num_experts 8"),
        ({"topk_group": 5}, "topk_group is 5, but n_group is 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but 2 of 4 groups hold only 4 "),
        ({"group_norm_size": 3}, r"group_norm_size 3 .* does not divide .* = 32"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim 5 is odd"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4 of head_dim 8 rotates 3 dims"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, more than the whole head"),
        ({"partial_rotary_factor": 0.1}, "rotates 0 dims"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, but there are 4 attention heads"),
        ({"num_kv_heads_for_linear_attn": 1}, "is 1, but there are 4 attention heads"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace is 5, but there are 4 layers"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
        ({"hidden_size": -4}, "hidden_size is -4, not a positive whole number"),
        ({"hidden_size": "24"}, "hidden_size is '24', not a positive whole number"),
        ({"hidden_size": 24.0}, "hidden_size is 24.0, not a positive whole number"),
        ({"num_experts": True}, "num_experts is True, not a positive whole number"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0, neither a positive whole number nor null"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a positive finite number"),
        ({"rope_theta": 1}, "rope_theta is 1, not more than 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, neither true nor false"),
        ({"score_function": "softmax"}, "score_function is 'softmax'; .* has 'sigmoid'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; .* has False"),
        ({"rope_interleave": 1}, "rope_interleave is 1; .* has True"),
        ({"linear_silu": True}, "linear_silu is True; .* has False"),
        ({"rope_scaling": 2}, "rope_scaling is 2, neither an object nor null"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_scaling has type 'ntk'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling has factor None"),
        ({"rope_scaling": YARN | {"beta": 3}}, "rope_scaling has the unknown key 'beta'"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, "beta_fast 0, not a positive number"),
        ({"rope_scaling": YARN | {"beta_slow": 64}}, "beta_fast 32 below beta_slow 64"),
        ({"rope_scaling": YARN | {"rope_theta": 7}}, "rope_theta 7, the model has 10000"),
        ({"eos_token_id": [3, 40]}, "eos_token_id 40 is outside the vocabulary of 40"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x', not a token id"),
        ({"quantization_config": 3}, "quantization_config is 3, neither an object nor null"),
    ],
)
def test_one_contradiction_is_one_problem(
    small_config: "Values", change: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        ModelConfig.from_dict(small_config | change)

    assert len(problems(small_config | change)) == 1


def test_all_problems_are_listed_at_once(small_config: "Values") -> None:
    broken = small_config | {"n_group": 3, "head_dim": -1, "qk_rope_head_dim": 5, "use_bias": True}
    del broken["kv_lora_rank"], broken["vocab_size"]

    found = "\n".join(problems(broken))

    for name in ("n_group", "head_dim", "qk_rope_head_dim", "use_bias", "kv_lora_rank"):
        assert name in found
    assert len(problems(broken)) == 6


@pytest.mark.parametrize(
    "key", ["routed_scaling_factor", "q_lora_rank", "use_qk_norm", "rope_theta"]
)
def test_a_missing_key_is_never_filled_in(small_config: "Values", key: str) -> None:
    assert problems({k: v for k, v in small_config.items() if k != key}) == [
        f"the key {key!r} is missing"
    ]


def test_shared_expert_width_is_needed_only_with_a_shared_expert(small_config: "Values") -> None:
    values = {k: v for k, v in small_config.items() if not k.startswith("moe_shared")}

    assert problems(values) == ["the key 'moe_shared_expert_intermediate_size' is missing"]
    assert ModelConfig.from_dict(values | {"num_shared_experts": 0}).num_shared_experts == 0


def test_another_architecture_is_told_which_one_is_supported(small_config: "Values") -> None:
    with pytest.raises(ConfigError, match=r"'LlamaForCausalLM'.*'BailingMoeV2_5ForCausalLM' only"):
        ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    with pytest.raises(ConfigError, match=r"'bailing_hybrid' is shared with Ling-3.0"):
        ModelConfig.from_dict(small_config | {"architectures": ["BailingMoeV3ForCausalLM"]})


def test_a_file_that_is_not_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json' cannot be read: No such file"):
        ModelConfig.from_file(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 3,\n oops}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not JSON: .* line 2"):
        ModelConfig.from_file(tmp_path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a list, not an object"):
        ModelConfig.from_file(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="is not JSON: 'utf-8' codec"):
        ModelConfig.from_file(tmp_path)


def test_several_end_tokens_are_read_as_a_tuple(small_config: "Values") -> None:
    config = ModelConfig.from_dict(small_config | {"eos_token_id": [3, 4], "bos_token_id": 1})

    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (3, 4), None)
    assert json.loads(json.dumps(config.raw)) == {
        **small_config,
        "eos_token_id": [3, 4],
        "bos_token_id": 1,
    }
