"""The scale of a matrix's inputs: where it is read from, and what no scale can be."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lingc.checkpoint import SyntheticCheckpoint, open_checkpoint, validate
from lingc.checkpoint.quantizer import quantize_checkpoint
from lingc.checkpoint.tensorfile import read_header
from lingc.errors import CheckpointError
from lingc.model.config import ModelConfig
from lingc.plan import TensorType, WeightSpec
from lingc.quantize.formats import quantize_fp8_tensor, round_bf16
from lingc.quantize.recipes import parse_recipe
from lingc.quantize.stored import fp8_tensor_specs
from lingc.weights import CheckpointWeights, write_weights
from lingc.weights import open_weights as opened

DENSE = "model.layers.0.attention.dense"
SCALE = f"{DENSE}.input_scale"

Write = Callable[..., Path]
Edit = Callable[[Path, Mapping[str, Any]], None]


@pytest.fixture
def scaled(written: Write, edit: Edit) -> Callable[..., Path]:
    """`scaled(dtype, values)`: a checkpoint with one such scale."""

    def make(dtype: str, values: NDArray[Any]) -> Path:
        path = written()
        holder = next(p for p in path.glob("*.safetensors") if f"{DENSE}.weight" in read_header(p))
        edit(holder, {SCALE: (dtype, values)})
        (path / "model.safetensors.index.json").unlink()
        return path

    return make


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_is_read_beside_its_matrix(
    shape: tuple[int, ...], scaled: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(scaled("F32", np.full(shape, 0.375, np.float32)))

    validate(checkpoint)
    assert checkpoint.input_scale(f"{DENSE}.weight") == 0.375
    assert checkpoint.input_scale("model.layers.0.mlp.gate_proj.weight") is None


def test_a_scale_may_be_stored_in_bf16(scaled: Callable[..., Path]) -> None:
    path = scaled("BF16", round_bf16(np.array([0.375], np.float32)))

    assert open_checkpoint(path).input_scale(f"{DENSE}.weight") == 0.375


def test_a_scale_is_part_of_what_tells_checkpoints_apart(
    scaled: Callable[..., Path], small: ModelConfig, edit: Edit
) -> None:
    path = scaled("F32", np.array([0.5], np.float32))
    first = open_checkpoint(path).identity()
    holder = next(p for p in path.glob("*.safetensors") if SCALE in read_header(p))

    edit(holder, {SCALE: ("F32", np.array([0.25], np.float32))})
    second = open_checkpoint(path).identity()
    edit(holder, {SCALE: None})

    assert len({first, second, open_checkpoint(path).identity()}) == 3
    assert SyntheticCheckpoint(small, 1).input_scale(f"{DENSE}.weight") is None


@pytest.mark.parametrize(
    ("dtype", "values", "problem"),
    [
        ("F32", np.array([0.0]), "an 'input_scale' of 0.0, which is no positive number"),
        ("F32", np.array([-1.0]), "an 'input_scale' of -1.0, which is no positive number"),
        ("F32", np.array([np.nan]), "an 'input_scale' of nan, which is no positive number"),
        ("F32", np.array([np.inf]), "an 'input_scale' of inf, which is no positive number"),
        ("F32", np.ones(2), r"an 'input_scale' that is F32 \[2\] in '.*', F32 \[1\] is due"),
        ("F32", np.ones(0), r"an 'input_scale' that is F32 \[0\] in '.*', F32 \[1\] is due"),
        ("I64", np.ones(1), r"an 'input_scale' that is I64 \[1\] in '.*', F32 \[1\] is due"),
    ],
)
def test_what_no_scale_can_be_is_refused_by_name(
    dtype: str, values: NDArray[Any], problem: str, scaled: Callable[..., Path]
) -> None:
    path = scaled(dtype, values.astype({"F32": np.float32, "I64": np.int64}[dtype]))

    with pytest.raises(CheckpointError) as caught:
        validate(open_checkpoint(path))

    assert len(caught.value.problems) == 1
    assert re.fullmatch(rf"tensor '{DENSE}.weight' has {problem}", caught.value.problems[0])


def test_a_scale_that_is_known_is_written_again_where_the_recipe_has_static_ones(
    scaled: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_checkpoint(scaled("F32", np.array([0.375], np.float32)))
    rules = [{"modules": [DENSE], "format": "fp8_tensor"}]
    found = {}

    for kind in ("fp8_static", "fp8"):
        recipe = parse_recipe({"name": kind, "activations": kind, "rules": rules}, source="x.json")
        made = quantize_checkpoint(source, recipe, tmp_path / kind)
        assert not made.lacks_input_scales
        found[kind] = open_checkpoint(made.path).input_scale(f"{DENSE}.weight")
        said = json.loads((made.path / "config.json").read_text())["quantization_config"]
        (said,) = said["config_groups"].values()
        assert said["input_activations"]["dynamic"] == (kind == "fp8")

    assert found == {"fp8_static": 0.375, "fp8": None}


@pytest.mark.parametrize("calibrated", [True, False])
def test_weights_of_one_scale_are_codes_and_two_scales(
    *, calibrated: bool, scaled: Callable[..., Path], written: Write, tmp_path: Path
) -> None:
    path = scaled("F32", np.array([0.375], np.float32)) if calibrated else written()
    source = open_checkpoint(path)
    shape = source.shape(f"{DENSE}.weight")
    whole = WeightSpec(name="dense", type=TensorType("bf16", shape), sources=(f"{DENSE}.weight",))
    specs = fp8_tensor_specs(whole)
    codes, scale = quantize_fp8_tensor(source.plain(f"{DENSE}.weight")[0])

    asked = CheckpointWeights(specs, source, source.config)
    written_too = opened(write_weights(specs, source, source.config, tmp_path / "weights"))

    for made in (asked, written_too):
        assert np.array_equal(made["dense_codes"], codes)
        assert np.array_equal(made["dense_scale"], scale)
        assert made["dense_input_scale"].tolist() == [0.375 if calibrated else 1.0]
