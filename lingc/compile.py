"""From a config to a plan: everything of a build that needs no weights and no engine library."""

import difflib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lingc import pipeline
from lingc.capture import Capturer, Sizes
from lingc.checkpoint import Checkpoint, Source, matrix_modules, open_checkpoint, validate
from lingc.checkpoint.convert import is_stored_as
from lingc.context import Context
from lingc.errors import UsageError
from lingc.graph import Captured, Fused, text
from lingc.lower import lower
from lingc.model.config import ModelConfig
from lingc.pipeline import Report
from lingc.plan import PHASES, Plan
from lingc.quantize.recipes import Recipe, built_in, load_recipe
from lingc.staging import writing
from lingc.targets.spec import EngineKind, Target


class Stage(Protocol):
    """How a stage is shown: `with stage("pack weights", total=n, unit="B") as advance`."""

    def __call__(
        self, name: str, *, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Callable[[int], None]]: ...


def silent(
    name: str, *, total: int | None = None, unit: str = ""
) -> AbstractContextManager[Callable[[int], None]]:
    """Show nothing."""
    del name, total, unit
    return nullcontext(_ignore)


def _ignore(_done: int = 1) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to build, resolved.

    Attributes:
        precision: Name or file of a recipe; None for the checkpoint's own layout.
        target: Canonical name.
        engine: An engine kind, or `auto` for the target's default.
        weights: `embed`, or `external` for a package that is bound to a checkpoint later.
        widen: When a CPU engine widens weights: `load`, `step` or `auto`.
        batch_invariant: Whether a GPU engine gives a request the same bits in any batch.
        timing_cache: File of what standard TensorRT measures; None for lingc's own.
        lock_tactics: Whether standard TensorRT is held to what that file holds.
        waive: Rules that may fire less often than they must.
        check: Check the program after every rule.
        dump_dir: Where to write the program after each stage.
    """

    precision: str | None = None
    target: str = "cpu"
    engine: str = "auto"
    weights: str = "embed"
    widen: str = "auto"
    batch_invariant: bool = False
    timing_cache: Path | None = None
    lock_tactics: bool = False
    sizes: Sizes = field(default_factory=Sizes)
    waive: tuple[str, ...] = ()
    check: bool = False
    dump_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A plan and how it came about."""

    plan: Plan
    report: Report
    recipe: Recipe
    target: Target


def read_config(path: Path) -> tuple[ModelConfig, Checkpoint | None]:
    """The config in a directory, and the checkpoint if the directory holds more than the config.

    Raises:
        ConfigError: No config, or not one of this architecture.
        CheckpointError: The checkpoint is broken; every fault is listed.
    """
    config = ModelConfig.from_file(path)
    if path.is_file() or not any(path.glob("*.safetensors*")):
        return config, None
    checkpoint = open_checkpoint(path)
    validate(checkpoint)
    return config, checkpoint


def compile_plan(
    config: ModelConfig,
    recipe: Recipe,
    target: Target,
    *,
    has_mtp: bool,
    request: Request,
    stage: Stage = silent,
    capturer: Capturer | None = None,
    report: Report | None = None,
) -> Compiled:
    """Capture, rewrite and lower all phases; needs no weights.

    Args:
        config: Of the model.
        recipe: How its weights are stored.
        target: What it is compiled for.
        has_mtp: Whether there are weights for the draft phase.
        request: What else was asked for; its precision and target are not read, and its engine
            only where that changes the plan.
        stage: How progress is shown.
        capturer: One that has captured this config with these sizes before, to save the time.
        report: Gains the lines of every phase that was run, also of one that fails.

    Raises:
        FusionError: A rule fired less often than it must.
        StageError: A stage failed.
        RecipeError: A pattern of the recipe matches nothing.
    """
    recipe.check_matches(matrix_modules(config))
    _check_waived(request.waive)
    phases = [phase for phase in PHASES if phase != "draft" or has_mtp]
    capturer = capturer or Capturer(config, request.sizes)
    report = Report() if report is None else report
    assert (capturer.config, capturer.sizes) == (config, request.sizes), "it captures another model"
    context = Context(
        config=config,
        phase=phases[0],
        target=target,
        recipe=recipe,
        engine=engine_kind(target, request.engine),
        embeds=request.weights == "embed",
    )
    fused: dict[str, Fused] = {}
    with stage("capture and fuse", total=len(phases), unit="phases") as advance:
        for phase in phases:
            fused[phase] = pipeline.run(
                capturer.capture(phase),
                replace(context, phase=phase),
                report,
                waive=request.waive,
                check=request.check,
                dump=_dumper(request.dump_dir, phase),
            )
            advance(1)
    plan = lower(fused, context, request.sizes)
    return Compiled(plan=plan, report=report, recipe=recipe, target=target)


def _check_waived(names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in pipeline.names()]
    if unknown:
        near = difflib.get_close_matches(unknown[0], pipeline.names(), n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"no pass is called {', '.join(map(repr, unknown))}",
            hint=f"{meant}the passes are {', '.join(pipeline.names())}",
        )


def _dumper(directory: Path | None, phase: str) -> Callable[[str, Captured], None] | None:
    if directory is None:
        return None
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    count = 0

    def dump(stage: str, program: Captured) -> None:
        nonlocal count
        path = directory / f"{phase}-{count:02}-{stage}.txt"
        with writing(path):
            path.write_text("\n".join(text(program)) + "\n", encoding="utf-8")
        count += 1

    return dump


def engine_kind(target: Target, wanted: str) -> EngineKind:
    """The kind of engine to build; `auto` depends on the target alone.

    Raises:
        UsageError: The target has no engine of that kind.
    """
    if wanted != "auto" and wanted not in target.engines:
        raise UsageError(
            f"there is no {wanted!r} engine for target {target.name!r}",
            hint=f"it has: {', '.join(target.engines)}",
        )
    kind: EngineKind = target.default_engine
    for known in target.engines:
        if known == wanted:
            kind = known
    return kind


def default_precision(checkpoint: Source | None, config: ModelConfig) -> str:
    """The recipe whose layout the checkpoint has already."""
    if checkpoint is not None:
        for name in built_in():
            if _is_stored_by(checkpoint, load_recipe(name)):
                return name
        kinds = {checkpoint.kind(name) for name in checkpoint.names}
    else:
        kinds = {str((config.quantization or {}).get("quant_method"))}
    if kinds & {"fp8_block", "fp8"}:
        return "fp8"
    return "int4" if kinds & {"int4_group", "compressed-tensors"} else "bf16"


def _is_stored_by(checkpoint: Source, recipe: Recipe) -> bool:
    """Whether every matrix is stored in the very format that a recipe asks for."""
    for name in checkpoint.names:
        if len(checkpoint.shape(name)) != 2:
            continue
        wanted = recipe.format_of(name.removesuffix(".weight"))
        if checkpoint.kind(name) != wanted.kind:
            return False
        if wanted.group and not is_stored_as(checkpoint, name, wanted.kind, wanted.group):
            return False
    return True
