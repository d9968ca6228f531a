"""The one ordered list of passes, run over one phase.

`run` compares how often each rule fired with how often the config says it must; a rule that fell
short fails the build with the reason, unless it is waived by name.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lingc import stages
from lingc.context import Context
from lingc.errors import FusionError, StageError
from lingc.graph import Captured, Fused
from lingc.passes import (
    absorb_mla,
    canonicalize_calls,
    fuse_add_rms_norm,
    fuse_embedding,
    fuse_experts,
    fuse_group_norm_gate,
    fuse_latent_attention,
    fuse_lightning,
    fuse_linear,
    fuse_lm_head,
    fuse_mixer,
    fuse_mla_attention,
    fuse_mla_latent,
    fuse_mla_query_rope,
    fuse_norm_pair,
    fuse_norm_router,
    fuse_qk_norm_rope,
    fuse_quantize,
    fuse_rms_norm,
    fuse_rope_table,
    fuse_router,
    fuse_silu_mul,
    gather_rows,
    merge_projections,
    quantize_experts,
    quantize_linears,
    split_experts,
)
from lingc.rewrite import Outcome, Refusal, Rewrite, apply, sweep

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A named run of rules.

    Attributes:
        requires: The contract of `lingc.stages` that holds before it, and after each of its rules.
        ensures: The contract that holds after it.
        engine: The kind of engine whose programs it is for; elsewhere none of its rules fires, and
            `requires` still holds after it. Empty for any.
    """

    name: str
    requires: str
    ensures: str
    rules: tuple[Rewrite, ...]
    engine: str = ""


PIPELINE = (
    Stage(
        name="canonicalize",
        requires="captured",
        ensures="canonical",
        rules=canonicalize_calls.RULES,
    ),
    Stage(
        name="fuse",
        requires="canonical",
        ensures="fused",
        rules=(
            fuse_rope_table.RULE,
            # Before the merge, while the attention's own linear can be told from the others.
            fuse_mla_attention.RULE,
            fuse_router.RULE,
            fuse_experts.RULE,
            merge_projections.RULE,
            merge_projections.JOIN_RULE,
            # The merge leaves slices of slices.
            canonicalize_calls.NESTED,
            fuse_silu_mul.RULE,
            fuse_experts.SHARED_RULE,
            fuse_qk_norm_rope.RULE,
            fuse_group_norm_gate.RULE,
            fuse_mla_query_rope.RULE,
            fuse_mla_latent.RULE,
            fuse_mla_latent.KV_RULE,
            # After the shared expert's add is gone, so that a residual add is the only one left.
            fuse_add_rms_norm.RULE,
            fuse_rms_norm.RULE,
            fuse_lm_head.RULE,
            fuse_mixer.DECODE_RULE,
            fuse_mixer.VERIFY_RULE,
            absorb_mla.RULE,
            # Last: it gives the activations the target's element type.
            fuse_embedding.RULE,
        ),
    ),
    Stage(
        name="quantize",
        requires="fused",
        ensures="legal",
        rules=(
            quantize_linears.RULE,
            quantize_experts.RULE,
            fuse_quantize.ADD_NORM_RULE,
            fuse_quantize.NORM_RULE,
            fuse_quantize.SWIGLU_RULE,
        ),
    ),
    Stage(
        name="launch",
        requires="legal",
        ensures="launched",
        engine="cuda",
        rules=(
            fuse_lightning.PREFILL_RULE,
            fuse_lightning.DECODE_RULE,
            fuse_lightning.VERIFY_RULE,
            # First bare; the next ones add what stands before and behind it.
            fuse_linear.RULE,
            fuse_linear.NORM_RULE,
            fuse_latent_attention.LATENT_RULE,
            fuse_linear.GATE_RULE,
            fuse_linear.SWIGLU_RULE,
            fuse_norm_router.RULE,
            # It leaves the shared expert's sum as a residual add.
            split_experts.RULE,
            fuse_linear.RESIDUAL_RULE,
            split_experts.SHARED_RULE,
            fuse_latent_attention.ATTENTION_RULE,
            fuse_norm_pair.RULE,
            gather_rows.RULE,
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One rule's line of the report.

    Attributes:
        expected: How often it must fire, or None where the config does not say.
        found: How often it fired.
        refused: Where it matched and did not fire, and why.
        near_miss: The nearest place where it did not even match, with what stood in its way.
        waived: Whether falling short was allowed by name.
    """

    phase: str
    stage: str
    name: str
    expected: int | None
    found: int
    refused: tuple[Refusal, ...] = ()
    near_miss: str = ""
    waived: bool = False

    @property
    def missed(self) -> bool:
        """Whether the rule fired another number of times than it must."""
        return self.expected is not None and self.found != self.expected


@dataclass(slots=True)
class Report:
    """What the pipeline did to every phase it ran over."""

    lines: list[Line] = field(default_factory=list)


Dump = Callable[[str, Captured], None]


def run(
    program: Captured,
    context: Context,
    report: Report,
    *,
    waive: Iterable[str] = (),
    check: bool = False,
    dump: Dump | None = None,
) -> Fused:
    """Rewrite a captured program, in place, to one that can be lowered.

    Args:
        program: Edited; the result is the same object.
        context: Model, phase, target and recipe.
        report: Gains a line for each rule.
        waive: Rules that may fire less often than they must.
        check: Check the graph and the contract after every rule too, not only after every stage.
        dump: Called with a stage's name and the program after it.

    Raises:
        FusionError: A rule fired less or more often than the config says.
        StageError: A stage's contract is violated.
    """
    waived = frozenset(waive)
    missed: list[Line] = []
    stages.check(program, "captured")
    if dump:
        dump("captured", program)
    for stage in PIPELINE:
        for rule in stage.rules:
            outcome = apply(program, rule, context)
            line = _line(outcome, rule, stage.name, context, waived)
            report.lines.append(line)
            missed += [line] if line.missed else []
            log.debug("%s %s: %d", context.phase, rule.name, outcome.found)
            if check:
                program.graph.lint()
                stages.check(program, stage.requires)
        sweep(program)
        _fail_on_misses(missed, context.phase)
        _check_left_over(program, stage, context, missed)
        if stage.ensures == "fused":
            stages.retype(program, context.target.activations)
        if dump:
            dump(stage.name, program)
    return Fused(program)


def _check_left_over(program: Captured, stage: Stage, context: Context, waived: list[Line]) -> None:
    """Check the contract after a stage; what was waived may be why it does not hold."""
    is_for = stage.engine in ("", context.engine_kind)
    try:
        stages.check(program, stage.ensures if is_for else stage.requires)
    except StageError as error:
        if not waived:
            raise
        raise StageError(
            f"nothing lowers what these leave where they did not fire:{_listed(waived)}\n"
            + error.problem,
            hint="waive only what has a slower form",
        ) from error


def _line(
    outcome: Outcome, rule: Rewrite, stage: str, context: Context, waived: frozenset[str]
) -> Line:
    return Line(
        phase=context.phase,
        stage=stage,
        name=rule.name,
        expected=rule.expected(context),
        found=outcome.found,
        refused=tuple(outcome.refused),
        near_miss=outcome.near_miss,
        waived=rule.name in waived,
    )


def _fail_on_misses(missed: Iterable[Line], phase: str) -> None:
    short = [line for line in missed if not line.waived]
    if not short:
        return
    names = ",".join(dict.fromkeys(line.name for line in short))
    raise FusionError(
        f"fusion missed in the {phase} phase:{_listed(short)}",
        hint=f"waive it with `--waive {names}` to build a slower engine all the same",
    )


def _listed(lines: Iterable[Line]) -> str:
    return "".join(f"\n  - {sentence(line)}" for line in lines)


def sentence(line: Line) -> str:
    """Why a rule fell short, in a sentence."""
    text = f"{line.name}: expected {line.expected}, found {line.found}"
    if line.refused:
        first, more = line.refused[0], len(line.refused) - 1
        others = f" (and {more} more)" if more else ""
        return f"{text}; refused at {first.place}{others}: {first.reason}"
    return f"{text}; nearest: {line.near_miss}" if line.near_miss else text


def names() -> tuple[str, ...]:
    """Every rule's name, in order."""
    return tuple(dict.fromkeys(rule.name for stage in PIPELINE for rule in stage.rules))
