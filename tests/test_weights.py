"""Weights of a plan: taken unchanged where they can be, rounded once where not, the same bytes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lingc.checkpoint import SyntheticCheckpoint, open_checkpoint, write_checkpoint
from lingc.checkpoint.source import Source
from lingc.errors import CheckpointError, InputError, IntegrityError
from lingc.model.config import ModelConfig
from lingc.plan import TensorType, WeightSpec
from lingc.quantize.formats import (
    dequantize_fp8_block,
    dequantize_int4_group,
    quantize_fp8_block,
    quantize_int4_group,
    round_bf16,
    widen_bf16,
)
from lingc.quantize.layouts import restore
from lingc.quantize.stored import fp8_specs, int4_specs
from lingc.weights import CheckpointWeights, materialize, open_weights, write_weights

Array = NDArray[Any]

LING_TINY = Path(__file__).parents[1] / "artifacts/checkpoints/ling-tiny"
RAW = ModelConfig.from_file(LING_TINY).raw

# hidden 136 is no multiple of a block or a nibble group, 200 ends in a partial block, 44 is short.
HEADS = ("num_attention_heads", "num_key_value_heads", "num_kv_heads_for_linear_attn")
WIDTHS = ("moe_intermediate_size", "moe_shared_expert_intermediate_size")
SMALL = {
    **dict.fromkeys(HEADS, 3),
    **dict.fromkeys(WIDTHS, 44),
    "hidden_size": 136,
    "num_hidden_layers": 3,
    "layer_group_size": 2,
    "head_dim": 12,
    "group_norm_size": 3,
    "intermediate_size": 200,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
CONFIG = ModelConfig.from_dict({**RAW, **SMALL})
# Every width a multiple of 128.
WIDE = ModelConfig.from_dict({**RAW, "num_hidden_layers": 4})

DENSE = "model.layers.0.attention.dense.weight"
GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
EXPERT_GATE_UP = tuple(
    f"model.layers.1.mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up")
)
DOWN = ("model.layers.1.mlp.experts.{e}.down_proj.weight",)
KV_B = "model.layers.1.attention.kv_b_proj.weight"


def _plain(dtype: str, shape: Sequence[int], *sources: str, **changes: Any) -> WeightSpec:
    return WeightSpec(name="w", type=TensorType(dtype, tuple(shape)), sources=sources, **changes)


def _fp8(rows: int, columns: int, *sources: str, experts: int = 0) -> tuple[WeightSpec, ...]:
    """Codes and scales; `rows` is that of all sources together."""
    shape = (experts, rows, columns) if experts else (rows, columns)
    return fp8_specs(_plain("bf16", shape, *sources, experts=experts))


def _int4(
    rows: int, columns: int, group: int, *sources: str, experts: int = 0
) -> tuple[WeightSpec, ...]:
    shape = (experts, rows, columns) if experts else (rows, columns)
    return int4_specs(_plain("bf16", shape, *sources, experts=experts), group)


def _made(specs: Sequence[WeightSpec], source: Source) -> list[Array]:
    weights = CheckpointWeights(specs, source, source.config)
    return [weights[spec.name] for spec in specs]


def _source(layout: str = "bf16", config: ModelConfig = CONFIG) -> SyntheticCheckpoint:
    return SyntheticCheckpoint(config, 1, layout)


class Counting:
    """A source that counts how often each tensor is read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.reads: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.source, name)
        if name not in ("dense", "plain", "quantized"):
            return value

        def read(tensor: str) -> Any:
            self.reads.append(tensor)
            return value(tensor)

        return read


# ------------------------------------------------------------------------------------------ plain


def test_a_bf16_weight_is_taken_as_it_is() -> None:
    source = _source()

    made = materialize(_plain("bf16", (136, 36), DENSE), source, CONFIG)

    assert np.array_equal(made, source.plain(DENSE)[0])


def test_an_f32_weight_is_widened() -> None:
    source = _source()

    made = materialize(_plain("f32", (136, 36), DENSE), source, CONFIG)

    assert np.array_equal(made, source.dense(DENSE))


@pytest.mark.parametrize("layout", ["fp8", "int4-all"])
def test_a_plain_weight_of_a_quantized_source_is_dequantized(layout: str) -> None:
    source = _source(layout)

    f32 = materialize(_plain("f32", (136, 36), DENSE), source, CONFIG)
    bf16 = materialize(_plain("bf16", (136, 36), DENSE), source, CONFIG)

    assert source.kind(DENSE) != "plain"
    assert np.array_equal(f32, source.dense(DENSE))
    assert np.array_equal(bf16, round_bf16(source.dense(DENSE)))


def test_sources_are_joined_along_the_output_axis() -> None:
    source = _source()

    made = materialize(_plain("f32", (400, 136), GATE, UP), source, CONFIG)

    assert np.array_equal(made, np.concatenate([source.dense(GATE), source.dense(UP)]))


def test_experts_are_stacked() -> None:
    source = _source()
    spec = _plain("bf16", (4, 88, 136), *EXPERT_GATE_UP, experts=4)

    made = materialize(spec, source, CONFIG)

    for e in range(4):
        names = [name.replace("{e}", str(e)) for name in EXPERT_GATE_UP]
        want = np.concatenate([source.plain(name)[0] for name in names])
        assert np.array_equal(made[e], want)


def test_absorbed_weights_are_the_halves_of_each_head() -> None:
    source = _source()
    kv_b = source.plain(KV_B)[0].reshape(3, 256, 512)
    spec = _plain("bf16", (3, 128, 512), KV_B, split=(3, 128, 128))

    k = materialize(replace(spec, take="absorb_k"), source, CONFIG)
    v = materialize(replace(spec, take="absorb_v"), source, CONFIG)

    assert np.array_equal(k, kv_b[:, :128])
    assert np.array_equal(v, kv_b[:, 128:])


def test_decay_comes_from_the_config() -> None:
    spec = _plain("f32", (3,), format="decay", layer=0)

    made = materialize(spec, _source(), CONFIG)

    assert made.dtype == np.float32
    assert np.array_equal(made, CONFIG.decay(0).astype(np.float32))


# ------------------------------------------------------------------------------------------- fp8


def test_a_plain_source_is_quantized() -> None:
    source = _source()

    codes, scales = _made(_fp8(136, 36, DENSE), source)

    want = quantize_fp8_block(source.plain(DENSE)[0])
    assert np.array_equal(codes, want[0])
    assert np.array_equal(scales, want[1])


def test_an_fp8_source_is_taken_unchanged() -> None:
    source = _source("fp8")

    codes, scales = _made(_fp8(136, 36, DENSE), source)

    assert np.array_equal(codes, source.quantized(DENSE)[0])
    assert np.array_equal(scales, source.quantized(DENSE)[1])


def test_fp8_sources_that_end_on_blocks_are_joined_unchanged() -> None:
    source = _source("fp8", WIDE)

    codes, scales = _made(_fp8(1536, 256, GATE, UP), source)

    parts = [source.quantized(name) for name in (GATE, UP)]
    assert np.array_equal(codes, np.concatenate([part[0] for part in parts]))
    assert np.array_equal(scales, np.concatenate([part[1] for part in parts]))


def test_fp8_sources_that_end_within_a_block_are_quantized_together() -> None:
    source = _source("fp8")

    codes, scales = _made(_fp8(400, 136, GATE, UP), source)

    joined = np.concatenate([source.dense(GATE), source.dense(UP)])
    want = quantize_fp8_block(joined)
    assert scales.shape == (4, 2)
    assert np.array_equal(codes, want[0])
    assert np.array_equal(scales, want[1])


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_stacked_experts_have_the_scales_of_each_source(layout: str) -> None:
    """44 rows end within a block, and still each source has blocks of its own."""
    source = _source(layout)

    codes, scales = _made(_fp8(88, 136, *EXPERT_GATE_UP, experts=4), source)

    assert scales.shape == (4, 2, 2)
    stored = _source("fp8")
    for e in range(4):
        parts = [stored.quantized(name.replace("{e}", str(e))) for name in EXPERT_GATE_UP]
        assert np.array_equal(codes[e], np.concatenate([part[0] for part in parts]))
        assert np.array_equal(scales[e], np.concatenate([part[1] for part in parts]))


def test_an_int4_source_is_quantized_from_its_values() -> None:
    source = _source("int4-all")

    codes, scales = _made(_fp8(136, 36, DENSE), source)

    assert np.array_equal(codes, quantize_fp8_block(source.dense(DENSE))[0])
    assert dequantize_fp8_block(codes, scales).shape == (136, 36)


# ------------------------------------------------------------------------------------------- int4


def test_an_int4_source_of_the_same_group_is_taken_unchanged() -> None:
    source = _source("int4")

    packed, scales = _made(_int4(136, 44, 32, *DOWN, experts=4), source)

    for e in range(4):
        want = source.quantized(DOWN[0].replace("{e}", str(e)))
        assert np.array_equal(packed[e], want[0])
        assert np.array_equal(scales[e], want[1])


def test_an_int4_source_of_another_group_is_quantized_from_its_values() -> None:
    source = _source("int4")

    packed, scales = _made(_int4(88, 136, 64, *EXPERT_GATE_UP, experts=4), source)

    name = EXPERT_GATE_UP[0].replace("{e}", "2")
    want = quantize_int4_group(source.dense(name), 64)
    assert np.array_equal(packed[2, :44], want[0])
    assert np.array_equal(scales[2, :44], want[1])


def test_groups_that_span_the_whole_width_are_the_same_group() -> None:
    source = _source("int4-all")  # groups of 128 over 36 columns

    packed, scales = _made(_int4(136, 36, 64, DENSE), source)

    assert np.array_equal(packed, source.quantized(DENSE)[0])
    assert np.array_equal(scales, source.quantized(DENSE)[1])


@given(group=st.sampled_from([8, 24, 32, 128, 256]), expert=st.integers(0, 3))
@settings(max_examples=20)
def test_int4_values_are_within_half_a_step(group: int, expert: int) -> None:
    source = _source()

    packed, scales = _made(_int4(136, 44, group, *DOWN, experts=4), source)

    want = source.dense(DOWN[0].replace("{e}", str(expert)))
    got = dequantize_int4_group(packed[expert], scales[expert], group, 44)
    step = np.repeat(widen_bf16(scales[expert]), group, axis=1)[:, :44]
    assert (np.abs(got - want) <= 0.54 * step).all()


# ----------------------------------------------------------------------------------------- layout


def test_rows_come_in_the_layout_of_the_weight() -> None:
    source = _source()
    spec = _plain("f32", (4, 88, 136), *EXPERT_GATE_UP, experts=4)

    plain = materialize(spec, source, CONFIG)
    turned = materialize(replace(spec, layout="interleaved"), source, CONFIG)

    assert np.array_equal(turned[:, 0::2], plain[:, :44])
    assert np.array_equal(turned[:, 1::2], plain[:, 44:])


def test_a_layout_that_a_matrix_cannot_have_is_refused_with_the_reason() -> None:
    spec = _plain("bf16", (136, 36), DENSE, layout="tiled")

    with pytest.raises(InputError, match="136 rows are not a multiple of 16"):
        materialize(spec, _source(), CONFIG)


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_a_shared_expert_stands_behind_the_routed_ones(layout: str, tmp_path: Path) -> None:
    source = _source(layout, WIDE)
    last = tuple(f"model.layers.1.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up"))
    specs = [
        replace(spec, layout="tiled_gated" if spec.part == "codes" else "plain")
        for spec in fp8_specs(
            _plain("bf16", (17, 256, 256), *EXPERT_GATE_UP, experts=16, last=last)
        )
    ]

    codes, scales = _made(specs, source)
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
    source = Counting(_source())
    codes, scales = _made(_fp8(88, 136, *EXPERT_GATE_UP, experts=4), source)

    assert codes.shape == (4, 88, 136)
    assert scales.shape == (4, 2, 2)
    assert len(source.reads) == len(set(source.reads)) == 8


def test_writing_reads_each_matrix_once(tmp_path: Path) -> None:
    source = Counting(_source())

    write_weights(_fp8(88, 136, *EXPERT_GATE_UP, experts=4), source, CONFIG, tmp_path)

    assert len(source.reads) == len(set(source.reads)) == 8


# ---------------------------------------------------------------------------------------- writing


def _plan() -> list[WeightSpec]:
    """A weight of every kind, with odd sizes."""
    fp8 = _fp8(88, 136, *EXPERT_GATE_UP, experts=4)
    int4 = _int4(136, 44, 32, *DOWN, experts=4)
    return [
        *(replace(spec, name=f"experts.{spec.name}") for spec in fp8),
        *(replace(spec, name=f"down.{spec.name}") for spec in int4),
        replace(_plain("bf16", (136,), "model.norm.weight"), name="norm"),
        replace(_plain("f32", (3,), format="decay", layer=0), name="decay"),
        replace(_plain("bf16", (136, 36), DENSE), name="dense"),
        replace(_plain("f32", (400, 136), GATE, UP, layout="interleaved"), name="gate_up"),
    ]


def test_what_is_written_is_what_is_made(tmp_path: Path) -> None:
    source, specs = _source(), _plan()

    weights = open_weights(write_weights(specs, source, CONFIG, tmp_path))

    made = CheckpointWeights(specs, source, CONFIG)
    assert set(weights) == set(made) == {spec.name for spec in specs}
    for name, values in made.items():
        assert np.array_equal(weights[name], values), name
        assert weights[name].dtype == values.dtype
        assert not weights[name].flags.writeable


def test_the_same_weights_give_the_same_files(tmp_path: Path) -> None:
    source, specs = _source(), _plan()

    one = write_weights(specs, source, CONFIG, tmp_path / "a" / "weights", shard_bytes=100_000)
    two = write_weights(specs[::-1], source, CONFIG, tmp_path / "b", shard_bytes=100_000)

    assert len(one) > 2
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_file_is_named_by_its_digest(tmp_path: Path) -> None:
    for path in write_weights(_plan(), _source(), CONFIG, tmp_path, shard_bytes=100_000):
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".safetensors"


def test_files_are_cut_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    paths = write_weights(_plan(), _source(), CONFIG, tmp_path, shard_bytes=100_000)

    sizes = {path: path.stat().st_size for path in paths}
    assert all(size < 102_000 or len(open_weights([path])) == 1 for path, size in sizes.items())


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    (path,) = write_weights(_plan(), _source(), CONFIG, tmp_path)

    with safetensors.safe_open(path, "numpy") as file:
        names = set(file.keys())
        decay = file.get_tensor("decay")
    assert names == {spec.name for spec in _plan()}
    assert np.array_equal(decay, CONFIG.decay(0).astype(np.float32))


def test_dtype_tags_are_those_of_the_plan(tmp_path: Path) -> None:
    weights = open_weights(write_weights(_plan(), _source(), CONFIG, tmp_path))

    assert {name: tensor.dtype for name, tensor in weights.tensors.items()} == {
        "decay": "F32",
        "dense": "BF16",
        "down.w_packed": "I32",
        "down.w_scale": "BF16",
        "experts.w_codes": "F8_E4M3",
        "experts.w_scale": "F32",
        "gate_up": "F32",
        "norm": "BF16",
    }


def test_what_a_directory_holds_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")

    paths = write_weights(_plan(), _source(), CONFIG, tmp_path)
    again = write_weights(_plan(), _source(), CONFIG, tmp_path)

    assert again == paths
    assert {path.name for path in tmp_path.iterdir()} == {"mine", *(path.name for path in paths)}


def test_nothing_to_write_gives_no_file(tmp_path: Path) -> None:
    assert write_weights([], _source(), CONFIG, tmp_path / "x") == []


def test_progress_ends_where_it_must(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    write_weights(_plan(), _source(), CONFIG, tmp_path, lambda *pair: told.append(pair))

    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize("layout", ["bf16", "fp8", "int4"])
def test_a_checkpoint_on_the_disk_gives_the_same_weights(layout: str, tmp_path: Path) -> None:
    source = _source(layout)
    stored = open_checkpoint(write_checkpoint(source, tmp_path / "c", layout=layout))

    one = write_weights(_plan(), source, CONFIG, tmp_path / "a")
    two = write_weights(_plan(), stored, CONFIG, tmp_path / "b")

    assert [path.name for path in one] == [path.name for path in two]


# --------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("make", ["materialize", "write"])
def test_a_plan_of_another_config_is_refused(make: str, tmp_path: Path) -> None:
    spec = _plain("bf16", (136, 40), DENSE)
    act: Callable[[], object] = (
        (lambda: materialize(spec, _source(), CONFIG))
        if make == "materialize"
        else (lambda: write_weights([spec], _source(), CONFIG, tmp_path / "x"))
    )

    with pytest.raises(CheckpointError, match=r"'w' is \[136, 40\] in the plan.*\[136, 36\]"):
        act()
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_missing_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"model\.x\.weight"):
        materialize(_plain("f32", (3,), "model.x.weight"), _source(), CONFIG)


def test_a_source_that_is_not_finite_is_named_with_its_weight() -> None:
    class Broken(Counting):
        def plain(self, name: str) -> tuple[Array, str]:
            bits = self.source.plain(name)[0].copy()
            bits[0, 0] = 0x7F80
            return bits, "bf16"

    with pytest.raises(CheckpointError, match=f"'w_codes' cannot be made of {DENSE}: .*infinite"):
        _made(_fp8(136, 36, DENSE), Broken(_source()))


def test_damaged_files_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (path,) = write_weights(_plan(), _source(), CONFIG, tmp_path)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(IntegrityError, match=f"'{path.name}' is truncated") as caught:
        open_weights([path])
    assert caught.value.exit_code == 6


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="'gone' cannot be read: No such file"):
        open_weights([tmp_path / "gone"])


def test_a_weight_in_two_files_is_refused(tmp_path: Path) -> None:
    (path,) = write_weights(_plan(), _source(), CONFIG, tmp_path)
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())

    with pytest.raises(IntegrityError, match=r"stands in .* and in 'copy'"):
        open_weights([path, copy])
