"""`lingc bench`: how fast an engine is, after it is shown to be right."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lingc.cli import output
from lingc.cli.failure import cache_dir, versions
from lingc.cli.interrupts import held
from lingc.cli.output import Output, bytes_text, seconds_text
from lingc.errors import GateError, UsageError

if TYPE_CHECKING:
    from lingc.bench.record import Measure, Record, Spread

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
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens in the cache before decoding.",
)
@click.option(
    "--prefill",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens of a prompt.",
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
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Also generate with that many drafts a round, against none.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of both sides (default: all cores).")
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), help="Write a record.")
@output.options
def command(
    out: Output,
    *,
    engine: Path,
    checkpoint: Path | None,
    against: Path | None,
    batch: str,
    context: int,
    prefill: int,
    tokens: int,
    drafts: int,
    threads: int | None,
    path: Path | None,
) -> None:
    """Time an engine against eager on the same weights, or against another engine.

    First both are fed the same tokens. Over budget there are no numbers, and the exit code is 5.
    Then the two take turns on the same threads. Ratios come first: how many times faster the
    engine is, or smaller; above 1 is better. They hold for this machine and this run, and so do the
    medians behind them.

    \b
    Examples:
      lingc bench tiny.ling --checkpoint artifacts/checkpoints/ling-tiny
      lingc bench tiny.ling --checkpoint artifacts/checkpoints/ling-tiny --mtp 1 -o record.json
      lingc bench int4.ling --against bf16.ling --batch 1
    """  # noqa: D301 click's mark for a block that is not rewrapped
    with held():
        from lingc.bench.record import Settings, document
        from lingc.bench.run import run
        from lingc.parity.page import write_whole

    settings = Settings(
        engine=engine,
        cache_dir=cache_dir(),
        against=against,
        checkpoint=checkpoint,
        batches=_batches(batch),
        context=context,
        prefill=prefill,
        tokens=tokens,
        drafts=drafts,
        threads=threads,
    )
    record = run(settings, out.note)
    told = document(record, versions())
    if path is not None and record.is_right:
        write_whole(path, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        out.note(f"record: {path}")
    if out.as_json:
        out.emit(told)
    else:
        _show(out, record)
    if not record.is_right:
        raise GateError(
            f"the engine is not right, so there are no numbers: {_broken(record)}",
            hint="`lingc parity` with the same two shows where they differ",
        )


def _batches(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text!r} is not a list of sizes", hint="for example: 1,4,8")
    return tuple(dict.fromkeys(int(part) for part in parts))


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
