"""Eager on the engine's weights: rounded as the plan says, and not otherwise."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lingc.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from lingc.errors import StageError
from lingc.model.loading import from_source
from lingc.parity.eager import EagerSide
from lingc.parity.weights import RoundedWeights, formats
from lingc.plan import Plan, Program, TensorType, WeightSpec
from lingc.quantize.formats import (
    dequantize_fp8_block,
    dequantize_int4_group,
    quantize_fp8_block,
    quantize_int4_group,
)

TINY = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-tiny"
DENSE = "model.layers.0.attention.dense.weight"
GATE = "model.layers.2.mlp.experts.{e}.gate_proj.weight"
UP = "model.layers.2.mlp.experts.{e}.up_proj.weight"
NORM = "model.norm.weight"


def spec(name: str, *sources: str, format: str, group: int = 0, experts: int = 0) -> WeightSpec:  # noqa: A002 the record's own name
    dtype = {"plain": "bf16", "fp8_block": "f8e4m3", "int4_group": "i32"}[format]
    return WeightSpec(
        name=name, type=TensorType(dtype, (1, 1)), sources=sources, format=format, group=group,
        experts=experts, part="values" if format == "plain" else "codes",
    )  # fmt: skip


def made_plan(**phases: list[WeightSpec]) -> Plan:
    programs = {
        phase: Program(
            inputs=(), states=(), outputs={}, updates={}, types={}, steps=(),
            weights=tuple(s.name for s in specs),
        )
        for phase, specs in phases.items()
    }  # fmt: skip
    return Plan(
        config={}, precision="made up", target="cpu", activation="f32", page_size=64, max_draft=0,
        states={}, weights={s.name: s for specs in phases.values() for s in specs},
        programs=programs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(TINY)


def test_each_tensor_goes_the_way_of_its_format(checkpoint: Checkpoint) -> None:
    plan = made_plan(
        prefill=[
            spec("dense", DENSE, format="fp8_block"),
            spec("experts", GATE, UP, format="int4_group", group=32, experts=16),
            spec("norm", NORM, format="plain"),
        ]
    )

    rounded = RoundedWeights(checkpoint, plan, ["prefill"])

    dense, up = checkpoint.dense(DENSE), checkpoint.dense(UP.replace("{e}", "9"))
    np.testing.assert_array_equal(
        rounded.dense(DENSE), dequantize_fp8_block(*quantize_fp8_block(dense))
    )
    np.testing.assert_array_equal(
        rounded.dense(UP.replace("{e}", "9")),
        dequantize_int4_group(*quantize_int4_group(up, 32), 32, up.shape[1]),
    )
    np.testing.assert_array_equal(rounded.dense(NORM), checkpoint.dense(NORM))
    assert not np.array_equal(rounded.dense(DENSE), dense)


def test_what_the_plan_does_not_name_stays(checkpoint: Checkpoint) -> None:
    rounded = RoundedWeights(checkpoint, made_plan(prefill=[]), ["prefill"])

    np.testing.assert_array_equal(rounded.dense(DENSE), checkpoint.dense(DENSE))
    assert rounded.names == checkpoint.names
    assert rounded.identity() == checkpoint.identity()


def test_only_the_phases_that_run_count(checkpoint: Checkpoint) -> None:
    plan = made_plan(
        prefill=[spec("kv", DENSE, format="fp8_block")], decode=[spec("k", DENSE, format="plain")]
    )

    decoded = RoundedWeights(checkpoint, plan, ["decode"])

    np.testing.assert_array_equal(decoded.dense(DENSE), checkpoint.dense(DENSE))
    with pytest.raises(StageError, match=r"held as plain in 'k' and as fp8_block in 'kv'"):
        formats(plan, ["prefill", "decode"])


def test_a_tensor_that_is_released_in_the_engines_format_is_taken_unchanged(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    plan = made_plan(prefill=[spec("dense", DENSE, format="fp8_block")])
    twin = open_checkpoint(write_checkpoint(checkpoint, tmp_path / "fp8", layout="fp8"))

    rounded = RoundedWeights(twin, plan, ["prefill"])

    assert twin.kind(DENSE) == "fp8_block"
    np.testing.assert_array_equal(rounded.dense(DENSE), twin.dense(DENSE))


def test_eager_takes_the_rounded_weights_and_tells_its_experts(checkpoint: Checkpoint) -> None:
    torch.set_num_threads(1)
    plan = made_plan(prefill=[spec("dense", DENSE, format="int4_group", group=32)])
    rows = [[5, 6, 7, 8, 9], [3, 2]]

    exact = EagerSide(from_source(checkpoint), "eager")
    rounded = EagerSide(from_source(RoundedWeights(checkpoint, plan, ["prefill"])), "rounded")
    a, b = exact.score(rows, "prefill"), rounded.score(rows, "decode")
    drafted = exact.score(rows, "draft")

    assert [s.logits.shape for s in a] == [(5, 4096), (2, 4096)]
    assert 0 < np.abs(a[0].logits - b[0].logits).max() < 2
    assert sorted(a[0].experts) == list(range(1, 8))
    choice = a[0].experts[3]
    assert choice.biased is not None
    assert (choice.ids.shape, choice.biased.shape) == ((5, 4), (5, 16))
    assert [s.logits.shape for s in drafted] == [(4, 4096), (1, 4096)]
    assert sorted(drafted[0].experts) == list(range(1, 9))
    exact.close()
