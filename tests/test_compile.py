"""From a config to a plan: what is read, what is asked for, and that it says the same each time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lingc import pipeline, targets
from lingc.capture import Sizes
from lingc.checkpoint import SyntheticCheckpoint, write_checkpoint
from lingc.compile import (
    Compiled,
    Request,
    compile_plan,
    default_precision,
    engine_kind,
    read_config,
    silent,
)
from lingc.errors import (
    CheckpointError,
    ConfigError,
    FusionError,
    RecipeError,
    UsageError,
)
from lingc.plan import dumps
from lingc.quantize.recipes import built_in, load_recipe, parse_recipe
from tests import programs

CONFIG = programs.config("tiny")
HOPPER = ("h20", "h20-3e", "h100-sxm", "h200-sxm")


def compiled(precision: str = "bf16", target: str = "cpu", **changes: Any) -> Compiled:
    has_mtp = changes.pop("has_mtp", True)
    stage = changes.pop("stage", silent)
    recipe = changes.pop("recipe", None) or load_recipe(precision)
    return compile_plan(
        CONFIG,
        recipe,
        targets.get(target),
        has_mtp=has_mtp,
        request=Request(sizes=programs.SIZES, **changes),
        stage=stage,
        capturer=programs.capturer("tiny"),
    )


# ------------------------------------------------------------------------------------ what is read


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(SyntheticCheckpoint(CONFIG, 1), tmp_path_factory.mktemp("c") / "tiny")


def test_a_directory_with_a_config_alone_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())

    assert read_config(tmp_path) == (CONFIG, None)
    assert read_config(checkpoint / "config.json") == (CONFIG, None)


def test_a_directory_with_weights_is_a_checkpoint(checkpoint: Path) -> None:
    config, opened = read_config(checkpoint)

    assert config == CONFIG
    assert opened is not None
    assert opened.has_mtp


def test_an_index_without_its_shards_is_a_broken_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())

    with pytest.raises(CheckpointError, match="is missing; the index puts"):
        read_config(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json' cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("layout", built_in())
def test_the_default_precision_is_the_layout_of_the_checkpoint(layout: str) -> None:
    assert default_precision(SyntheticCheckpoint(CONFIG, 1, layout), CONFIG) == layout


@pytest.mark.parametrize("layout", ["bf16", "fp8", "int4"])
def test_without_weights_the_config_says_the_layout(layout: str, tmp_path: Path) -> None:
    path = write_checkpoint(SyntheticCheckpoint(CONFIG, 1), tmp_path / "x", layout=layout)

    config, _ = read_config(path / "config.json")

    assert default_precision(None, config) == layout


# --------------------------------------------------------------------------------- what is asked


def test_auto_depends_on_the_target_alone() -> None:
    assert engine_kind(targets.get("cpu"), "auto") == "onnx"
    assert engine_kind(targets.get("cpu"), "onnx") == "onnx"
    assert {engine_kind(targets.get(name), "auto") for name in HOPPER} == {"cuda"}


@pytest.mark.parametrize("name", sorted(set(targets.ALL) - {"cpu"}))
def test_every_gpu_has_tensorrt_engines_and_those_without_another_have_them_by_default(
    name: str,
) -> None:
    target = targets.get(name)

    assert engine_kind(target, "tensorrt") == "tensorrt"
    assert engine_kind(target, "auto") == ("cuda" if name in HOPPER else "tensorrt")


def test_an_engine_that_a_target_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no 'onnx' engine for target 'h20'\nhint: it has: cuda"):
        engine_kind(targets.get("h20"), "onnx")


def test_a_pass_that_does_not_exist_cannot_be_waived() -> None:
    with pytest.raises(
        UsageError, match=r"no pass is called 'fuse_rooter'\nhint: did you mean 'fu"
    ):
        compiled(waive=("fuse_rooter",))


def test_a_recipe_that_does_not_fit_the_model_is_refused_before_capture() -> None:
    rules = [{"modules": ["model.layers.*.moe"], "format": "fp8_block"}]
    recipe = parse_recipe({"name": "mine", "rules": rules}, source="mine")

    with pytest.raises(RecipeError, match="matches no module"):
        compiled(recipe=recipe)


def test_a_capturer_of_other_sizes_is_not_taken() -> None:
    with pytest.raises(AssertionError, match="another model"):
        compile_plan(
            CONFIG,
            load_recipe("bf16"),
            targets.get("cpu"),
            has_mtp=True,
            request=Request(sizes=Sizes(page_size=8)),
            capturer=programs.capturer("tiny"),
        )


# -------------------------------------------------------------------------------- what comes of it


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
def test_the_same_request_gives_the_same_plan(precision: str) -> None:
    first = dumps(compiled(precision).plan)
    compiled("int4-all")

    assert dumps(compiled(precision).plan) == first


def test_checking_every_pass_changes_nothing() -> None:
    assert dumps(compiled(check=True).plan) == dumps(compiled().plan)


def test_a_plan_says_what_was_asked() -> None:
    plan = compiled("fp8", "h20").plan

    assert (plan.precision, plan.target, plan.activation) == ("fp8", "h20", "bf16")
    assert (plan.page_size, plan.max_draft) == (4, 3)
    assert list(plan.programs) == ["prefill", "decode", "verify", "draft"]


def test_a_checkpoint_without_mtp_weights_has_no_draft_phase() -> None:
    made = compiled(has_mtp=False)

    assert list(made.plan.programs) == ["prefill", "decode", "verify"]
    assert not any(name.startswith(f"layers.{CONFIG.mtp_layer}.") for name in made.plan.weights)
    assert {line.phase for line in made.report.lines} == set(made.plan.programs)


def test_a_missed_fusion_fails_with_the_reason() -> None:
    rules = [{"modules": ["model.layers.*.mlp.gate"], "format": "fp8_block"}]
    recipe = parse_recipe({"name": "mine", "rules": rules}, source="mine")

    with pytest.raises(
        FusionError, match=r"fuse_router: expected 3, found 0; refused at .*: the re"
    ):
        compiled(recipe=recipe)


def test_progress_counts_the_phases() -> None:
    seen: list[tuple[str, int | None, str]] = []
    done: list[int] = []

    @contextmanager
    def stage(
        name: str, *, total: int | None = None, unit: str = ""
    ) -> Iterator[Callable[[int], None]]:
        seen.append((name, total, unit))
        yield done.append

    compiled(stage=stage)

    assert seen == [("capture and fuse", 4, "phases")]
    assert done == [1, 1, 1, 1]


def test_the_program_is_written_after_each_stage(tmp_path: Path) -> None:
    compiled(dump_dir=tmp_path / "ir")

    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    stages = [stage.name for stage in pipeline.PIPELINE]
    assert {name.partition("-")[0] for name in names} == {"prefill", "decode", "verify", "draft"}
    assert all(any(name.endswith(f"-{stage}.txt") for name in names) for stage in stages)
    assert all("lingc.router" in path.read_text() for path in (tmp_path / "ir").glob("*-quantize*"))
