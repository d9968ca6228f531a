"""Files of packed weights: the same bytes each time, named by them, refused when damaged."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import safetensors

from lingc.checkpoint import open_checkpoint, write_checkpoint
from lingc.errors import IntegrityError
from lingc.weights import CheckpointWeights, open_weights, write_weights
from tests.made_weights import CONFIG, checkpoint, some_of_each


def test_what_is_written_is_what_is_made(tmp_path: Path) -> None:
    source, specs = checkpoint(), some_of_each()

    weights = open_weights(write_weights(specs, source, CONFIG, tmp_path))

    made = CheckpointWeights(specs, source, CONFIG)
    assert set(weights) == set(made) == {spec.name for spec in specs}
    for name, values in made.items():
        assert np.array_equal(weights[name], values), name
        assert weights[name].dtype == values.dtype
        assert not weights[name].flags.writeable


def test_the_same_weights_give_the_same_files(tmp_path: Path) -> None:
    source, specs = checkpoint(), some_of_each()

    one = write_weights(specs, source, CONFIG, tmp_path / "a" / "weights", shard_bytes=100_000)
    two = write_weights(specs[::-1], source, CONFIG, tmp_path / "b", shard_bytes=100_000)

    assert len(one) > 2
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_file_is_named_by_its_digest(tmp_path: Path) -> None:
    for path in write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path, shard_bytes=100_000):
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".safetensors"


def test_files_are_cut_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    paths = write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path, shard_bytes=100_000)

    sizes = {path: path.stat().st_size for path in paths}
    assert all(size < 102_000 or len(open_weights([path])) == 1 for path, size in sizes.items())


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    (path,) = write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path)

    with safetensors.safe_open(path, "numpy") as file:
        names = set(file.keys())
        decay = file.get_tensor("decay")
    assert names == {spec.name for spec in some_of_each()}
    assert np.array_equal(decay, CONFIG.decay(0).astype(np.float32))


def test_dtype_tags_are_those_of_the_plan(tmp_path: Path) -> None:
    weights = open_weights(write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path))

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

    paths = write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path)
    again = write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path)

    assert again == paths
    assert {path.name for path in tmp_path.iterdir()} == {"mine", *(path.name for path in paths)}


def test_nothing_to_write_gives_no_file(tmp_path: Path) -> None:
    assert write_weights([], checkpoint(), CONFIG, tmp_path / "x") == []


def test_progress_ends_where_it_must(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path, lambda *pair: told.append(pair))

    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize("layout", ["bf16", "fp8", "int4"])
def test_a_checkpoint_on_the_disk_gives_the_same_weights(layout: str, tmp_path: Path) -> None:
    source = checkpoint(layout)
    stored = open_checkpoint(write_checkpoint(source, tmp_path / "c", layout=layout))

    one = write_weights(some_of_each(), source, CONFIG, tmp_path / "a")
    two = write_weights(some_of_each(), stored, CONFIG, tmp_path / "b")

    assert [path.name for path in one] == [path.name for path in two]


def test_damaged_files_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (path,) = write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(IntegrityError, match=f"'{path.name}' is truncated") as caught:
        open_weights([path])
    assert caught.value.exit_code == 6


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="'gone' cannot be read: No such file"):
        open_weights([tmp_path / "gone"])


def test_a_weight_in_two_files_is_refused(tmp_path: Path) -> None:
    (path,) = write_weights(some_of_each(), checkpoint(), CONFIG, tmp_path)
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())

    with pytest.raises(IntegrityError, match=r"stands in .* and in 'copy'"):
        open_weights([path, copy])
