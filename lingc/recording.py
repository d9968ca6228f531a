"""Test vectors of a package: prompts, and what the references answer to them.

They are made in f64, weights as stored. The order of f32 sums depends on the number of cores and on
what they can do, and so would the vectors' bytes; rounded to f32 once, at the end, f64 gives the
same on every machine. An engine whose activations are narrower is held to them with the tolerance
of its roundings.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lingc.compile import Stage
from lingc.interpret import InterpreterBackend
from lingc.op import OPS
from lingc.plan import Arg, Plan, Program, Step, TensorType
from lingc.runtime import vectors
from lingc.runtime.backend import Limits
from lingc.weights import open_weights

log = logging.getLogger(__name__)

TOKENS = 8
F32_TOLERANCE = 2e-3
"""FP32 sums in another order differ by up to 1e-4 of logits that reach 20; see lingc.compare."""

BF16_SHARE, FP8_SHARE = 0.15, 1.0
"""Of the logits' standard deviation, for engines whose activations are narrower: three times the
largest difference of the references in those types (0.05 with bf16 activations, 0.32 with FP8, of
the shipped checkpoint: an FP8 code, or an expert, that falls the other way moves everything behind
it). A wrong engine is five away."""

MOST_WEIGHT_BYTES = 4 << 30
"""Beyond this no vectors are made at build time: the interpreter holds the weights in memory."""

PROMPT_LENGTHS = (5, 70)

_NARROW = ("f32", "bf16")


def record(plan: Plan, shards: list[Path], stage: Stage) -> Mapping[str, bytes]:
    """The files of `tests/`, for whoever receives the package."""
    if sum(spec.type.bytes() for spec in plan.weights.values()) > MOST_WEIGHT_BYTES:
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
        tokens_per_sequence=max(PROMPT_LENGTHS) + TOKENS,
        page_size=plan.page_size,
    )
    with stage("record test vectors"):
        backend = InterpreterBackend(in_f64(plan), open_weights(shards), limits)
        cases = vectors.record(backend, prompts, count=TOKENS, tolerance=F32_TOLERANCE)
        backend.close()
    share = _share(plan)
    if share is not None:
        cases = [replace(case, tolerance=_share_of_spread(share, case)) for case in cases]
    return vectors.encode(cases)


def _share(plan: Plan) -> float | None:
    """What `BF16_SHARE` and `FP8_SHARE` mean for a plan; None where activations are f32."""
    if plan.activation == "f32":
        return None
    args = (arg for program in plan.programs.values() for s in program.steps for arg in s.args)
    return FP8_SHARE if "fp8" in args else BF16_SHARE


def _share_of_spread(share: float, case: vectors.Case) -> float:
    return float(f"{share * case.logits.std(dtype='f8'):.2g}")


def in_f64(plan: Plan) -> Plan:
    """The plan with f64 for every floating-point value that is not a weight."""

    def wide(kind: TensorType) -> TensorType:
        return replace(kind, dtype="f64") if kind.dtype in _NARROW else kind

    def named(step: Step) -> Step:
        if not step.op.startswith("lingc."):
            return step
        names = OPS[step.op.removeprefix("lingc.")].arguments
        args: tuple[Arg, ...] = tuple(
            "f64" if name == "dtype" and arg in _NARROW else arg
            for name, arg in zip(names, step.args, strict=True)
        )
        return replace(step, args=args)

    def program(old: Program) -> Program:
        kept = {name: old.types[name] for name in old.weights}
        types = {name: wide(kind) for name, kind in old.types.items()} | kept
        return replace(old, types=types, steps=tuple(map(named, old.steps)))

    return replace(
        plan,
        states={name: wide(kind) for name, kind in plan.states.items()},
        programs={phase: program(old) for phase, old in plan.programs.items()},
    )
