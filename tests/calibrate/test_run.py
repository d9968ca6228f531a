"""A calibration from beginning to end: what it sees, makes, keeps and refuses."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lingc.calibrate import spill
from lingc.calibrate.coverage import coverage
from lingc.calibrate.gradients import Gradients
from lingc.calibrate.layer import Layer
from lingc.calibrate.matrices import Method, count_matrices
from lingc.calibrate.run import Settings, calibrate, count_steps
from lingc.calibrate.spill import Spill
from lingc.capture import Capturer, Sizes
from lingc.checkpoint import (
    Checkpoint,
    SyntheticCheckpoint,
    matrix_modules,
    open_checkpoint,
    write_checkpoint,
)
from lingc.checkpoint.calibrated import open_calibration, read_document
from lingc.checkpoint.quantizer import quantize_checkpoint
from lingc.errors import (
    CheckpointError,
    InputError,
    IntegrityError,
    RecipeError,
    ResourceError,
)
from lingc.model.config import ModelConfig
from lingc.model.loading import from_source
from lingc.quantize.formats import E4M3_MAX
from lingc.quantize.recipes import load_recipe, parse_recipe
from tests.calibrate.conftest import brisk, content, read

Finished = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _brisk() -> Iterator[None]:
    with brisk():
        yield


# ------------------------------------------------------------------------------------- what is seen


def test_activations_are_those_of_the_model(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without anything rounded, the residual stream behind every layer is eager's."""
    seen: dict[int, list[torch.Tensor]] = {}
    run = Layer.run

    def watched(layer: Layer, x: Spill, after: Spill, files: tuple[Path, Path]) -> None:
        run(layer, x, after, files)
        spans = layer._tokens.spans()
        seen[layer._number] = [after[first:end] for first, end in spans]

    monkeypatch.setattr(Layer, "run", watched)
    given = read(rows)
    calibrate(small, load_recipe("bf16"), given, tmp_path / "out", Settings())

    model = from_source(small)
    drafted = iter(seen[small.config.mtp_layer])
    for i, one in enumerate(given.samples):
        taps: dict[str, torch.Tensor] = {}
        ids = torch.tensor([one.ids])
        hidden = model.forward_hidden(ids, taps=taps)
        if len(one.ids) > 1:  # the MTP layer needs a next token
            model.mtp(ids[:, 1:], hidden[:, :-1], taps=taps)
            want = taps[f"layers.{small.config.mtp_layer}.output"][0]
            torch.testing.assert_close(next(drafted), want, rtol=1e-4, atol=1e-4)
        for layer in range(small.config.num_hidden_layers):
            want = taps[f"layers.{layer}.output"][0]
            torch.testing.assert_close(seen[layer][i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int4-all", "fp8", "fp8-static", "int4-fp8"])
def test_every_matrix_of_the_recipe_is_made(
    name: str, small: Checkpoint, finished: Finished
) -> None:
    recipe = load_recipe(name)
    wanted = {
        module
        for module in matrix_modules(small.config)
        if recipe.format_of(module).kind != "plain"
    }

    matrices = read_document(finished(name))["matrices"]

    assert {one["module"] for one in matrices} == wanted
    assert len(matrices) == len(wanted)
    assert {one["how"] for one in matrices} == {"calibrated"}


def test_what_is_watched_are_the_products_of_the_captured_graph(
    config: ModelConfig, finished: Finished
) -> None:
    """The modules whose inputs are observed are those that the graph multiplies by a weight."""
    capturer = Capturer(config, Sizes())
    multiplied = {
        source.removesuffix(".weight").replace("{e}", str(expert))
        for node in capturer.capture("prefill").graph.nodes
        if node.op == "placeholder" and node.meta["role"] == "weight"
        for source in node.meta["weight"].sources
        for expert in range(max(node.meta["weight"].experts, 1))
    }
    recipe = load_recipe("fp8-static")
    wanted = {m for m in multiplied if recipe.format_of(m).kind != "plain"}

    observed = read_document(finished("fp8-static"))["observed"]

    draft = f"model.layers.{config.mtp_layer}."
    found = {module for one in observed for module in one["modules"]}
    assert {module for module in found if not module.startswith(draft)} == wanted


@pytest.mark.parametrize("fp8", ["gptq", "nearest"])
def test_the_head_is_told_of_as_any_matrix_is(
    fp8: str, small: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    settings = Settings(method=Method(fp8=fp8, loss="matrix"))

    made = calibrate(small, load_recipe("fp8-max"), read(rows), tmp_path / "out", settings)

    observed = {module for one in made.document["observed"] for module in one["modules"]}
    assert observed == {one["module"] for one in made.document["matrices"]}
    assert "lm_head" in observed


def test_progress_ends_where_it_must(small: Checkpoint, rows: Path, tmp_path: Path) -> None:
    told: list[int] = []

    recipe, settings = load_recipe("fp8"), Settings()

    calibrate(small, recipe, read(rows), tmp_path / "out", settings, done=told.append)

    assert sum(told) == count_steps(small, recipe, settings) > count_matrices(small)


# ------------------------------------------------------------------------------------ what is made


def test_losses_are_below_those_of_nearest(finished: Finished) -> None:
    for name, most in (("int4-all", 0.7), ("fp8", 1.0)):
        made = read_document(finished(name))["matrices"]
        ratios = [one["loss"] / one["nearest_loss"] for one in made]
        assert np.median(ratios) < most
        assert max(ratios) <= 1.0 + 1e-6


def test_quantizing_takes_what_was_made(
    small: Checkpoint, finished: Finished, tmp_path: Path
) -> None:
    recipe = load_recipe("int4-all")
    changes = open_calibration(finished("int4-all"), small, recipe)

    result = quantize_checkpoint(small, recipe, tmp_path / "out", changes=changes)

    written = open_checkpoint(result.path)
    assert {one.how for one in result.outcomes} == {"calibrated", "plain"}
    for name in changes.names:
        assert np.array_equal(written.dense(name), changes.source.dense(name))
    plain = quantize_checkpoint(small, recipe, tmp_path / "plain")
    assert written.identity() != open_checkpoint(plain.path).identity()


def test_static_scales_stand_beside_their_modules(
    small: Checkpoint, finished: Finished, tmp_path: Path
) -> None:
    from lingc.checkpoint.tensorfile import Maps, read_header  # noqa: PLC0415

    recipe = load_recipe("fp8-static")
    document = read_document(finished("fp8-static"))
    changes = open_calibration(finished("fp8-static"), small, recipe)

    path = quantize_checkpoint(small, recipe, tmp_path / "out", changes=changes).path

    stored = {k: v for file in path.glob("*.safetensors") for k, v in read_header(file).items()}
    scales = {k.removesuffix(".input_scale"): v for k, v in stored.items() if "input_scale" in k}
    assert scales.keys() == document["input_bounds"].keys()
    for module, tensor in scales.items():
        bound = document["input_bounds"][module]
        assert Maps().read(tensor).item() == pytest.approx(bound / float(E4M3_MAX))
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["input_activations"]["strategy"] == "tensor"
    assert not said["config_groups"]["group_0"]["input_activations"]["dynamic"]


@pytest.mark.parametrize("observer", ["absmax", "percentile", "mse"])
def test_bounds_are_those_of_the_observer_that_was_asked_for(
    observer: str, small: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    recipe, given = load_recipe("fp8-static"), read(rows)

    wide, narrow = (
        calibrate(
            small, recipe, given, tmp_path / str(percentile),
            Settings(observer=observer, percentile=percentile),
        ).document
        for percentile in (99.99, 80.0)
    )  # fmt: skip

    seen = {module: one["bounds"] for one in wide["observed"] for module in one["modules"]}
    bounds = wide["input_bounds"]
    assert bounds == {module: each[observer] for module, each in seen.items()}
    is_other = [narrow["input_bounds"][module] < 0.7 * bounds[module] for module in bounds]
    assert all(is_other) if observer == "percentile" else not any(is_other)


def test_the_same_inputs_give_the_same_bytes(
    small: Checkpoint, rows: Path, finished: Finished, tmp_path: Path
) -> None:
    settings = Settings(fallback_below=2)
    again = calibrate(small, load_recipe("int4-all"), read(rows), tmp_path / "again", settings)

    assert content(again.path) == content(finished("int4-all"))


def test_what_is_stored_so_already_is_left_alone(
    config: ModelConfig, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(SyntheticCheckpoint(config, 1), tmp_path / "fp8", layout="fp8")

    monkeypatch.delattr(Gradients, "run")  # which would be for nothing

    made = calibrate(
        open_checkpoint(path), load_recipe("fp8"), read(rows), tmp_path / "out", Settings()
    )

    assert {one["how"] for one in made.document["matrices"]} == {"stored"}
    assert not list((made.path / "layers").iterdir())


# -------------------------------------------------------------------------------------- experts


def _with_dead_expert(config: ModelConfig, path: Path) -> Checkpoint:
    class Dead(SyntheticCheckpoint):
        def plain(self, name: str) -> tuple[Any, str]:
            values, dtype = super().plain(name)
            if name == "model.layers.2.mlp.gate.expert_bias":
                values = values.copy()
                values[3] = -100.0
            return values, dtype

    return open_checkpoint(write_checkpoint(Dead(config, 1), path))


def test_an_expert_that_no_token_reaches_is_named_and_rounded_to_nearest(
    config: ModelConfig, rows: Path, tmp_path: Path
) -> None:
    source = _with_dead_expert(config, tmp_path / "dead")
    recipe = load_recipe("int4")

    made = calibrate(source, recipe, read(rows), tmp_path / "out", Settings(fallback_below=2))

    covered = coverage(made.document["coverage"], floor=1)
    assert [(one.layer, one.expert, one.tokens) for one in covered.below] == [(2, 3, 0)]
    assert list(covered.silent_lines()) == ["layer 2: no token reached expert 3"]
    fallen = {one["module"] for one in made.document["matrices"] if one["how"] == "fallback"}
    leaves = ("gate_proj", "up_proj", "down_proj")
    assert fallen == {f"model.layers.2.mlp.experts.3.{leaf}" for leaf in leaves}
    changes = open_calibration(made.path, source, recipe)
    result = quantize_checkpoint(source, recipe, tmp_path / "q", changes=changes)
    assert {one.name for one in result.outcomes if one.how == "rounded"} == fallen


def test_an_expert_that_no_token_reaches_may_be_rounded_beside_the_others(
    config: ModelConfig, rows: Path, tmp_path: Path
) -> None:
    source = _with_dead_expert(config, tmp_path / "dead")

    made = calibrate(
        source, load_recipe("int4"), read(rows), tmp_path / "out", Settings(fallback_below=0)
    )

    assert {one["how"] for one in made.document["matrices"]} == {"calibrated"}
    assert made.document["coverage"]["2"][3] == 0


def test_tokens_of_experts_add_up(small: Checkpoint, finished: Finished) -> None:
    document = read_document(finished("int4-all"))
    tokens, k = document["data"]["tokens"], small.config.num_experts_per_tok
    samples = document["data"]["samples"]

    sums = {layer: sum(counts) for layer, counts in document["coverage"].items()}

    assert sums == {"1": tokens * k, "2": tokens * k, "3": (tokens - samples) * k}


# -------------------------------------------------------------------------------------- refusals


def test_a_weight_that_makes_activations_wild_is_found_by_layer_tensor_and_sample(
    config: ModelConfig, rows: Path, tmp_path: Path
) -> None:
    class Wild(SyntheticCheckpoint):
        def plain(self, name: str) -> tuple[Any, str]:
            values, dtype = super().plain(name)
            if name == "model.layers.1.attention.kv_b_proj.weight":
                values = values.copy()
                values[:] = 0x7F7F  # the largest finite BF16 value
            return values, dtype

    source = open_checkpoint(write_checkpoint(Wild(config, 1), tmp_path / "wild"))

    said = (
        r"an activation is (nan|-?inf): layer 1, input of 'model\.layers\.1\..*', "
        r"sample 'rows\.jsonl:\d+', token \d+"
    )
    with pytest.raises(InputError, match=said) as caught:
        calibrate(source, load_recipe("int4-all"), read(rows), tmp_path / "out", Settings())
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("loss", ["model", "matrix"])
@pytest.mark.parametrize("name", ["int4-all", "fp8-static"])
def test_activations_that_cannot_be_squared_are_refused_by_module(
    loss: str, name: str, config: ModelConfig, rows: Path, tmp_path: Path
) -> None:
    class Large(SyntheticCheckpoint):
        def plain(self, name: str) -> tuple[Any, str]:
            values, dtype = super().plain(name)
            if name == "model.layers.1.mlp.shared_experts.up_proj.weight":
                values = values.copy()
                values[3] = 0x7180  # 2^100
            return values, dtype

    source = open_checkpoint(write_checkpoint(Large(config, 1), tmp_path / "large"))
    settings = Settings(method=Method(loss=loss))

    with pytest.raises(InputError, match=r"layers\.1\.mlp|layer 1") as caught:
        calibrate(source, load_recipe(name), read(rows), tmp_path / "out", settings)
    assert caught.value.exit_code == 3


def test_a_recipe_for_another_model_is_refused_before_anything_is_written(
    small: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    rule = {"modules": ["model.layers.*.mamba.in_proj"], "format": "fp8_block"}
    recipe = parse_recipe({"name": "other", "rules": [rule]}, source="other.json")

    with pytest.raises(RecipeError, match=r"'model\.layers\.\*\.mamba\.in_proj' matches no module"):
        calibrate(small, recipe, read(rows), tmp_path / "out", Settings())
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_of_something_else_is_refused(
    config: ModelConfig, small: Checkpoint, finished: Finished, tmp_path: Path
) -> None:
    other = open_checkpoint(write_checkpoint(SyntheticCheckpoint(config, 2), tmp_path / "other"))

    with pytest.raises(IntegrityError, match=r"is of checkpoint [0-9a-f]{16}, given is checkpoint"):
        open_calibration(finished("fp8"), other, load_recipe("fp8"))
    with pytest.raises(IntegrityError, match=r"is of recipe [0-9a-f]{16}, given is recipe"):
        open_calibration(finished("fp8"), small, load_recipe("int4"))
    with pytest.raises(InputError, match=r"is no calibration: 'calibration\.json' cannot be read"):
        open_calibration(tmp_path, small, load_recipe("fp8"))


def test_a_calibration_that_lost_a_file_is_refused(
    small: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    made = calibrate(small, load_recipe("fp8"), read(rows), tmp_path / "out", Settings())
    (made.path / "layers" / "0001-mlp.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"is not whole:\n  - 'model\.layers\.1\.mlp"):
        open_calibration(made.path, small, load_recipe("fp8"))


def test_a_calibration_with_a_flipped_bit_or_a_foreign_file_is_refused(
    small: Checkpoint, finished: Finished, tmp_path: Path
) -> None:
    path = shutil.copytree(finished("fp8"), tmp_path / "out")
    file = path / "layers" / "0001-mlp.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))

    with pytest.raises(IntegrityError, match=r"0001-mlp\.safetensors' has SHA-256") as caught:
        open_calibration(path, small, load_recipe("fp8"))
    assert caught.value.exit_code == 6

    file.write_bytes(sound)
    open_calibration(path, small, load_recipe("fp8"))
    shutil.copy(file, path / "layers" / "more.safetensors")
    with pytest.raises(IntegrityError, match=r"more\.safetensors' has SHA-256 .* has none"):
        open_calibration(path, small, load_recipe("fp8"))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("matrices", [{"how": "calibrated"}], r"'matrices\[0\]\.module': it is missing"),
        ("matrices", [{"module": "m", "how": 3}], r"'matrices\[0\]\.how': it is 3"),
        ("matrices", ["m"], r"'matrices\[0\]': it is 'm'"),
        ("input_bounds", {"m": "1"}, "'input_bounds' of 'm': it is '1'"),
        ("input_bounds", {"m": -1.0}, r"'input_bounds' of 'm': it is -1\.0"),
        ("input_bounds", {"m": float("nan")}, "'input_bounds' of 'm': it is nan"),
        ("input_bounds", {"m": 10**400}, "'input_bounds' of 'm': it is 1000"),
        ("files", {"m": None}, "'files' of 'm': it is None"),
    ],
)
def test_unsound_values_are_refused_by_file_key_and_value(
    key: str, value: object, said: str, small: Checkpoint, finished: Finished, tmp_path: Path
) -> None:
    document = {**read_document(finished("fp8")), key: value}
    (tmp_path / "calibration.json").write_text(json.dumps(document))

    with pytest.raises(InputError, match=rf"calibration\.json' has no sound {said}"):
        open_calibration(tmp_path, small, load_recipe("fp8"))


def test_a_full_disk_is_told_and_what_was_done_is_kept(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, files = spill._allocate, 0

    def fail(handle: int, length_bytes: int) -> None:
        nonlocal files
        files += 1
        if files == 6:  # in the second layer
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(handle, length_bytes)

    recipe, given = load_recipe("fp8"), read(rows)
    with monkeypatch.context() as patch:
        patch.setattr(spill, "_allocate", fail)
        with pytest.raises(ResourceError, match="cannot be written: No space left") as caught:
            calibrate(small, recipe, given, tmp_path / "out", Settings())
    assert caught.value.exit_code == 7
    assert not (tmp_path / "out").exists()

    again = calibrate(small, recipe, given, tmp_path / "out", Settings())

    assert again.is_resumed
    whole = calibrate(small, recipe, given, tmp_path / "whole", Settings())
    assert content(again.path) == content(whole.path)
