"""A broken checkpoint is refused by name, before anything is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.robustness.damage import INDEX, edit_config, edit_tensors, shard, shard_of

if TYPE_CHECKING:
    from tests.robustness.conftest import Refuses

UP = "model.layers.0.mlp.experts.1.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
NAN_BF16 = np.uint16(0x7FC0)
NAN_E4M3 = np.uint8(0x7F)

Damage = Callable[[Path], None]


def cut(length: int) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = shard(checkpoint)
        path.write_bytes(path.read_bytes()[:length])

    return damage


def grow(checkpoint: Path) -> None:
    with shard(checkpoint).open("ab") as file:
        file.write(b"\0" * 64)


def lengthen_header(checkpoint: Path) -> None:
    path = shard(checkpoint)
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def remove_shard(checkpoint: Path) -> None:
    shard(checkpoint).unlink()


def remove_tensor(checkpoint: Path) -> None:
    edit_tensors(shard_of(checkpoint, UP), {UP: None})


def add_tensor(checkpoint: Path) -> None:
    extra = ("BF16", np.zeros((2, 2), np.uint16))
    edit_tensors(shard(checkpoint), {"model.layers.0.extra.weight": extra})


def set_tensor(name: str, dtype: str, values: np.ndarray) -> Damage:
    return lambda checkpoint: edit_tensors(shard_of(checkpoint, name), {name: (dtype, values)})


def write(name: str, text: str) -> Damage:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).write_text(text)

    return damage


def lead_out(checkpoint: Path) -> None:
    path = checkpoint / INDEX
    path.write_text(path.read_text().replace(shard(checkpoint).name, "../other.safetensors"))


def remove_weights(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()


def remove_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def config(**changes: object) -> Damage:
    return lambda checkpoint: edit_config(checkpoint, **changes)


BROKEN: dict[str, tuple[Damage, str]] = {
    "one byte short": (cut(-1), r"'model-00003\S+' is truncated: its tensors end at byte \d+"),
    "half a header": (cut(100), r"'model-00003\S+' (is truncated|has a header)"),
    "an empty shard": (cut(0), r"'model-00003\S+' is truncated: it has 0 bytes"),
    "bytes too many": (grow, r"'model-00003\S+' has bytes that no tensor owns"),
    "a huge header": (lengthen_header, r"'model-00003\S+' .*header"),
    "a missing shard": (remove_shard, r"'model-00003\S+' is missing; the index puts \d+ tensors"),
    "a missing tensor": (remove_tensor, rf"{re.escape(UP)}' is not in 'model-\S+', where the ind"),
    "an extra tensor": (add_tensor, r"'model\.layers\.0\.extra\.weight' is not one that this conf"),
    "another dtype": (
        set_tensor(UP, "F16", np.zeros((32, 64), np.float16)),
        rf"{re.escape(UP)}' is F16 in 'model-\S+', BF16 or F32 is due",
    ),
    "another shape": (
        set_tensor(UP, "BF16", np.zeros((64, 32), np.uint16)),
        rf"{re.escape(UP)}' is \[64, 32\] in 'model-\S+', \[32, 64\] is due",
    ),
    "a NaN in a vector": (
        set_tensor(NORM, "BF16", np.full(64, NAN_BF16)),
        rf"{re.escape(NORM)}' has a value that is NaN or infinite",
    ),
    "an index that is not JSON": (write(INDEX, "{"), rf"'{INDEX}' is not sound JSON"),
    "an index that leads out": (lead_out, r"the index names the file '\.\./other\.safetensors'"),
    "no weights": (remove_weights, r"holds a config and no weights to embed .*--weights external"),
    "no config": (remove_config, r"config\.json' cannot be read: No such file"),
    "a config that is not JSON": (write("config.json", '{"a": 1,'), "config.json' is not JSON"),
    "a config too deep": (write("config.json", "[" * 100_000), "config.json' is not JSON"),
    "a config that is a list": (write("config.json", "[]"), "holds a list, not an object"),
    "another architecture": (
        config(architectures=["LlamaForCausalLM"], model_type="llama"),
        r"architectures is \['LlamaForCausalLM'\]; lingc builds 'BailingMoeV2_5ForCausalLM' only",
    ),
    "contradictions, all at once": (
        config(num_experts=5, num_key_value_heads=3, topk_group=9),
        r"3 problems.*num_key_value_heads is 3.*n_group 2 does not divide.*topk_group is 9",
    ),
    "a vocabulary of another size": (
        config(vocab_size=256),
        r"'lm_head\.weight' is \[128, 64\] in .*, \[256, 64\] is due",
    ),
    "a broken generation config": (
        write("generation_config.json", "{"),
        r"generation_config\.json' is not JSON.*correct the file, or remove it",
    ),
    "an end of turn that is no token": (
        write("generation_config.json", '{"eos_token_id": "x"}'),
        "eos_token_id is 'x', it must be a token id",
    ),
    "a broken tokenizer": (write("tokenizer.json", "{"), r"tokenizer\.json cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused(
    name: str, checkpoint: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    damage, message = BROKEN[name]
    damage(checkpoint)

    said = refuses(3, "build", checkpoint, "-o", tmp_path / "x.ling")

    assert re.search(message, said, re.DOTALL)


SCALE = f"{UP}_scale_inv"
BROKEN_FP8: dict[str, tuple[Damage, str]] = {
    "a NaN scale": (
        set_tensor(SCALE, "F32", np.full((1, 1), np.nan, np.float32)),
        rf"{re.escape(UP)}' has a scale that is NaN",
    ),
    "a negative scale": (
        set_tensor(SCALE, "F32", np.full((1, 1), -1, np.float32)),
        rf"{re.escape(UP)}' has a scale that is zero or negative",
    ),
    "scales of another shape": (
        set_tensor(SCALE, "F32", np.ones((2, 1), np.float32)),
        rf"{re.escape(UP)}'.*\[2, 1\]",
    ),
    "codes without scales": (
        lambda checkpoint: edit_tensors(shard_of(checkpoint, SCALE), {SCALE: None}),
        rf"{re.escape(SCALE)}' is not in 'model-\S+', where the index puts it",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FP8)
def test_a_broken_fp8_checkpoint_is_refused(
    name: str, checkpoint_fp8: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    damage, message = BROKEN_FP8[name]
    damage(checkpoint_fp8)

    said = refuses(3, "build", checkpoint_fp8, "-o", tmp_path / "x.ling")

    assert re.search(message, said, re.DOTALL)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
def test_a_nan_in_a_matrix_is_found_while_packing(
    precision: str, checkpoint: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    set_tensor(UP, "BF16", np.full((32, 64), NAN_BF16))(checkpoint)

    said = refuses(
        3, "build", checkpoint, "--precision", precision, "-o", tmp_path / "x.ling", "-q"
    )

    assert re.search(rf"cannot be made of .*{re.escape(UP)}.*: .* NaN or infinite", said)


@pytest.mark.usefixtures("captured")
def test_a_nan_among_fp8_codes_is_found_while_packing(
    checkpoint_fp8: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    set_tensor(UP, "F8_E4M3", np.full((32, 64), NAN_E4M3))(checkpoint_fp8)

    said = refuses(3, "build", checkpoint_fp8, "-o", tmp_path / "x.ling", "-q")

    assert re.search(rf"cannot be made of .*{re.escape(UP)}.*: there are codes that are NaN", said)


def test_a_nan_is_found_while_binding(
    built_for_config: Path, checkpoint: Path, refuses: "Refuses"
) -> None:
    set_tensor(UP, "BF16", np.full((32, 64), NAN_BF16))(checkpoint)

    said = refuses(3, "bind", built_for_config, "--checkpoint", checkpoint, "-q")

    assert re.search(rf"cannot be made of .*{re.escape(UP)}.*: .* NaN or infinite", said)


def test_a_tokenizer_of_another_model_is_refused(
    checkpoint: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    vocabulary = {"a": 0, "b": 500}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    (checkpoint / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )

    said = refuses(3, "build", checkpoint, "-o", tmp_path / "x.ling")

    assert re.search(r"makes token ids up to 500, the model has a vocabulary of 128", said)


def test_every_fault_is_told_at_once(checkpoint: Path, refuses: "Refuses", tmp_path: Path) -> None:
    cut(-1)(checkpoint)
    remove_tensor(checkpoint)
    set_tensor(NORM, "BF16", np.full(64, NAN_BF16))(checkpoint)

    said = refuses(3, "build", checkpoint, "-o", tmp_path / "x.ling")

    assert re.search(r"has 3 problems", said)
    assert "truncated" in said
    assert UP in said
    assert NORM in said


def test_no_directory_at_all_is_refused(refuses: "Refuses", tmp_path: Path) -> None:
    said = refuses(3, "build", tmp_path / "nowhere", "-o", tmp_path / "x.ling")

    assert re.search(r"nowhere' cannot be read: No such file.*\nhint: give a checkpoint dir", said)
