"""`lingc bench`: how fast an engine is, after it is shown to be right."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingc.cli import measuring, output
from lingc.cli.failure import cache_dir, versions
from lingc.cli.interrupts import held
from lingc.cli.output import Output, bytes_text, seconds_text
from lingc.errors import GateError, InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lingc.bench.engine import Report
    from lingc.bench.engine_times import Decode, Profiled
    from lingc.bench.record import Measure, Record, Spread
    from lingc.bench.synthetic import Routing

_QUIET_CORES = 0.2
"""What others may use of the machine while it is measured."""


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Eager's weights.")
@click.option(
    "--against", type=click.Path(path_type=Path), help="Another engine, in eager's place."
)
@click.option(
    "--batch", default="1,4", show_default=True, help="Sequences at once, for decoding: 1,4,8."
)
@click.option(
    "--context",
    default="128",
    show_default=True,
    help="Tokens in the cache before decoding; several for a CUDA engine: 400,4096.",
)
@click.option(
    "--prefill",
    default="512",
    show_default=True,
    help="Tokens of a prompt; several for a CUDA engine: 8192,32768.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Decode steps to time on each side.",
)
@click.option(
    "--mtp",
    "drafts",
    default="0",
    show_default=True,
    help="Also generate with that many drafts a round; several for a CUDA engine: 1,3.",
)
@click.option(
    "--acceptance", help="Shares of a CUDA engine's drafts to keep by force, as drawn weights need."
)
@click.option(
    "--synthetic-weights",
    "seed",
    type=click.IntRange(min=0),
    help="Draw a CUDA engine's weights on the device, by this seed.",
)
@click.option(
    "--routing",
    type=click.Choice(("uniform", "zipf")),
    default="uniform",
    show_default=True,
    help="How drawn weights spread tokens over experts.",
)
@click.option("--profile", is_flag=True, help="Time each kind of a CUDA engine's steps too.")
@click.option("--target", help="The variant's, of a package with several (default: this GPU's).")
@click.option("--sms", type=click.IntRange(min=1), help="Use so many of a GPU's multiprocessors.")
@click.option(
    "--binaries",
    type=click.Path(path_type=Path),
    help="Where the benchmark's own kernels are compiled already: `lingc tune --compile`.",
)
@click.option("--threads", type=output.THREADS, help="Of both sides (default: all cores).")
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), help="Write a record.")
@output.options
def command(
    out: Output,
    *,
    engine: Path,
    checkpoint: Path | None,
    against: Path | None,
    batch: str,
    context: str,
    prefill: str,
    tokens: int,
    drafts: str,
    acceptance: str | None,
    seed: int | None,
    routing: "Routing",
    profile: bool,
    target: str | None,
    sms: int | None,
    binaries: Path | None,
    threads: int | None,
    path: Path | None,
) -> None:
    """Time an engine against eager on the same weights, or against another engine.

    First both are fed the same tokens. Over budget there are no numbers, and the exit code is 5.
    Then the two take turns on the same threads. Ratios come first: how many times faster the
    engine is, or smaller; above 1 is better. They hold for this machine and this run, and so do the
    medians behind them.

    A CUDA engine is timed alone, against what its bytes would take at the speed of memory. Its test
    vectors come first; one without weights may have them drawn, and then every kind of step is held
    to its reference on what the steps before it made. Drawn weights guess nothing right, so that
    drafts are kept by force where --acceptance says how many: the time of a round is then real, and
    how many tokens it gives is what was asked for. Its record grows as RECORD.partial, and has its
    own name once it is whole.

    \b
    Examples:
      lingc bench tiny.ling --checkpoint artifacts/checkpoints/ling-tiny
      lingc bench tiny.ling --checkpoint artifacts/checkpoints/ling-tiny --mtp 1 -o record.json
      lingc bench int4.ling --against bf16.ling --batch 1
      lingc bench h200.ling --synthetic-weights 0 --batch 1,16,32 --context 4096 --profile
      lingc bench h200.ling --synthetic-weights 0 --mtp 1,3 --acceptance 0.5,0.8
    """  # noqa: D301 click's mark for a block that is not rewrapped
    with held():
        from lingc.bench.record import Settings, document

    batches = measuring.sizes(batch, "--batch")
    contexts = measuring.sizes(context, "--context")
    prefills = measuring.sizes(prefill, "--prefill")
    rounds = tuple(one for one in measuring.sizes(drafts, "--mtp", least=0) if one)
    kept = (None,) if acceptance is None else measuring.shares(acceptance, "--acceptance")
    if against is None and _kind(engine) == "cuda":
        _cuda(
            out, engine, checkpoint, path, batches=batches, contexts=contexts,
            prefills=prefills, tokens=tokens, seed=seed, routing=routing, profile=profile, sms=sms,
            binaries=binaries, drafts=rounds, acceptances=kept, target=target,
        )  # fmt: skip
        return
    given = {
        "--synthetic-weights": seed is not None,
        "--profile": profile,
        "--target": target is not None,
        "--sms": sms is not None,
        "--acceptance": acceptance is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise UsageError(f"{name} is for a CUDA engine, timed alone")
    if max(map(len, (contexts, prefills, rounds))) > 1:
        raise UsageError(
            "only a CUDA engine is timed at several contexts, prompts or drafts in one run"
        )
    with held():
        from lingc.bench.run import run

    settings = Settings(
        engine=engine,
        cache_dir=cache_dir(),
        against=against,
        checkpoint=checkpoint,
        batches=batches,
        context=contexts[0],
        prefill=prefills[0],
        tokens=tokens,
        drafts=max(rounds, default=0),
        threads=threads,
    )
    record = run(settings, out.note)
    told = document(record, versions())
    if record.is_right:
        measuring.keep(out, path, told)
    if out.as_json:
        out.emit(told)
    else:
        _show(out, record)
    if not record.is_right:
        raise GateError(
            f"the engine is not right, so there are no numbers: {_broken(record)}",
            hint="`lingc parity` with the same two shows where they differ",
        )


def _kind(engine: Path) -> str:
    """Of a package, by its manifest alone; empty where there is none, which is told later."""
    from lingc.engine.examine import examine

    try:
        manifest = examine(engine, level="structure").manifest
    except InputError:
        return ""
    return "" if manifest is None else manifest.variants[manifest.target].engine


def _cuda(
    out: Output, engine: Path, checkpoint: Path | None, path: Path | None, *,
    binaries: Path | None, target: str | None, **given: Any,
) -> None:  # fmt: skip
    """A CUDA engine alone."""
    with held():
        from lingc.bench import engine as bench
        from lingc.runtime.load import open_engine
        from lingc.targets.cuda.binaries import read_compilers

    if checkpoint is not None and given["seed"] is not None:
        raise UsageError("--checkpoint and --synthetic-weights contradict each other; give one")
    settings = bench.Settings(
        cache_dir=binaries or cache_dir(),
        compilers=None if binaries is None else read_compilers(binaries),
        **given,
    )
    growing = measuring.Growing(out, path)
    opened = open_engine(
        engine,
        checkpoint=checkpoint,
        cache_dir=cache_dir() if settings.seed is None else None,
        target=target,
    )
    known, date = versions(), datetime.now(UTC).isoformat(timespec="seconds")

    def document(report: "Report") -> dict[str, Any]:
        return bench.document(report, opened, settings, known, date)

    with growing.told():
        report = bench.run(
            opened, settings, out.note, lambda some: growing.add(lambda: document(some))
        )
        told = document(report)
        if report.is_right:
            growing.finish(told)
    if out.as_json:
        out.emit(told)
    else:
        _show_cuda(out, report)
    if not report.is_right:
        wrong = [check for check in report.gate if check.problem is not None]
        raise GateError(
            f"the engine is not right, so there are no numbers: {len(wrong)} of "
            f"{len(report.gate)} checks fail",
            hint=f"the first: {wrong[0].name}, {wrong[0].detail}: {wrong[0].problem}",
        )


def _show_cuda(out: Output, report: "Report") -> None:
    out.line(f"device:  {report.device['name']}, {report.device['sms']} SMs")
    out.line(f"loaded:  in {seconds_text(report.loaded)}")
    wrong = sum(check.problem is not None for check in report.gate)
    out.line(f"gate:    {len(report.gate)} checks, {wrong} wrong")
    read = report.ceilings.get("read")
    if report.ceilings:
        speeds = ", ".join(f"{name} {v / 1e12:.2f} TB/s" for name, v in report.ceilings.items())
        out.line(f"memory:  {speeds}")
    if report.decodes:
        out.table(
            ("batch", "context", "tokens/s", "a step", "predicted", "a run", "TB/s", "of read",
             "launches", "experts hit"),
            [_decode_row(one, read) for one in report.decodes],
        )  # fmt: skip
    for one in report.decodes:
        if one.profile:
            name = f"batch {one.batch}, context {one.context}"
            _show_kinds(out, name, one.profile, one.step)
    if report.generations:
        out.table(
            ("requests", "drafts", "kept", "tokens/s, answered", "to the first token"),
            [
                (
                    one.batch,
                    one.drafts,
                    f"{one.kept:.2f}" if one.drafts else "-",
                    f"{one.tokens_per_s:.1f}",
                    seconds_text(one.first_token),
                )
                for one in report.generations
            ],
        )
    if report.speculations:
        _show_rounds(out, report)
    if report.prefills:
        out.table(
            ("prompt", "tokens/s", "to the first token", "10-90 %", "predicted"),
            [
                (
                    one.tokens,
                    f"{one.tokens_per_s:.0f}",
                    seconds_text(one.run.p50),
                    f"{seconds_text(one.run.p10)} - {seconds_text(one.run.p90)}",
                    seconds_text(one.predicted),
                )
                for one in report.prefills
            ],
        )
    for prompt in report.prefills:
        if prompt.last is not None:
            name = f"last of {prompt.chunks} chunks of {prompt.tokens} tokens, each step alone"
            _show_kinds(out, name, prompt.profile, prompt.last)


def _show_rounds(out: Output, report: "Report") -> None:
    out.table(
        ("drafts", "batch", "context", "kept by force", "kept", "tokens/s", "a round", "predicted",
         "a run", "launches"),
        [
            (
                one.drafts,
                one.batch,
                one.context,
                "-" if one.acceptance is None else f"{100 * one.acceptance:.0f} %",
                f"{one.kept:.2f}",
                f"{one.tokens_per_s:.1f}",
                f"{1e3 * one.round.p50:.3f} ms",
                f"{1e3 * one.predicted:.3f} ms",
                f"{1e3 * one.run.p50:.3f} ms",
                one.launches,
            )
            for one in report.speculations
        ],
    )  # fmt: skip
    out.table(
        ("step", "batch", "context", "tokens", "a step", "predicted", "launches"),
        [
            (
                one.phase,
                one.batch,
                one.context,
                one.tokens,
                f"{1e3 * one.step.p50:.3f} ms",
                f"{1e3 * one.predicted:.3f} ms",
                one.launches,
            )
            for one in report.parts
        ],
    )
    for one in report.parts:
        if one.profile:
            name = f"{one.phase} of {one.tokens} tokens, batch {one.batch}, context {one.context}"
            _show_kinds(out, name, one.profile, one.step)


def _decode_row(one: "Decode", read: float | None) -> tuple[object, ...]:
    hit = one.experts
    return (
        one.batch,
        one.context,
        f"{one.tokens_per_s:.1f}",
        f"{1e3 * one.step.p50:.3f} ms",
        f"{1e3 * one.predicted:.3f} ms",
        f"{1e3 * one.run.p50:.3f} ms",
        f"{one.bytes_per_s / 1e12:.2f}",
        "-" if read is None else f"{100 * one.bytes_per_s / read:.1f} %",
        one.launches,
        "-" if not hit else f"{sum(hit) / len(hit):.1f} ({min(hit)}-{max(hit)})",
    )


def _show_kinds(out: Output, name: str, kinds: "Sequence[Profiled]", whole: "Spread") -> None:
    took = 1e-6 * sum(kind.measured * kind.steps for kind in kinds)
    out.line(
        f"{name}: the kinds of steps take {1e3 * took:.3f} ms, the whole {1e3 * whole.p50:.3f} ms "
        f"({100 * (took / whole.p50 - 1):+.1f} %)"
    )
    out.table(
        ("op", "tactic", "steps", "launches", "µs a step", "predicted", "off", "GB/s", "by"),
        [
            (
                kind.op,
                kind.tactic,
                kind.steps,
                kind.launches,
                f"{kind.measured:.2f}",
                f"{kind.predicted:.2f}",
                f"{100 * (kind.predicted / kind.measured - 1):+.0f} %",
                f"{1e-3 * kind.moved_bytes / kind.measured:.0f}",
                kind.origin,
            )
            for kind in kinds
        ],
    )


def _broken(record: "Record") -> str:
    return "; ".join(
        f"{row.mode}: {check.name} is {check.found}, {check.limit} is due"
        for row in record.gate
        for check in row.checks
        if not check.ok
    )


def _show(out: Output, record: "Record") -> None:
    out.line(f"engine:   {record.engine['name']}")
    out.line(f"baseline: {record.baseline['name']}")
    out.line(f"threads:  {record.settings.cores}")
    out.table(
        ("gate", "against", "tokens", "mean KL", "max |Δ|", "top-1 differs", ""),
        [
            (
                row.mode,
                row.reference,
                row.summary.tokens,
                f"{row.summary.mean_kl:.3g}",
                f"{row.summary.max_abs:.3g}",
                row.summary.top1_above_margin,
                "right" if row.ok else "WRONG",
            )
            for row in record.gate
        ],
    )
    if not record.is_right:
        return
    out.table(
        ("measure", "", "ratio", "engine", "baseline", "engine 10-90 %", "baseline 10-90 %"),
        [_row(measure) for measure in record.measures],
    )
    if record.acceptance:
        shares = ", ".join("never" if r is None else f"{r:.3f}" for r in record.acceptance)
        out.line(f"accepted drafts by place in the round: {shares}")
    out.line("A ratio above 1: the engine is so many times faster, or smaller, on this machine.")
    if record.other_cores is not None and record.other_cores > _QUIET_CORES:
        out.line(
            f"But other processes kept {record.other_cores:.1f} cores busy meanwhile, so these"
            " numbers are worth little; run it again on a quiet machine"
        )


def _row(measure: "Measure") -> tuple[object, ...]:
    unit = measure.unit
    return (
        measure.name,
        measure.detail,
        None if measure.ratio is None else f"{measure.ratio:.2f}x",
        _value(measure.engine.p50, unit),
        _value(measure.baseline.p50, unit),
        _span(measure.engine, unit),
        _span(measure.baseline, unit),
    )


def _span(spread: "Spread", unit: str) -> str:
    if unit == "tokens/s":
        return f"{spread.p10:.4g} - {spread.p90:.4g}"
    return f"{_value(spread.p10, unit)} - {_value(spread.p90, unit)}"


def _value(value: float, unit: str) -> str:
    match unit:
        case "s":
            return seconds_text(value)
        case "B":
            return bytes_text(value)
    return f"{value:.4g} {unit}"
