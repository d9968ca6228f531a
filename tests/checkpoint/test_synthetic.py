"""Synthetic checkpoints: the same bytes each time, sane statistics, nothing kept."""

import hashlib

import numpy as np
import pytest

from lingc.checkpoint import SyntheticCheckpoint
from lingc.errors import CheckpointError, UnknownPrecisionError
from lingc.model.config import ModelConfig
from lingc.quantize.formats import quantize_fp8_block, widen_bf16

QKV = "model.layers.0.attention.query_key_value.weight"


def test_a_tensor_is_the_same_whatever_was_read_before(small: ModelConfig) -> None:
    one, two = SyntheticCheckpoint(small, 7), SyntheticCheckpoint(small, 7)
    for name in two.names:
        two.dense(name)

    assert np.array_equal(one.dense(QKV), two.dense(QKV))


def test_the_bytes_are_pinned(small: ModelConfig) -> None:
    """Records made with synthetic weights stay comparable."""
    digest = hashlib.sha256(SyntheticCheckpoint(small, 7).plain(QKV)[0].tobytes())

    assert digest.hexdigest()[:16] == "9705d67f7bf47be4"


def test_seeds_and_names_give_different_values(small: ModelConfig) -> None:
    one, two = SyntheticCheckpoint(small, 1), SyntheticCheckpoint(small, 2)
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))

    assert not np.array_equal(one.dense(gate), two.dense(gate))
    assert not np.array_equal(one.dense(gate), one.dense(up))
    assert one.identity() != two.identity()
    assert one.identity() != SyntheticCheckpoint(small, 1, "fp8").identity()
    assert one.identity() == SyntheticCheckpoint(small, 1).identity()


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("model.word_embeddings.weight", 0, 1),
        (QKV, 0, 136**-0.5),
        ("model.layers.0.mlp.down_proj.weight", 0, 200**-0.5),
        ("model.norm.weight", 1, 0.1),
    ],
)
def test_statistics_keep_activations_sane(
    name: str, mean: float, std: float, small: ModelConfig
) -> None:
    values = SyntheticCheckpoint(small, 0).dense(name)

    within = 5 / values.size**0.5
    assert abs(values.mean() - mean) < within * std
    assert abs(values.std() / std - 1) < within


def test_expert_biases_are_f32_and_differ(small: ModelConfig) -> None:
    values, dtype = SyntheticCheckpoint(small, 0).plain("model.layers.1.mlp.gate.expert_bias")

    assert dtype == "f32"
    assert values.std() > 0.01


@pytest.mark.parametrize("layout", ["bf16", "fp8", "int4", "int4-all"])
def test_a_layout_quantizes_the_same_values(layout: str, small: ModelConfig) -> None:
    plain, stored = SyntheticCheckpoint(small, 3), SyntheticCheckpoint(small, 3, layout)
    name = "model.layers.1.mlp.experts.0.down_proj.weight"

    want, got = plain.dense(name), stored.dense(name)

    assert np.abs(got - want).max() <= 0.08 * np.abs(want).max()
    if stored.kind(name) == "fp8_block":
        codes, scales = quantize_fp8_block(want)
        assert np.array_equal(stored.quantized(name)[0], codes)
        assert np.array_equal(stored.quantized(name)[1], scales)


def test_plain_bits_are_the_dense_values(small: ModelConfig) -> None:
    source = SyntheticCheckpoint(small, 3)

    bits, dtype = source.plain(QKV)

    assert dtype == "bf16"
    assert np.array_equal(widen_bf16(bits), source.dense(QKV))


def test_there_is_no_tokenizer(small: ModelConfig) -> None:
    source = SyntheticCheckpoint(small, 3)

    assert source.tokenizer_files() == ()
    assert source.generation_config() == {}


def test_an_unknown_tensor_or_layout_is_named(small: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.x'"):
        SyntheticCheckpoint(small, 0).dense("model.x")
    with pytest.raises(UnknownPrecisionError, match="'fp9'"):
        SyntheticCheckpoint(small, 0, "fp9")
