"""Opening a checkpoint: every release layout reads alike, and every fault is listed by name."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lingc.checkpoint import (
    SyntheticCheckpoint,
    expected_tensors,
    open_checkpoint,
    validate,
    write_checkpoint,
)
from lingc.checkpoint.directory import INDEX, MTP_FILE
from lingc.checkpoint.tensorfile import Maps, read_header
from lingc.errors import CheckpointError, ConfigError
from lingc.model.config import ModelConfig
from lingc.quantize.formats import round_bf16

Write = Callable[..., Path]
Edit = Callable[[Path, Mapping[str, Any]], None]

LING_TINY = Path(__file__).parents[2] / "artifacts/checkpoints/ling-tiny"

EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
QKV = "model.layers.0.attention.query_key_value.weight"


def _file_of(directory: Path, stored_name: str) -> Path:
    return next(p for p in directory.glob("*.safetensors") if stored_name in read_header(p))


def _stored(directory: Path, stored_name: str) -> NDArray[Any]:
    return Maps().read(read_header(_file_of(directory, stored_name))[stored_name]).copy()


def _index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    value = json.loads((directory / INDEX).read_text())
    change(value["weight_map"])
    (directory / INDEX).write_text(json.dumps(value))


def _problems(directory: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=directory.name) as caught:
        validate(open_checkpoint(directory))
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value.problems


# ---------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("layout", "kinds", "error"),
    [
        ("bf16", {"plain"}, 0),
        ("fp8", {"plain", "fp8_block"}, 2**-4),
        ("int4", {"plain", "int4_group"}, 0.08),
    ],
)
def test_every_layout_reads_as_the_same_model(
    layout: str, kinds: set[str], error: float, written: Write, small: ModelConfig
) -> None:
    source = SyntheticCheckpoint(small, 1)

    checkpoint = open_checkpoint(written(layout))
    validate(checkpoint)

    assert checkpoint.names == source.names
    assert {checkpoint.kind(name) for name in checkpoint.names} == kinds
    for name in checkpoint.names:
        want, got = source.dense(name), checkpoint.dense(name)
        assert got.shape == want.shape == checkpoint.shape(name)
        assert got.flags.writeable
        assert np.abs(got - want).max() <= error * np.abs(want).max()


def test_the_shipped_checkpoint_is_sound() -> None:
    checkpoint = open_checkpoint(LING_TINY)
    validate(checkpoint)

    assert len(checkpoint.names) == 509
    assert checkpoint.has_mtp
    assert checkpoint.generation_config()["eos_token_id"] == [4081, 4084]
    assert [path.name for path in checkpoint.tokenizer_files()] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]


def test_the_full_size_model_has_the_published_tensors_and_parameters() -> None:
    config = ModelConfig.from_file(LING_TINY.with_name("ling-2.6-flash"))

    shapes = expected_tensors(config).values()

    assert len(shapes) == 25_015
    assert sum(int(np.prod(shape)) for shape in shapes) == 107_494_409_216


def test_a_quantized_tensor_is_given_as_it_is_stored(written: Write) -> None:
    checkpoint = open_checkpoint(written("int4"))

    packed, scales, group = checkpoint.quantized(EXPERT)

    assert packed.shape == (44, 17)
    assert scales.shape == (44, 5)
    assert group == 32


def test_layouts_may_be_mixed_tensor_by_tensor(written: Write, edit: Edit) -> None:
    fp8, int4 = written("fp8"), written("int4")
    suffixes = ("_packed", "_scale", "_shape")
    tags = dict(zip(suffixes, ("I32", "BF16", "I64"), strict=True))
    file = _file_of(fp8, EXPERT)
    edit(
        file,
        {EXPERT: None, EXPERT + "_scale_inv": None}
        | {EXPERT + s: (tags[s], _stored(int4, EXPERT + s)) for s in suffixes},
    )
    (fp8 / INDEX).unlink()
    shutil.copy(int4 / "config.json", fp8)  # names the group size

    checkpoint = open_checkpoint(fp8)

    assert checkpoint.kind(EXPERT) == "int4_group"
    assert checkpoint.kind(QKV) == "fp8_block"
    assert np.array_equal(checkpoint.dense(EXPERT), open_checkpoint(int4).dense(EXPERT))


@pytest.mark.parametrize("layout", ["fp8", "int4"])
def test_a_config_that_says_nothing_of_quantization_is_enough(
    layout: str, small: ModelConfig, tmp_path: Path
) -> None:
    raw = {**small.raw, "hidden_size": 128, "moe_intermediate_size": 64}
    source = SyntheticCheckpoint(ModelConfig.from_dict(raw), 1)
    path = write_checkpoint(source, tmp_path / "x", layout=layout)
    want = open_checkpoint(path).dense(EXPERT)
    (path / "config.json").write_text(json.dumps(raw))

    assert np.array_equal(open_checkpoint(path).dense(EXPERT), want)


def test_f32_tensors_are_read_as_they_are(written: Write, edit: Edit) -> None:
    path = written()
    values = np.full((108, 136), 1 / 3, np.float32)
    edit(_file_of(path, QKV), {QKV: ("F32", values)})

    checkpoint = open_checkpoint(path)

    assert np.array_equal(checkpoint.dense(QKV), values)
    assert checkpoint.plain(QKV)[1] == "f32"


# ------------------------------------------------------------------------------------------ files


def test_the_mtp_file_is_read_whether_the_index_lists_it_or_not(
    written: Write, tmp_path: Path, small: ModelConfig
) -> None:
    listed = open_checkpoint(written("bf16"))
    unlisted = open_checkpoint(
        write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / "u", index_mtp=False)
    )

    assert listed.has_mtp
    assert unlisted.has_mtp
    assert unlisted.names == listed.names
    assert MTP_FILE not in (unlisted.path / INDEX).read_text()


def test_mtp_weights_may_be_left_out_whatever_the_config_says(written: Write) -> None:
    checkpoint = open_checkpoint(written("int4", keep_mtp=False))

    assert checkpoint.config.has_mtp
    assert not checkpoint.has_mtp


def test_mtp_weights_may_not_be_left_out_in_part(written: Write, edit: Edit) -> None:
    path = written(index_mtp=False)
    edit(path / MTP_FILE, {"model.layers.3.enorm.weight": None})

    assert _problems(path) == ("tensor 'model.layers.3.enorm.weight' is missing",)


def test_without_an_index_every_file_is_read(written: Write) -> None:
    path = written()
    before = open_checkpoint(path).identity()
    (path / INDEX).unlink()

    assert open_checkpoint(path).identity() == before


def test_names_that_every_loader_skips_are_skipped(written: Write, edit: Edit) -> None:
    path = written()
    one = ("F32", np.ones(1, np.float32))
    edit(path / MTP_FILE, {"model.layers.0.attention.slope": one, "model.mtp.x.weight": one})

    validate(open_checkpoint(path))


def test_identity_depends_on_values_and_not_on_files(
    written: Write, small: ModelConfig, tmp_path: Path, edit: Edit
) -> None:
    path = written()
    one_file = write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / "one")
    other = write_checkpoint(SyntheticCheckpoint(small, 2), tmp_path / "other")
    identity = open_checkpoint(path).identity()

    assert open_checkpoint(one_file).identity() == identity
    assert open_checkpoint(other).identity() != identity
    values = _stored(one_file, "model.norm.weight")
    values[0] += 1
    edit(_file_of(one_file, "model.norm.weight"), {"model.norm.weight": ("BF16", values)})
    assert open_checkpoint(one_file).identity() != identity


# --------------------------------------------------------------------------------- what is refused


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no directory '.*nowhere'"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_directory_without_tensors_is_refused(written: Write) -> None:
    path = written()
    for file in [*path.glob("*.safetensors"), path / INDEX]:
        file.unlink()

    assert "there is no '*.safetensors' file" in _problems(path)


def test_a_missing_shard_is_named_and_its_tensors_are_counted_once(written: Write) -> None:
    path = written()
    lost = _file_of(path, QKV)
    count = len(read_header(lost))
    lost.unlink()

    assert _problems(path) == (f"{lost.name!r} is missing; the index puts {count} tensors there",)


@pytest.mark.parametrize("index", ["index", "no index"])
def test_a_truncated_shard_is_named_alone(index: str, written: Write) -> None:
    path = written()
    shard = _file_of(path, QKV)
    shard.write_bytes(shard.read_bytes()[:-1])
    if index == "no index":
        (path / INDEX).unlink()

    (problem,) = _problems(path)

    assert problem.startswith(f"{shard.name!r} is truncated: its tensors end at byte")


def test_an_index_that_names_what_a_shard_lacks_is_refused(written: Write, edit: Edit) -> None:
    path = written()
    shard = _file_of(path, QKV)
    edit(shard, {QKV: None})

    assert _problems(path) == (f"tensor {QKV!r} is not in {shard.name!r}, where the index puts it",)


def test_a_tensor_that_the_index_does_not_name_is_refused(written: Write) -> None:
    path = written()
    shard = _file_of(path, QKV)
    _index(path, lambda names: names.pop(QKV))

    assert f"tensor {QKV!r} of {shard.name!r} is not in the index" in _problems(path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/../x.safetensors", "x.bin", "..", ""]
)
def test_an_index_cannot_lead_out_of_the_directory(name: str, written: Write) -> None:
    path = written()
    shutil.copy(_file_of(path, QKV), path.parent / "x.safetensors")
    _index(path, lambda names: names.update({QKV: name}))

    assert f"the index names the file {name!r}; one in its own folder is due" in _problems(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not sound JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is given twice"),
    ],
)
def test_a_broken_index_is_refused(text: str, problem: str, written: Write) -> None:
    path = written()
    (path / INDEX).write_text(text)

    assert any(INDEX in line and problem in line for line in _problems(path))


def test_a_tensor_in_two_files_is_refused(written: Write) -> None:
    path = written()
    shutil.copy(path / MTP_FILE, path / "again.safetensors")
    (path / INDEX).unlink()

    line = f"tensor 'model.layers.3.enorm.weight' stands in 'again.safetensors' and in {MTP_FILE!r}"
    assert line in _problems(path)


def test_an_extra_tensor_is_refused(written: Write, edit: Edit) -> None:
    path = written(index_mtp=False)
    edit(path / MTP_FILE, {"model.layers.9.enorm.weight": ("BF16", np.ones(136, np.uint16))})

    assert _problems(path) == (
        "tensor 'model.layers.9.enorm.weight' is not one that this config has",
    )


def test_many_missing_tensors_of_a_kind_take_one_line(written: Write) -> None:
    path = written()
    (path / INDEX).unlink()
    for file in path.glob("model-0*.safetensors"):
        file.unlink()

    assert _problems(path) == (
        "tensor 'model.word_embeddings.weight' is missing, as are 61 more, up to 'lm_head.weight'",
    )


FP8_DOWN = "model.layers.0.mlp.down_proj.weight"
BAD_TENSORS = [
    (
        "bf16",
        QKV,
        ("BF16", np.ones((108, 135), np.uint16)),
        r"is \[108, 135\].*\[108, 136\] is due",
    ),
    (
        "bf16",
        QKV,
        ("BF16", np.ones((136, 108), np.uint16)),
        r"is \[136, 108\].*\[108, 136\] is due",
    ),
    ("bf16", QKV, ("F16", np.ones((108, 136), np.float16)), "is F16.*BF16 or F32 is due"),
    ("bf16", QKV, ("I32", np.ones((108, 136), np.int32)), "is I32.*BF16 or F32 is due"),
    ("bf16", QKV, ("F8_E4M3", np.ones((108, 136), np.uint8)), "'weight_scale_inv' beside it"),
    ("fp8", FP8_DOWN, ("I8", np.ones((136, 200), np.int8)), "is I8.*F8_E4M3 is due"),
    ("fp8", FP8_DOWN + "_scale_inv", None, "F8_E4M3 and has no 'weight_scale_inv'"),
    ("fp8", FP8_DOWN, None, "has weight_scale_inv beside each other, which is no layout"),
    (
        "fp8",
        FP8_DOWN + "_scale_inv",
        ("F32", np.ones((1, 1), np.float32)),
        r"'weight_scale_inv' that is \[1, 1\].*\[2, 2\] is due",
    ),
    (
        "fp8",
        FP8_DOWN + "_scale_inv",
        ("BF16", np.ones((2, 2), np.uint16)),
        "'weight_scale_inv' that is BF16.*F32 is due",
    ),
    ("fp8", "model.norm.weight_scale_inv", ("F32", np.ones((2, 1), np.float32)), "is no matrix"),
    ("int4", EXPERT + "_shape", None, "weight_packed, weight_scale beside each other"),
    (
        "int4",
        EXPERT + "_packed",
        ("I32", np.ones((44, 16), np.int32)),
        r"'weight_packed' that is \[44, 16\].*\[44, 17\] is due",
    ),
    (
        "int4",
        EXPERT + "_scale",
        ("BF16", np.ones((44, 4), np.uint16)),
        r"'weight_scale' that is \[44, 4\].*\[44, 5\] is due",
    ),
    ("int4", EXPERT + "_shape", ("I64", np.array([136, 44])), r"says \[136, 44\], \[44, 136\] is"),
]


@pytest.mark.parametrize(
    ("layout", "name", "change", "problem"),
    BAD_TENSORS,
    ids=[f"{layout}-{i}" for i, (layout, *_) in enumerate(BAD_TENSORS)],
)
def test_a_wrong_tensor_is_named_with_what_is_due(
    layout: str, name: str, change: Any, problem: str, written: Write, edit: Edit
) -> None:
    path = written(layout)
    logical = name.partition(".weight")[0] + ".weight"
    holder = next(
        p for p in path.glob("*.safetensors") if any(n.startswith(logical) for n in read_header(p))
    )
    edit(holder, {name: change})
    (path / INDEX).unlink()

    problems = _problems(path)

    assert len(problems) == 1
    assert re.match(rf"tensor {logical!r}.*{problem}", problems[0])


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.nan, "NaN"),
        (np.inf, "infinite"),
        (0.0, "zero or negative"),
        (-0.5, "zero or negative"),
    ],
)
@pytest.mark.parametrize("layout", ["fp8", "int4"])
def test_a_scale_that_no_weight_can_have_is_refused(
    layout: str, value: float, problem: str, written: Write, edit: Edit
) -> None:
    path = written(layout)
    name = EXPERT + ("_scale_inv" if layout == "fp8" else "_scale")
    scales = _stored(path, name)
    bad = np.array([value], np.float32)
    scales[-1, -1] = bad[0] if layout == "fp8" else round_bf16(bad)[0]
    edit(_file_of(path, name), {name: ("F32" if layout == "fp8" else "BF16", scales)})

    assert _problems(path) == (f"tensor {EXPERT!r} has a scale that is {problem}",)


def test_a_vector_that_is_not_finite_is_refused(written: Write, edit: Edit) -> None:
    path = written()
    name = "model.layers.1.mlp.gate.expert_bias"
    edit(_file_of(path, name), {name: ("F32", np.array([0, np.nan, 0, 0], np.float32))})

    assert _problems(path) == (f"tensor {name!r} has a value that is NaN or infinite",)


def test_all_faults_are_told_at_once(written: Write, edit: Edit) -> None:
    path = written("fp8")
    lost = _file_of(path, "lm_head.weight")
    scale = FP8_DOWN + "_scale_inv"
    edit(_file_of(path, scale), {scale: ("F32", np.full((2, 2), np.nan, np.float32))})
    edit(path / MTP_FILE, {"extra.weight": ("F32", np.ones(3, np.float32))})
    edit(_file_of(path, QKV), {QKV: ("F8_E4M3", np.ones((1, 1), np.uint8))})
    lost.unlink()

    problems = "\n".join(_problems(path))

    for part in (
        f"{lost.name!r} is missing",
        "'extra.weight' of 'model-mtp-layer.safetensors' is not in the index",
        "'extra.weight' is not one that this config has",
        f"tensor {QKV!r} is [1, 1]",
        f"tensor {FP8_DOWN!r} has a scale that is NaN",
    ):
        assert part in problems


def test_a_tensor_that_the_plan_wants_and_nobody_has_is_named(written: Write) -> None:
    checkpoint = open_checkpoint(written())

    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.layers\.77\.x'"):
        checkpoint.dense("model.layers.77.x")


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_broken_generation_config_is_refused(text: str, written: Write) -> None:
    path = written()
    (path / "generation_config.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_checkpoint(path).generation_config()
