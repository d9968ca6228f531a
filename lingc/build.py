"""The stages in order: the one function that knows them all.

    checkpoint -> capture -> passes -> plan -> engine code -> weights -> test vectors -> package

The part up to the plan is `lingc.compile`, the engine's code is `lingc.code`. What is built depends
on the checkpoint and the arguments alone.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lingc import code, plan_cache, recording, targets
from lingc.capture import Capturer
from lingc.checkpoint import Checkpoint
from lingc.checkpoint.reader import GENERATION_CONFIG, TOKENIZER_FILES, read_generation_config
from lingc.code import Code
from lingc.compile import (
    Compiled,
    Request,
    Stage,
    compile_plan,
    default_precision,
    engine_kind,
    read_config,
    silent,
)
from lingc.engine import Contents, Manifest, PackageWriter
from lingc.errors import CheckpointError, ConfigError, UsageError
from lingc.model.config import ARCHITECTURE, ModelConfig
from lingc.pipeline import Report
from lingc.plan import Plan, dumps
from lingc.quantize.recipes import Recipe, load_recipe
from lingc.runtime.stopping import stop_ids
from lingc.runtime.tokenizer import FILES, Tokenizer
from lingc.targets.spec import EngineKind, Target
from lingc.weights import CheckpointWeights, write_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A package that was written.

    Attributes:
        compiled: For the first target.
        code: For the first target.
    """

    path: Path
    manifest: Manifest
    compiled: Compiled
    code: Code


def build(
    source: Path,
    output: Path,
    request: Request,
    *,
    also: Sequence[str] = (),
    overwrite: bool = False,
    stage: Stage = silent,
    capturer: Capturer | None = None,
    cache_dir: Path | None = None,
) -> Built:
    """Build an engine from a checkpoint directory, or from a config alone.

    Args:
        source: A checkpoint, or a directory or file with the config.
        output: The package; must not exist unless `overwrite`.
        request: What to build.
        also: Further targets that the package shall have code for, beside the request's.
        overwrite: Replace a package that is there.
        stage: How progress is shown.
        capturer: As for `compile_plan`.
        cache_dir: Where plans and compiled kernels are kept for the next build; not at all where
            None.

    Raises:
        LingcError: Anything that is in the way, by its class; nothing is left at `output`.
    """
    kind, wanted = _asked(request, also)
    recipe = None if request.precision is None else load_recipe(request.precision)
    with stage("read checkpoint"):
        config, checkpoint = read_config(source)
    if checkpoint is None and request.weights == "embed":
        raise ConfigError(
            f"{str(source)!r} holds a config and no weights to embed",
            hint="give a checkpoint, or build an engine without weights: --weights external",
        )
    texts = _texts(source if source.is_dir() else source.parent, config)
    recipe = recipe or load_recipe(default_precision(checkpoint, config))
    has_mtp = checkpoint.has_mtp if checkpoint is not None else config.has_mtp
    with PackageWriter(output, overwrite=overwrite) as writer:
        made: list[tuple[Compiled, Code]] = []
        for target in wanted:
            compiled = _compiled(
                config, recipe, target, replace(request, target=target.name), has_mtp=has_mtp,
                stage=stage, capturer=capturer, cache_dir=cache_dir,
            )  # fmt: skip
            code_of = code.make(
                compiled, kind, request, weights=_weights(compiled.plan, checkpoint, request),
                cache_dir=cache_dir, stage=stage,
            )  # fmt: skip
            made.append((compiled, code_of))
            _refuse_other_plan(made[0][1].plan, code_of.plan)
        compiled, first = made[0]
        shards: list[Path] | None = None
        tests: Mapping[str, bytes] = {}
        if request.weights == "embed":
            assert checkpoint is not None
            shards = _pack(first.plan, checkpoint, writer.weights_dir, stage)
            tests = recording.record(first.plan, shards, stage)
        parts = _Parts(
            compiled=compiled, codes=[one for _, one in made], texts=texts, shards=shards,
            tests=tests,
        )  # fmt: skip
        contents = _contents(parts, checkpoint, request)
        with stage("write package"):
            manifest = writer.commit(contents)
    log.info("wrote %s", output)
    return Built(path=output, manifest=manifest, compiled=compiled, code=first)


def _weights(
    plan: Plan, checkpoint: Checkpoint | None, request: Request
) -> CheckpointWeights | None:
    """The plan's weights, for engines that hold some of them; None where they come later."""
    if checkpoint is None or request.weights != "embed":
        return None
    return CheckpointWeights(plan.weights.values(), checkpoint, checkpoint.config)


def _asked(request: Request, also: Sequence[str]) -> tuple[EngineKind, list[Target]]:
    """The kind of engine and the targets, which must go together.

    Raises:
        UnknownTargetError: One of them is no target.
        UsageError: One is named twice, or they have engines of several kinds.
    """
    names = (request.target, *also)
    wanted = [targets.get(name) for name in names]
    if len(set(names)) < len(names):
        raise UsageError(f"a target is named twice: {', '.join(names)}")
    kinds = {one.name: engine_kind(one, request.engine) for one in wanted}
    if len({*kinds.values()}) > 1:
        listed = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise UsageError(
            f"one package cannot hold engines of several kinds: {listed}",
            hint="choose one with --engine, or build a package for each",
        )
    kind = kinds[request.target]
    code.refuse(kind, request)
    code.require(kind, wanted)
    return kind, wanted


def _refuse_other_plan(plan: Plan, other: Plan) -> None:
    """Variants of a package share its plan and its weights.

    Raises:
        UsageError: Another target computes something else, or wants weights in other layouts.
    """
    if dumps(replace(other, target=plan.target)) != dumps(plan):
        raise UsageError(
            f"{plan.target} and {other.target} need different plans and cannot share a package",
            hint="build a package for each",
        )


def _compiled(
    config: ModelConfig, recipe: Recipe, target: Target, request: Request, *, has_mtp: bool,
    stage: Stage, capturer: Capturer | None, cache_dir: Path | None,
) -> Compiled:  # fmt: skip
    """The plan, from the cache where it is there and nothing but the plan was asked for."""

    def made() -> tuple[Plan, Report]:
        done = compile_plan(
            config, recipe, target, has_mtp=has_mtp, request=request, stage=stage,
            capturer=capturer,
        )  # fmt: skip
        return done.plan, done.report

    if cache_dir is None or request.check or request.dump_dir is not None:
        plan, report = made()
    else:
        name = plan_cache.key(config, recipe, target, request, has_mtp=has_mtp)
        plan, report = plan_cache.kept(cache_dir, name, made)
    return Compiled(plan=plan, report=report, recipe=recipe, target=target)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a package is made of, before it is written."""

    compiled: Compiled
    codes: Sequence[Code]
    texts: Mapping[str, bytes]
    shards: list[Path] | None
    tests: Mapping[str, bytes]


def _pack(plan: Plan, checkpoint: Checkpoint, directory: Path, stage: Stage) -> list[Path]:
    total = sum(spec.type.bytes() for spec in plan.weights.values())
    with stage("pack weights", total=total, unit="B") as advance:
        seen = 0

        def progress(written: int, _total: int) -> None:
            nonlocal seen
            advance(written - seen)
            seen = written

        return write_weights(
            plan.weights.values(), checkpoint, checkpoint.config, directory, progress
        )


def _contents(parts: _Parts, checkpoint: Checkpoint | None, request: Request) -> Contents:
    made, compiled = parts.codes[0], parts.compiled
    plan = made.plan
    codes = {one.plan.target: one for one in parts.codes}
    config = json.dumps(plan.config, indent=2, sort_keys=True, ensure_ascii=True) + "\n"
    return Contents(
        plan=dumps(plan),
        model_files={"config.json": config.encode(), **parts.texts},
        variants={name: one.files for name, one in codes.items()},
        variant_info={name: {"engine": one.kind, **one.info} for name, one in codes.items()},
        weights=parts.shards,
        architecture=ARCHITECTURE,
        checkpoint=None
        if checkpoint is None
        else (default_precision(checkpoint, checkpoint.config), checkpoint.identity()),
        request={
            "precision": plan.precision,
            "target": plan.target,
            "engine": made.kind,
            "weights": request.weights,
            "page_size": plan.page_size,
            "max_draft": plan.max_draft,
            "waive": sorted(request.waive),
            **made.request,
        },
        passes=[
            {"phase": x.phase, "name": x.name, "expected": x.expected, "found": x.found}
            for x in compiled.report.lines
        ],
        quant={
            "recipe": _recipe(compiled.recipe),
            "activations": plan.activation,
            "note": _activation_note(compiled, made, checkpoint, request),
        },
        producer={**{name: version(name) for name in ("torch", "numpy")}, **made.producer},
        kernels={name: data for one in parts.codes for name, data in one.kernels.items()},
        tests=parts.tests,
    )


def _activation_note(
    compiled: Compiled, made: Code, checkpoint: Checkpoint | None, request: Request
) -> str:
    """Where activations are otherwise than the recipe says; empty where they are not."""
    wanted = compiled.recipe.activations
    if wanted != "plain" and not compiled.target.fp8_activations:
        return "weight-only: activations stay f32 on this target"
    if wanted != "fp8_static":
        return ""
    static = [spec for spec in made.plan.weights.values() if spec.part == "input_scales"]
    if not static:
        if made.kind != "tensorrt":
            why = f"{made.kind} engines have no kernel for static scales"
        elif request.weights != "embed":
            why = "static scales are constants of an engine, and weights come later"
        else:
            why = "the recipe stores no matrix but experts with one scale"
        return f"activations are quantized on the fly, in blocks: {why}"
    told = []
    if any(spec.format == "fp8_block" for spec in made.plan.weights.values()):
        told.append("what matrices of blocks read, as experts are, is quantized on the fly")
    assert checkpoint is not None, "static scales come from a checkpoint"
    lost = sum(checkpoint.input_scale(spec.sources[0]) is None for spec in static)
    if lost:
        told.append(
            f"{lost} of {len(static)} matrices have no calibrated scale of inputs, and get 1"
        )
    return "; ".join(told)


def _recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "activations": recipe.activations,
        "rules": [{"modules": list(rule.modules), **asdict(rule.format)} for rule in recipe.rules],
    }


def _texts(folder: Path, config: ModelConfig) -> Mapping[str, bytes]:
    """The tokenizer's files and the generation config, as they are; what is there must be sound.

    Raises:
        InputError: One of them cannot be read, or does not go with the config.
    """
    paths = [folder / name for name in (*TOKENIZER_FILES, GENERATION_CONFIG)]
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    stop_ids(read_generation_config(folder / GENERATION_CONFIG), config.raw)
    if "tokenizer.json" not in files:
        return files
    needed = Tokenizer({name: files[name] for name in files if name in FILES}).vocab_size
    if needed > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} makes token ids up to {needed - 1}, the model has "
            f"a vocabulary of {config.vocab_size}",
            hint="take the tokenizer files that the checkpoint was published with",
        )
    return files
