"""Weights outside of a package: packed once, found again, and refused when they are not its own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lingc.checkpoint import SyntheticCheckpoint, open_checkpoint
from lingc.cli import main
from lingc.engine import Contents, Package, open_package, verify, write_package
from lingc.engine.bind import bind, find_bound, with_weights
from lingc.engine.bound import bind_dir
from lingc.engine.machine import Machine
from lingc.errors import CheckpointError, InputError, IntegrityError, ResourceError, UsageError
from lingc.model.config import ModelConfig
from lingc.plan import Plan, TensorType, WeightSpec, dumps

CHECKPOINT = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-tiny"
CONFIG = ModelConfig.from_file(CHECKPOINT)
IDENTITY = open_checkpoint(CHECKPOINT).identity()

Make = Callable[[str | None], Package]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make(plan: Plan, contents: Contents, tmp_path: Path) -> Make:
    """A package of two real weights, made for a checkpoint of that identity."""
    norm = WeightSpec(
        name="norm.weight",
        type=TensorType("f32", (CONFIG.hidden_size,)),
        sources=("model.norm.weight",),
    )
    decay = WeightSpec(
        name="decay",
        type=TensorType("f32", (CONFIG.num_attention_heads,)),
        sources=(),
        format="decay",
        layer=0,
    )
    weights = {"norm.weight": norm, "decay": decay}
    real = replace(plan, config=CONFIG.raw, weights=weights, programs={})

    def make(identity: str | None) -> Package:
        path = tmp_path / f"{identity}.ling"
        checkpoint = None if identity is None else ("bf16", identity)
        write_package(path, replace(contents, plan=dumps(real), checkpoint=checkpoint))
        return open_package(path, level="integrity")

    return make


def test_a_package_without_weights_says_how_to_get_them(make: Make) -> None:
    with pytest.raises(InputError, match=r"holds no weights\nhint: pack them once: lingc bind"):
        make(IDENTITY).shards()


def test_bound_weights_are_those_of_the_plan(make: Make, cache: Path) -> None:
    told = []

    bound = bind(
        make(IDENTITY), CHECKPOINT, cache_dir=cache, progress=lambda *done: told.append(done)
    )

    values = {name: value for shard in bound.shards for name, value in load_file(shard).items()}
    assert values.keys() == {"norm.weight", "decay"}
    expected = open_checkpoint(CHECKPOINT).dense("model.norm.weight")
    np.testing.assert_array_equal(values["norm.weight"], expected)
    assert told[-1] == (1032, 1032)


def test_the_command_binds_where_the_engine_could_not_run(
    make: Make, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make(IDENTITY)
    bare = Machine(os="linux", arch="riscv64", version_of=lambda _: None)
    monkeypatch.setattr("lingc.engine.examine.this_machine", lambda: bare)
    words = ("--checkpoint", CHECKPOINT, "--cache-dir", cache, "--progress", "none")

    code = main(["bind", *map(str, (package.root, *words))])

    assert (code, capsys.readouterr().err) == (0, "")
    assert find_bound(package, cache_dir=cache) is not None


def test_what_was_bound_is_found_and_not_packed_again(
    make: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make(IDENTITY)
    assert find_bound(package, cache_dir=cache) is None
    bound = bind(package, CHECKPOINT, cache_dir=cache)
    monkeypatch.setattr("lingc.engine.bind.write_weights", lambda *_: pytest.fail("packed again"))

    assert bind(package, CHECKPOINT, cache_dir=cache) == bound
    assert find_bound(package, cache_dir=cache) == bound
    assert find_bound(package, cache_dir=cache, checkpoint=CHECKPOINT) == bound
    assert with_weights(package, cache_dir=cache).shards() == bound.shards


def test_binding_twice_gives_the_same_bytes(make: Make, tmp_path: Path) -> None:
    package = make(IDENTITY)

    first = bind(package, CHECKPOINT, cache_dir=tmp_path / "a")
    again = bind(package, CHECKPOINT, cache_dir=tmp_path / "b")

    for one, other in zip(sorted(first.path.iterdir()), sorted(again.path.iterdir()), strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


def test_the_weights_of_another_checkpoint_are_refused_and_both_are_named(
    make: Make, cache: Path
) -> None:
    package = make("c" * 64)

    with pytest.raises(IntegrityError, match=rf"made for checkpoint c{{64}}, .* {IDENTITY}"):
        bind(package, CHECKPOINT, cache_dir=cache)
    with pytest.raises(IntegrityError, match=rf"made for checkpoint c{{64}}, .* {IDENTITY}"):
        find_bound(package, cache_dir=cache, checkpoint=CHECKPOINT)
    assert not cache.exists()


def test_weights_put_in_place_of_others_are_refused(make: Make, cache: Path) -> None:
    package, other = make(IDENTITY), make("c" * 64)
    bound = bind(package, CHECKPOINT, cache_dir=cache)
    bound.path.rename(bind_dir(other.manifest, cache, "c" * 64))

    with pytest.raises(IntegrityError, match=rf"expected checkpoint c{{64}}, found {IDENTITY}"):
        find_bound(other, cache_dir=cache)


def test_a_checkpoint_of_another_config_is_refused(make: Make, cache: Path) -> None:
    raw = {**CONFIG.raw, "rope_theta": 10_000.0, "moe_intermediate_size": 64}
    other = SyntheticCheckpoint(ModelConfig.from_dict(raw), seed=1)

    with pytest.raises(CheckpointError, match=r"(?s)'moe_intermediate_size' is 128.*'rope_theta'"):
        bind(make(None), other, cache_dir=cache)


def test_a_package_of_a_config_alone_takes_any_weights_of_it(make: Make, cache: Path) -> None:
    package = make(None)
    one = bind(package, SyntheticCheckpoint(CONFIG, seed=1), cache_dir=cache)
    assert find_bound(package, cache_dir=cache) == one

    two = bind(package, CHECKPOINT, cache_dir=cache)

    assert one.path != two.path
    with pytest.raises(UsageError, match=r"bound to 2 checkpoints: .*\nhint: say which"):
        find_bound(package, cache_dir=cache)
    assert find_bound(package, cache_dir=cache, checkpoint=CHECKPOINT) == two


def test_a_package_with_weights_takes_no_others(package: Path, cache: Path) -> None:
    opened = open_package(package, level="integrity")

    with pytest.raises(UsageError, match="holds its weights and takes no others"):
        bind(opened, CHECKPOINT, cache_dir=cache)
    assert with_weights(opened, cache_dir=cache) is opened


@pytest.mark.parametrize("name", ["weights.json", ".safetensors"])
def test_every_flip_in_bound_weights_is_caught_and_mended(
    make: Make, cache: Path, name: str
) -> None:
    package = make(IDENTITY)
    bound = bind(package, CHECKPOINT, cache_dir=cache)
    path = next(path for path in bound.path.iterdir() if path.name.endswith(name))
    whole = path.read_bytes()

    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(IntegrityError, match="cannot be used"):
            find_bound(package, cache_dir=cache)

    assert bind(package, CHECKPOINT, cache_dir=cache) == bound
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", ["missing", "extra", "link"])
def test_bound_weights_with_other_files_are_refused(make: Make, cache: Path, change: str) -> None:
    package = make(IDENTITY)
    bound = bind(package, CHECKPOINT, cache_dir=cache)
    if change == "extra":
        (bound.path / "notes.txt").write_bytes(b"")
    else:
        bound.shards[0].rename(cache / "elsewhere")
    if change == "link":
        bound.shards[0].symlink_to(cache / "elsewhere")

    with pytest.raises(IntegrityError, match=r"(?s)cannot be used.*hint: remove that directory"):
        find_bound(package, cache_dir=cache)


def test_verify_looks_at_bound_weights_too(make: Make, cache: Path) -> None:
    package = make(IDENTITY)

    def bound_check() -> tuple[str, int]:
        report = verify(package.root, level="integrity", cache_dir=cache)
        found = next(check for check in report.checks if check.id == "bound-weights")
        return found.verdict, report.exit_code

    assert bound_check() == ("not run", 0)
    bound = bind(package, CHECKPOINT, cache_dir=cache)
    assert bound_check() == ("ok", 0)
    bound.shards[0].write_bytes(b"")
    assert bound_check() == ("failed", 6)


def test_a_cache_that_cannot_be_written_is_answered(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(ResourceError, match="cannot be written"):
        bind(make(IDENTITY), CHECKPOINT, cache_dir=tmp_path / "file")


def test_a_newer_index_is_refused(make: Make, cache: Path) -> None:
    package = make(IDENTITY)
    index = bind(package, CHECKPOINT, cache_dir=cache).path / "weights.json"
    value = {**json.loads(index.read_bytes()), "format": 2}
    index.write_text(json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n")

    with pytest.raises(IntegrityError, match="format 2, this version reads 1"):
        find_bound(package, cache_dir=cache)
