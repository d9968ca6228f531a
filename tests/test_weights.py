"""Weights of a plan: taken unchanged where they can be, rounded once where not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.checkpoint.source import Source
from lingc.errors import CheckpointError, InputError
from lingc.quantize.formats import (
    dequantize_fp8_block,
    dequantize_int4_group,
    quantize_fp8_block,
    quantize_int4_group,
    round_bf16,
    widen_bf16,
)
from lingc.quantize.layouts import restore
from lingc.quantize.stored import fp8_specs
from lingc.weights import materialize, open_weights, write_weights
from tests.made_weights import (
    CONFIG,
    DENSE,
    DOWN,
    EXPERT_GATE_UP,
    GATE,
    KV_B,
    UP,
    WIDE,
    Array,
    Counting,
    checkpoint,
    fp8_pair,
    int4_pair,
    make_all,
    plain_spec,
)

# ------------------------------------------------------------------------------------------ plain


def test_a_bf16_weight_is_taken_as_it_is() -> None:
    source = checkpoint()

    made = materialize(plain_spec("bf16", (136, 36), DENSE), source, CONFIG)

    assert np.array_equal(made, source.plain(DENSE)[0])


def test_an_f32_weight_is_widened() -> None:
    source = checkpoint()

    made = materialize(plain_spec("f32", (136, 36), DENSE), source, CONFIG)

    assert np.array_equal(made, source.dense(DENSE))


@pytest.mark.parametrize("layout", ["fp8", "int4-all"])
def test_a_plain_weight_of_a_quantized_source_is_dequantized(layout: str) -> None:
    source = checkpoint(layout)

    f32 = materialize(plain_spec("f32", (136, 36), DENSE), source, CONFIG)
    bf16 = materialize(plain_spec("bf16", (136, 36), DENSE), source, CONFIG)

    assert source.kind(DENSE) != "plain"
    assert np.array_equal(f32, source.dense(DENSE))
    assert np.array_equal(bf16, round_bf16(source.dense(DENSE)))


def test_sources_are_joined_along_the_output_axis() -> None:
    source = checkpoint()

    made = materialize(plain_spec("f32", (400, 136), GATE, UP), source, CONFIG)

    assert np.array_equal(made, np.concatenate([source.dense(GATE), source.dense(UP)]))


def test_experts_are_stacked() -> None:
    source = checkpoint()
    spec = plain_spec("bf16", (4, 88, 136), *EXPERT_GATE_UP, experts=4)

    made = materialize(spec, source, CONFIG)

    for e in range(4):
        names = [name.replace("{e}", str(e)) for name in EXPERT_GATE_UP]
        want = np.concatenate([source.plain(name)[0] for name in names])
        assert np.array_equal(made[e], want)


def test_absorbed_weights_are_the_halves_of_each_head() -> None:
    source = checkpoint()
    kv_b = source.plain(KV_B)[0].reshape(3, 256, 512)
    spec = plain_spec("bf16", (3, 128, 512), KV_B, split=(3, 128, 128))

    k = materialize(replace(spec, take="absorb_k"), source, CONFIG)
    v = materialize(replace(spec, take="absorb_v"), source, CONFIG)

    assert np.array_equal(k, kv_b[:, :128])
    assert np.array_equal(v, kv_b[:, 128:])


def test_decay_comes_from_the_config() -> None:
    spec = plain_spec("f32", (3,), format="decay", layer=0)

    made = materialize(spec, checkpoint(), CONFIG)

    assert made.dtype == np.float32
    assert np.array_equal(made, CONFIG.decay(0).astype(np.float32))


# ------------------------------------------------------------------------------------------- fp8


def test_a_plain_source_is_quantized() -> None:
    source = checkpoint()

    codes, scales = make_all(fp8_pair(136, 36, DENSE), source)

    want = quantize_fp8_block(source.plain(DENSE)[0])
    assert np.array_equal(codes, want[0])
    assert np.array_equal(scales, want[1])


def test_an_fp8_source_is_taken_unchanged() -> None:
    source = checkpoint("fp8")

    codes, scales = make_all(fp8_pair(136, 36, DENSE), source)

    assert np.array_equal(codes, source.quantized(DENSE)[0])
    assert np.array_equal(scales, source.quantized(DENSE)[1])


def test_fp8_sources_that_end_on_blocks_are_joined_unchanged() -> None:
    source = checkpoint("fp8", WIDE)

    codes, scales = make_all(fp8_pair(1536, 256, GATE, UP), source)

    parts = [source.quantized(name) for name in (GATE, UP)]
    assert np.array_equal(codes, np.concatenate([part[0] for part in parts]))
    assert np.array_equal(scales, np.concatenate([part[1] for part in parts]))


def test_fp8_sources_that_end_within_a_block_are_quantized_together() -> None:
    source = checkpoint("fp8")

    codes, scales = make_all(fp8_pair(400, 136, GATE, UP), source)

    joined = np.concatenate([source.dense(GATE), source.dense(UP)])
    want = quantize_fp8_block(joined)
    assert scales.shape == (4, 2)
    assert np.array_equal(codes, want[0])
    assert np.array_equal(scales, want[1])


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_stacked_experts_have_the_scales_of_each_source(layout: str) -> None:
    """44 rows end within a block, and still each source has blocks of its own."""
    source = checkpoint(layout)

    codes, scales = make_all(fp8_pair(88, 136, *EXPERT_GATE_UP, experts=4), source)

    assert scales.shape == (4, 2, 2)
    stored = checkpoint("fp8")
    for e in range(4):
        parts = [stored.quantized(name.replace("{e}", str(e))) for name in EXPERT_GATE_UP]
        assert np.array_equal(codes[e], np.concatenate([part[0] for part in parts]))
        assert np.array_equal(scales[e], np.concatenate([part[1] for part in parts]))


def test_an_int4_source_is_quantized_from_its_values() -> None:
    source = checkpoint("int4-all")

    codes, scales = make_all(fp8_pair(136, 36, DENSE), source)

    assert np.array_equal(codes, quantize_fp8_block(source.dense(DENSE))[0])
    assert dequantize_fp8_block(codes, scales).shape == (136, 36)


# ------------------------------------------------------------------------------------------- int4


def test_an_int4_source_of_the_same_group_is_taken_unchanged() -> None:
    source = checkpoint("int4")

    packed, scales = make_all(int4_pair(136, 44, 32, *DOWN, experts=4), source)

    for e in range(4):
        want = source.quantized(DOWN[0].replace("{e}", str(e)))
        assert np.array_equal(packed[e], want[0])
        assert np.array_equal(scales[e], want[1])


def test_an_int4_source_of_another_group_is_quantized_from_its_values() -> None:
    source = checkpoint("int4")

    packed, scales = make_all(int4_pair(88, 136, 64, *EXPERT_GATE_UP, experts=4), source)

    name = EXPERT_GATE_UP[0].replace("{e}", "2")
    want = quantize_int4_group(source.dense(name), 64)
    assert np.array_equal(packed[2, :44], want[0])
    assert np.array_equal(scales[2, :44], want[1])


def test_groups_that_span_the_whole_width_are_the_same_group() -> None:
    source = checkpoint("int4-all")  # groups of 128 over 36 columns

    packed, scales = make_all(int4_pair(136, 36, 64, DENSE), source)

    assert np.array_equal(packed, source.quantized(DENSE)[0])
    assert np.array_equal(scales, source.quantized(DENSE)[1])


@given(group=st.sampled_from([8, 24, 32, 128, 256]), expert=st.integers(0, 3))
@settings(max_examples=20)
def test_int4_values_are_within_half_a_step(group: int, expert: int) -> None:
    source = checkpoint()

    packed, scales = make_all(int4_pair(136, 44, group, *DOWN, experts=4), source)

    want = source.dense(DOWN[0].replace("{e}", str(expert)))
    got = dequantize_int4_group(packed[expert], scales[expert], group, 44)
    step = np.repeat(widen_bf16(scales[expert]), group, axis=1)[:, :44]
    assert (np.abs(got - want) <= 0.54 * step).all()


# ----------------------------------------------------------------------------------------- layout


def test_rows_come_in_the_layout_of_the_weight() -> None:
    source = checkpoint()
    spec = plain_spec("f32", (4, 88, 136), *EXPERT_GATE_UP, experts=4)

    plain = materialize(spec, source, CONFIG)
    turned = materialize(replace(spec, layout="interleaved"), source, CONFIG)

    assert np.array_equal(turned[:, 0::2], plain[:, :44])
    assert np.array_equal(turned[:, 1::2], plain[:, 44:])


def test_a_layout_that_a_matrix_cannot_have_is_refused_with_the_reason() -> None:
    spec = plain_spec("bf16", (136, 36), DENSE, layout="tiled")

    with pytest.raises(InputError, match="136 rows are not a multiple of 16"):
        materialize(spec, checkpoint(), CONFIG)


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_a_shared_expert_stands_behind_the_routed_ones(layout: str, tmp_path: Path) -> None:
    source = checkpoint(layout, WIDE)
    last = tuple(f"model.layers.1.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up"))
    specs = [
        replace(spec, layout="tiled_gated" if spec.part == "codes" else "plain")
        for spec in fp8_specs(
            plain_spec("bf16", (17, 256, 256), *EXPERT_GATE_UP, experts=16, last=last)
        )
    ]

    codes, scales = make_all(specs, source)
    stored = open_weights(write_weights(specs, source, WIDE, tmp_path))

    want = [quantized(source, name) for name in last]
    assert np.array_equal(scales[16], np.concatenate([pair[1] for pair in want]))
    rows = np.concatenate([pair[0] for pair in want])
    assert np.array_equal(restore("tiled_gated", codes)[16], rows)
    assert specs[0].type.bind({}) == codes.shape == (17, 256, 256)
    assert np.array_equal(stored["w_codes"], codes)
    assert np.array_equal(stored["w_scale"], scales)


def quantized(source: Source, name: str) -> tuple[Array, Array]:
    stored = source.quantized(name) if source.kind(name) == "fp8_block" else None
    return (stored[0], stored[1]) if stored else quantize_fp8_block(source.dense(name))


# ------------------------------------------------------------------------------------------ costs


def test_codes_and_scales_of_a_matrix_cost_one_reading() -> None:
    source = Counting(checkpoint())
    codes, scales = make_all(fp8_pair(88, 136, *EXPERT_GATE_UP, experts=4), source)

    assert codes.shape == (4, 88, 136)
    assert scales.shape == (4, 2, 2)
    assert len(source.reads) == len(set(source.reads)) == 8


def test_writing_reads_each_matrix_once(tmp_path: Path) -> None:
    source = Counting(checkpoint())

    write_weights(fp8_pair(88, 136, *EXPERT_GATE_UP, experts=4), source, CONFIG, tmp_path)

    assert len(source.reads) == len(set(source.reads)) == 8


# --------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("make", ["materialize", "write"])
def test_a_plan_of_another_config_is_refused(make: str, tmp_path: Path) -> None:
    spec = plain_spec("bf16", (136, 40), DENSE)
    act: Callable[[], object] = (
        (lambda: materialize(spec, checkpoint(), CONFIG))
        if make == "materialize"
        else (lambda: write_weights([spec], checkpoint(), CONFIG, tmp_path / "x"))
    )

    with pytest.raises(CheckpointError, match=r"'w' is \[136, 40\] in the plan.*\[136, 36\]"):
        act()
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_missing_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"model\.x\.weight"):
        materialize(plain_spec("f32", (3,), "model.x.weight"), checkpoint(), CONFIG)


def test_a_source_that_is_not_finite_is_named_with_its_weight() -> None:
    class Broken(Counting):
        def plain(self, name: str) -> tuple[Array, str]:
            bits = self.source.plain(name)[0].copy()
            bits[0, 0] = 0x7F80
            return bits, "bf16"

    with pytest.raises(CheckpointError, match=f"'w_codes' cannot be made of {DENSE}: .*infinite"):
        make_all(fp8_pair(136, 36, DENSE), Broken(checkpoint()))
