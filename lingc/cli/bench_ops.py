"""`lingc bench-ops`: the kernels of ops, held to their references and timed."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingc.cli import measuring, output
from lingc.cli.failure import cache_dir, versions
from lingc.cli.output import Output
from lingc.errors import GateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lingc.bench.kernels import Timing
    from lingc.bench.ops import Report, Settings
    from lingc.bench.peers import PeerTiming
    from lingc.bench.step import StepTiming
    from lingc.plan import Plan


@click.command()
@click.option("--op", "ops", multiple=True, help="This op alone; again for more.")
@click.option("--tokens", help="Numbers of tokens to time at: 1,8,32.")
@click.option("--match", multiple=True, help="Only shapes whose name contains this.")
@click.option("--target", "target_name", default="h200-sxm", show_default=True)
@click.option("--cases/--no-cases", default=True, help="Gate the ops' small cases too.")
@click.option("--time/--no-time", "timed", default=True, help="Time what passed the gate.")
@click.option("--all", "every", is_flag=True, help="List every tactic, not the fastest alone.")
@click.option(
    "--step",
    "checkpoint",
    type=click.Path(path_type=Path),
    help="Instead time a whole decode step of this model, its weights drawn at random.",
)
@click.option("--precision", default="fp8", show_default=True, help="Of the step's model.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=400,
    show_default=True,
    help="Tokens in the cache before the step.",
)
@click.option("--sms", help="Use so many multiprocessors, such as 48,78,132; a part of the device.")
@measuring.compiling
@click.option("--peers", is_flag=True, help="Time other projects' kernels too, those installed.")
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), help="Write a record.")
@output.options
def command(
    out: Output,
    *,
    ops: tuple[str, ...],
    tokens: str | None,
    match: tuple[str, ...],
    target_name: str,
    cases: bool,
    timed: bool,
    every: bool,
    checkpoint: Path | None,
    precision: str,
    context: int,
    sms: str | None,
    into: Path | None,
    binaries: Path | None,
    peers: bool,
    jobs: int | None,
    path: Path | None,
) -> None:
    """Run the kernels of ops on this GPU: first against FP64, then for time.

    Binaries are compiled ahead of time and kept in the cache, or come from elsewhere. A tactic that
    fails the gate is not timed, and the exit code is 5. Products, experts and attention of 2,048
    tokens and more are compared at some rows; a shape whose reference does not fit all the same is
    timed on the word of the smaller ones, with a star. Times are of one call in a recorded series,
    cold data, the hand-off to the next call included.

    \b
    Examples:
      lingc bench-ops --op fused_linear --tokens 1
      lingc bench-ops --no-time
      lingc bench-ops -o artifacts/bench/ops-h200.json
      lingc bench-ops --compile kernels/ && lingc bench-ops --binaries kernels/
      lingc bench-ops --op expert_up --tokens 1 --sms 48,78,132
      lingc bench-ops --step artifacts/checkpoints/ling-2.6-flash --precision fp8
    """  # noqa: D301 click's mark for a block that is not rewrapped
    from lingc import targets
    from lingc.bench import ops as bench
    from lingc.bench.record import about
    from lingc.bench.step import decode_kernels
    from lingc.targets.cuda.binaries import read_compilers, write_compilers

    if into is not None and binaries is not None:
        raise UsageError("--compile and --binaries contradict each other; give one of them")
    settings = bench.Settings(
        target=targets.get(target_name),
        cache_dir=into or binaries or cache_dir(),
        compilers=None if binaries is None else read_compilers(binaries),
        ops=ops,
        tokens=() if tokens is None else measuring.sizes(tokens, "--tokens"),
        match=match,
        cases=cases,
        timed=timed,
        jobs=jobs,
        peers=peers,
    )
    date = datetime.now(UTC).date().isoformat()
    if sms is not None:
        counts = measuring.sizes(sms, "--sms")
        if checkpoint is not None or peers:
            raise UsageError("--sms is for ops alone", hint="leave --step and --peers out")
        _curve(out, settings, counts, about(versions(), date), path, into)
        return
    if checkpoint is not None:
        plan = _plan(out, settings, checkpoint, precision)
        if into is None:
            _step(out, settings, plan, context, about(versions(), date), path)
            return
        wanted = [
            kernel
            for sequences in settings.tokens or (1,)
            for kernel in decode_kernels(plan, sequences=sequences, context=context)
        ]
        made = len(bench.compile_some(settings, wanted, out.stage))
    else:
        made = 0 if into is None else bench.compile_kernels(settings, out.stage)
    if into is not None:
        write_compilers(into)
        out.line(f"{made} kernels for {settings.target.arch} are in {into}")
        return
    report = bench.run(settings, out.stage)
    document = bench.document(report, settings, about(versions(), date))
    measuring.keep(out, path, document)
    if out.as_json:
        out.emit(document)
    else:
        _print(out, report, report.timings if every else bench.best(report.timings))
    if report.faults:
        raise GateError(
            f"{len(report.faults)} of {report.gated} runs are wrong",
            hint="the first: {0.op}, {0.case}, {0.tactic}: {0.problem}".format(report.faults[0]),
        )


def _curve(
    out: Output, settings: "Settings", counts: tuple[int, ...], about: dict[str, Any],
    path: Path | None, into: Path | None,
) -> None:  # fmt: skip
    """The fastest tactic of each shape on parts of the device."""
    from lingc.bench import curve
    from lingc.targets.cuda.binaries import write_compilers

    if into is not None:
        made = curve.compile_kernels(settings, counts, out.stage)
        write_compilers(into)
        out.line(f"{len(made)} kernels for {settings.target.arch} are in {into}")
        return
    found = curve.run(settings, counts, out.stage)
    document = curve.document(found, settings, about)
    measuring.keep(out, path, document)
    if out.as_json:
        out.emit(document)
    else:
        out.line(f"device: {found.device['name']}; TB/s of the fastest tactic")
        out.table(*curve.table(found))
    if found.faults:
        raise GateError(
            f"{len(found.faults)} of {found.gated} runs are wrong",
            hint="the first: {0.op}, {0.case}, {0.tactic}: {0.problem}".format(found.faults[0]),
        )


def _plan(out: Output, settings: "Settings", checkpoint: Path, precision: str) -> "Plan":
    from lingc import compile as compiler
    from lingc.model.config import ModelConfig
    from lingc.quantize.recipes import load_recipe

    config, recipe = ModelConfig.from_file(checkpoint), load_recipe(precision)
    request = compiler.Request(precision=recipe.name, target=settings.target.name)
    return compiler.compile_plan(
        config,
        recipe,
        settings.target,
        has_mtp=config.has_mtp,
        request=request,
        stage=out.stage,
    ).plan


def _step(
    out: Output, settings: "Settings", plan: "Plan", context: int, about: dict[str, Any],
    path: Path | None,
) -> None:  # fmt: skip
    """A whole decode step as one graph."""
    from lingc.bench import step

    found = []
    for sequences in settings.tokens or (1,):
        timing, facts = step.time_decode(
            plan,
            sequences=sequences,
            context=context,
            cache_dir=settings.cache_dir,
            compilers=settings.compilers,
        )
        found.append(step.document(timing, facts))
        if not out.as_json:
            _print_step(out, timing, facts)
    document = {"kind": "bench-step", "format": 1, **about, "target": plan.target,
                "layers": plan.config["num_hidden_layers"], "precision": plan.precision,
                "steps": found}  # fmt: skip
    measuring.keep(out, path, document)
    if out.as_json:
        out.emit(document)
    if not all(one["finite"] for one in found):
        raise GateError("the step's logits are not finite", hint="run `lingc bench-ops --no-time`")


def _print_step(out: Output, timing: "StepTiming", facts: "Mapping[str, Any]") -> None:
    out.line(
        f"one decode step of {facts['sequences']} sequences after {facts['context']} tokens: "
        f"{timing.microseconds / 1e3:.3f} ms, {timing.launches} launches, "
        f"{timing.moved_bytes / 1e9:.2f} GB, "
        f"{timing.moved_bytes / timing.microseconds / 1e6:.2f} TB/s, "
        f"{facts['experts_hit']:.1f} experts hit a layer"
    )
    out.table(
        ("op", "tactic", "calls", "µs a call, alone", "µs in all"),
        [
            (op, tactic, calls, f"{each:.2f}", f"{calls * each:.1f}")
            for (op, tactic), (calls, each) in timing.by_op.items()
        ],
    )


def _print(out: Output, report: "Report", timings: "Sequence[Timing]") -> None:
    found = report.device
    out.line(f"device:   {found['name']}, {found['sms']} SMs")
    if report.ceilings:
        speeds = ", ".join(f"{name} {v / 1e12:.2f} TB/s" for name, v in report.ceilings.items())
        out.line(f"ceilings: {speeds}")
    out.line(f"gate:     {report.gated} runs, {len(report.faults)} wrong")
    for op, case, reason in report.refused:
        out.line(f"refused:  {op}, {case}: {reason}")
    for op, case in report.crowded:
        out.line(f"no room:  {op}, {case}: its reference does not fit, so it was not gated")
    for fault in report.faults:
        out.line(f"WRONG:    {fault.op}, {fault.case}, {fault.tactic}: {fault.problem}")
    read = report.ceilings.get("read")
    rows = [_row(one, read) for one in timings]
    columns = ("shape", "tokens", "tactic", "µs", "10-90 %", "GB/s", "of read", "TFLOP/s", "regs")
    if rows:
        out.table(columns, rows)
    if report.peers:
        out.table(("shape", "tokens", "peer", "µs", "which"), [_peer(one) for one in report.peers])


def _peer(one: "PeerTiming") -> tuple[object, ...]:
    time = "absent" if one.microseconds is None else f"{one.microseconds[1]:.2f}"
    about = one.absent or one.difference
    return (one.benchmark, one.tokens, f"{one.peer} {one.version}".strip(), time, about)


def _row(one: "Timing", read: float | None) -> tuple[object, ...]:
    low, middle, high = one.microseconds
    return (
        one.benchmark,
        one.tokens,
        one.tactic,
        f"{middle:.2f}" + ("" if one.gated else "*"),
        f"{low:.2f}-{high:.2f}",
        f"{one.bytes_per_s / 1e9:.0f}",
        "-" if read is None else f"{100 * one.bytes_per_s / read:.1f} %",
        f"{one.flops_per_s / 1e12:.1f}",
        " ".join(str(fact["registers"]) for fact in one.facts),
    )
