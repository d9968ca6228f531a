"""Writing checkpoints: the release layouts bit for bit, whole or not at all."""

import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingc.checkpoint import (
    Checkpoint,
    SyntheticCheckpoint,
    make_twin,
    open_checkpoint,
    validate,
    write_checkpoint,
)
from lingc.checkpoint.convert import to_rounded
from lingc.checkpoint.directory import INDEX, MTP_FILE
from lingc.checkpoint.tensorfile import Maps, Stored, TensorWriter, read_header
from lingc.errors import CheckpointError, ResourceError, UsageError
from lingc.model.config import ModelConfig
from lingc.quantize.formats import quantize_fp8_block, round_bf16

Write = Callable[..., Path]
Edit = Callable[[Path, Mapping[str, Any]], None]

LING_TINY = Path(__file__).parents[2] / "artifacts/checkpoints/ling-tiny"

# SHA-256 of tensors of two reference checkpoints of ling-tiny, quantized by other programs: the
# FP8 one with torch, the INT4 one checked with the unpacking routine of compressed-tensors 0.20.0.
# All 942 tensors of the one and all 1,115 of the other were found equal to the twins' when these
# were noted.
REFERENCE = [
    ("fp8", "model.layers.0.mlp.down_proj.weight", "0c754b65bf836f3c"),
    ("fp8", "model.layers.0.mlp.down_proj.weight_scale_inv", "acf7b32ac088160e"),
    ("fp8", "model.layers.4.mlp.experts.7.up_proj.weight", "504ad679db7b9712"),
    ("fp8", "model.layers.3.attention.dense.weight_scale_inv", "c406449b1b0eacad"),
    ("fp8", "model.layers.8.eh_proj.weight", "06feff0c7056ca5b"),
    ("int4", "model.layers.1.mlp.experts.0.gate_proj.weight_packed", "ecbba01d3f89c636"),
    ("int4", "model.layers.1.mlp.experts.0.gate_proj.weight_scale", "705012c4f3a9e36d"),
    ("int4", "model.layers.7.mlp.experts.15.down_proj.weight_packed", "1f2c3a652f996efa"),
    ("int4", "model.layers.7.mlp.experts.15.down_proj.weight_scale", "2c0164870adcdba9"),
]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Checkpoint]:
    cache = tmp_path_factory.mktemp("cache")
    source = open_checkpoint(LING_TINY)
    return {layout: make_twin(source, layout, cache) for layout in ("bf16", "fp8", "int4")}


def _tensors(directory: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= read_header(path)
    return found


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ------------------------------------------------------------------------------------------ twins


@pytest.mark.parametrize(("layout", "name", "digest"), REFERENCE)
def test_a_twin_has_the_bytes_of_the_reference(
    layout: str, name: str, digest: str, twins: Mapping[str, Checkpoint]
) -> None:
    tensor = Maps().read(_tensors(twins[layout].path)[name])

    assert hashlib.sha256(tensor.tobytes()).hexdigest().startswith(digest)


def test_twins_hold_what_the_releases_hold(twins: Mapping[str, Checkpoint]) -> None:
    for twin in twins.values():
        validate(twin)

    assert {layout: len(_tensors(twin.path)) for layout, twin in twins.items()} == {
        "bf16": 509,
        "fp8": 942,
        "int4": 1115,
    }
    assert {layout: twin.has_mtp for layout, twin in twins.items()} == {
        "bf16": True,
        "fp8": True,
        "int4": False,
    }


def test_a_bf16_twin_is_the_same_weights(twins: Mapping[str, Checkpoint]) -> None:
    assert twins["bf16"].identity() == open_checkpoint(LING_TINY).identity()


def test_the_config_says_how_a_twin_is_stored(twins: Mapping[str, Checkpoint]) -> None:
    fp8, int4 = twins["fp8"].config.quantization, twins["int4"].config.quantization

    assert fp8 is not None
    assert fp8["weight_block_size"] == [128, 128]
    assert fp8["modules_to_not_convert"][:3] == [
        "lm_head",
        "model.word_embeddings",
        "model.layers.1.mlp.gate",
    ]
    assert len(fp8["modules_to_not_convert"]) == 22
    assert int4 is not None
    assert int4["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert r"re:model\.layers\.8\..*" in int4["ignore"]
    assert twins["bf16"].config.quantization is None
    assert twins["fp8"].config.raw == open_checkpoint(LING_TINY).config.raw


def test_a_twin_is_made_once(tmp_path: Path, small: ModelConfig) -> None:
    source = open_checkpoint(write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / "x"))
    first = make_twin(source, "fp8", tmp_path / "cache")
    before = first.path.stat().st_mtime_ns

    again = make_twin(source, "fp8", tmp_path / "cache")

    assert again.path == first.path
    assert again.path.stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------------- writing


def test_tokenizer_and_generation_config_come_along(twins: Mapping[str, Checkpoint]) -> None:
    source, twin = open_checkpoint(LING_TINY), twins["fp8"]

    assert twin.generation_config() == source.generation_config()
    assert [path.read_bytes() for path in twin.tokenizer_files()] == [
        path.read_bytes() for path in source.tokenizer_files()
    ]


@pytest.mark.parametrize("layout", ["bf16", "fp8", "int4"])
def test_the_same_weights_give_the_same_bytes(
    layout: str, tmp_path: Path, small: ModelConfig
) -> None:
    one, two = (
        write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / name, layout=layout)
        for name in ("one", "two")
    )

    assert _content(one) == _content(two)


@pytest.mark.parametrize("layout", ["fp8", "int4"])
def test_what_is_quantized_already_is_copied_unchanged(
    layout: str, written: Write, tmp_path: Path, edit: Edit
) -> None:
    """Values that no rounding gives show that nothing was rounded again."""
    path = written(layout)
    name = "model.layers.1.mlp.experts.2.down_proj.weight" + ("" if layout == "fp8" else "_packed")
    file = next(p for p in path.glob("*.safetensors") if name in read_header(p))
    values = Maps().read(read_header(file)[name]).copy()
    values[...] = values & 0x33
    edit(file, {name: ("F8_E4M3" if layout == "fp8" else "I32", values)})

    copy = write_checkpoint(open_checkpoint(path), tmp_path / "copy", layout=layout)

    assert open_checkpoint(copy).identity() == open_checkpoint(path).identity()


def test_a_quantized_checkpoint_can_be_written_in_another_layout(
    written: Write, tmp_path: Path
) -> None:
    fp8 = open_checkpoint(written("fp8"))

    bf16 = open_checkpoint(write_checkpoint(fp8, tmp_path / "b", layout="bf16"))
    int4 = open_checkpoint(write_checkpoint(fp8, tmp_path / "i", layout="int4"))

    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert np.array_equal(bf16.plain(name)[0], round_bf16(fp8.dense(name)))
    assert {bf16.kind(name), int4.kind(name)} == {"plain", "int4_group"}
    assert int4.kind("model.layers.1.attention.dense.weight") == "plain"


def test_f32_weights_are_rounded_once(written: Write, tmp_path: Path, edit: Edit) -> None:
    """Straight from f32 to FP8, not by way of BF16."""
    path = written()
    name = "model.layers.0.attention.dense.weight"
    file = next(p for p in path.glob("*.safetensors") if name in read_header(p))
    values = np.random.default_rng(0).standard_normal((136, 36)).astype(np.float32)
    edit(file, {name: ("F32", values)})

    fp8 = open_checkpoint(write_checkpoint(open_checkpoint(path), tmp_path / "f", layout="fp8"))

    codes, scales, _ = fp8.quantized(name)
    assert np.array_equal(codes, quantize_fp8_block(values)[0])
    assert np.array_equal(scales, quantize_fp8_block(values)[1])


def test_files_are_cut_at_the_size_that_is_asked_for(written: Write) -> None:
    path = written()
    files = sorted(file.name for file in path.glob("*.safetensors"))
    index = json.loads((path / INDEX).read_text())

    assert files[0] == f"model-00001-of-{len(files) - 1:05}.safetensors"
    assert files[-1] == MTP_FILE
    assert len(files) > 3
    assert all((path / file).stat().st_size < 120_000 for file in files[:-1])
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        tensor.length_bytes for tensor in _tensors(path).values()
    )


def test_progress_ends_where_it_must(small: ModelConfig, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    write_checkpoint(
        SyntheticCheckpoint(small, 1), tmp_path / "x", progress=lambda *pair: told.append(pair)
    )

    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


def test_an_unknown_layout_is_refused(small: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layout is called 'fp4'"):
        write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / "x", layout="fp4")


# --------------------------------------------------------------------------------- whole or nothing


def test_a_place_that_is_taken_is_left_alone(small: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")

    with pytest.raises(UsageError, match="exists already"):
        write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path)
    assert _content(tmp_path) == {"mine": b"mine"}


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    written: Write, edit: Edit, tmp_path: Path
) -> None:
    path = written()
    name = "model.layers.1.attention.dense.weight"
    file = next(p for p in path.glob("*.safetensors") if name in read_header(p))
    values = Maps().read(read_header(file)[name]).copy()
    values[3, 4] = 0x7FC0
    edit(file, {name: ("BF16", values)})

    with pytest.raises(CheckpointError, match=f"'{name}': a weight is NaN or infinite"):
        write_checkpoint(open_checkpoint(path), tmp_path / "out" / "x", layout="fp8")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(CheckpointError, match=f"'{name}': a weight is NaN or infinite"):
        to_rounded(open_checkpoint(path), name, "int4_group", 32)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage())

    with pytest.raises(ResourceError, match=r"x' needs 0\.\d+ MB, the disk has 0\.00 MB free"):
        write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


class _Usage:
    free = 10


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_midway_leaves_nothing(
    code: int, small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_writer: TensorWriter) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(TensorWriter, "finish", fail)

    with pytest.raises(ResourceError, match="cannot be written: ") as caught:
        write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / "x")
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_nothing(small: ModelConfig, tmp_path: Path) -> None:
    def interrupt(_written_bytes: int, _total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / "x", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_refused(small: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ResourceError, match="a part of that path is a file"):
        write_checkpoint(SyntheticCheckpoint(small, 1), tmp_path / "file" / "x")
