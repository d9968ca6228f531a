"""The stages in order: the one function that knows them all.

    checkpoint -> capture -> passes -> plan -> engine code -> weights -> test vectors -> package

The part up to the plan is `lingc.compile`. What is built depends on the checkpoint and the
arguments alone.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lingc import targets
from lingc.capture import Capturer
from lingc.checkpoint import Checkpoint
from lingc.checkpoint.reader import GENERATION_CONFIG, TOKENIZER_FILES, read_generation_config
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
from lingc.errors import CheckpointError, ConfigError
from lingc.interpret import InterpreterBackend
from lingc.model.config import ARCHITECTURE, ModelConfig
from lingc.plan import Arg, Plan, Program, TensorType, dumps
from lingc.quantize.recipes import Recipe, load_recipe
from lingc.runtime import vectors
from lingc.runtime.backend import Limits
from lingc.runtime.stopping import stop_ids
from lingc.runtime.tokenizer import FILES, Tokenizer
from lingc.targets.onnx.lower import OnnxEngine
from lingc.targets.onnx.lower import lower as lower_onnx
from lingc.targets.spec import EngineKind
from lingc.weights import open_weights, write_weights

log = logging.getLogger(__name__)

VECTOR_TOKENS = 8
VECTOR_TOLERANCE = 2e-3
"""FP32 sums in another order differ by up to 1e-4 of logits that reach 20; see lingc.compare."""

VECTOR_WEIGHT_BYTES = 4 << 30
"""Beyond this no vectors are made at build time: the interpreter holds the weights in memory."""

PROMPT_LENGTHS = (5, 70)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A package that was written."""

    path: Path
    manifest: Manifest
    compiled: Compiled
    engine: OnnxEngine


def build(
    source: Path,
    output: Path,
    request: Request,
    *,
    overwrite: bool = False,
    stage: Stage = silent,
    capturer: Capturer | None = None,
) -> Built:
    """Build an engine from a checkpoint directory, or from a config alone.

    Args:
        source: A checkpoint, or a directory or file with the config.
        output: The package; must not exist unless `overwrite`.
        request: What to build.
        overwrite: Replace a package that is there.
        stage: How progress is shown.
        capturer: As for `compile_plan`.

    Raises:
        LingcError: Anything that is in the way, by its class; nothing is left at `output`.
    """
    target = targets.get(request.target)
    kind = engine_kind(target, request.engine)
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
        compiled = compile_plan(
            config,
            recipe,
            target,
            has_mtp=has_mtp,
            request=request,
            stage=stage,
            capturer=capturer,
        )
        with stage("lower to ONNX"):
            engine = lower_onnx(compiled.plan, widen=request.widen)
        plan = with_layouts(compiled.plan, engine)
        shards: list[Path] | None = None
        tests: Mapping[str, bytes] = {}
        if request.weights == "embed":
            assert checkpoint is not None
            shards = _pack(plan, checkpoint, writer.weights_dir, stage)
            tests = _vectors(plan, shards, stage)
        parts = _Parts(
            plan=plan,
            compiled=compiled,
            engine=engine,
            kind=kind,
            texts=texts,
            shards=shards,
            tests=tests,
        )
        contents = _contents(parts, checkpoint, request)
        with stage("write package"):
            manifest = writer.commit(contents)
    log.info("wrote %s", output)
    return Built(path=output, manifest=manifest, compiled=compiled, engine=engine)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a package is made of, before it is written."""

    plan: Plan
    compiled: Compiled
    engine: OnnxEngine
    kind: EngineKind
    texts: Mapping[str, bytes]
    shards: list[Path] | None
    tests: Mapping[str, bytes]


def with_layouts(plan: Plan, engine: OnnxEngine) -> Plan:
    """The plan with the row orders that an engine's kernels want."""
    layouts = {weight.name: weight.layout for weight in engine.weights}
    weights = {
        name: replace(spec, layout=layouts.get(name, spec.layout))
        for name, spec in plan.weights.items()
    }
    return replace(plan, weights=weights)


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


def _vectors(plan: Plan, shards: list[Path], stage: Stage) -> Mapping[str, bytes]:
    """Prompts and what the references answer, for whoever receives the package."""
    if sum(spec.type.bytes() for spec in plan.weights.values()) > VECTOR_WEIGHT_BYTES:
        log.warning("no test vectors: the weights exceed what the interpreter may hold in memory")
        return {}
    vocab = int(plan.config["vocab_size"])
    # Ids spread over the vocabulary by a fixed rule: the same for every build.
    prompts = {
        f"prompt-{length}": [(7919 * (i + 1)) % min(vocab, 1 << 16) for i in range(length)]
        for length in PROMPT_LENGTHS
    }
    prompts = {name: [token % vocab for token in ids] for name, ids in prompts.items()}
    limits = Limits.from_tokens(
        slots=1,
        tokens_per_sequence=max(PROMPT_LENGTHS) + VECTOR_TOKENS,
        page_size=plan.page_size,
    )
    with stage("record test vectors"):
        backend = InterpreterBackend(_in_f64(plan), open_weights(shards), limits)
        cases = vectors.record(backend, prompts, count=VECTOR_TOKENS, tolerance=VECTOR_TOLERANCE)
        backend.close()
    return vectors.encode(cases)


def _in_f64(plan: Plan) -> Plan:
    """The plan with f64 for every f32 that is not a weight.

    The order of f32 sums depends on the number of cores and on what they can do, and so would the
    vectors' bytes. Rounded to f32 once, at the end, they are those of every machine.
    """

    def wide(kind: TensorType) -> TensorType:
        return replace(kind, dtype="f64") if kind.dtype == "f32" else kind

    def named(arg: Arg) -> Arg:
        return "f64" if arg == "f32" else arg

    def program(old: Program) -> Program:
        kept = {name: old.types[name] for name in old.weights}
        types = {name: wide(kind) for name, kind in old.types.items()} | kept
        steps = tuple(replace(step, args=tuple(map(named, step.args))) for step in old.steps)
        return replace(old, types=types, steps=steps)

    return replace(
        plan,
        states={name: wide(kind) for name, kind in plan.states.items()},
        programs={phase: program(old) for phase, old in plan.programs.items()},
    )


def _contents(parts: _Parts, checkpoint: Checkpoint | None, request: Request) -> Contents:
    plan, compiled, engine = parts.plan, parts.compiled, parts.engine
    config = json.dumps(plan.config, indent=2, sort_keys=True, ensure_ascii=True) + "\n"
    return Contents(
        plan=dumps(plan),
        model_files={"config.json": config.encode(), **parts.texts},
        variants={plan.target: {f"{phase}.onnx": data for phase, data in engine.models.items()}},
        variant_info={plan.target: {"engine": parts.kind, "runs_on": RUNS_ON, **engine.info}},
        weights=parts.shards,
        architecture=ARCHITECTURE,
        checkpoint=None
        if checkpoint is None
        else (default_precision(checkpoint, checkpoint.config), checkpoint.identity()),
        request={
            "precision": plan.precision,
            "target": plan.target,
            "engine": parts.kind,
            "weights": request.weights,
            "widen": engine.info.get("widen", request.widen),
            "page_size": plan.page_size,
            "max_draft": plan.max_draft,
            "waive": sorted(request.waive),
        },
        passes=[
            {"phase": x.phase, "name": x.name, "expected": x.expected, "found": x.found}
            for x in compiled.report.lines
        ],
        quant={
            "recipe": _recipe(compiled.recipe),
            "activations": plan.activation,
            "note": "weight-only: activations stay f32 on this target"
            if compiled.recipe.activations == "fp8" and not compiled.target.fp8_activations
            else "",
        },
        producer={name: version(name) for name in ("torch", "onnx", "numpy")},
        tests=parts.tests,
    )


RUNS_ON: Mapping[str, Any] = {
    "os": ["linux"],
    "arch": ["x86_64", "aarch64"],
    "libraries": {"onnxruntime": ">=1.31"},
}


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
