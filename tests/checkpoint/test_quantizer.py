"""Quantizing by any recipe: the bytes, what is told of them, and going on after a kill."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingc.checkpoint import (
    SyntheticCheckpoint,
    make_twin,
    matrix_modules,
    open_checkpoint,
    validate,
    write_checkpoint,
)
from lingc.checkpoint.compressed import patterns
from lingc.checkpoint.outcomes import families, suggestions
from lingc.checkpoint.quantizer import REPORT, quantize_checkpoint
from lingc.checkpoint.tensorfile import Maps, TensorWriter, read_header
from lingc.errors import CheckpointError, RecipeError, ResourceError, UsageError
from lingc.model.config import ModelConfig
from lingc.quantize.recipes import built_in, load_recipe, parse_recipe
from tests.calibrate.conftest import killed

Write = Callable[..., Path]

LING_TINY = Path(__file__).parents[2] / "artifacts/checkpoints/ling-tiny"


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# -------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize("name", ["bf16", "fp8", "int4"])
def test_a_release_layout_is_the_twin_byte_for_byte(name: str, tmp_path: Path) -> None:
    """`test_write` holds the twins to checkpoints that other programs quantized."""
    source = open_checkpoint(LING_TINY)
    twin = make_twin(source, name, tmp_path / "twins")

    made = quantize_checkpoint(source, load_recipe(name), tmp_path / "out", keep_mtp=name != "int4")

    got = _content(made.path)
    del got[REPORT]
    assert got == _content(twin.path)


@pytest.mark.parametrize("name", built_in())
def test_every_recipe_gives_a_sound_checkpoint_in_its_formats(
    name: str, small: ModelConfig, tmp_path: Path
) -> None:
    source, recipe = SyntheticCheckpoint(small, 1), load_recipe(name)

    made = quantize_checkpoint(source, recipe, tmp_path / "out", shard_bytes=100_000)

    written = open_checkpoint(made.path)
    validate(written)
    for module in matrix_modules(small):
        assert written.kind(f"{module}.weight") == recipe.format_of(module).kind
    assert written.config.raw == small.raw


@pytest.mark.parametrize("name", ["int4-fp8", "fp8-static"])
def test_what_is_written_can_be_quantized_again_without_loss(
    name: str, small: ModelConfig, tmp_path: Path
) -> None:
    first = quantize_checkpoint(SyntheticCheckpoint(small, 1), load_recipe(name), tmp_path / "a")

    again = quantize_checkpoint(open_checkpoint(first.path), load_recipe(name), tmp_path / "b")

    assert {one.how for one in again.outcomes} == {"copied", "plain"}
    assert open_checkpoint(again.path).identity() == open_checkpoint(first.path).identity()


def test_one_scale_for_a_matrix_is_one_for_each_block(small: ModelConfig, tmp_path: Path) -> None:
    """How engines, which have blocks, read a matrix with one scale."""
    made = quantize_checkpoint(
        SyntheticCheckpoint(small, 1), load_recipe("fp8-static"), tmp_path / "out"
    )
    written = open_checkpoint(made.path)
    name = "model.layers.0.mlp.gate_proj.weight"

    blocks = write_checkpoint(written, tmp_path / "blocks", layout="fp8")

    codes, scales, _ = open_checkpoint(blocks).quantized(name)
    assert scales.shape == (2, 2)
    assert np.array_equal(codes, written.quantized(name)[0])
    assert set(scales.flatten().tolist()) == {written.quantized(name)[1].item()}


@pytest.mark.parametrize("name", ["int4", "int4-all", "int4-fp8", "fp8-static"])
def test_the_library_of_compressed_tensors_loads_it(name: str, tmp_path: Path) -> None:
    import torch  # noqa: PLC0415
    from compressed_tensors.compressors import ModelCompressor  # noqa: PLC0415
    from compressed_tensors.quantization import (  # noqa: PLC0415
        QuantizationConfig,
        apply_quantization_config,
    )
    from safetensors.torch import load_file  # noqa: PLC0415

    made = quantize_checkpoint(open_checkpoint(LING_TINY), load_recipe(name), tmp_path / "out")
    written = open_checkpoint(made.path)
    said = json.loads((made.path / "config.json").read_text())["quantization_config"]
    modules = [m for m in matrix_modules(written.config) if m != "model.word_embeddings"]
    model = _modules({module: written.shape(f"{module}.weight") for module in modules})
    config = QuantizationConfig(**said)
    apply_quantization_config(model, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    stored = {k: v for file in made.path.glob("*.safetensors") for k, v in load_file(file).items()}
    starts = tuple(f"{m}.{leaf}" for m in modules for leaf in ("weight", "input_scale"))
    owned = {k: v for k, v in stored.items() if k.startswith(starts)}

    loaded = model.load_state_dict(owned, strict=False)
    compressor.decompress_model(model)

    assert not loaded.unexpected_keys
    missing = {name.rpartition(".")[2] for name in loaded.missing_keys}
    assert missing <= {"input_scale"}  # a calibration brings them
    for module in modules:
        got = model.get_submodule(module).weight.float()
        want = torch.from_numpy(written.dense(f"{module}.weight"))
        if written.kind(f"{module}.weight") == "int4_group":
            assert torch.equal(got, want.bfloat16().float())
        else:  # the library rounds an FP8 scale to BF16, and the product
            torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Linears at the names of a checkpoint's modules."""
    from torch import bfloat16, nn  # noqa: PLC0415

    root = nn.Module()
    for name, (rows, columns) in shapes.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, nn.Linear(columns, rows, bias=False, dtype=bfloat16))
    return root


@given(st.data())
def test_patterns_match_the_modules_and_no_other(data: st.DataObject) -> None:
    every = matrix_modules(ModelConfig.from_file(LING_TINY))
    chosen = data.draw(st.sets(st.sampled_from(every)))

    found = patterns(chosen, 16)

    matched = {
        module
        for module in every
        for one in found
        if (re.match(one[3:], module) if one.startswith("re:") else one == module)
    }
    assert matched == chosen


def test_patterns_fold_layers_and_experts() -> None:
    every = matrix_modules(ModelConfig.from_file(LING_TINY))
    experts = [module for module in every if ".experts." in module]

    assert patterns(experts, 16) == [
        rf"re:model\.layers\.(?:1|2|3|4|5|6|7|8)\.mlp\.experts\.\d+\.{leaf}$"
        for leaf in ("gate_proj", "up_proj", "down_proj")
    ]


# ----------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize("name", ["fp8-max", "int4-all", "fp8-static"])
def test_errors_are_those_of_the_written_values(
    name: str, small: ModelConfig, tmp_path: Path
) -> None:
    source = SyntheticCheckpoint(small, 1)

    made = quantize_checkpoint(source, load_recipe(name), tmp_path / "out")

    written = open_checkpoint(made.path)
    for one in made.outcomes:
        before, after = (
            s.dense(f"{one.name}.weight").astype(np.float64) for s in (source, written)
        )
        if one.how == "plain":
            assert one.error is None
            assert one.why == "no rule of the recipe names it"
            continue
        assert one.error == pytest.approx(
            np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-4
        )
        rms = np.sqrt(np.square(before).mean())
        assert one.worst == pytest.approx(np.abs(after - before).max() / rms, rel=1e-4)


def test_a_matrix_with_outliers_is_suggested_to_stay_plain(
    small: ModelConfig, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.experts.2.down_proj.weight"

    class Outliers(SyntheticCheckpoint):
        def plain(self, asked: str) -> tuple[Any, str]:
            values, dtype = super().plain(asked)
            if asked == name:
                values = values.copy()
                values[:, ::8] = 0x4120  # 10.0, a hundred times what the others are
            return values, dtype

    made = quantize_checkpoint(Outliers(small, 1), load_recipe("int4"), tmp_path / "out")

    found = suggestions(made.outcomes)
    assert [one.module for one in found] == [name.removesuffix(".weight")]
    assert found[0].bytes == 136 * 44 * 2 - (136 * 6 * 4 + 136 * 2 * 2 + 16)
    assert "times the median of int4_group(32)" in found[0].reason


def test_nothing_is_suggested_where_matrices_are_alike(tmp_path: Path) -> None:
    for name in ("fp8", "int4-all"):
        made = quantize_checkpoint(open_checkpoint(LING_TINY), load_recipe(name), tmp_path / name)
        assert suggestions(made.outcomes) == ()


def test_lines_are_folded_into_families(small: ModelConfig, tmp_path: Path) -> None:
    recipe = {
        "name": "mine",
        "rules": [
            {"modules": ["model.layers.2.mlp.experts.*"], "format": "plain"},
            {"modules": ["*.experts.*"], "format": "int4_group", "group": 32},
        ],
    }
    made = quantize_checkpoint(
        SyntheticCheckpoint(small, 1), parse_recipe(recipe, source="x"), tmp_path / "out"
    )

    found = [one for one in families(made.outcomes) if ".experts." in one.pattern]

    assert Counter((one.how, one.why) for one in found) == {
        ("rounded", None): 3,
        ("plain", "rule 1 of the recipe keeps it plain"): 3,
    }
    assert sum(one.matrices for one in found) == 3 * 4 * 3
    assert sum(one.matrices for one in families(made.outcomes)) == len(made.outcomes)


def test_the_report_lies_beside_the_weights(small: ModelConfig, tmp_path: Path) -> None:
    made = quantize_checkpoint(SyntheticCheckpoint(small, 1), load_recipe("fp8"), tmp_path / "out")

    told = json.loads((made.path / REPORT).read_text())

    assert parse_recipe(told["recipe"], source="report") == load_recipe("fp8")
    assert [one["name"] for one in told["tensors"]] == list(matrix_modules(small))


# -------------------------------------------------------------------------------- whole or nothing


def test_a_failed_run_goes_on_at_the_file_it_was_in(
    small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe, out = SyntheticCheckpoint(small, 1), load_recipe("int4-fp8"), tmp_path / "out"
    whole = quantize_checkpoint(source, recipe, tmp_path / "whole", shard_bytes=50_000)
    finish, files = TensorWriter.finish, 0

    def fail(writer: TensorWriter) -> None:
        nonlocal files
        files += 1
        if files == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finish(writer)

    monkeypatch.setattr(TensorWriter, "finish", fail)
    with pytest.raises(ResourceError, match="out' cannot be written: No space left") as caught:
        quantize_checkpoint(source, recipe, out, shard_bytes=50_000)
    assert caught.value.exit_code == 7
    assert not out.exists()
    kept = len(list((tmp_path / "out.partial" / "content").glob("*.safetensors")))

    result = quantize_checkpoint(source, recipe, out, shard_bytes=50_000)

    assert result.is_resumed
    assert kept == 2
    assert files - 3 == len(list(out.glob("*.safetensors"))) - kept
    assert _content(out) == _content(whole.path)
    assert result.outcomes == whole.outcomes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.long
def test_a_run_killed_at_twenty_moments_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source, recipe = open_checkpoint(LING_TINY), load_recipe("int4-fp8")
    out, draw = tmp_path / "out", random.Random(20)  # noqa: S311 a seeded choice of moments

    def work(place: Path) -> None:
        quantize_checkpoint(source, recipe, place, shard_bytes=60_000)

    def is_past(moment: float) -> bool:
        return time.monotonic() >= moment

    started = time.monotonic()
    work(tmp_path / "whole")
    whole_s = time.monotonic() - started
    want, kills = _content(tmp_path / "whole"), 0
    while kills < 20:
        moment = time.monotonic() + draw.random() * whole_s / 4
        code = killed(partial(work, out), partial(is_past, moment))
        kills += code == -signal.SIGKILL
        if out.exists():
            assert _content(out) == want
            shutil.rmtree(out)
    work(out)

    assert _content(out) == want
    assert not out.with_name("out.partial").exists()


def test_what_was_begun_otherwise_is_not_gone_on_with(
    small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = SyntheticCheckpoint(small, 1), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, load_recipe("fp8"), out)

    with pytest.raises(UsageError, match=r"other inputs:\n  - recipe: was [0-9a-f]{64}, is"):
        quantize_checkpoint(source, load_recipe("int4"), out)
    with pytest.raises(UsageError, match=r"other inputs:\n  - checkpoint: was"):
        quantize_checkpoint(SyntheticCheckpoint(small, 2), load_recipe("fp8"), out)

    quantize_checkpoint(source, load_recipe("int4"), out, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def _interrupt(_writer: TensorWriter) -> None:
    raise KeyboardInterrupt


def test_two_at_once_do_not_mix(small: ModelConfig, tmp_path: Path) -> None:
    source = SyntheticCheckpoint(small, 1)

    def again(_done: int) -> None:
        with pytest.raises(ResourceError, match="is being filled by another process"):
            quantize_checkpoint(source, load_recipe("fp8"), tmp_path / "out")

    quantize_checkpoint(source, load_recipe("fp8"), tmp_path / "out", progress=again)

    assert (tmp_path / "out" / "config.json").exists()


def test_a_place_that_is_taken_is_left_alone(small: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")

    with pytest.raises(UsageError, match="exists already"):
        quantize_checkpoint(SyntheticCheckpoint(small, 1), load_recipe("fp8"), tmp_path)
    assert _content(tmp_path) == {"mine": b"mine"}


def test_a_weight_that_is_not_finite_is_named(
    written: Write, edit: Callable[..., None], tmp_path: Path
) -> None:
    path = written()
    name = "model.layers.1.attention.dense.weight"
    file = next(p for p in path.glob("*.safetensors") if name in read_header(p))
    values = Maps().read(read_header(file)[name]).copy()
    values[3, 4] = 0x7FC0
    edit(file, {name: ("BF16", values)})

    with pytest.raises(CheckpointError, match=f"'{name}': a weight is NaN or infinite"):
        quantize_checkpoint(open_checkpoint(path), load_recipe("int4-all"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_written(
    small: ModelConfig, tmp_path: Path
) -> None:
    rule = {"modules": ["model.layers.*.mlp.expert.*"], "format": "fp8_block"}
    recipe = parse_recipe({"name": "mine", "rules": [rule]}, source="mine.json")

    with pytest.raises(RecipeError, match=r"matches no module; the nearest is 'model\.layers"):
        quantize_checkpoint(SyntheticCheckpoint(small, 1), recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
